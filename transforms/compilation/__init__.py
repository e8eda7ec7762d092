"""Compilation with XLA.

jit       jax.jit with a list of its retraces
retraces  the list, and the differences between calls
kernels/  the kernels of a compiled program, their equations and times
"""
