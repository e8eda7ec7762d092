"""The compiled program: its kernels, and the equations in each.

tags      a scope around each equation, so that instructions know theirs
hlo       the text of the compiled program as instructions
finding   kernels: which instructions run, what they are, and of which equations
profiling what each takes
table     `compiled`, and the result that users see
"""
