"""Losses: their values against formulas, and who receives their gradient."""

import pytest
import torch

from apportion.allocate import MutualChoice, Threshold, TokenChoice
from apportion.features import (
    LearnedThreshold,
    SparseAutoencoder,
    aux_k_loss,
    aux_zipf_loss,
    gated_loss,
    l0_loss,
    l1_loss,
    reconstruction_loss,
)
from apportion.features.jump_relu import jump_relu, step

D, F = 12, 40


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(30, D, generator=torch.Generator().manual_seed(0))


def test_reconstruction_loss_is_the_unexplained_share_of_variance(x: torch.Tensor) -> None:
    assert float(reconstruction_loss(x, x)) == 0
    torch.testing.assert_close(reconstruction_loss(x, x.mean(dim=0).expand_as(x)), torch.tensor(1.0))
    half = x.bfloat16()
    assert reconstruction_loss(half, half).dtype == torch.float32


def test_l1_weighs_features_by_their_decoder_norm(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, TokenChoice(3))
    codes = sae(x).codes
    expected = (codes.to_dense() * sae.decoder_weight.norm(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(l1_loss(codes, sae.decoder_weight), expected)


def test_aux_k_equals_a_dense_computation_and_trains_only_what_it_revives(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(3))
    with torch.no_grad():
        sae.decoder_bias.normal_(generator=torch.Generator().manual_seed(1))
    revive = torch.zeros(F, dtype=torch.bool)
    revive[[3, 5, 8, 13, 21]] = True
    residual = torch.randn(30, D, generator=torch.Generator().manual_seed(2))
    centred = sae.centred(x)
    loss = aux_k_loss(sae, centred, residual, revive, k_aux=2)
    scores = centred @ sae.encoder_weight.T + sae.encoder_bias
    best = scores.masked_fill(~revive, -torch.inf).topk(2, dim=1)
    dense = torch.zeros(30, F).scatter(1, best.indices, best.values.relu())
    error = (residual - dense @ sae.decoder_weight).square().sum()
    torch.testing.assert_close(loss, error / (residual - residual.mean(dim=0)).square().sum())
    loss.backward()
    for weight in (sae.encoder_weight, sae.decoder_weight, sae.encoder_bias):
        touched = weight.grad.reshape(F, -1).abs().sum(dim=1) > 0
        assert bool(touched.any())
        assert not bool((touched & ~revive).any())
    assert sae.decoder_bias.grad is None


def test_aux_k_has_the_same_gradients_where_they_are_sparse(x: torch.Tensor) -> None:
    revive = torch.arange(F) % 3 == 1
    residual = torch.randn(30, D, generator=torch.Generator().manual_seed(2))
    gradients = []
    for sparse in (False, True):
        sae = SparseAutoencoder(D, F, MutualChoice(3))
        sae.sparse_gradients = sparse
        weights = (sae.encoder_weight, sae.decoder_weight, sae.encoder_bias)
        loss = aux_k_loss(sae, sae.centred(x), residual, revive, k_aux=2)
        gradients.append(torch.autograd.grad(loss, weights))
    for whole, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found.to_dense() if found.is_sparse else found, whole)
    assert [each.is_sparse and each.is_coalesced() for each in gradients[1]] == [True, True, False]


def test_nothing_to_revive_costs_nothing(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(3))
    assert float(aux_k_loss(sae, x, x, torch.zeros(F, dtype=torch.bool))) == 0
    assert float(aux_k_loss(sae, x[:0], x[:0], torch.ones(F, dtype=torch.bool))) == 0


def test_aux_zipf_with_a_vanishing_cut_is_aux_k_on_the_dead(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(3))
    density = 1 / torch.arange(1, F + 1)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[7, 11, 39]] = True
    density[dead] = 0
    sae.statistics.density.copy_(density)
    torch.testing.assert_close(aux_zipf_loss(sae, x, x, cut=1e-12), aux_k_loss(sae, x, x, dead))


def test_aux_zipf_revives_more_than_the_dead(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(3))
    density = 1 / torch.arange(1, F + 1)
    density[36:] *= 0.1
    sae.statistics.density.copy_(density)
    assert float(aux_zipf_loss(sae, x, x).detach()) > 0


def test_jump_relu_values_and_pseudo_derivatives() -> None:
    scores = torch.tensor([0.2, 0.45, 0.55, 0.9], dtype=torch.float64, requires_grad=True)
    thresholds = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    values = jump_relu(scores, thresholds, 0.2)
    assert values.tolist() == [0, 0, 0.55, 0.9]
    values.sum().backward()
    assert scores.grad.tolist() == [0, 0, 1, 1]
    # -theta / bandwidth within half a bandwidth of the threshold, else nothing
    torch.testing.assert_close(thresholds.grad, torch.tensor([0, -2.5, -2.5, 0], dtype=torch.float64))
    thresholds.grad = None
    step(scores, thresholds, 0.2).sum().backward()
    torch.testing.assert_close(thresholds.grad, torch.tensor([0, -5.0, -5.0, 0], dtype=torch.float64))


def test_l0_loss_counts_and_moves_thresholds(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, LearnedThreshold(initial=0.4, bandwidth=0.2))
    loss = l0_loss(sae, sae.centred(x))
    assert float(loss.detach()) == pytest.approx(sae(x).codes.nnz / 30)
    loss.backward()
    assert bool((sae.learned_threshold.grad <= 0).all())
    assert bool((sae.learned_threshold.grad < 0).any())
    with pytest.raises(TypeError, match="LearnedThreshold"):
        l0_loss(SparseAutoencoder(D, F, TokenChoice(2)), x)


def test_gated_terms_leave_the_dictionary_alone(x: torch.Tensor) -> None:
    sae = SparseAutoencoder(D, F, Threshold(0.0), gated=True)
    sparsity, auxiliary = gated_loss(sae, sae.centred(x), x)
    (sparsity + auxiliary).backward()
    assert sae.decoder_weight.grad is None
    assert bool(sae.encoder_weight.grad.any())
    assert bool(sae.encoder_bias.grad.any())
