"""Fitting: every architecture learns, phases hand over, and an interrupted run ends like an undisturbed one."""

from dataclasses import replace

import pytest
import torch

from apportion.allocate import FeatureChoice, MutualChoice, Threshold, TokenChoice, Zipf
from apportion.data import SyntheticDictionary
from apportion.errors import InputError
from apportion.features import (
    DictionaryObjective,
    LearnedThreshold,
    Phases,
    Recipe,
    SparseAutoencoder,
    UnitDecoder,
    fit_dictionary,
    reconstruction_loss,
)
from apportion.features.optimizer import dictionary_adam
from apportion.ops.encode.cpu import scores_memory
from apportion.training import train

WORLD = SyntheticDictionary(d=16, n_true=32, mean_l0=3.0, seed=0)
BASE = Recipe(
    MutualChoice(3),
    n_features=40,
    steps=120,
    batch_size=256,
    learning_rate=1e-2,
    phases=Phases(warmup_fraction=0, refresh_every=10),
)


def batches(step: int) -> torch.Tensor:
    return WORLD.sample(256, seed=step).x


def calibration() -> list[torch.Tensor]:
    return [WORLD.sample(1000, seed=10**6 + part).x for part in range(4)]


def fit(recipe: Recipe, **more):
    return fit_dictionary(recipe, batches, 16, calibration=calibration, progress=False, **more)


@pytest.mark.parametrize(
    ("recipe", "most"),
    [
        (replace(BASE, rule=TokenChoice(3)), 0.5),
        (BASE, 0.4),
        (replace(BASE, auxiliary="dead", dead_after=1000), 0.4),
        (replace(BASE, nested=(0.25, 0.5)), 0.5),
        (replace(BASE, rule=FeatureChoice(3, profile=Zipf())), 0.5),
        (replace(BASE, rule=Threshold(0.0), target_l0=3.0, auxiliary="none"), 0.9),
        (replace(BASE, rule=LearnedThreshold(), target_l0=3.0, auxiliary="none"), 0.9),
        (replace(BASE, rule=Threshold(0.0), gated=True, target_l0=3.0, auxiliary="none"), 0.9),
    ],
    ids=["topk", "mutual+zipf", "mutual+dead", "matryoshka", "feature", "relu", "jumprelu", "gated"],
)
def test_every_architecture_learns(recipe: Recipe, most: float) -> None:
    sae, result = fit(recipe)
    x = WORLD.sample(2000, seed=10**7).x
    with torch.no_grad():
        out = sae(x)
    fvu = float((x - out.output).square().sum() / (x - x.mean(dim=0)).square().sum())
    assert fvu < most
    assert result.steps_done == recipe.steps
    assert not sae.training
    assert float(sae.input_scale) == 1.0
    torch.testing.assert_close(sae.decoder_weight.detach().norm(dim=1), torch.ones(40))
    if recipe.has_budget:
        assert out.codes.nnz / 2000 == pytest.approx(3, rel=0.05)


def test_the_penalty_is_steered_to_the_wanted_l0() -> None:
    recipe = replace(BASE, rule=Threshold(0.0), target_l0=3.0, auxiliary="none", steps=400)
    sae, _ = fit(recipe)
    l0 = sae(WORLD.sample(2000, seed=10**7).x).codes.nnz / 2000
    assert l0 == pytest.approx(3, rel=0.35)


def test_feature_choice_takes_over_with_a_fitted_law_and_measured_ranks() -> None:
    sae, _ = fit(replace(BASE, rule=FeatureChoice(3, profile=Zipf(exponent=7.0))))
    exponent, _ = sae.zipf.tolist()
    assert exponent != 7.0
    assert int(sae.ledger.given.sum()) == 3 * 256 * (120 - 72)
    assert not torch.equal(sae.share, sae.share.sort(descending=True).values)


def test_feature_choice_from_the_start_ranks_by_index() -> None:
    recipe = replace(BASE, rule=FeatureChoice(3, profile=Zipf()), phases=Phases(warmup_fraction=0, mutual_fraction=0))
    sae, _ = fit(recipe)
    assert torch.equal(sae.share, sae.share.sort(descending=True).values)


@pytest.mark.parametrize("rule", [MutualChoice(3), FeatureChoice(3, profile=Zipf()), Threshold(0.0)])
def test_paused_and_resumed_equals_undisturbed(rule, tmp_path) -> None:
    recipe = replace(BASE, rule=rule, target_l0=3.0, steps=60)
    whole, _ = fit(recipe, folder=tmp_path / "whole")
    for stop in (13, 47):
        _, result = fit_until(stop, recipe, tmp_path / "parts")
        assert result.steps_done == stop
    resumed, result = fit(recipe, folder=tmp_path / "parts")
    assert result.resumed_from == 47
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]) or bool(tensor.isnan().all()), name


