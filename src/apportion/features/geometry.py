"""How the directions of a dictionary lie to each other."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class NearestFeatures:
    """For every feature the other features whose decoder directions are most like it, most alike first."""

    indices: Int[np.ndarray, "features top"]
    cosine: Float[np.ndarray, "features top"]


@torch.no_grad()
def nearest_features(
    decoder_weight: Float[Tensor, "features d_in"], *, top: int = 8, chunk: int = 1024
) -> NearestFeatures:
    """The ``top`` other features of highest decoder cosine, without the full features x features matrix.

    Args:
        decoder_weight: one direction a row, of any length; an all-zero row has cosine 0 with everything.
        top: neighbours to keep; at most ``features - 1``.
        chunk: features at a time; the working memory is ``chunk * features`` floats.

    Raises:
        ValueError: ``top`` or ``chunk`` is below 1.
    """
    if top < 1 or chunk < 1:
        raise ValueError(f"top={top}, chunk={chunk}: both must be at least 1")
    n_features = decoder_weight.shape[0]
    top = min(top, max(n_features - 1, 0))
    directions = torch.nn.functional.normalize(decoder_weight.float(), dim=1)
    indices = np.zeros((n_features, top), dtype=np.int32)
    cosine = np.zeros((n_features, top), dtype=np.float32)
    for start in range(0, n_features if top else 0, chunk):
        rows = directions[start : start + chunk]
        similarity = rows @ directions.T
        itself = torch.arange(len(rows), device=rows.device)
        similarity[itself, itself + start] = -torch.inf
        best = similarity.topk(top)
        indices[start : start + chunk] = best.indices.cpu().numpy()
        cosine[start : start + chunk] = best.values.clamp(-1, 1).cpu().numpy()
    return NearestFeatures(indices, cosine)
