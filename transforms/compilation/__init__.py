"""What XLA compiles.

jit       jax.jit with an account of its retraces
retraces  why a call was traced or compiled again
kernels/  the kernels of a compiled program, their equations and times
"""
