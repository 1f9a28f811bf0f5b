"""Calibrated thresholds are the exact quantiles of everything that came, whatever the batches were."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, ThresholdCalibrator, Zipf, densities, whole_quotas

SETTINGS = hypothesis.settings(deadline=None, max_examples=60)

ROWS, COLUMNS = 200, 16


def random_scores(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed))


def calibrated(calibrator: ThresholdCalibrator, scores: Tensor, sizes: list[int]) -> float | Tensor:
    for batch in scores.split(sizes):
        calibrator.update(batch)
    return calibrator.finish()


def halfway(ranked: Tensor, wanted: int, floor: float) -> float:
    """Between the last winner and the first loser of falling scores, no lower than the floor."""
    above = ranked[ranked > floor]
    if wanted == 0 or wanted > above.numel():
        return max(floor, float(above[0])) if wanted == 0 and above.numel() else floor
    loser = float(above[wanted]) if wanted < above.numel() else floor
    return (float(above[wanted - 1]) + loser) / 2


@pytest.mark.parametrize("budget", [0.5, 1, 3.37, 7])
@pytest.mark.parametrize("sizes", [[ROWS], [50] * 4, [1, 99, 0, 100]], ids=len)
def test_mutual_choice_gets_exactly_its_budget(budget: float, sizes: list[int]) -> None:
    scores, rule = random_scores(), MutualChoice(budget)
    theta = calibrated(ThresholdCalibrator(rule, COLUMNS, ROWS), scores, sizes)
    assert isinstance(theta, float)
    won = rule.at_inference(theta)(scores)
    assert abs(won.nnz / ROWS - budget) <= 1 / ROWS
    assert won.nnz == round(budget * ROWS)
    assert theta == pytest.approx(halfway(scores.flatten().sort(descending=True).values, won.nnz, 0.0), rel=1e-6)


@pytest.mark.parametrize("profile", [Zipf(0.0), Zipf(1.0), Zipf(2.0)])
@pytest.mark.parametrize("sizes", [[ROWS], [50] * 4, [1, 99, 0, 100]], ids=len)
def test_feature_choice_gets_exactly_its_quotas(profile: Zipf, sizes: list[int]) -> None:
    scores, rule = random_scores().exp(), FeatureChoice(3.3, profile=profile)
    theta = calibrated(ThresholdCalibrator(rule, COLUMNS, ROWS), scores, sizes)
    assert isinstance(theta, Tensor)
    wanted = whole_quotas(rule.share(COLUMNS) * ROWS, 660, ROWS)
    won = rule.at_inference(theta)(scores)
    assert won.winners_per_column().equal(wanted)
    by_column = scores.sort(dim=0, descending=True).values.T
    definition = [halfway(column, int(quota), 0.0) for column, quota in zip(by_column, wanted, strict=True)]
    assert theta.tolist() == pytest.approx(definition, rel=1e-6)


def test_feature_choice_follows_shares_that_are_not_by_index() -> None:
    scores, rule = random_scores().exp(), FeatureChoice(4, profile=Zipf())
    share = densities(Zipf().weights(COLUMNS), 4.0).flip(0)
    theta = calibrated(ThresholdCalibrator(rule, COLUMNS, ROWS, share=share), scores, [ROWS])
    assert isinstance(theta, Tensor)
    assert rule.at_inference(theta)(scores).winners_per_column().equal(whole_quotas(share * ROWS, 4 * ROWS, ROWS))


def test_a_column_that_wants_nothing_gets_nothing() -> None:
    scores = random_scores().exp()
    share = torch.zeros(COLUMNS, dtype=torch.float64)
    share[3] = 0.5
    theta = calibrated(ThresholdCalibrator(FeatureChoice(0.5), COLUMNS, ROWS, share=share), scores, [ROWS])
    assert (scores > theta).sum(dim=0).tolist() == [0, 0, 0, ROWS // 2] + [0] * (COLUMNS - 4)


@pytest.mark.parametrize("rule", [MutualChoice(3), FeatureChoice(3, profile=Zipf())], ids=["mutual", "feature"])
def test_the_order_of_the_batches_does_not_matter(rule: MutualChoice | FeatureChoice) -> None:
    scores = random_scores()
    results = []
    for seed in range(4):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))
        calibrator = ThresholdCalibrator(rule, COLUMNS, ROWS)
        calibrator._limit = 2 * int(calibrator._wanted.sum() + calibrator._wanted.numel())
        results.append(torch.as_tensor(calibrated(calibrator, scores[order], [20] * 10)))
    assert all(each.equal(results[0]) for each in results)


@pytest.mark.parametrize("rule", [MutualChoice(1), FeatureChoice(1, profile=Zipf())], ids=["mutual", "feature"])
def test_memory_is_bounded_and_costs_no_exactness(rule: MutualChoice | FeatureChoice) -> None:
    rows = 1000
    scores = random_scores(rows).exp()
    tight, roomy = ThresholdCalibrator(rule, COLUMNS, rows), ThresholdCalibrator(rule, COLUMNS, rows)
    # The allowance for short streams would hide the trimming here.
    tight._limit -= 1_000_000
    assert tight._limit == 2 * int(tight._wanted.sum() + tight._wanted.numel()) < scores.numel()
    for batch in scores.split(50):
        tight.update(batch)
        roomy.update(batch)
        assert tight._scores.numel() == tight._groups.numel() <= tight._limit
    assert bool((tight.cut() > 0).any()), "nothing was ever trimmed"
    assert torch.as_tensor(tight.finish()).equal(torch.as_tensor(roomy.finish()))


def test_a_long_stream_never_outgrows_its_limit() -> None:
    rows, columns = 30_000, 60
    calibrator = ThresholdCalibrator(MutualChoice(2), columns, rows)
    generator = torch.Generator().manual_seed(0)
    above = 0
    batches = []
    for _ in range(6):
        batch = torch.rand(5000, columns, generator=generator)
        batches.append(batch)
        calibrator.update(batch)
        above += batch.numel()
        assert calibrator._scores.numel() <= calibrator._limit < 2 * (2 * rows + 1) + 1_000_001
    assert above > calibrator._limit
    theta = calibrator.finish()
    assert sum(int((batch > theta).sum()) for batch in batches) == 2 * rows


@SETTINGS
@hypothesis.given(
    numbers=st.lists(st.integers(-3, 6), min_size=1, max_size=40), part=st.floats(0.01, 1), limit=st.integers(0, 30)
)
def test_ties_are_never_overspent(numbers: list[int], part: float, limit: int) -> None:
    scores = torch.tensor(numbers).view(-1, 1) / 4
    calibrator = ThresholdCalibrator(MutualChoice(part), 1, len(numbers))
    calibrator._limit = max(limit, int(calibrator._wanted.sum()) + 1)
    theta = calibrated(calibrator, scores, [1] * len(numbers))
    wanted = round(part * len(numbers))
    ranked = scores.flatten().sort(descending=True).values
    assert theta == halfway(ranked, wanted, 0.0)
    assert int((scores > theta).sum()) <= wanted


def test_fewer_positive_scores_than_the_budget_leave_the_floor() -> None:
    scores = random_scores()
    assert calibrated(ThresholdCalibrator(MutualChoice(12), COLUMNS, ROWS), scores, [ROWS]) == 0.0
    lower = calibrated(ThresholdCalibrator(MutualChoice(12), COLUMNS, ROWS, floor=-10), scores, [ROWS])
    assert int((scores > lower).sum()) == 12 * ROWS
    per_column = calibrated(ThresholdCalibrator(FeatureChoice(12), COLUMNS, ROWS), scores, [ROWS])
    assert isinstance(per_column, Tensor)
    assert per_column.tolist() == [0.0] * COLUMNS


def test_no_threshold_lies_below_a_higher_floor() -> None:
    assert calibrated(ThresholdCalibrator(MutualChoice(7), COLUMNS, ROWS, floor=1.5), random_scores(), [ROWS]) == 1.5


def test_neighbouring_floats_are_parted() -> None:
    one = torch.tensor(1.0)
    next_one = torch.nextafter(one, torch.tensor(2.0))
    after_that = torch.nextafter(next_one, torch.tensor(2.0))
    for lower, upper in ((one, next_one), (next_one, after_that)):
        scores = torch.stack([lower, upper]).view(2, 1)
        theta = calibrated(ThresholdCalibrator(MutualChoice(0.5), 1, 2), scores, [2])
        assert (scores > theta).flatten().tolist() == [False, True]


def test_all_entries_wanted_and_all_entries_there() -> None:
    scores = random_scores().exp()
    theta = calibrated(ThresholdCalibrator(MutualChoice(COLUMNS), COLUMNS, ROWS), scores, [ROWS])
    assert theta == pytest.approx(float(scores.min()) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores_of_every_type_are_taken(dtype: torch.dtype) -> None:
    scores = random_scores().to(dtype)
    calibrator = ThresholdCalibrator(MutualChoice(3), COLUMNS, ROWS)
    calibrator._limit = 700
    theta = calibrated(calibrator, scores, [10] * 20)
    assert theta == pytest.approx(halfway(scores.float().flatten().sort(descending=True).values, 600, 0.0), rel=1e-6)


def test_entries_above_the_cut_are_enough() -> None:
    scores = random_scores()
    for rule in (MutualChoice(2), FeatureChoice(2, profile=Zipf())):
        whole, entries = ThresholdCalibrator(rule, COLUMNS, ROWS), ThresholdCalibrator(rule, COLUMNS, ROWS)
        for calibrator in (whole, entries):
            calibrator._limit = 2 * (2 * ROWS + COLUMNS)
        for batch in scores.split(20):
            whole.update(batch)
            matter = batch > entries.cut()
            entries.update_entries(matter.nonzero()[:, 1], batch[matter], rows=20)
        assert torch.as_tensor(whole.finish()).equal(torch.as_tensor(entries.finish()))


def test_finishing_twice_gives_the_same() -> None:
    calibrator = ThresholdCalibrator(FeatureChoice(2), COLUMNS, ROWS)
    calibrator.update(random_scores())
    assert torch.as_tensor(calibrator.finish()).equal(torch.as_tensor(calibrator.finish()))


def test_gradients_do_not_enter() -> None:
    calibrator = ThresholdCalibrator(MutualChoice(2), COLUMNS, ROWS)
    calibrator.update(random_scores().requires_grad_())
    assert not calibrator._scores.requires_grad


@pytest.mark.parametrize(("came", "announced"), [(ROWS - 1, ROWS), (ROWS, ROWS - 1), (0, 5)])
def test_another_number_of_rows_than_announced_is_refused(came: int, announced: int) -> None:
    calibrator = ThresholdCalibrator(MutualChoice(2), COLUMNS, announced)
    calibrator.update(random_scores(came))
    with pytest.raises(ValueError, match=f"{came} rows came, but rows={announced} were announced"):
        calibrator.finish()


def test_calibration_on_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="rows=0: calibration needs at least one row"):
        ThresholdCalibrator(MutualChoice(2), COLUMNS, 0)


def test_scores_that_are_not_finite_are_refused() -> None:
    scores = random_scores()
    scores[7, 3] = torch.nan
    calibrator = ThresholdCalibrator(MutualChoice(2), COLUMNS, ROWS)
    with pytest.raises(ValueError, match=r"scores\[7, 3\] is nan"):
        calibrator.update(scores)
