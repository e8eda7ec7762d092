"""Eager execution beside tracing.

tape          the eager graph, recorded as it runs, and its define-by-run gradient
pullbacks     the derivative of one recorded operation
study         study and compare: eager, traced and compiled
report        their results
line_tracing  the Python lines that run
advice        what to write where tracing refuses a program
"""
