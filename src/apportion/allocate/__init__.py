"""Who gets the budget? Rules look at scores and return an ``Allocation``.

>>> import torch
>>> from apportion.allocate import FeatureChoice, MutualChoice, TokenChoice
>>> scores = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4]])
>>> TokenChoice(1)(scores).to_dense()
tensor([[0.9000, 0.0000, 0.0000],
        [0.0000, 0.0000, 0.4000]])
>>> MutualChoice(budget=1)(scores).to_dense()
tensor([[0.9000, 0.8000, 0.0000],
        [0.0000, 0.0000, 0.0000]])
>>> FeatureChoice(budget=1.5)(scores).to_dense()
tensor([[0.9000, 0.8000, 0.0000],
        [0.0000, 0.0000, 0.4000]])
"""

from apportion.allocate.allocation import Allocation
from apportion.allocate.calibration import ThresholdCalibrator
from apportion.allocate.mesh import Mesh, allocate_over_mesh, encode_over_mesh
from apportion.allocate.quotas import Profile, QuotaLedger, Uniform, Zipf, densities, expected_share, whole_quotas
from apportion.allocate.rules import (
    RULES,
    Blocks,
    FeatureChoice,
    MutualChoice,
    NofM,
    Rule,
    Selection,
    Threshold,
    TokenChoice,
    check_scores,
)

__all__ = [
    "RULES",
    "Allocation",
    "Blocks",
    "FeatureChoice",
    "Mesh",
    "MutualChoice",
    "NofM",
    "Profile",
    "QuotaLedger",
    "Rule",
    "Selection",
    "Threshold",
    "ThresholdCalibrator",
    "TokenChoice",
    "Uniform",
    "Zipf",
    "allocate_over_mesh",
    "check_scores",
    "densities",
    "encode_over_mesh",
    "expected_share",
    "whole_quotas",
]
