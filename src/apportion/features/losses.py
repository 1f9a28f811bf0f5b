"""Losses of dictionaries, as functions beside the model. All return scalars; weights are the caller's."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import mse_loss

from apportion.allocate import Allocation, Selection
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.jump_relu import LearnedThreshold, step


def reconstruction_loss(target: Float[Tensor, "tokens d"], output: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    """Share of variance left unexplained in this batch (FVU): squared error over squared distance from the batch mean.

    The denominator is a constant of the batch, so gradients are those of the mean squared error, but the number means
    the same at every site. Computed in float32 whatever comes in.
    """
    target, output = target.float(), output.float()
    variance = target.var(dim=0, correction=0).sum() * target.shape[0]
    return mse_loss(output, target, reduction="sum") / variance.clamp(min=1e-12)


def l1_loss(codes: Allocation, decoder_weight: Float[Tensor, "features d"]) -> Float[Tensor, ""]:
    """Mean over tokens of the code's L1 norm, each feature weighted by its decoder norm (Bricken et al. 2023).

    With unit decoder rows the weights are 1; they keep a feature from hiding in a long row when rows are free.
    """
    norms = decoder_weight.norm(dim=1)[codes.col_indices]
    return (codes.values.abs() * norms).sum() / max(codes.shape[0], 1)


def l0_loss(sae: SparseAutoencoder, x_centred: Float[Tensor, "tokens d"]) -> Float[Tensor, ""]:
    """Mean L0 of a JumpReLU dictionary, differentiable in its thresholds (equation 9 of arXiv 2407.14435)."""
    rule = sae.rule
    if not isinstance(rule, LearnedThreshold):
        raise TypeError(f"l0_loss trains learned thresholds; the rule is {rule}: use LearnedThreshold(), or l1_loss")
    limits = sae.learned_threshold.detach() - rule.bandwidth / 2
    with torch.no_grad():
        near = Selection("above", limits=limits).encode(x_centred, sae.encoder_weight, sae.encoder_bias)
    fires = step(near.values, sae.learned_threshold[near.col_indices], rule.bandwidth)
    return fires.sum() / max(near.shape[0], 1)


def gated_loss(
    sae: SparseAutoencoder, x_centred: Float[Tensor, "tokens d"], target: Float[Tensor, "tokens d"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two extra terms of a Gated dictionary (equation 8 of arXiv 2404.16014): sparsity and reconstruction.

    Both act on the rectified gate scores; the auxiliary term decodes them with the decoder held constant, so that the
    gates learn to reconstruct without pulling the dictionary.
    """
    gates = Selection("above", limits=torch.zeros(sae.n_features)).encode(
        x_centred, sae.encoder_weight, sae.encoder_bias
    )
    frozen = gates.matmul(sae.decoder_weight.detach()) + sae.decoder_bias.detach()
    return l1_loss(gates, sae.decoder_weight.detach()), reconstruction_loss(target, frozen)


def aux_k_loss(
    sae: SparseAutoencoder,
    x_centred: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d_out"],
    revive: Bool[Tensor, "features"],
    k_aux: int | None = None,
) -> Float[Tensor, ""]:
    """Let features that fire too little explain what the others leave (Gao et al. 2024, arXiv 2406.04093, section A.2).

    Per token the ``k_aux`` best of the features in ``revive`` are decoded, without bias, towards the detached residual;
    the error is relative to the residual's own variance. The gradient reaches their encoder and decoder rows and
    nothing else. Peers differ in five details of this loss (residual detached, bias, normaliser, scale by the number of
    dead features, ReLU): here yes, none, residual variance, none, yes.

    Args:
        sae: the dictionary.
        x_centred: what ``SparseAutoencoder.centred`` gave.
        residual: target minus reconstruction, scaled units.
        revive: features to train; with those that have not fired for long it is aux_k, with those that fire less than
            their Zipf rank predicts it is the paper's aux_zipf.
        k_aux: how many per token; default half the width, at most the size of ``revive``.

    Returns:
        The loss; zero where there is nothing to revive.
    """
    chosen = revive.nonzero().flatten()
    if chosen.numel() == 0 or x_centred.shape[0] == 0:
        return x_centred.new_zeros(())
    count = min(k_aux or max(sae.d_in // 2, 1), chosen.numel())
    # An indexed matrix gives a gradient as large as the matrix.
    encoder_rows = _RowsOf.apply(sae.encoder_weight, chosen) if sae.sparse_gradients else sae.encoder_weight[chosen]
    codes = (
        Selection("rows", count)
        .encode(
            x_centred.detach(),
            encoder_rows,
            sae.encoder_bias[chosen],
            sae.precision,
            sparse_grad=sae.sparse_gradients,
        )
        .active()
    )
    # The decoder needs no copy of its rows: the codes can name them as the whole dictionary does.
    codes = replace(codes, col_indices=chosen[codes.col_indices], shape=(codes.shape[0], sae.n_features))
    explained = codes.matmul(sae.decoder_weight, sae.sparse_gradients)
    residual = residual.detach()
    variance = (residual - residual.mean(dim=0)).square().sum().clamp(min=1e-12)
    return (residual - explained).square().sum() / variance


class _RowsOf(torch.autograd.Function):
    """``matrix[rows]`` for ascending rows, whose gradient, a sparse one, becomes a sparse one of the whole matrix."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = matrix.shape
        return matrix[rows]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), (grad,) = ctx.saved_tensors, grads
        places = rows[grad._indices()]
        return (
            torch.sparse_coo_tensor(places, grad._values(), ctx.shape, is_coalesced=True, check_invariants=False),
            None,
        )
