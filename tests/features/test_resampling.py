"""Dead features get a new start where the dictionary is worst, and nothing else changes."""

import pytest
import torch

from apportion.allocate import Threshold
from apportion.errors import InputError
from apportion.features import DictionaryAdam, Recipe, SparseAutoencoder, fit_dictionary
from apportion.features.resampling import Resampling, l1_penalty, rarely_firing, resample


def a_dictionary() -> tuple[SparseAutoencoder, torch.Tensor, DictionaryAdam]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=draw)
    sae = SparseAutoencoder(16, 12, Threshold(0.0), seed=0)
    sae.initialise_from(x)
    with torch.no_grad():
        sae.encoder_bias[[3, 8]] = -100
    optimizer = DictionaryAdam(sae.parameters(), lr=1e-3)
    out = sae(x, "batch")
    (out.output.square().sum() + out.codes.values.sum()).backward()
    optimizer.step()
    return sae, x, optimizer


def test_features_that_fire_too_rarely_are_found() -> None:
    sae, x, _ = a_dictionary()
    assert rarely_firing(sae, [x[:32], x[32:]], 1e-3).nonzero().flatten().tolist() == [3, 8]


def test_only_dead_rows_and_their_moments_change() -> None:
    sae, x, optimizer = a_dictionary()
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[3, 8]] = True
    names = ("decoder_weight", "encoder_weight", "encoder_bias", "decoder_bias")
    before = {name: getattr(sae, name).detach().clone() for name in names}
    for name in names:
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[getattr(sae, name)][moment] += 1
    assert resample(sae, dead, x, optimizer, torch.Generator().manual_seed(1), 0.2) == 2
    for name in names:
        now, state = getattr(sae, name).detach(), optimizer.state[getattr(sae, name)]
        if name == "decoder_bias":
            assert now.equal(before[name])
            assert state["exp_avg"].ne(0).all()
            continue
        assert now[~dead].equal(before[name][~dead])
        assert now[dead].ne(before[name][dead]).any()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert state[moment][dead].eq(0).all()
            assert state[moment][~dead].ne(0).any(dim=-1).all()
    assert sae.encoder_bias[dead].eq(0).all()
    torch.testing.assert_close(sae.decoder_weight[dead].norm(dim=1), torch.ones(2))
    alive = sae.encoder_weight[~dead].norm(dim=1).mean()
    torch.testing.assert_close(sae.encoder_weight[dead].norm(dim=1), 0.2 * alive.expand(2))
    # Each is a centred input of its own.
    centred = torch.nn.functional.normalize(sae.centred(x), dim=1)
    match = (sae.decoder_weight[dead] @ centred.T).max(dim=1)
    torch.testing.assert_close(match.values, torch.ones(2))
    assert match.indices[0] != match.indices[1]


def test_inputs_are_drawn_by_the_square_of_their_loss() -> None:
    sae = SparseAutoencoder(2, 2, Threshold(0.0))
    with torch.no_grad():
        sae.encoder_bias.fill_(-100)
    x = torch.tensor([[1.0, 0.0], [0.0, 3**0.25]])  # losses 1 and sqrt 3, so weights 1 and 3
    drawn = 0
    for seed in range(400):
        resample(sae, torch.tensor([True, False]), x, None, torch.Generator().manual_seed(seed))
        drawn += bool(sae.decoder_weight[0, 1] > 0.5)
        with torch.no_grad():
            sae.encoder_bias.fill_(-100)
    assert 270 < drawn < 330


def test_nothing_is_resampled_where_nothing_is_dead_or_missed() -> None:
    sae, x, optimizer = a_dictionary()
    generator = torch.Generator()
    assert resample(sae, torch.zeros(12, dtype=torch.bool), x, optimizer, generator) == 0
    with torch.no_grad():
        sae.encoder_bias.fill_(-100)
    centre = (sae.decoder_bias / sae.input_scale).detach().expand(5, -1)
    before = sae.decoder_weight.detach().clone()
    perfect = sae(centre, "batch").output
    assert resample(sae, torch.ones(12, dtype=torch.bool), perfect, optimizer, generator) in (0, 12)
    sae.input_scale.fill_(1.0)
    assert resample(sae, torch.ones(12, dtype=torch.bool), sae.decoder_bias.detach()[None], optimizer, generator) == 0
    assert sae.decoder_weight.shape == before.shape


def test_fewer_inputs_than_dead_features_is_a_clear_error() -> None:
    sae, x, optimizer = a_dictionary()
    with pytest.raises(InputError, match=r"12 features are dead, but only 3 of 3 inputs"):
        resample(sae, torch.ones(12, dtype=torch.bool), x[:3], optimizer, torch.Generator())


def test_when_it_happens_and_how_the_learning_rate_comes_back() -> None:
    plan = Resampling(every=10, times=2, warmup=4)
    assert [step for step in range(50) if plan.happens(step)] == [10, 20]
    assert [plan.learning_rate(step) for step in (9, 10, 12, 14, 20, 24, 30)] == [1, 0.1, 0.55, 1, 0.1, 1, 1]
    with pytest.raises(InputError, match="every=0"):
        Resampling(every=0)
    with pytest.raises(InputError, match="cutoff"):
        Resampling(cutoff=0)


def test_training_with_it_revives_and_resumes_exactly(tmp_path) -> None:
    draw = torch.Generator().manual_seed(0)
    data = torch.randn(512, 16, generator=draw)

    def batches(step: int) -> torch.Tensor:
        return data[torch.randint(512, (64,), generator=torch.Generator().manual_seed(step))]

    recipe = Recipe(Threshold(0.0), 32, steps=24, batch_size=64, auxiliary="none", penalty=0.02, learning_rate=1e-2)

    def kill(sae: SparseAutoencoder) -> None:
        with torch.no_grad():
            sae.encoder_bias[:10] = -100

    settings = {"start_from": kill, "resampling": Resampling(every=8, times=2, look_back=4), "progress": False}
    whole, result = fit_dictionary(recipe, batches, 16, betas=(0.0, 0.9999), log_every=1, **settings)
    assert next(record["resampled"] for record in result.history if "resampled" in record) == 10
    assert rarely_firing(whole, [data], 1e-3).sum() < 10
    for stop in (12, None):
        parts, _ = fit_dictionary(
            recipe, batches, 16, betas=(0.0, 0.9999), folder=tmp_path / "run", stop_after=stop, **settings
        )
    assert parts.decoder_weight.equal(whole.decoder_weight)


def test_the_papers_penalty_in_the_units_of_a_recipe() -> None:
    x = 3 * torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    # Squared error + L1 in raw units against share of variance + L1 in scaled units, for some code and its error.
    distance = float((x - x.mean(dim=0)).square().sum(dim=1).mean())
    scale = (16 / distance) ** 0.5
    error, code = 5.0, 7.0
    ours = error / distance + l1_penalty(2.0, x) * code * scale
    assert ours * distance == pytest.approx(error + 2.0 * code, rel=1e-4)
    with pytest.raises(InputError, match="coefficient=-1"):
        l1_penalty(-1, x)
    with pytest.raises(InputError, match="the same"):
        l1_penalty(1.0, torch.ones(4, 3))
