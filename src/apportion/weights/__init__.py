"""Weights per layer: which of a network's weights stay, how they are stored, and what running them costs."""

from apportion.weights.compression import compress, decompress
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.masks import (
    add_masks,
    counts,
    keep_masks,
    masks_from_zeros,
    masks_of,
    remove_masks,
    train_masked,
)
from apportion.weights.monarch import MonarchLinear
from apportion.weights.patterns import BlockPattern, NofMPattern, Pattern, Unstructured, choose_masks, parse_pattern
from apportion.weights.sparse_linear import SparseLinear

__all__ = [
    "BlockPattern",
    "MonarchLinear",
    "NofMPattern",
    "Pattern",
    "SparseLinear",
    "Unstructured",
    "WeightLayer",
    "add_masks",
    "choose_masks",
    "compress",
    "counts",
    "decompress",
    "keep_masks",
    "masks_from_zeros",
    "masks_of",
    "parse_pattern",
    "prunable",
    "remove_masks",
    "train_masked",
]
