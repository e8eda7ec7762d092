"""Training: `train` runs any pure `(state, batch) -> (state, metrics)`; `step` makes one of a loss and an optimizer."""

from .log import Log
from .loop import train
from .update import TrainState, Update, step

__all__ = ["Log", "TrainState", "Update", "step", "train"]
