"""What a dictionary remembers of its features."""

import torch

from apportion.allocate import Allocation
from apportion.features import FeatureStatistics


def codes(dense: list[list[float]]) -> Allocation:
    matrix = torch.tensor(dense)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (matrix > 0).sum(dim=1).cumsum(0)])
    return Allocation(crow, matrix.nonzero()[:, 1], matrix[matrix > 0], (matrix.shape[0], matrix.shape[1]))


def test_density_is_a_plain_mean_at_first() -> None:
    statistics = FeatureStatistics(3, horizon=100)
    statistics.update(codes([[1.0, 0, 0], [1.0, 2.0, 0]]), shared_threshold=True)
    statistics.update(codes([[0, 2.0, 0], [0, 0, 0]]), shared_threshold=True)
    torch.testing.assert_close(statistics.density, torch.tensor([0.5, 0.5, 0.0]))
    assert int(statistics.tokens_seen) == 4


def test_silence_is_counted_in_tokens() -> None:
    statistics = FeatureStatistics(3)
    statistics.update(codes([[1.0, 0, 0], [1.0, 2.0, 0]]), shared_threshold=True)
    statistics.update(codes([[0, 2.0, 0]]), shared_threshold=True)
    assert statistics.tokens_since_fired.tolist() == [1, 0, 3]
    assert statistics.dead(3).tolist() == [False, False, True]


def test_thresholds_follow_the_smallest_winner_of_all_or_of_each() -> None:
    batch = codes([[1.0, 0, 0.5], [3.0, 2.0, 0]])
    shared, own = FeatureStatistics(3), FeatureStatistics(3)
    shared.update(batch, shared_threshold=True)
    own.update(batch, shared_threshold=False)
    assert shared.threshold.tolist() == [0.5, 0.5, 0.5]
    assert own.threshold.tolist() == [1.0, 2.0, 0.5]


def test_what_fires_never_has_no_threshold_of_its_own() -> None:
    statistics = FeatureStatistics(2)
    statistics.update(codes([[1.0, 0]]), shared_threshold=False)
    assert statistics.threshold[1].isnan()


def test_everything_is_saved_with_the_module() -> None:
    one, other = FeatureStatistics(3), FeatureStatistics(3)
    one.update(codes([[1.0, 0, 0.5]]), shared_threshold=True)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.density, one.density)
    assert int(other.batches_seen) == 1


def test_an_empty_batch_changes_nothing() -> None:
    statistics = FeatureStatistics(2)
    empty = Allocation(torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0), (0, 2))
    statistics.update(empty, shared_threshold=True)
    assert int(statistics.batches_seen) == 0
