"""Transcoders imitate a map from one space to another; their loss, start, skip path and files."""

import dataclasses

import pytest
import torch

from apportion.allocate import MutualChoice, Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features import (
    LearnedThreshold,
    Recipe,
    SparseAutoencoder,
    Transcoder,
    TranscoderSettings,
    fit_transcoder,
    weighted_reconstruction_loss,
)

RECIPE = Recipe(TokenChoice(4), n_features=64, steps=150, batch_size=128, learning_rate=1e-2, auxiliary="dead")


def draw(seed: int, tokens: int = 128) -> torch.Tensor:
    return 3 * torch.randn(tokens, 12, generator=torch.Generator().manual_seed(seed)) + 2


def mlp(x: torch.Tensor) -> torch.Tensor:
    """A small ReLU network of 16 neurons, from width 12 to width 8, with an output of another size."""
    weights = torch.Generator().manual_seed(1000)
    into, out = torch.randn(12, 16, generator=weights), torch.randn(16, 8, generator=weights)
    return 5 * (x @ into - 6).relu() @ out + 1


def pairs(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = draw(step)
    return x, mlp(x)


def calibration() -> list[torch.Tensor]:
    return [draw(10**6, 4000)]


def fvu(transcoder: Transcoder) -> float:
    x = draw(10**7, 2000)
    with torch.no_grad():
        error = (transcoder(x).output - mlp(x)).square().sum()
    return float(error / (mlp(x) - mlp(x).mean(dim=0)).square().sum())


@pytest.mark.parametrize(
    "rule", [TokenChoice(4), MutualChoice(4), Threshold(0.0), LearnedThreshold()], ids=lambda rule: type(rule).__name__
)
def test_it_learns_the_map_by_every_rule(rule) -> None:
    budget = isinstance(rule, (TokenChoice, MutualChoice))
    recipe = dataclasses.replace(
        RECIPE, rule=rule, target_l0=None if budget else 4.0, auxiliary="dead" if budget else "none"
    )
    transcoder, result = fit_transcoder(recipe, pairs, 12, 8, calibration=calibration, progress=False)
    assert result.steps_done == 150
    assert fvu(transcoder) < (0.35 if budget else 0.6)
    assert float(transcoder.input_scale) == float(transcoder.output_scale) == 1.0
    torch.testing.assert_close(transcoder.decoder_weight.detach().norm(dim=1), torch.ones(64))


def test_a_skip_path_lowers_the_error() -> None:
    plain, _ = fit_transcoder(RECIPE, pairs, 12, 8, progress=False)
    skip, _ = fit_transcoder(RECIPE, pairs, 12, 8, transcoder=TranscoderSettings(skip=True), progress=False)
    assert fvu(skip) < fvu(plain)
    assert skip.skip_weight.norm() > 0


def test_a_free_decoder_starts_at_zero_and_learns() -> None:
    settings = TranscoderSettings(unit_decoder=False)
    fresh = Transcoder(12, 64, TokenChoice(4), d_out=8, skip=True, unit_decoder=False)
    fresh.decoder_bias.data.fill_(3.0)
    assert fresh(draw(0)).output.equal(torch.full((128, 8), 3.0))
    transcoder, _ = fit_transcoder(RECIPE, pairs, 12, 8, transcoder=settings, progress=False)
    assert fvu(transcoder) < 0.5
    assert transcoder.decoder_weight.norm(dim=1).std() > 0.01


def test_with_no_features_to_speak_of_the_skip_path_is_linear_regression() -> None:
    recipe = dataclasses.replace(RECIPE, rule=TokenChoice(1), n_features=1, steps=400, learning_rate=3e-2)
    # One feature that never fires leaves the linear path alone.
    transcoder, _ = fit_transcoder(
        dataclasses.replace(recipe, auxiliary="none"),
        pairs,
        12,
        8,
        transcoder=TranscoderSettings(skip=True),
        start_from=lambda sae: sae.encoder_bias.data.fill_(-1e3),
        progress=False,
    )
    x = torch.cat([draw(step) for step in range(400)])
    ones = torch.ones(len(x), 1)
    solved = torch.linalg.lstsq(torch.cat([x, ones], dim=1), mlp(x)).solution
    test = draw(10**7, 2000)
    best = torch.cat([test, torch.ones(2000, 1)], dim=1) @ solved
    best_fvu = float((best - mlp(test)).square().sum() / (mlp(test) - mlp(test).mean(dim=0)).square().sum())
    assert fvu(transcoder) == pytest.approx(best_fvu, rel=0.05)


def test_the_loss_divides_a_token_by_the_norm_of_its_target() -> None:
    target, output = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 2.0]])
    assert float(weighted_reconstruction_loss(target, output)) == pytest.approx((1 + 4) / 2 / 5)
    some = torch.cat([target, torch.zeros(1, 2)]).requires_grad_()
    loss = weighted_reconstruction_loss(some.detach(), some * 0.5)
    loss.backward()
    assert some.grad.isfinite().all()
    assert float(loss.detach()) == pytest.approx((2.25 + 4) / 4 / 5)


