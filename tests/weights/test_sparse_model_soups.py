"""Prune, retrain in branches, average: counts, phases, folders and processes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from apportion.errors import InputError
from apportion.weights import add_masks, counts, masks_of, prunable, remove_masks
from apportion.weights.averaging import average
from apportion.weights.own_processes import in_processes
from apportion.weights.retraining import Branch
from apportion.weights.sparse_model_soups import SoupRecipe, SoupSettings, sparse_model_soup
from soup_recipes import Recipe, tiny

BRANCHES = [Branch(steps=6, seed=seed, learning_rate=0.1) for seed in (1, 2, 3)]
SETTINGS = SoupSettings(sparsity=0.8, phases=2)


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(mine == theirs and torch.equal(x, y) for (mine, x), (theirs, y) in pairs)


@pytest.mark.parametrize("phases", [1, 2, 3])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_soup_and_candidates_keep_exactly_what_was_asked(marks, phases, scope):
    made = sparse_model_soup(tiny(), Recipe(str(marks)), BRANCHES, SoupSettings(0.8, phases, scope))
    wanted = round(0.2 * 108) if scope == "global" else round(0.2 * 72) + round(0.2 * 36)
    for network in [made.network, *made.candidates]:
        assert counts(network, prunable(network)).kept == wanted
        assert all(torch.equal(mask, masks_of(made.network)[name]) for name, mask in masks_of(network).items())
    left = [1 - each.sparsity for each in made.phases]
    assert left == pytest.approx([0.2 ** ((k + 1) / phases) for k in range(phases)], abs=0.02)
    assert same(made.network, average(made.candidates))
    assert made.phases[-1].chosen == [0, 1, 2]
    remove_masks(made.network)
    assert counts(made.network, prunable(made.network)).kept == wanted


def test_the_first_phase_prunes_by_magnitude_and_branches_differ(marks):
    network = tiny()
    made = sparse_model_soup(network, Recipe(str(marks)), BRANCHES, SoupSettings(0.75, 1, "layer"))
    threshold = network[0].weight.detach().abs().flatten().sort(descending=True).values[17]
    assert torch.equal(masks_of(made.network)["0"], network[0].weight.abs() >= threshold)
    assert not same(made.candidates[0], made.candidates[1])
    assert masks_of(network) == {}  # the trained network is left as it was


def test_one_branch_is_iterative_magnitude_pruning(marks):
    made = sparse_model_soup(tiny(), Recipe(str(marks)), BRANCHES[:1], replace(SETTINGS, combine="greedy"))
    assert same(made.network, made.candidates[0])
    assert len(list(marks.iterdir())) == 2


@pytest.mark.parametrize("combine", ["greedy", "best"])
def test_what_goes_on_is_no_worse_than_the_best_branch(marks, combine):
    recipe = Recipe(str(marks), norm=True)
    made = sparse_model_soup(tiny(norm=True), recipe, BRANCHES, replace(SETTINGS, combine=combine))
    scores = [recipe.score(each) for each in made.candidates]
    assert recipe.score(made.network) >= max(scores)
    assert made.phases[-1].chosen[0] == scores.index(max(scores))
    if combine == "best":
        assert made.phases[-1].chosen == [scores.index(max(scores))]


def test_batch_norms_of_soup_and_candidates_fit_the_data(marks):
    recipe = Recipe(str(marks), norm=True)
    made = sparse_model_soup(tiny(norm=True), recipe, BRANCHES, SETTINGS)
    for network in [made.network, *made.candidates]:
        with torch.no_grad():
            mean = torch.stack([network[0](each).mean(0) for each in recipe.calibration()]).mean(0)
        torch.testing.assert_close(network[1].running_mean, mean)
        assert network[1].num_batches_tracked.dtype == torch.int64


def test_the_adaptive_peak_lies_between_its_bounds_and_follows_pruning(marks):
    made = sparse_model_soup(tiny(), Recipe(str(marks)), BRANCHES[:1], replace(SETTINGS, trained_steps=60))
    peaks = [each.learning_rates[0] for each in made.phases]
    network = tiny()
    weights = torch.cat([each.matrix().detach().flatten() for each in prunable(network)])
    removed = 1 - 0.2**0.5
    smallest = weights.abs().sort().values[: 108 - round(108 * (1 - removed))]
    drop = float(smallest.norm() / weights.norm())
    assert peaks[0] == pytest.approx(0.1 * drop / removed**0.5, rel=1e-5)
    assert all(0.1 * 6 / 60 <= peak <= 0.1 for peak in peaks)
    plain = sparse_model_soup(tiny(), Recipe(str(marks)), BRANCHES[:1], SETTINGS)
    assert [each.learning_rates for each in plain.phases] == [[0.1], [0.1]]


def test_through_files_the_soup_is_the_same_and_nothing_is_done_twice(marks, tmp_path):
    recipe = Recipe(str(marks))
    folder = tmp_path / "soup"
    direct = sparse_model_soup(tiny(), recipe, BRANCHES, SETTINGS)
    through = sparse_model_soup(tiny(), recipe, BRANCHES, SETTINGS, folder)
    assert same(direct.network, through.network)
    done = len(list(marks.iterdir()))
    (folder / "phase-2" / "branch-1.safetensors").unlink()  # as if killed before it was written
    again = sparse_model_soup(tiny(), recipe, BRANCHES, SETTINGS, folder)
    assert same(direct.network, again.network)
    assert len(list(marks.iterdir())) == done + 1
    assert again.phases == through.phases


def test_another_soup_does_not_go_into_the_folder(marks, tmp_path):
    recipe = Recipe(str(marks))
    sparse_model_soup(tiny(), recipe, BRANCHES, SETTINGS, tmp_path / "soup")
    other = tiny()
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    for network, branches, settings, what in (
        (tiny(), BRANCHES[:2], SETTINGS, "branches"),
        (tiny(), BRANCHES, replace(SETTINGS, sparsity=0.5), "settings"),
        (other, BRANCHES, SETTINGS, "network"),
    ):
        with pytest.raises(InputError, match=f"holds a soup of other {what}"):
            sparse_model_soup(network, recipe, branches, settings, tmp_path / "soup")


@pytest.mark.slow
def test_processes_give_the_same_soup_and_a_failed_one_is_made_up_for(marks, tmp_path):
    settings = SoupSettings(0.8, 1)
    recipe = Recipe(str(marks), fails=2)
    direct = sparse_model_soup(tiny(), recipe, BRANCHES[:2], settings)
    (tmp_path / "broken").touch()
    folder = tmp_path / "soup"
    with pytest.raises(RuntimeError, match=r"branch-1 \(exit code 1.*run the same again"):
        sparse_model_soup(tiny(), recipe, BRANCHES[:2], settings, folder, processes=2, threads=1)
    assert (folder / "phase-1" / "branch-0.safetensors").exists()
    (tmp_path / "broken").unlink()
    before = len(list(marks.iterdir()))
    parallel = sparse_model_soup(tiny(), recipe, BRANCHES[:2], settings, folder, processes=2, threads=1)
    assert len(list(marks.iterdir())) == before + 1
    assert same(direct.network, parallel.network)


class Moves(SoupRecipe):
    """Changes masks, which it must not."""

    def network(self) -> nn.Module:
        return tiny()

    def retrain(self, network: nn.Module, branch: Branch, folder: Path | None) -> None:
        add_masks(network, {name: mask.flip(0) for name, mask in masks_of(network).items()})


def test_a_branch_that_moves_its_masks_is_found_out():
    with pytest.raises(InputError, match="branch 0 ended with other masks"):
        sparse_model_soup(tiny(), Moves(), BRANCHES, SETTINGS)


def test_what_cannot_travel_says_so():
    with pytest.raises(InputError, match=r"job cannot be sent to another process.*processes=1"):
        in_processes({"job": (lambda: None, ())}, 2)


def test_a_recipe_without_a_score_cannot_choose():
    class Plain(SoupRecipe):
        def network(self):
            return tiny()

        def retrain(self, network, branch, folder):
            pass

    with pytest.raises(InputError, match="Plain has no score"):
        sparse_model_soup(tiny(), Plain(), BRANCHES, replace(SETTINGS, combine="best"))
    assert Plain().calibration() is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoupSettings(1.0), "below 1"),
        (lambda: SoupSettings(0.0), r"sparsity=0\.0: there is nothing"),
        (lambda: SoupSettings(0.5, 0), "phases=0"),
        (lambda: SoupSettings(trained_steps=0), "trained_steps=0"),
        (lambda: sparse_model_soup(tiny(), Moves(), [], SETTINGS), "branches is empty"),
        (lambda: sparse_model_soup(tiny(), Moves(), BRANCHES, SETTINGS, processes=0), "processes=0"),
        (lambda: sparse_model_soup(tiny(), Moves(), BRANCHES, SETTINGS, processes=2), "needs a folder"),
    ],
)
def test_what_cannot_work_says_so(make, message):
    with pytest.raises(InputError, match=message):
        make()
