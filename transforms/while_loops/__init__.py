"""Reverse mode through `while` loops, in bounded memory: `primitives.rules(loops)` makes each loop differentiable.

schedule      the steps at which a loop is checkpointed, and how its steps are reversed from the checkpoints
adjoint       the sweep: a loop that runs forward and back; its derivatives and batches
checkpointed  how a sweep runs as loops of XLA
primitives    the sweep's primitives, and what JAX's transforms make of them
unrolling     a sweep as two scans, to look into
"""
