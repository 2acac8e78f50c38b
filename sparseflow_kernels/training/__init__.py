"""Training of flows, and the paper's loop of train, prune, retrain."""

from .checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from .cycles import Cycle, live_size, prune_cycle_, sparse_flow
from .evaluation import Evaluation, evaluate, evaluate_nll
from .lock import FolderInUseError
from .loop import Epoch, NonFiniteLossError, train
from .presets import PRESETS, Preset
from .rows import as_dataset
from .settings import TrainingSettings

__all__ = [
    "CheckpointError",
    "Cycle",
    "Epoch",
    "Evaluation",
    "PRESETS",
    "FolderInUseError",
    "NonFiniteLossError",
    "Preset",
    "TrainingSettings",
    "as_dataset",
    "evaluate",
    "evaluate_nll",
    "live_size",
    "load_checkpoint",
    "prune_cycle_",
    "save_checkpoint",
    "sparse_flow",
    "train",
]
