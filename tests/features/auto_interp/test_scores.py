import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from apportion.features.auto_interp import Example, auroc, summarise


def window(source: str, quantile: int = -1) -> Example:
    return Example(0, "a", ((0, 1),), np.zeros(1, dtype=np.float32), source, quantile)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_auroc_is_that_of_scikit_learn_and_blind_to_monotone_maps(positive, negative):
    labels = [1] * len(positive) + [0] * len(negative)
    expected = roc_auc_score(labels, positive + negative)
    found = auroc(np.array(positive, dtype=float), np.array(negative, dtype=float))
    assert found == pytest.approx(expected)
    assert auroc(np.exp(positive), np.exp(negative)) == pytest.approx(found)


def test_balanced_accuracy_is_that_of_scikit_learn():
    random = np.random.default_rng(0)
    labels = random.random(50) < 0.3
    scores = random.random(50).tolist()
    windows = [window("activating", 0) if label else window("random") for label in labels]
    score = summarise(windows, scores, threshold=0.5, quantiles=1, base_rate=0.1)
    assert score.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, np.array(scores) > 0.5))


def test_figures_by_quantile_and_source_and_expected_precision():
    windows = [window("activating", 0), window("activating", 1), window("random"), window("neighbour")]
    score = summarise(windows, [0.2, 0.9, 0.1, 0.8], threshold=0.5, quantiles=3, base_rate=0.01)
    assert score.by_quantile == [0.0, 1.0, None]
    assert score.by_source["random"] == {"auroc": 1.0, "balanced_accuracy": 0.75}
    assert score.by_source["neighbour"] == {"auroc": 0.5, "balanced_accuracy": 0.25}
    assert score.expected_precision == pytest.approx(0.5 * 0.01 / (0.5 * 0.01 + 0.5 * 0.99))


def test_failed_windows_are_left_out_and_counted_and_a_constant_judge_scores_a_half():
    windows = [window("activating", 0)] * 3 + [window("random")] * 3
    score = summarise(
        windows, [1.0, 1.0, None, 1.0, 1.0, 1.0], threshold=0.5, quantiles=1, base_rate=0.5, failed={"nonsense": 1}
    )
    assert score.balanced_accuracy == 0.5
    assert score.auroc == 0.5
    assert score.n == 5
    assert score.failed == {"nonsense": 1}
    nothing = summarise(windows, [None] * 6, threshold=None, quantiles=1, base_rate=0.5)
    assert nothing.auroc is None
    assert nothing.balanced_accuracy is None
