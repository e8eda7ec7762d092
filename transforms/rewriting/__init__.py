"""Intermediate values read and replaced, and parts of a graph replaced.

tap          tap and patch: values by scope, primitive or predicate
scope_rules  rules for whole scopes
replace      matches of a pattern
matching     the occurrences of a graph in another
plans        which matches are replaced, and what is dead then
"""
