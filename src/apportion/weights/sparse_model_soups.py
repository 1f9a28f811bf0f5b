"""Sparse Model Soups (Zimmer, Spiegel & Pokutta 2023, arXiv 2306.16788).

What is allocated: the weights that a network keeps, fewer from phase to phase. In each phase the network is pruned by
magnitude and retrained several times from that one pruned start, by branches that differ in batch order, weight decay,
length or learning rate; since all share one mask, the average of their weights is exactly as sparse, and the next phase
begins with it. With a single branch it is iterative magnitude pruning (IMP).

| paper | here |
|---|---|
| goal sparsity, phases P, p of the remaining weights a phase | ``sparsity``, ``phases``, `GeometricSchedule.removed` |
| m models that differ in seed, weight decay, length, schedule | branches: `apportion.weights.retraining.Branch` |
| UniformSoup, GreedySoup | ``combine="uniform"``, ``"greedy"`` (``"best"``: the best branch goes on alone) |
| LLR, ALLR | ``Branch.schedule="linear"``, ``trained_steps`` |
| recalibration of batch norm | `apportion.weights.averaging.repair_batch_norm` |

Departures: norms and one-dimensional weights are not pruned (the paper's code prunes every weight but batch norms');
masks are compared before they are averaged; a seed means another order of batches in each phase.
"""

import copy
import dataclasses
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.training.state import module_tensors, restore_module
from apportion.weights.averaging import average, greedy, repair_batch_norm
from apportion.weights.gradual_pruning import prune_by_magnitude
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.masks import add_masks, counts, masks_of
from apportion.weights.own_processes import in_processes
from apportion.weights.patterns import Scope, Unstructured
from apportion.weights.retraining import Branch, adaptive_peak
from apportion.weights.schedule import GeometricSchedule

Combine = Literal["uniform", "greedy", "best"]
_MASK = ".parametrizations.weight.0.mask"
# Between the seeds of two phases; a prime, so that branches' own seeds do not meet.
_SEEDS_OF_A_PHASE = 1_000_003


@dataclass(frozen=True)
class SoupSettings:
    """What is pruned, and what becomes of the branches.

    Args:
        sparsity: after the last phase; the paper's script has 0.9.
        phases: P, from 1 to 3 in the paper.
        scope: one threshold over the network (``global``, the paper's), or in each ``layer`` or ``row``.
        combine: see the module's description.
        trained_steps: steps of the original training, for ALLR: each branch's peak learning rate then follows what
            pruning took away. None for LLR.
        include: patterns of layers' names, see `apportion.weights.prunable`.
        exclude: patterns to leave out again.

    Raises:
        InputError: a value that cannot work.
    """

    sparsity: float = 0.9
    phases: int = 3
    scope: Scope = "global"
    combine: Combine = "uniform"
    trained_steps: int | None = None
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Unstructured(self.sparsity, self.scope)
        GeometricSchedule(self.sparsity, self.phases, 1)
        if self.sparsity == 0:
            raise InputError("sparsity=0.0: there is nothing to prune; use a share of weights to remove, such as 0.9")
        if self.combine not in ("uniform", "greedy", "best"):
            raise InputError(f"combine={self.combine!r}: use uniform, greedy or best")
        if self.trained_steps is not None and self.trained_steps < 1:
            raise InputError(f"trained_steps={self.trained_steps}: at least 1, or None for LLR")


class SoupRecipe(ABC):
    """What a soup needs to know of a network and its task.

    A recipe travels to other processes: define its class in a module that they can import, keep in it what says how to
    find the data, not the data, and let `retrain` be a function of network and branch alone. A dataclass is best: a
    folder then remembers what its branches were made by.
    """

    @abstractmethod
    def network(self) -> nn.Module:
        """A network of the kind that is pruned; its weights do not matter."""

    @abstractmethod
    def retrain(self, network: nn.Module, branch: Branch, folder: Path | None) -> None:
        """Train in place under the network's masks, as `apportion.weights.retraining.retrain` does."""

    def score(self, network: nn.Module) -> float:
        """How good a network is on validation data; only greedy soups and the best branch ask.

        Raises:
            InputError: the recipe does not define it.
        """
        raise InputError(f"{type(self).__name__} has no score: define it to choose between branches")

    def calibration(self) -> Iterable[Any] | None:
        """Batches of training data for batch norms; None if there are none."""
        return None


