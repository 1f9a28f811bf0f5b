"""Weights per layer: which of a network's weights stay, how they are stored, and what running them costs."""

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
from apportion.weights.patterns import BlockPattern, NofMPattern, Pattern, Unstructured, choose_masks, parse_pattern

__all__ = [
    "BlockPattern",
    "NofMPattern",
    "Pattern",
    "Unstructured",
    "WeightLayer",
    "add_masks",
    "choose_masks",
    "counts",
    "keep_masks",
    "masks_from_zeros",
    "masks_of",
    "parse_pattern",
    "prunable",
    "remove_masks",
    "train_masked",
]
