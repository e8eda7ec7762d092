"""Gradients within a memory budget: a policy decides which values are saved for the backward pass, and which are recomputed.

Files, in reading order: `joint` (a gradient as one program of two parts), `device_model` (the rates that weigh recomputation
against memory), `policy` (a policy, and its simulated peak and seconds), `saved_set` (the search for a policy), `program` (the
program under a policy), `scan_bodies` (policies for the steps of a scan), `candidates` (the data of a planner), `planner`
(compile, measure, keep the cheapest program that fits), `plan` (the public functions).
"""
