"""Intermediate values read and replaced, and parts of a graph replaced.

tap          tap and patch: values by scope, primitive or predicate
scope_rules  rules for whole scopes
replace      matches of a pattern
matching     the matches of a graph in another
"""
