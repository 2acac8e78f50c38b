"""Pruning of vector fields and flows: WT (single weights), FT (whole neurons), and size as the paper counts it."""

from ..masks import copy_module, remove_masks_
from .chain import NotAChain
from .graph_neurons import NeuronGroup
from .matrices import check_can_be_pruned, prunable_layers, weight_matrices
from .neurons import NoNeurons, neuron_report, prune_neurons_
from .propagation import prune_with_propagation_
from .size import KEEP_RATIOS, SparsityReport, dense_size, keep_ratio, size, sparsity_report
from .weights import prune_weights_

__all__ = [
    "KEEP_RATIOS",
    "NeuronGroup",
    "NoNeurons",
    "NotAChain",
    "SparsityReport",
    "check_can_be_pruned",
    "copy_module",
    "dense_size",
    "keep_ratio",
    "neuron_report",
    "prunable_layers",
    "prune_neurons_",
    "prune_weights_",
    "prune_with_propagation_",
    "remove_masks_",
    "size",
    "sparsity_report",
    "weight_matrices",
]
