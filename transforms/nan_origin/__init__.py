"""The origin of NaN and infinities.

backtracking  the way back from a result that is not finite, element by element
dependencies  which elements of its operands an element is computed from
iterations    single iterations of loops
lane_tracing  lanes, and lines of derivative rules
remedies      what to write instead
report        `nan_origin`, and the result that users see
"""
