"""The state of a run on disk: whole or not at all, checked when it is read; nothing in it can run code."""

from opencoca.train.checkpoints.saver import Checkpoints
from opencoca.train.checkpoints.state import TrainState

__all__ = ["Checkpoints", "TrainState"]
