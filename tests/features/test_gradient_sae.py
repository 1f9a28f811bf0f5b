"""Gradients choose who wins; they change nothing else, and nothing at all where there are none."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features import (
    GradientScore,
    Recipe,
    SparseAutoencoder,
    attribution_rank,
    encode_with_gradients,
    fit_dictionary,
    fit_gradient_dictionary,
)
from apportion.features.gradient_sae import GradientAutoencoder, GradientObjective, effects

TOPK = TokenChoice(4)
RULES = [TOPK, MutualChoice(4), FeatureChoice(4)]


def made(rule: Any = TOPK, seed: int = 0, kind: type = SparseAutoencoder) -> Any:
    sae = kind(16, 40, rule, seed=seed)
    with torch.no_grad():
        sae.decoder_bias.normal_(0, 0.1, generator=torch.Generator().manual_seed(seed))
    return sae


def drawn(seed: int, rows: int = 60) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(seed))


def test_the_choice_is_that_of_the_definition() -> None:
    sae, x, gradients = made(), drawn(1), drawn(2)
    codes = encode_with_gradients(sae, x, gradients, GradientScore(2.0)).to_dense()
    z = torch.relu((x - sae.decoder_bias) @ sae.encoder_weight.T + sae.encoder_bias)
    w = (gradients @ sae.decoder_weight.T).abs()
    score = z * (1 + 2.0 * w / w.mean())
    kept = torch.zeros_like(z).scatter(1, score.topk(4).indices, 1.0)
    torch.testing.assert_close(codes, z * kept)
    by_score = encode_with_gradients(sae, x, gradients, GradientScore(2.0, value="score")).to_dense()
    torch.testing.assert_close(by_score, score * kept)
    assert not codes.gt(0).equal(encode_with_gradients(sae, x, gradients, GradientScore(0.0)).to_dense().gt(0))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_without_gradients_the_choice_is_the_rules_own(rule: Any) -> None:
    sae, x = made(rule).eval(), drawn(1)
    plain = sae.encode(x, mode="batch")
    for score, gradients in ((GradientScore(0.0), drawn(2)), (GradientScore(3.0), torch.zeros_like(x))):
        codes = encode_with_gradients(sae, x, gradients, score)
        assert codes.col_indices.equal(plain.col_indices)
        assert codes.crow_indices.equal(plain.crow_indices)
        torch.testing.assert_close(codes.values, plain.values)


def test_a_token_without_gradient_is_encoded_as_ever() -> None:
    sae, x, gradients = made(), drawn(1), drawn(2)
    gradients[::2] = 0
    codes = encode_with_gradients(sae, x, gradients, GradientScore(3.0)).to_dense()
    plain = sae.encode(x, mode="batch").to_dense()
    torch.testing.assert_close(codes[::2], plain[::2])
    assert not codes[1::2].allclose(plain[1::2])


def test_the_scale_of_gradients_matters_only_without_norm() -> None:
    sae, x, gradients = made(), drawn(1), drawn(2)

    def places(score: GradientScore, factor: float) -> Tensor:
        return encode_with_gradients(sae, x, factor * gradients, score).to_dense() > 0

    assert places(GradientScore(1.0), 1e-4).equal(places(GradientScore(1.0), 1.0))
    raw = [places(GradientScore(beta, norm="none"), factor) for beta, factor in ((1.0, 8.0), (8.0, 1.0), (1.0, 1.0))]
    assert raw[0].equal(raw[1])
    assert not raw[0].equal(raw[2])


def test_effects_are_slopes_of_the_loss_along_unit_directions() -> None:
    sae = made().double()
    head = torch.randn(16, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = drawn(1, 1).double().requires_grad_()

    def loss(at: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(at @ head, torch.tensor([4]), reduction="sum")

    (gradient,) = torch.autograd.grad(loss(x), x)
    found = effects(sae, gradient)[0]
    for feature in (0, 7, 39):
        step = 1e-6 * sae.decoder_weight[feature].detach()
        slope = (loss(x.detach() + step) - loss(x.detach() - step)) / 2e-6
        torch.testing.assert_close(found[feature], slope.abs(), rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        sae.decoder_weight.neg_()
    assert effects(sae, gradient)[0].equal(found)


def test_contributions_of_features_add_up_to_the_first_order() -> None:
    """With no error, what features contribute to ``x . g`` and what the bias does is all of it."""
    sae, codes = made().double(), torch.zeros(3, 40, dtype=torch.float64)
    codes[:, [3, 8, 20]] = torch.rand(3, 3, dtype=torch.float64)
    with torch.no_grad():
        x = codes @ sae.decoder_weight + sae.decoder_bias
    gradient = drawn(2, 3).double()
    shares = (codes * (gradient @ sae.decoder_weight.T)).sum(1) + gradient @ sae.decoder_bias
    torch.testing.assert_close(shares, (x * gradient).sum(1))


@pytest.mark.parametrize("sparse", [False, True])
def test_no_gradient_flows_through_the_score(sparse: bool) -> None:
    """Gradients of the loss are those with the choice held fixed."""
    x, gradients = drawn(1), drawn(2)
    sae, frozen = (made(kind=GradientAutoencoder).train() for _ in range(2))
    sae.sparse_gradients = sparse
    recipe = Recipe(TokenChoice(4), 40, steps=10, batch_size=60, auxiliary="none")
    loss, _ = GradientObjective(recipe, GradientScore(2.0))(sae, (x, gradients), 0)
    loss.backward()
    kept = encode_with_gradients(frozen, x, gradients, GradientScore(2.0)).to_dense() > 0
    centred = x - frozen.decoder_bias
    z = torch.relu(centred @ frozen.encoder_weight.T + frozen.encoder_bias) * kept
    output = z @ frozen.decoder_weight + frozen.decoder_bias
    ((output - x).square().sum() / (x - x.mean(0)).square().sum()).backward()
    for (name, ours), theirs in zip(sae.named_parameters(), frozen.parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad.to_dense(), theirs.grad, msg=name)


def pairs(step: int) -> tuple[Tensor, Tensor]:
    return drawn(100 + step, 64), drawn(9000 + step, 64)


def recipe(rule: Any = TOPK, **changes: Any) -> Recipe:
    return Recipe(rule, **{"n_features": 40, "steps": 6, "batch_size": 64, "learning_rate": 1e-2, **changes})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_beta_0_trains_the_plain_dictionary_bit_for_bit(rule: Any) -> None:
    found, _ = fit_gradient_dictionary(recipe(rule), pairs, 16, GradientScore(0.0), progress=False)
    plain, _ = fit_dictionary(recipe(rule), lambda step: pairs(step)[0], 16, progress=False)
    other, _ = fit_gradient_dictionary(recipe(rule), pairs, 16, GradientScore(3.0), progress=False)
    assert type(found) is SparseAutoencoder
    for name, tensor in plain.state_dict().items():
        assert found.state_dict()[name].equal(tensor) or bool(tensor.float().isnan().any())
    assert not other.decoder_weight.equal(plain.decoder_weight)


def test_a_trained_dictionary_is_a_plain_one_that_names_its_score(tmp_path: Any) -> None:
    sae, _ = fit_gradient_dictionary(recipe(), pairs, 16, progress=False)
    sae.save(tmp_path)
    again = SparseAutoencoder.load(tmp_path)
    assert again.metadata["gradient_score"] == {"beta": 1.0, "norm": "mean", "value": "affinity"}
    expected = torch.stack([effects(made(seed=0), pairs(step)[1]).mean() for step in range(6)]).mean()
    assert again.metadata["mean_effect"] == pytest.approx(float(expected), rel=0.2)
    assert again.encode(drawn(3)).to_dense().equal(sae.encode(drawn(3)).to_dense())
    assert not sae.training


def test_an_interrupted_run_goes_on_with_its_mean_effect(tmp_path: Any) -> None:
    whole, _ = fit_gradient_dictionary(recipe(), pairs, 16, progress=False)
    fit_gradient_dictionary(recipe(), pairs, 16, folder=tmp_path, stop_after=3, progress=False)
    resumed, result = fit_gradient_dictionary(recipe(), pairs, 16, folder=tmp_path, progress=False)
    assert result.steps_done == 6
    assert resumed.decoder_weight.equal(whole.decoder_weight)
    assert resumed.metadata["mean_effect"] == whole.metadata["mean_effect"]


def test_an_inert_score_is_warned_of() -> None:
    def averaged(step: int) -> tuple[Tensor, Tensor]:
        x, gradients = pairs(step)
        return x, gradients / 1e5

    with pytest.warns(UserWarning, match="gradients change no choice"):
        fit_gradient_dictionary(recipe(), averaged, 16, GradientScore(norm="none"), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_gradient_dictionary(recipe(), averaged, 16, progress=False)


def test_attribution_ranks_features_by_what_they_add() -> None:
    sae, x = made().eval(), drawn(1)
    reader = sae.decoder_weight[7].detach()
    order, influence = attribution_rank(sae, x, reader.expand_as(x))
    codes = sae.encode(x).to_dense()
    torch.testing.assert_close(influence, torch.relu(codes * (sae.decoder_weight @ reader)).mean(0))
    assert influence[order].diff().le(0).all()
    assert int(order[0]) == 7


def test_what_cannot_be_is_refused() -> None:
    sae, x, gradients = made(), drawn(1), drawn(2)
    with pytest.raises(InputError, match=r"beta=-1: must be a number from 0"):
        GradientScore(-1)
    with pytest.raises(InputError, match=r"batches hold no gradients: harvest\(\.\.\., gradients='label'\)"):
        fit_gradient_dictionary(recipe(), lambda step: pairs(step)[0], 16, progress=False)
    with pytest.raises(InputError, match=r"gradients \(64, 15\) and activations \(64, 16\)"):
        fit_gradient_dictionary(recipe(), lambda step: (pairs(step)[0], pairs(step)[1][:, :15]), 16, progress=False)
    with pytest.raises(InputError, match="gradients help to share out a budget"):
        fit_gradient_dictionary(recipe(Threshold(0.0)), pairs, 16, progress=False)
    with pytest.raises(InputError, match="give rule=TokenChoice"):
        encode_with_gradients(made(Threshold(0.0)), x, gradients)
    gradients[5, 2] = torch.nan
    with pytest.raises(ValueError, match=r"gradients\[5\] has NaN"):
        encode_with_gradients(sae, x, gradients)
    with torch.no_grad():
        sae.decoder_weight.mul_(2)
    with pytest.raises(InputError, match=r"rows are up to 1 off unit norm"):
        encode_with_gradients(sae, x, drawn(2))


def test_the_mean_effect_is_that_of_all_batches_at_first_and_travels_with_the_weights() -> None:
    sae = made(kind=GradientAutoencoder)
    for mean in (1.0, 3.0, 8.0):
        sae.see_effects(torch.tensor(mean))
    assert float(sae.effect_mean) == pytest.approx(4.0)
    assert float(sae.effect_now) == 8.0
    again = made(kind=GradientAutoencoder)
    again.load_state_dict(sae.state_dict())
    assert float(again.effect_mean) == pytest.approx(4.0)
    assert int(again.effect_batches) == 3
