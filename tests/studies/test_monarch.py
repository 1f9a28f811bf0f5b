"""The study of Monarch matrices: equal budgets, what counts, and one run of all of it on little."""

import pytest
import torch
from torch import nn

from apportion.studies import monarch
from apportion.studies.monarch_exactness import exactness
from apportion.studies.monarch_networks import (
    DENSE,
    LOW_RANK,
    MONARCH,
    NARROW,
    PRUNED,
    CharacterTask,
    LowRankLinear,
    equal_rank,
    largest,
    multiplications,
    parameters,
    steps_at_equal_cost,
)
from apportion.studies.workbench import Workbench
from apportion.weights.monarch_shape import MonarchShape

SMOKE = monarch._SIZES["smoke"]


@pytest.fixture(scope="module")
def task() -> CharacterTask:
    return CharacterTask(SMOKE.task, seed=0)


def test_arms_have_equal_parameters(task: CharacterTask) -> None:
    sizes = {arm: parameters(task.network(arm)) for arm in (DENSE, NARROW, LOW_RANK, MONARCH)}
    assert sizes[LOW_RANK] == sizes[MONARCH] < sizes[DENSE]
    assert 0.9 * sizes[MONARCH] < sizes[NARROW] <= sizes[MONARCH]
    assert task.narrow_width() < SMOKE.task.width


def test_multiplications_are_those_of_all_layers(task: CharacterTask) -> None:
    network = task.network(MONARCH)
    hidden = sum(network.get_submodule(name).shape.parameters for name in ("first", "second"))
    assert multiplications(network) == hidden + network.head.weight.numel()


def test_projected_networks_have_equal_budgets_and_leave_the_trained_one_alone(task: CharacterTask) -> None:
    trained = task.network(DENSE)
    weight = trained.second.weight.detach().clone()
    budget = MonarchShape.of(32, 32).parameters
    pruned = task.projected(trained, PRUNED, None)
    assert int(pruned.second.weight.detach().count_nonzero()) == budget
    low_rank = task.projected(trained, LOW_RANK, None).second
    assert sum(each.weight.numel() for each in low_rank.children()) <= budget
    assert task.projected(trained, MONARCH, None).second.shape.parameters == budget
    assert torch.equal(trained.second.weight, weight)


def test_low_rank_is_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 9)
    x = torch.randn(5, 12)
    torch.testing.assert_close(LowRankLinear.from_linear(linear, 9)(x), linear(x))
    made = LowRankLinear.from_linear(linear, 3)
    error = (linear.weight - made.up.weight @ made.down.weight).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(linear.weight)[3:].norm())


def test_the_largest_entries_are_kept_exactly_that_many() -> None:
    weight = torch.tensor([[3.0, -3.0, 1.0], [0.0, -5.0, 3.0]])
    assert int(largest(weight, 3).sum()) == 3
    assert largest(weight, 1).nonzero().tolist() == [[1, 1]]


def test_equal_rank_never_has_more_parameters() -> None:
    shape = MonarchShape.of(13, 30, nblocks=3, rank=2)
    rank = equal_rank(shape)
    assert rank * (13 + 30) <= shape.parameters < (rank + 1) * (13 + 30)


def test_equal_cost_counts_both_phases() -> None:
    first, second = steps_at_equal_cost(500, dense=140, monarch=80, structured=0.8)
    assert first * 80 + second * 140 <= 500 * 140 < first * 80 + (second + 1) * 140
    assert first / (first + second) == pytest.approx(0.8, abs=0.01)


def test_brute_force_finds_the_projection_and_nothing_nearer() -> None:
    found = exactness(16, starts=3, seed=1)
    left_over = {name: figures.get("squared norm left over", 0.0) for name, figures in found.items()}
    assert left_over["exactness: Fourier, inputs in the transpose order"] < 1e-20
    assert left_over["exactness: Hadamard"] < 1e-20
    assert left_over["exactness: circulant"] > 0.05
    (ratio,) = found["exactness: alternating least squares"].values()
    assert 1 - 1e-9 < ratio < 1.01


def _measured(margins: dict[str, float]) -> monarch.Values:
    """Every arm at 2 bits but those named."""
    names = [f"from scratch: {arm}" for arm in monarch._SCRATCH]
    names += [f"dense to sparse, published width: {arm}" for arm in monarch._PROJECTED]
    names += [monarch._throughout(arm) for arm in (DENSE, MONARCH, NARROW)] + [f"sparse to dense: {monarch.REVERSE}"]
    jitter = [0.0, 0.001, -0.001]
    return {
        name: {
            monarch.BITS: [2 + margins.get(name, 0.0) + each for each in jitter],
            "bits before finetuning": [3.0] * 3,
        }
        for name in names
    }


def test_what_counts_are_the_uses_after_training() -> None:
    good = {f"from scratch: {MONARCH}": -0.1, f"dense to sparse, published width: {MONARCH}": -0.1}
    good[f"sparse to dense: {monarch.REVERSE}"] = -0.1
    claims = monarch._claims(SMOKE, _measured(good))
    assert [each.verdict for each in claims if each.part_of_verdict] == ["holds"] * 5
    bad = monarch._claims(SMOKE, _measured(dict.fromkeys(good, 0.1)))
    assert {each.verdict for each in bad if each.part_of_verdict} == {"does not hold"}


@pytest.mark.packaged
@pytest.mark.slow
def test_the_smoke_run_measures_everything() -> None:
    finding = monarch.run("smoke", [0], Workbench())
    found = {(row.name, row.metric): row.mean for row in finding.rows}
    where = "q_proj, 50% of the parameters (4 blocks)"
    errors = {arm: found[f"{where}: {arm}", monarch.ERROR] for arm in (MONARCH, LOW_RANK, PRUNED, "Monarch of noise")}
    assert errors[PRUNED] < errors[LOW_RANK] < errors[MONARCH] < errors["Monarch of noise"]
    assert found["from scratch: Monarch", "parameters"] == found[f"from scratch: {LOW_RANK}", "parameters"]
    assert found["dense to sparse: dense, as it was", monarch.BITS] == found["from scratch: dense", monarch.BITS]
    reverse, throughout = f"sparse to dense: {monarch.REVERSE}", monarch._throughout(MONARCH)
    assert SMOKE.task.steps < found[reverse, "steps"] < found[throughout, "steps"]
    assert sum(each.part_of_verdict for each in finding.comparisons) == 5
    assert finding.verdict == "mixed", "one seed is never enough"
    assert "<svg" in finding.plots["errors"]
