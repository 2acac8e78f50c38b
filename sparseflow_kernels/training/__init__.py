"""Training of flows, and the paper's loop of train, prune, retrain."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .loop import Cycle, NonFiniteLossError, evaluate_nll, train, train_prune_retrain

__all__ = [
    "CheckpointError",
    "Cycle",
    "NonFiniteLossError",
    "evaluate_nll",
    "load_checkpoint",
    "save_checkpoint",
    "train",
    "train_prune_retrain",
]
