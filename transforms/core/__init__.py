"""Graphs, and how a pass runs over them.

errors        the exception tree
_jax          the only door to non-public JAX
manual_axes   values that differ between the shards of a shard_map
subjaxprs     where each primitive keeps its sub-jaxprs, and how it is bound with others
signatures    what arguments are called, how a call orders them, which are static
scope_paths   `where` and `op`: scope patterns, primitives, predicates
text          a graph as text
pass_trace    the live driver: a running function under a pass
passes        Pass, and the driver of jaxprs, `run`
rules         Rules, the tabular Pass
evaluation    how a Graph is evaluated under JAX's traces
graph         Graph, trace, walk
rewrite       interpret, rewrite, verify
"""
