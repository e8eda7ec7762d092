"""Maps over a batch axis.

vmap      jax.vmap on functions and Graphs
chunking  a map as a loop over chunks of lanes, their size chosen by a memory budget
"""
