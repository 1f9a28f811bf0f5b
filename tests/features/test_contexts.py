"""The streaming pass over contexts against a slow, obvious definition of what it keeps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from apportion.allocate import MutualChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.contexts import FeatureContexts, collect_contexts


class FakeView:
    """Contexts of random tokens whose activations are the feature activations themselves."""

    def __init__(self, codes: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        self.codes = codes
        self.n_contexts, self.length, _ = codes.shape
        self.token_ids = torch.arange(self.n_contexts * self.length).reshape(self.n_contexts, self.length)
        self.valid = torch.ones(codes.shape[:2], dtype=torch.bool) if valid is None else valid

    def contexts(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        part = slice(start, stop)
        return self.token_ids[part], self.codes[part], self.valid[part], torch.arange(start, stop) // 2


class FakeDictionary:
    """Encodes x as its positive part, stored sparsely as an Allocation would be (allocated zeros included)."""

    def __init__(self, n_features: int) -> None:
        self.n_features = n_features
        self.training = True

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        assert not self.training, "reports must show threshold inference, not the batch rule"
        rows, columns = (x >= 0).nonzero(as_tuple=True)
        return SimpleNamespace(row_indices=lambda: rows, col_indices=columns, values=x[rows, columns])


def sparse_codes(n_contexts: int, length: int, n_features: int, seed: int = 0, rate: float = 0.08) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (n_contexts, length, n_features)
    magnitude = torch.exp(torch.randn(size, generator=generator))
    drawn = torch.rand(size, generator=generator)
    # Some allocated zeros: a rule that spends its whole budget hands them out, and they are not activity.
    return torch.where(drawn < rate, magnitude, torch.where(drawn < 1.5 * rate, 0.0, -1.0))


def collect(view: FakeView, **settings) -> FeatureContexts:
    return collect_contexts(FakeDictionary(view.codes.shape[2]), view, progress=False, **settings)


def test_statistics_equal_those_of_the_dense_codes():
    codes = sparse_codes(20, 12, 15)
    found = collect(FakeView(codes), batch_tokens=40)
    dense = codes.clamp(min=0).reshape(-1, 15).double().numpy()
    assert found.n_tokens == 240
    assert (found.fires == (dense > 0).sum(0)).all()
    np.testing.assert_allclose(found.density, (dense > 0).mean(0))
    np.testing.assert_allclose(found.activation_sum, dense.sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.max_activation, dense.max(0), rtol=1e-6)
    assert (found.winners_per_token == np.bincount((dense > 0).sum(1))).all()
    for feature in range(15):
        values = dense[:, feature][dense[:, feature] > 0]
        assert (found.histogram[feature] == np.histogram(values, found.histogram_edges)[0]).all()


def test_top_contexts_are_the_highest_peaks_one_per_context():
    codes = sparse_codes(30, 12, 15)
    found = collect(FakeView(codes), top=6, batch_tokens=50, window=(3, 2))
    for feature in range(15):
        peaks = codes[:, :, feature].amax(1).clamp(min=0)
        expected = peaks.sort(descending=True).values[:6]
        slots = [slot for slot in range(6) if found.peak[feature, slot] >= 0]
        shown = [found.activations[feature, slot, found.peak[feature, slot]] for slot in slots]
        np.testing.assert_allclose(shown, expected[expected > 0], rtol=1e-6)
        assert len({found.position[feature, slot] // 12 for slot in slots}) == len(slots)


def test_every_window_shows_the_tokens_and_activations_that_were_there():
    codes = sparse_codes(30, 12, 15)
    view = FakeView(codes)
    found = collect(view, batch_tokens=50, window=(3, 2))
    tokens, flat = view.token_ids.reshape(-1).numpy(), codes.clamp(min=0).reshape(-1, 15).numpy()
    features, slots = np.nonzero(found.peak >= 0)
    assert len(features) > 150
    for feature, slot in zip(features, slots, strict=True):
        there = found.position[feature, slot] + np.arange(6)
        assert there[0] // 12 == there[-1] // 12, "a window must not leave its context"
        assert (found.token_ids[feature, slot] == tokens[there]).all()
        np.testing.assert_array_equal(found.activations[feature, slot], flat[there, feature])
        assert found.activations[feature, slot].argmax() == found.peak[feature, slot]
        assert found.document[feature, slot] == there[0] // 12 // 2


def test_sampled_contexts_lie_in_their_interval_and_are_not_among_the_top():
    # Activations grow along the text, so that the maximum known when a context is filed is never the final one.
    codes = sparse_codes(200, 12, 6) * torch.linspace(0.1, 1, 200)[:, None, None]
    found = collect(FakeView(codes), top=5, quantiles=4, per_quantile=3, batch_tokens=100)
    groups = found.slot_groups()[1:]
    assert [(low, high) for _, low, high in groups] == [(0.75, 1.0), (0.5, 0.75), (0.25, 0.5), (0.0, 0.25)]
    for feature in range(6):
        top_contexts = {found.position[feature, slot] // 12 for slot in range(5)}
        for slots, low, high in groups:
            for slot in range(slots.start, slots.stop):
                if found.peak[feature, slot] < 0:
                    continue
                share = found.activations[feature, slot].max() / found.max_activation[feature]
                assert low <= share <= high
                assert found.position[feature, slot] // 12 not in top_contexts
    assert (found.peak[:, groups[-1][0]] >= 0).all(), "the lowest interval of a frequent feature is never empty"


def test_contexts_are_filed_again_when_the_last_one_raises_the_maximum():
    codes = torch.full((101, 12, 8), -1.0)
    codes[:, 5] = torch.linspace(0.9, 1, 101)[:, None]
    codes[100] *= 10
    found = collect(FakeView(codes), top=5, batch_tokens=120)
    high, low = found.slot_groups()[1][0], found.slot_groups()[-1][0]
    assert (found.peak[:, high] == -1).all()
    assert (found.peak[:, low] >= 0).all()


def test_the_sample_is_the_same_on_every_run_and_the_top_for_every_batch_size():
    view = FakeView(sparse_codes(40, 12, 15))
    first, again, other = (collect(view, batch_tokens=size) for size in (50, 50, 500))
    for name in ("token_ids", "activations", "peak", "position"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(first, name)[:, :10], getattr(other, name)[:, :10])
    np.testing.assert_array_equal(first.histogram, other.histogram)


def test_tokens_marked_invalid_neither_count_nor_fire():
    codes = sparse_codes(10, 12, 5, rate=0.5)
    valid = torch.ones(10, 12, dtype=torch.bool)
    valid[:, 0] = False
    found = collect(FakeView(codes, valid), window=(20, 20))
    assert found.n_tokens == 110
    assert (found.fires == (codes[:, 1:] > 0).sum((0, 1)).numpy()).all()
    assert (found.activations[:, :, 0] == 0).all()
    assert (found.token_ids[found.peak >= 0][:, 0] >= 0).all(), "an invalid token is still shown as text"


def test_a_real_dictionary_is_shown_by_its_threshold_codes_and_left_in_training_mode():
    torch.manual_seed(0)
    view = FakeView(torch.randn(40, 12, 16))
    sae = SparseAutoencoder(16, 48, rule=MutualChoice(budget=4))
    x = view.codes.reshape(-1, 16)
    sae.calibrate([x], rows=len(x))
    sae.train()
    found = collect_contexts(sae, view, progress=False, batch_tokens=100)
    assert sae.training
    with torch.no_grad():
        codes = sae.eval().encode(x).to_dense().numpy()
    assert (found.fires == (codes > 0).sum(0)).all()
    np.testing.assert_allclose(found.max_activation, codes.max(0), rtol=1e-6)
    assert found.winners_per_token @ np.arange(len(found.winners_per_token)) == found.fires.sum()


def test_a_feature_that_never_fires_has_empty_slots():
    codes = sparse_codes(10, 12, 5)
    codes[:, :, 3] = -1
    found = collect(FakeView(codes))
    assert found.fires[3] == 0
    assert found.max_activation[3] == 0
    assert found.mean_activation[3] == 0
    assert (found.peak[3] == -1).all()
    assert (found.token_ids[3] == -1).all()


def test_a_dictionary_that_never_fires_is_reported_rather_than_refused():
    found = collect(FakeView(torch.full((4, 12, 5), -1.0)))
    assert (found.peak == -1).all()
    assert found.winners_per_token.tolist() == [48]


def test_the_dictionary_is_left_in_the_mode_in_which_it_came():
    sae = FakeDictionary(5)
    collect_contexts(sae, FakeView(sparse_codes(4, 12, 5)), progress=False)
    assert sae.training


def test_saved_contexts_load_unchanged(tmp_path):
    found = collect(FakeView(sparse_codes(10, 12, 5)))
    found.save(tmp_path / "kept")
    loaded = FeatureContexts.load(tmp_path / "kept")
    for name, value in vars(found).items():
        np.testing.assert_array_equal(getattr(loaded, name), value)
        assert np.asarray(getattr(loaded, name)).dtype == np.asarray(value).dtype


def test_damaged_files_are_named(tmp_path):
    collect(FakeView(sparse_codes(10, 12, 5))).save(tmp_path)
    path = tmp_path / "contexts.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"contexts\.safetensors"):
        FeatureContexts.load(tmp_path)
    (tmp_path / "contexts.json").write_text("{}")
    with pytest.raises(InputError, match=r"contexts\.json is not of version"):
        FeatureContexts.load(tmp_path)


@pytest.mark.parametrize("bad", [{"top": 0}, {"quantiles": -1}, {"window": (-1, 3)}, {"batch_tokens": 0}])
def test_impossible_counts_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        collect(FakeView(sparse_codes(4, 12, 5)), **bad)


def test_an_empty_view_is_refused():
    with pytest.raises(ValueError, match="no contexts"):
        collect(FakeView(torch.zeros(0, 12, 5)))