@dataclass(frozen=True)
class Phase:
    """What happened in a phase.

    Attributes:
        sparsity: of the weights that are pruned.
        learning_rates: the branches' peaks.
        chosen: places of the branches that are in the soup.
    """

    sparsity: float
    learning_rates: list[float]
    chosen: list[int]


@dataclass(frozen=True, eq=False)
class Soup:
    """What came of it.

    Attributes:
        network: pruned and masked (`apportion.weights.remove_masks` leaves plain weights), in eval mode.
        candidates: the branches of the last phase, each of them as sparse, in eval mode.
        phases: first to last.
    """

    network: nn.Module
    candidates: list[nn.Module]
    phases: list[Phase] = field(default_factory=list)


def sparse_model_soup(
    network: nn.Module,
    recipe: SoupRecipe,
    branches: Sequence[Branch],
    settings: SoupSettings,
    folder: Path | str | None = None,
    *,
    processes: int = 1,
    threads: int | None = None,
) -> Soup:
    """Prune and retrain, phase by phase.

    Args:
        network: trained; it is left as it is.
        recipe: how to retrain it.
        branches: of every phase. A single one makes it iterative magnitude pruning.
        settings: see `SoupSettings`.
        folder: keeps every finished branch, so that a call that was killed goes on where it was when it is repeated.
        processes: how many branches run at a time, each in a process of its own; 1 runs them in this one.
        threads: of torch in each of these processes; the cores are shared out evenly if None.

    Raises:
        InputError: a setting that cannot work; the folder holds another soup; a branch changed its masks.
        RuntimeError: a branch failed in its process; those that finished are kept in the folder.
    """
    if not branches:
        raise InputError("branches is empty: give at least one")
    if processes < 1:
        raise InputError(f"processes={processes}: use at least 1")
    if processes > 1 and folder is None:
        raise InputError(f"processes={processes} needs a folder, by which results come back: give one")
    kitchen = _Kitchen(recipe, settings, None if folder is None else Path(folder), processes, threads)
    soup = copy.deepcopy(network)
    kitchen.check_folder(soup, branches)
    schedule = GeometricSchedule(settings.sparsity, settings.phases, 1)
    phases, candidates = [], []
    for phase in range(settings.phases):
        layers = prunable(soup, settings.include, settings.exclude)
        before = _norm(layers)
        prune_by_magnitude(soup, layers, Unstructured(schedule.at(phase), settings.scope))
        drop = max(0.0, 1 - (_norm(layers) / before) ** 2) ** 0.5
        own = [_of_phase(branch, phase, drop, schedule.removed, settings.trained_steps) for branch in branches]
        candidates = kitchen.retrained(soup, own, phase)
        chosen, soup = kitchen.combined(candidates)
        sparsity = counts(soup, prunable(soup, settings.include, settings.exclude)).sparsity
        phases.append(Phase(sparsity, [each.learning_rate for each in own], chosen))
    return Soup(soup.eval(), [each.eval() for each in candidates], phases)


