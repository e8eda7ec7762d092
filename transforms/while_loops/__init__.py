"""Reverse mode through `while` loops: `rules(loops)` makes each one a loop that can be differentiated in bounded memory.

`schedule` says when a loop is checkpointed, `sweep` what its derivatives are, `driver` how they run, `primitives` what JAX's
transforms make of them.
"""
