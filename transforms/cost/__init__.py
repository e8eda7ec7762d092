"""What a program costs: FLOPs, bytes, memory.

Read `table` (`cost` and its result), `steps` (what runs, and how often), `operations` (the table of rules), `timeline` (live
bytes), `materialised` (the temporaries that XLA needs, by the tables of `backends`), `trips` (how often loops run), `machines`
(the roofline).
"""