def test_the_papers_loss_learns_too() -> None:
    recipe = dataclasses.replace(RECIPE, rule=Threshold(0.0), target_l0=4.0, auxiliary="none")
    settings = TranscoderSettings(loss="weighted", start="random")
    transcoder, _ = fit_transcoder(recipe, pairs, 12, 8, transcoder=settings, progress=False)
    assert fvu(transcoder) < 0.6


def test_the_linear_start_is_better_than_a_random_one() -> None:
    errors = {}
    for start in ("linear", "random"):
        recipe = dataclasses.replace(RECIPE, steps=5)
        _, result = fit_transcoder(
            recipe, pairs, 12, 8, transcoder=TranscoderSettings(start=start), progress=False, log_every=1
        )
        errors[start] = result.history[0]["fvu"]
    assert errors["linear"] < errors["random"]


@pytest.mark.parametrize("equal", [True, False])
def test_folding_changes_units_and_nothing_else(equal: bool) -> None:
    d_out = 12 if equal else 8
    transcoder = Transcoder(12, 64, MutualChoice(4), d_out=d_out, skip=True)
    x = draw(0)
    y = torch.cat([mlp(x), x[:, :4]], dim=1)[:, :d_out]
    transcoder.initialise_from(x, target=y)
    transcoder.skip_weight.data.normal_(generator=torch.Generator().manual_seed(0))
    transcoder.calibrate([x], 128)
    transcoder.eval()
    before = transcoder(x)
    transcoder.fold_scale()
    after = transcoder(x)
    torch.testing.assert_close(after.output, before.output, rtol=1e-4, atol=1e-3)
    assert after.codes.col_indices.equal(before.codes.col_indices)


def test_save_and_load_round_trip(tmp_path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=3)
    transcoder, _ = fit_transcoder(recipe, pairs, 12, 8, transcoder=TranscoderSettings(skip=True), progress=False)
    transcoder.save(tmp_path)
    found = SparseAutoencoder.load(tmp_path)
    assert isinstance(found, Transcoder)
    assert found.metadata["transcoder"]["skip"]
    assert found(draw(0)).output.equal(transcoder(draw(0)).output)


def test_paused_and_resumed_equals_undisturbed(tmp_path) -> None:
    recipe = dataclasses.replace(RECIPE, steps=20)
    settings = TranscoderSettings(skip=True)

    def fit(folder, **more):
        return fit_transcoder(recipe, pairs, 12, 8, transcoder=settings, folder=folder, progress=False, **more)[0]

    whole = fit(tmp_path / "whole")
    fit(tmp_path / "parts", stop_after=7)
    parts = fit(tmp_path / "parts")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, parts.state_dict()[name]) or bool(tensor.isnan().all()), name
    with pytest.raises(InputError, match=r"transcoder\.skip"):
        fit_transcoder(recipe, pairs, 12, 8, folder=tmp_path / "parts", progress=False)


def test_dead_features_are_revived_against_the_target(monkeypatch) -> None:
    seen = []

    def spy(sae, x, residual, revive, size):
        seen.append(residual.shape[1])
        return x.new_zeros(())

    monkeypatch.setattr("apportion.features.fitting.aux_k_loss", spy)
    fit_transcoder(dataclasses.replace(RECIPE, steps=2), pairs, 12, 8, progress=False)
    assert seen == [8]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(InputError, match="gated=True"):
        fit_transcoder(dataclasses.replace(RECIPE, rule=Threshold(0.0), gated=True), pairs, 12, 8, progress=False)
    with pytest.raises(InputError, match="target has shape"):
        fit_transcoder(RECIPE, pairs, 12, 9, progress=False)
