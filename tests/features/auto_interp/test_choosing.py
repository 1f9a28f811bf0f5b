"""Which windows are shown to whom."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from apportion.allocate import Allocation
from apportion.errors import InputError
from apportion.features.auto_interp import ExampleSettings, collect_examples
from apportion.features.auto_interp.choosing import _Windows
from apportion.models.spelling import Spelled

CONTEXT, WINDOW, FEATURES = 32, 8, 12


class Text:
    """Contexts of random tokens; feature f fires on tokens of its own, rarer ones for higher f. Three contexts a
    document."""

    n_features = FEATURES

    def __init__(self, n_contexts: int = 300, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.n_contexts = n_contexts
        self.ids = random.integers(0, 400, size=(n_contexts, CONTEXT))
        self.codes = np.zeros((n_contexts, CONTEXT, FEATURES), dtype=np.float32)
        for feature in range(FEATURES):
            fires = (self.ids + 31 * feature) % 40 < max(1, 4 - feature // 3)
            self.codes[:, :, feature] = fires * random.random(self.ids.shape)
        # Features 1 and 0 nearly always fire together.
        self.codes[:, :, 1] = self.codes[:, :, 0] * (random.random(self.ids.shape) < 0.8)
        self.decoder_weight = torch.eye(FEATURES)
        self.decoder_weight[1] = torch.tensor([0.9, 0.4] + [0.0] * (FEATURES - 2))

    def contexts(self, start, stop):
        part = slice(start, min(stop, self.n_contexts))
        documents = torch.arange(self.n_contexts)[part] // 3
        valid = torch.ones(len(documents), CONTEXT, dtype=torch.bool)
        return torch.from_numpy(self.ids[part]), torch.from_numpy(self.codes[part]), valid, documents

    def encode(self, x):
        row, column = x.nonzero(as_tuple=True)
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=len(x)).cumsum(0)])
        return Allocation(crow, column, x[row, column], (len(x), FEATURES))

    def window(self, number: int) -> np.ndarray:
        """All codes of a window."""
        context, place = divmod(number, CONTEXT // WINDOW)
        return self.codes[context, place * WINDOW : (place + 1) * WINDOW]

    def document(self, number: int) -> int:
        return number // (CONTEXT // WINDOW) // 3


def spell(ids):
    words = [f" {token}" for token in ids]
    ends = np.cumsum([0, *map(len, words)]).tolist()
    return Spelled("".join(words), tuple(pairwise(ends)))


SETTINGS = ExampleSettings(
    window=WINDOW, train=10, test=10, non_activating=10, quantiles=5, min_windows=20, neighbours=3, per_neighbour=4,
    negatives=("random", "neighbour", "cooccurring"), near_misses=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def text() -> Text:
    return Text()


@pytest.fixture(scope="module")
def examples(text):
    return collect_examples(text, text, settings=SETTINGS, batch_tokens=500, progress=False)


def test_activations_are_those_of_the_window_and_negatives_are_silent(text, examples):
    for feature in range(FEATURES):
        shown = examples.of(feature, spell)
        assert len(shown.train) == len(shown.test) == 10
        for example in (*shown.train, *shown.test):
            expected = text.window(example.number)[:, feature]
            assert example.activations == pytest.approx(expected, rel=1e-3, abs=1e-3)
            assert expected.any()
        for example in (*shown.negatives, *shown.near_misses):
            assert not text.window(example.number)[:, feature].any()


def test_train_and_test_share_no_document_of_any_feature(text, examples):
    sides = {0: set(), 1: set()}
    for feature in range(FEATURES):
        shown = examples.of(feature, spell)
        sides[0] |= {text.document(each.number) for each in (*shown.train, *shown.near_misses)}
        sides[1] |= {text.document(each.number) for each in (*shown.test, *shown.negatives)}
    assert not sides[0] & sides[1]


def test_contexts_that_hold_documents_of_both_sides_are_left_out():
    windows = _Windows(Text(), SETTINGS)
    side, document = windows.side[::4], windows.document
    for context in range(len(document) - 1):
        if side[context] >= 0:
            assert document[context] % 2 == document[context + 1] % 2 == side[context]
        else:
            assert document[context] != document[context + 1]


def test_quantiles_are_drawn_from_evenly(examples):
    for feature in range(FEATURES):
        shown = examples.of(feature, spell)
        for part in (shown.train, shown.test):
            counts = np.bincount([each.quantile for each in part], minlength=5)
            assert counts.max() - counts.min() <= 1
            strongest = {q: [each.activations.max() for each in part if each.quantile == q] for q in (0, 4)}
            assert max(strongest[0]) <= min(strongest[4]) + 1e-3


def test_the_top_choice_shows_the_strongest_windows_of_the_train_side(text):
    settings = ExampleSettings(**{**SETTINGS.__dict__, "choice": "top", "negatives": ("random",)})
    chosen = collect_examples(text, text, settings=settings, progress=False).of(3, spell)
    side = _Windows(text, settings).side
    all_peaks = sorted((text.window(number)[:, 3].max() for number in np.flatnonzero(side == 0)), reverse=True)
    assert [each.activations.max() for each in chosen.train] == pytest.approx(all_peaks[:10], abs=1e-3)


def test_negatives_of_neighbours_are_where_those_fire(text, examples):
    shown = examples.of(0, spell)
    by_source = {source: [each for each in shown.negatives if each.source == source] for source in SETTINGS.negatives}
    assert len(by_source["random"]) == 10
    assert by_source["cooccurring"]
    for source in ("neighbour", "cooccurring"):
        for each in by_source[source]:
            assert text.window(each.number).any()


def test_the_feature_that_fires_in_the_same_windows_is_found_first(text):
    from apportion.features.auto_interp.choosing import ContextCodes, _Survey

    windows = _Windows(text, SETTINGS)
    survey = _Survey(FEATURES, windows, ExampleSettings(**{**SETTINGS.__dict__, "pool": 10**6}))
    survey.add(ContextCodes.encode(text, windows, 0, windows.n_contexts))
    survey.finish()
    fires = np.stack([text.window(n).any(axis=0) for n in np.flatnonzero(windows.side >= 0)]).astype(int)
    both = fires.T @ fires
    jaccard = both / (fires.sum(0)[:, None] + fires.sum(0) - both)
    np.fill_diagonal(jaccard, -1)
    found = survey.cooccurring(np.arange(FEATURES), 3)
    assert found[0, 0] == 1
    for feature in range(FEATURES):
        assert jaccard[feature, found[feature]] == pytest.approx(np.sort(jaccard[feature])[::-1][:3])


def test_similar_negatives_are_the_nearest_silent_windows(text):
    settings = ExampleSettings(**{**SETTINGS.__dict__, "negatives": ("similar",), "pool": 10**6})

    def embed(texts):
        vectors = torch.tensor([[float(" 7" in each), 0.1 * len(each)] for each in texts])
        return torch.nn.functional.normalize(vectors, dim=1)

    shown = collect_examples(text, text, [2], settings, embed=embed, spell=spell, progress=False).of(2, spell)
    query = embed([each.text for each in shown.train]).mean(dim=0)
    worst = min(float(embed([each.text])[0] @ query) for each in shown.negatives)
    side = _Windows(text, settings).side
    silent = [n for n in np.flatnonzero(side == 1) if not text.window(n)[:, 2].any()]
    others = sorted((float(embed([spell(text_ids(text, n)).text])[0] @ query) for n in silent), reverse=True)
    assert worst >= others[9] - 1e-5


def text_ids(text: Text, number: int) -> list[int]:
    context, place = divmod(int(number), CONTEXT // WINDOW)
    return text.ids[context, place * WINDOW : (place + 1) * WINDOW].tolist()


def test_windows_depend_neither_on_the_batch_nor_on_who_else_is_asked_for_nor_on_global_random_state(text, examples):
    state = np.random.get_state()[1].copy()
    alone = collect_examples(text, text, [5, 7], SETTINGS, batch_tokens=100_000, progress=False)
    for feature in (5, 7):
        for part in ("train", "test", "negatives", "near_misses"):
            ours, theirs = (getattr(each.of(feature, spell), part) for each in (alone, examples))
            assert [each.number for each in ours] == [each.number for each in theirs]
    assert (np.random.get_state()[1] == state).all()


def test_base_rates_and_counts_are_exact(text, examples):
    fires = text.codes > 0
    assert examples.density == pytest.approx(fires.mean(axis=(0, 1)))
    in_windows = fires.reshape(-1, WINDOW, FEATURES).any(axis=1)
    assert examples.n_windows.tolist() == in_windows.sum(axis=0).tolist()
    assert examples.window_density == pytest.approx(in_windows.mean(axis=0))
    assert examples.largest == pytest.approx(text.codes.max(axis=(0, 1)))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"window": 64}, "window=64"),
        ({"quantiles": 11}, "quantiles=11"),
        ({"choice": "best"}, "choice='best'"),
        ({"negatives": ("odd",)}, "negatives='odd'"),
        ({"negatives": ("similar",)}, "sentence encoder"),
        ({"train": 0}, "train=0"),
    ],
)
def test_settings_that_cannot_work_are_refused(text, changes, named):
    with pytest.raises(InputError, match=named):
        collect_examples(text, text, settings=ExampleSettings(**{**SETTINGS.__dict__, **changes}), progress=False)


def test_features_that_do_not_exist_are_refused(text):
    with pytest.raises(InputError, match="from 0 to 11"):
        collect_examples(text, text, [12], SETTINGS, progress=False)
    with pytest.raises(KeyError):
        collect_examples(text, text, [3], SETTINGS, progress=False).of(4, spell)
