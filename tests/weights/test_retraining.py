"""Learning rates of retraining, and SGD under masks."""

import itertools
import math

import pytest
import torch

from apportion.errors import InputError
from apportion.weights import Unstructured, masks_of, prunable
from apportion.weights.gradual_pruning import prune_by_magnitude
from apportion.weights.retraining import SCHEDULES, Branch, adaptive_peak, cosine, linear, retrain
from soup_recipes import batch_of, squared, tiny


def test_the_linear_schedule_rises_along_a_cosine_and_falls_in_a_line():
    factors = [linear(step, 40) for step in range(40)]
    assert factors[:4] == pytest.approx([(1 - math.cos(math.pi * k / 5)) / 2 for k in (1, 2, 3, 4)])
    assert factors[4] == 1
    falls = [before - after for before, after in itertools.pairwise(factors[4:])]
    assert falls == pytest.approx([1 / 36] * 35)
    assert factors[-1] == pytest.approx(1 / 36)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 9, 100])
def test_no_step_is_spent_at_a_learning_rate_of_zero(name, steps):
    factors = [SCHEDULES[name](step, steps) for step in range(steps)]
    assert all(0 < each <= 1 for each in factors)
    assert max(factors) == 1


def test_the_cosine_schedule_is_halfway_down_halfway():
    assert cosine(55, 100) == pytest.approx(0.5)


def test_the_adaptive_peak_follows_what_was_taken_away():
    # As much as weights gone by chance would take: no less than the largest.
    assert adaptive_peak(0.2, math.sqrt(0.5), 0.5, 0.01) == pytest.approx(0.2)
    assert adaptive_peak(0.2, 0.5 * math.sqrt(0.5), 0.5, 0.01) == pytest.approx(0.1)
    assert adaptive_peak(0.2, 0.001, 0.5, 0.01) == 0.01
    assert adaptive_peak(0.2, 1.0, 0.25, 0.01) == 0.2
    with pytest.raises(InputError, match=r"removed=0\.0"):
        adaptive_peak(0.2, 0.1, 0.0, 0.01)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_retraining_is_plain_sgd_on_what_is_left(decay):
    net, reference = tiny(), tiny()
    prune_by_magnitude(net, prunable(net), Unstructured(0.5))
    masks = masks_of(net)
    branch = Branch(steps=12, learning_rate=0.1, weight_decay=decay)
    result = retrain(net, branch, squared, lambda step: batch_of(0, step))
    with torch.no_grad():
        for name in masks:
            reference.get_submodule(name).weight.mul_(masks[name])
    sgd = torch.optim.SGD(reference.parameters(), 0.1, momentum=0.9, weight_decay=decay, nesterov=decay > 0)
    for step in range(12):
        sgd.param_groups[0]["lr"] = 0.1 * linear(step, 12)
        sgd.zero_grad()
        squared(reference, batch_of(0, step), step)[0].backward()
        for name in masks:
            reference.get_submodule(name).weight.grad.mul_(masks[name])
        sgd.step()
    for name in masks:
        torch.testing.assert_close(net.get_submodule(name).weight, reference.get_submodule(name).weight)
        assert int(net.get_submodule(name).weight[~masks[name]].count_nonzero()) == 0
    assert result.steps_done == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"learning_rate": math.inf}, "learning_rate=inf"),
        ({"weight_decay": -1.0}, r"weight_decay=-1\.0"),
        ({"momentum": 1.0}, r"momentum=1\.0"),
    ],
)
def test_what_cannot_be_a_branch_says_so(given, message):
    with pytest.raises(InputError, match=message):
        Branch(**{"steps": 5, **given})
