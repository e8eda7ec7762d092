"""Kernels of a compiled program, and the equations in each.

tags          a scope around each equation, which XLA keeps on instructions
hlo           a parser of the text of compiled programs
instructions  kernels: the instructions that run, and their equations
profiling     the time of each kernel
table         `compiled` and its result
"""
