import pytest
import torch

from apportion.errors import InputError
from apportion.features.head_scores import (
    HeadScores,
    auc_interval,
    label_heads,
    mean_difference,
    output_norm,
    roc_auc,
)


def test_the_auc_is_scikit_learns() -> None:
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (5, 4), generator=generator).float()  # with ties
    labels = torch.rand(5, 4, generator=generator) < 0.3
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels.flatten(), scores.flatten()))
    with pytest.raises(InputError, match="0 of 20"):
        roc_auc(scores, torch.zeros(5, 4, dtype=torch.bool))


def test_the_heads_with_the_largest_mean_effect_of_either_sign_are_labelled() -> None:
    effects = torch.zeros(2, 4, 5)
    effects[:, 1, 2] = torch.tensor([-3.0, -1.0])
    effects[:, 3, 0] = 1.0
    effects[:, 0, 0] = torch.tensor([5.0, -5.0])  # cancels
    assert label_heads(effects, 0.1).nonzero().tolist() == [[1, 2], [3, 0]]
    assert label_heads(effects, 0.01).sum() == 1
    with pytest.raises(InputError, match="share is 1"):
        label_heads(effects, 1.0)


def test_the_interval_holds_the_auc_and_narrows_where_prompts_and_heads_agree() -> None:
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(10, 6, generator=generator)
    effects = size + 0.02 * torch.randn(8, 10, 6, generator=generator)
    perfect = auc_interval(size, effects, 0.1, resamples=200)
    noisy_scores = size + 0.6 * torch.rand(10, 6, generator=generator)
    low, high = auc_interval(noisy_scores, effects, 0.1, resamples=200)
    assert low < roc_auc(noisy_scores, label_heads(effects, 0.1)) < high
    assert perfect[1] - perfect[0] < high - low
    assert perfect[0] > 0.95


def test_mean_difference_and_norm_are_what_they_say() -> None:
    positive, negative = torch.zeros(4, 1, 2, 3), torch.zeros(4, 1, 2, 3)
    positive[:, 0, 0, 0] = 3.0
    positive[:, 0, 1] = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]])
    assert mean_difference(positive, negative).tolist() == [[3.0, 0.0]]
    assert output_norm(positive, negative).tolist() == [[1.5, 0.5]]
    # Pooled variance of head 1: 4 / 6.
    shifted = positive.clone()
    shifted[:, 0, 1, 1] = 2.0
    assert float(mean_difference(shifted, negative, standardised=True)[0, 1]) == pytest.approx(2 / (4 / 6) ** 0.5)


def test_the_best_heads_come_first_and_make_a_mask() -> None:
    scores = HeadScores("made up", torch.tensor([[1.0, 4.0], [3.0, 2.0]]))
    assert scores.top(2) == [(0, 1), (1, 0)]
    assert scores.mask(2).tolist() == [[False, True], [True, False]]
    with pytest.raises(InputError, match="count is 5"):
        scores.top(5)
