"""The compiled training loop.

loop     train: runs any pure `(state, batch) -> (state, metrics)`
update   step: such a function, made of a loss and an optimizer
program  the compiled program of a step
log      the Log that train returns
bar      the progress bar
"""
