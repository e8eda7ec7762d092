"""Eager execution beside tracing.

tape          tape: records the operations of an eager run, and differentiates it
pullbacks     the derivative of one recorded operation
study         study and compare: a function run eagerly, traced and compiled
report        the results of study and compare
line_tracing  the Python lines that run
advice        the reason why tracing fails, and what to write instead
"""
