"""What a feature says about the next token if nothing after its layer intervenes.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens", applied to dictionary directions as in Bricken et
al. 2023. The final norm's scale depends on the whole residual stream and only multiplies all logits of a feature by
one positive number, so it is left out: the order of the tokens is right, the size of the logits is relative.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class LogitLens:
    """The tokens that each feature's decoder direction promotes and suppresses the most, strongest first."""

    promoted_ids: Int[np.ndarray, "features top"]
    promoted_logits: Float[np.ndarray, "features top"]
    suppressed_ids: Int[np.ndarray, "features top"]
    suppressed_logits: Float[np.ndarray, "features top"]


@torch.no_grad()
def logit_lens(
    decoder_weight: Float[Tensor, "features d_in"],
    unembedding: Float[Tensor, "vocabulary width"],
    *,
    final_norm_weight: Float[Tensor, " width"] | None = None,
    top: int = 10,
    chunk: int = 256,
) -> LogitLens:
    """Extreme entries of ``decoder_weight @ (unembedding * final_norm_weight).T``, a chunk of features at a time.

    Args:
        decoder_weight: one direction a row, in the residual stream.
        unembedding: one row a token of the vocabulary.
        final_norm_weight: gain of the model's last norm (for a norm that stores gain - 1, as Gemma does, add 1 first).
        top: tokens to keep at each end; at most the vocabulary.
        chunk: features at a time; the working memory is ``chunk * vocabulary`` floats.

    Raises:
        ValueError: the widths differ, or ``top`` or ``chunk`` is below 1.
    """
    if decoder_weight.shape[1] != unembedding.shape[1]:
        raise ValueError(
            f"decoder_weight has width {decoder_weight.shape[1]} but unembedding has {unembedding.shape[1]}: "
            "the logit lens needs features that write into the residual stream"
        )
    if top < 1 or chunk < 1:
        raise ValueError(f"top={top}, chunk={chunk}: both must be at least 1")
    top = min(top, unembedding.shape[0])
    readout = unembedding.float()
    if final_norm_weight is not None:
        readout = readout * final_norm_weight.float()
    readout = readout.to(decoder_weight.device).T
    # Two small top-k selections over each block of logits while it is in the cache; the logits are never kept.
    ends = [
        (part.topk(top), part.topk(top, largest=False))
        for part in (rows.float() @ readout for rows in decoder_weight.split(chunk))
    ]
    promoted, suppressed = zip(*ends, strict=True) if ends else ((), ())

    def gathered(parts: tuple, name: str, dtype: type) -> np.ndarray:
        if not parts:
            return np.zeros((0, top), dtype=dtype)
        return torch.cat([getattr(part, name) for part in parts]).cpu().numpy().astype(dtype)

    return LogitLens(
        promoted_ids=gathered(promoted, "indices", np.int32),
        promoted_logits=gathered(promoted, "values", np.float32),
        suppressed_ids=gathered(suppressed, "indices", np.int32),
        suppressed_logits=gathered(suppressed, "values", np.float32),
    )