@pytest.mark.parametrize("clip_norm", [1e-3, None])
@pytest.mark.parametrize(
    "rule", [TokenChoice(3), MutualChoice(3), FeatureChoice(3, profile=Zipf())], ids=lambda rule: type(rule).__name__
)
def test_sparse_gradients_and_tiles_train_as_whole_ones_do(rule, clip_norm: float | None) -> None:
    # Few winners among many features, of which soon most are dead.
    recipe = Recipe(
        rule, 200, steps=12, batch_size=16, learning_rate=3e-3, dead_after=32, phases=Phases(refresh_every=4)
    )
    settings = recipe.settings(clip_norm=clip_norm, log_every=1)

    def trained(sparse: bool) -> tuple[SparseAutoencoder, list[dict]]:
        sae = SparseAutoencoder(16, 200, rule)
        sae.sparse_gradients = sparse
        result = train(
            sae,
            DictionaryObjective(recipe),
            lambda step: WORLD.sample(16, seed=step).x,
            settings,
            None,
            hooks=[UnitDecoder()],
            optimizer=dictionary_adam(sae, settings),
            progress=False,
        )
        assert sae.encoder_weight.grad.is_sparse == sae.decoder_weight.grad.is_sparse == sparse
        return sae, result.history

    whole, expected = trained(False)
    with scores_memory(16 * 70 * 4):
        sparse, found = trained(True)
    assert expected[-1]["dead"] > 0.1
    assert max(record["loss"] - record["fvu"] for record in expected) > 1e-3
    for record, other in zip(expected, found, strict=True):
        for name in ("loss", "gradient_norm", "l0", "dead"):
            assert other[name] == pytest.approx(record[name], rel=1e-5)
    for name, tensor in whole.state_dict().items():
        # Adam divides by the size of the gradient: where that is nothing but rounding, so is the step.
        torch.testing.assert_close(sparse.state_dict()[name], tensor, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(("tokens", "sparse"), [(6, True), (7, False)])
def test_gradients_are_sparse_where_fewer_than_half_of_the_features_can_win(tokens: int, sparse: bool) -> None:
    start = []
    sae, _ = fit_dictionary(
        replace(BASE, steps=1, batch_size=tokens),
        lambda step: WORLD.sample(tokens, seed=step).x,
        16,
        start_from=lambda sae: start.append(sae.decoder_weight.detach().clone()),
        progress=False,
    )
    grad = sae.decoder_weight.grad
    assert grad.is_sparse == sae.encoder_weight.grad.is_sparse == sparse
    # Either way it has been projected, and the step brought the rows back to the sphere.
    along = (grad.to_dense() * start[0]).sum(dim=1)
    assert float(along.abs().max()) < 1e-5 * float(grad.to_dense().norm())
    torch.testing.assert_close(sae.decoder_weight.detach().norm(dim=1), torch.ones(40))


class Sum(DictionaryObjective):
    """Batches of two tensors: the input, and what to add to it for the target."""

    def input_and_target(self, sae: SparseAutoencoder, batch) -> tuple[torch.Tensor, torch.Tensor]:
        return sae.centred(batch[0]), (batch[0] + batch[1]) * sae.input_scale


def pairs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batches(step), torch.zeros(256, 16)


def test_a_module_and_an_objective_of_ones_own_train_on_batches_of_several_tensors(tmp_path) -> None:
    plain, _ = fit(replace(BASE, steps=20))
    own = SparseAutoencoder(16, 40, BASE.rule)
    recipe = replace(BASE, steps=20)
    for stop in (7, None):
        sae, _ = fit_dictionary(
            recipe,
            pairs,
            16,
            sae=own if stop else SparseAutoencoder(16, 40, BASE.rule),
            objective=Sum(recipe),
            calibration=calibration,
            folder=tmp_path,
            stop_after=stop,
            progress=False,
        )
        assert (sae is own) == bool(stop)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, sae.state_dict()[name]), name
    shifted, _ = fit_dictionary(
        recipe, lambda step: (batches(step), torch.ones(256, 16)), 16, objective=Sum(recipe), progress=False
    )
    assert float((shifted.decoder_bias - plain.decoder_bias).detach().mean()) > 0.02


@pytest.mark.parametrize(
    ("sae", "named"),
    [
        (SparseAutoencoder(8, 40, MutualChoice(3)), "sae.d_in=8"),
        (SparseAutoencoder(16, 41, MutualChoice(3)), "sae.n_features=41"),
        (SparseAutoencoder(16, 40, MutualChoice(4)), "sae.rule"),
    ],
)
def test_a_module_that_the_recipe_is_not_for_is_refused(sae: SparseAutoencoder, named: str) -> None:
    with pytest.raises(InputError, match=named):
        fit_dictionary(BASE, batches, 16, sae=sae, progress=False)


def fit_until(stop: int, recipe: Recipe, folder):
    """A run that pauses after some steps, as Ctrl-C would make it."""
    return fit(recipe, folder=folder, stop_after=stop)


def test_a_run_of_other_data_is_not_resumed(tmp_path) -> None:
    recipe = replace(BASE, steps=20)
    fit_until(5, recipe, tmp_path)
    with pytest.raises(InputError, match="store"):
        fit(recipe, folder=tmp_path, provenance={"store": "another"})


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"target_l0": 41.0}, {"batch_size": 0}],
)
def test_recipes_that_cannot_work_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        replace(BASE, **wrong)


def test_silence_is_a_quarter_of_the_run_at_most_ten_million_tokens() -> None:
    assert BASE.silence == 120 * 256 // 4
    assert replace(BASE, steps=10**9).silence == 10_000_000
    assert replace(BASE, dead_after=7).silence == 7


@pytest.mark.parametrize("nested", [(0.5, 0.25), (0.5, 0.5), (1.0,), (0.0, 0.5), (0.01,)])
def test_prefixes_that_are_none_are_refused(nested: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="nested="):
        replace(BASE, nested=nested)


def test_a_matryoshka_loss_is_the_mean_over_prefixes_that_decode_alone() -> None:
    recipe = replace(BASE, nested=(0.25, 0.5), auxiliary="none")
    sae = SparseAutoencoder(16, 40, MutualChoice(3))
    x = batches(0)
    loss, metrics = DictionaryObjective(recipe)(sae, x, 0)
    codes = sae.encode(x, "batch").to_dense()
    alone = [
        reconstruction_loss(x, codes[:, :size] @ sae.decoder_weight[:size] + sae.decoder_bias) for size in (10, 20, 40)
    ]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    torch.testing.assert_close(torch.as_tensor(metrics["fvu"]), alone[-1].detach())
