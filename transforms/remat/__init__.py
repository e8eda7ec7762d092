"""Gradients within a memory budget: what is kept for the backward pass, and what is computed again.

Read `joint` (a gradient as one program of two parts), `nominal` (what computing and keeping are weighed by), `search` (which
values to keep), `emission` (the program that follows), `scans` (the same for the steps of a scan), `programs` (what is
planned with), `planning` (compile, measure, keep the cheapest that fits), `plans` (what users see).
"""
