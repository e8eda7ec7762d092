"""What people look at: a page of HTML for a graph, and what changed from one graph to another.

Read `pages` (`show`) and `differences` (`diff`). The data of a page is that of
`transforms.description`; `assets` has its style, its script and the library that lays it out.
"""
