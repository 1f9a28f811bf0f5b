"""What transcoder features mean by their weights alone, whatever the input: the input-invariant half of an attribution.

Section 4 of Dunefsky, Chlenski, Nanda 2024 (arXiv 2406.11944): which tokens excite a feature directly (its
de-embedding), which do so through a head's value and output matrices, and how strongly features of a lower transcoder
are wired to it. Norms are passed by their gain (and centring, for LayerNorms); their scale depends on the input and is
that of a prompt of one token here, so that scores compare tokens and features, and their sizes are relative. What a
feature writes is read by `logit_lens`. The paper's case studies look at these before any text on which a feature fires.

| paper | here |
|---|---|
| W_E w_i | ``de_embedding`` |
| W_E (W_V W_O) w_i | ``de_embedding(..., through=(layer, head))`` |
| norm of (W_V W_O) w_i, head by head | ``head_capacity`` |
| W_dec(lower) . w_i(upper) | ``connections`` |
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.errors import InputError
from apportion.features.frozen_pass import FrozenPass
from apportion.features.transcoder import Transcoder


def _of_one_token(model: Any, *transcoders: tuple[int, Transcoder]) -> FrozenPass:
    return FrozenPass(model, torch.zeros(1, dtype=torch.int64), dict(transcoders), first_is_whole=True)


def _embeddings(frozen: FrozenPass) -> Float[Tensor, "vocabulary d"]:
    model: Any = frozen.model
    weight: Tensor = model.get_input_embeddings().weight.detach()
    width = frozen.embedding_written.shape[-1]
    if weight.shape[1] != width:
        raise InputError(
            f"{type(frozen.model).__name__} has token embeddings of width {weight.shape[1]} in a stream of width "
            f"{width}: a de-embedding needs both to be alike"
        )
    return weight


def de_embedding(
    model: Any,
    layer: int,
    transcoder: Transcoder,
    features: Sequence[int],
    *,
    through: tuple[int, int] | None = None,
) -> Float[Tensor, "features vocabulary"]:
    """How much each token of the vocabulary excites some features.

    Args:
        model: a causal `LanguageModel` or transformers model.
        layer: of the transcoder.
        transcoder: whose features.
        features: which.
        through: a layer and a head; then tokens excite by what that head copies from them instead of directly.

    Raises:
        InputError: no such layer or head, or token embeddings that are narrower than the stream.
    """
    frozen = _of_one_token(model, (layer, transcoder))
    rows = []
    for feature in features:
        reading = frozen.of_feature(layer, feature, 0)
        if through is not None:
            _check_head(frozen, *through, below=layer)
            _, by_head = frozen.heads_of(through[0], reading.attention[through[0], 0], 0)
            reading = frozen.of_head(*through, by_head[through[1]], 0)
        rows.append(reading.embedding[0])
    return torch.stack(rows) @ _embeddings(frozen).T


def head_capacity(model: Any, layer: int, transcoder: Transcoder, feature: int) -> Float[Tensor, "layers heads"]:
    """How strongly each head could excite a feature: the norm of the feature's direction as the head's input sees it.

    Heads of the layers above the transcoder have 0.
    """
    frozen = _of_one_token(model, (layer, transcoder))
    reading = frozen.of_feature(layer, feature, 0)
    capacity = torch.zeros(frozen.n_layers, frozen.n_heads)
    for below in frozen.layers_with_gradient(reading.attention, 0):
        _, by_head = frozen.heads_of(below, reading.attention[below, 0], 0)
        for head in range(frozen.n_heads):
            capacity[below, head] = frozen.of_head(below, head, by_head[head], 0).embedding[0].norm()
    return capacity


def connections(
    model: Any, lower: tuple[int, Transcoder], upper: tuple[int, Transcoder], features: Sequence[int] | None = None
) -> Float[Tensor, "features lower_features"]:
    """How much a unit of each lower feature adds to the score of upper features, by the direct path.

    Args:
        model: a causal `LanguageModel` or transformers model.
        lower: layer and transcoder that write.
        upper: layer and transcoder that read.
        features: of the upper one; default all of them.

    Raises:
        InputError: ``lower`` is not below ``upper``.
    """
    if not lower[0] < upper[0]:
        raise InputError(f"lower layer {lower[0]}, upper layer {upper[0]}: what writes must be below what reads")
    frozen = _of_one_token(model, lower, upper)
    weight = upper[1].encoder_weight.detach()
    weight = weight if features is None else weight[list(features)]
    # The way down is linear: where there are more features than dimensions it is found once for each dimension.
    basis = weight if weight.shape[0] <= weight.shape[1] else torch.eye(weight.shape[1], dtype=weight.dtype)
    down = torch.stack([frozen.of_mlp_input(upper[0], row, 0).mlps[lower[0], 0] for row in basis])
    directions = down if basis is weight else weight.to(down.dtype) @ down
    return directions @ lower[1].decoder_weight.detach().to(down.dtype).T


def _check_head(frozen: FrozenPass, layer: int, head: int, below: int) -> None:
    if not 0 <= head < frozen.n_heads:
        raise InputError(f"head {head}: the model has {frozen.n_heads} heads a layer")
    if not 0 <= layer <= below:
        raise InputError(f"layer {layer} of the head: it must be 0 to {below}, the transcoder's own")