class _Kitchen:
    """Where branches are retrained and combined."""

    def __init__(
        self, recipe: SoupRecipe, settings: SoupSettings, folder: Path | None, processes: int, threads: int | None
    ) -> None:
        self.recipe, self.settings, self.folder = recipe, settings, folder
        self.processes, self.threads = processes, threads

    def check_folder(self, network: nn.Module, branches: Sequence[Branch]) -> None:
        """Refuse a folder that holds something else.

        Raises:
            InputError: names what differs.
        """
        if self.folder is None:
            return
        content = {
            "settings": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.settings).items()
            },
            "branches": [dataclasses.asdict(each) for each in branches],
            "recipe": repr(self.recipe) if dataclasses.is_dataclass(self.recipe) else type(self.recipe).__name__,
            "network": _digest(module_tensors(network)),
        }
        path = self.folder / "soup.json"
        if path.exists() and (held := read_json(path)) != content:
            different = [name for name, value in content.items() if held.get(name) != value]
            raise InputError(f"{self.folder} holds a soup of other {', '.join(different)}: choose another folder")
        write_json(path, content)

    def retrained(self, pruned: nn.Module, branches: Sequence[Branch], phase: int) -> list[nn.Module]:
        """A network for each branch, all of them with the masks they began with.

        Raises:
            InputError: a branch changed its masks.
        """
        if self.folder is None:
            candidates = [copy.deepcopy(pruned) for _ in branches]
            for candidate, branch in zip(candidates, branches, strict=True):
                self.recipe.retrain(candidate, branch, None)
        else:
            candidates = self._through_files(pruned, branches, self.folder / f"phase-{phase + 1}")
        masks = masks_of(pruned)
        for place, candidate in enumerate(candidates):
            own = masks_of(candidate)
            if own.keys() != masks.keys() or any(not torch.equal(own[name], mask) for name, mask in masks.items()):
                raise InputError(f"branch {place} ended with other masks than it began with: a soup needs one mask")
            repair_batch_norm(candidate, self.recipe.calibration())
        return candidates

    def combined(self, candidates: list[nn.Module]) -> tuple[list[int], nn.Module]:
        """Which branches make the soup, and the soup."""
        chosen = list(range(len(candidates)))
        if self.settings.combine == "greedy" and len(chosen) > 1:
            return greedy(candidates, self._repaired_score)
        if self.settings.combine == "best" and len(chosen) > 1:
            chosen = [max(chosen, key=lambda place: self.recipe.score(candidates[place].eval()))]
        soup = average([candidates[each] for each in chosen])
        if len(chosen) > 1:
            repair_batch_norm(soup, self.recipe.calibration())
        return chosen, soup

    def _repaired_score(self, network: nn.Module) -> float:
        repair_batch_norm(network, self.recipe.calibration())
        return self.recipe.score(network.eval())

    def _through_files(self, pruned: nn.Module, branches: Sequence[Branch], folder: Path) -> list[nn.Module]:
        start = folder / "start.safetensors"
        _save(start, pruned)
        paths = [folder / f"branch-{place}.safetensors" for place in range(len(branches))]
        tasks = {
            path.stem: (_run_branch, (self.recipe, branch, start, path))
            for path, branch in zip(paths, branches, strict=True)
            if not path.exists()
        }
        if self.processes > 1:
            in_processes(tasks, self.processes, self.threads)
        else:
            for run, arguments in tasks.values():
                run(*arguments)
        candidates = []
        for path in paths:
            candidates.append(copy.deepcopy(pruned))
            _load(path, candidates[-1])
        return candidates


def _run_branch(recipe: SoupRecipe, branch: Branch, start: Path, result: Path) -> None:
    """Retrain one branch from a file to a file."""
    network = recipe.network()
    _load(start, network)
    recipe.retrain(network, branch, result.with_suffix(""))
    _save(result, network)


def _save(path: Path, network: nn.Module) -> None:
    from safetensors.torch import save_file

    tensors = {name: each.detach().cpu().contiguous().clone() for name, each in module_tensors(network).items()}
    with write_atomically(path) as temporary:
        save_file(tensors, temporary)


def _load(path: Path, network: nn.Module) -> None:
    """Fill a network, with masks or without, with what a file holds."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    names = [name.removesuffix(_MASK) for name in tensors if name.endswith(_MASK)]
    modules = dict(network.named_modules())
    for name in names:
        if name not in modules:
            raise InputError(f"{path} has masks of {name}, which the recipe's network lacks: they must be of one kind")
        shape = WeightLayer(name, modules[name]).matrix().shape
        add_masks(network, {name: torch.ones(shape, dtype=torch.bool)})
    own = module_tensors(network)
    if own.keys() != tensors.keys():
        different = sorted(own.keys() ^ tensors.keys())[0]
        raise InputError(f"{path} and the recipe's network are of different kinds: only one has {different}")
    with torch.no_grad():
        restore_module(network, tensors)


def _of_phase(branch: Branch, phase: int, drop: float, removed: float, trained_steps: int | None) -> Branch:
    """The branch as it is run in a phase."""
    peak = branch.learning_rate
    if trained_steps is not None:
        peak = adaptive_peak(peak, drop, removed, min(branch.steps / trained_steps, 1) * peak)
    return dataclasses.replace(branch, seed=branch.seed + phase * _SEEDS_OF_A_PHASE, learning_rate=peak)


def _norm(layers: Sequence[WeightLayer]) -> float:
    return float(torch.stack([each.weight.detach().double().square().sum() for each in layers]).sum().sqrt())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, each in tensors.items():
        digest.update(name.encode() + each.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
