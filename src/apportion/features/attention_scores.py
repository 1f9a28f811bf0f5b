"""Why a head looks where it looks: its score for one pair of tokens, as a sum over pairs of features.

Source: Kissane et al. 2024 (arXiv 2406.17759), the query-key side of their recursive attribution. With the norm's scale
held fixed the query is a linear function of the destination's stream and the key of the source's, so the score is
bilinear; a dictionary of the stream takes both sides apart. Rotary embeddings turn queries and keys by their positions,
whose product depends on the offset alone; they are part of both linear maps here, which are asked from the model and
not built from its weights, so that any family's embedding (and a norm of queries and keys) is in them.

| paper | here |
|---|---|
| c_f(dst) c_g(src) (d_f W_Q) R(dst - src) (d_g W_K) / sqrt(d_head) | an entry of `ScoreExpansion`'s ``table`` |
| c_f d_f, dictionary bias, error | the first rows and columns; the model's own biases are the last |
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.errors import InputError
from apportion.features.attention_output_sae import Reader
from apportion.features.dictionary import SparseAutoencoder
from apportion.models.direct_paths import DirectPaths, Part

EXTRAS = ("dictionary bias", "error", "model bias")


@dataclass(frozen=True, eq=False)
class ScoreExpansion:
    """A head's score for a pair of tokens, before the softmax (and before a cap on scores, where a model has one).

    Attributes:
        table: what each pair of terms adds; the rows are the destination's terms, the columns the source's.
        destination_features: of the first rows; the last three rows are ``EXTRAS``.
        source_features: of the first columns; the last three columns are ``EXTRAS``.
        score: what the model computed.
    """

    table: Float[Tensor, "destination_terms source_terms"]
    destination_features: list[int]
    source_features: list[int]
    score: float

    @property
    def by_features(self) -> Float[Tensor, "destination_features source_features"]:
        """What the pairs of features add, without biases and errors."""
        return self.table[: len(self.destination_features), : len(self.source_features)]


@torch.enable_grad()
def score_expansion(
    paths: DirectPaths, sae: SparseAutoencoder, layer: int, head: int, destination: int, source: int
) -> ScoreExpansion:
    """Expand both sides of a head's score by a dictionary of the residual stream before its layer.

    Args:
        paths: the forward pass; in float64 for sums to 1e-9.
        sae: of the site ``layers.{layer - 1}.residual`` (``embeddings`` for layer 0).
        layer: of the head.
        head: query head.
        destination: the token that looks.
        source: the token that is looked at; not behind it.

    Raises:
        InputError: no such layer, head or token; the source comes after the destination; a dictionary of another width.
    """
    for name, value, count in (
        ("layer", layer, paths.n_layers),
        ("destination", destination, paths.n_tokens),
        ("source", source, paths.n_tokens),
    ):
        if not 0 <= value < count:
            raise InputError(f"{name}={value}: must be from 0 to {count - 1}")
    if not 0 <= head < paths.n_heads(layer):
        raise InputError(f"head={head}: layer {layer} has heads 0 to {paths.n_heads(layer) - 1}")
    if source > destination:
        raise InputError(f"source={source} comes after destination={destination}: attention looks back only")
    if sae.d_in != paths.embeddings.shape[1]:
        raise InputError(
            f"the dictionary takes activations of width {sae.d_in}, the stream before layer {layer} has width "
            f"{paths.embeddings.shape[1]}: give a dictionary of that stream"
        )
    queries, destination_features = _terms(paths, sae, layer, "queries", head, destination)
    keys, source_features = _terms(paths, sae, layer, "keys", head, source)
    scaling = paths.scaling(layer)
    query = paths.attention(layer, "queries")[head, destination]
    key = paths.attention(layer, "keys")[head, source]
    return ScoreExpansion(
        queries @ keys.T * scaling, destination_features, source_features, float(query @ key) * scaling
    )


def _terms(
    paths: DirectPaths, sae: SparseAutoencoder, layer: int, part: Part, head: int, position: int
) -> tuple[Float[Tensor, "terms key_width"], list[int]]:
    """A query or key as a sum: a row for every firing feature, then one each for ``EXTRAS``."""
    x = paths.stream(layer)[position]
    with torch.no_grad():
        features = sae.encode(x[None].to(sae.encoder_weight), mode="threshold").col_indices.tolist()
        readers = [Reader.of(sae, feature) for feature in features]
        values = torch.stack([x @ each.weight.to(x) + each.bias.to(x) for each in readers]) if readers else x[:0]
        directions = (sae.decoder_weight[features] / sae.input_scale).to(x) * values[:, None]
        bias = (sae.decoder_bias / sae.input_scale).to(x)
    parts = torch.cat([directions, bias[None], (x - directions.sum(dim=0) - bias)[None]])
    # The linear map, a row of it at a time: heads are narrow.
    like = paths.attention(layer, part)
    rows, constants = [], []
    for coordinate in range(like.shape[2]):
        cotangent = torch.zeros_like(like)
        cotangent[head, position, coordinate] = 1
        gradient, constant = paths.to_stream(layer, part, cotangent)
        rows.append(gradient[position])
        constants.append(constant)
    return torch.cat([parts @ torch.stack(rows).T, torch.tensor([constants], dtype=torch.float64).to(parts)]), features
