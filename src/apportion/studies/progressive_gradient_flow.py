"""Study of *Progressive Gradient Flow for Robust N:M Sparsity Training* (Bambhaniya et al. 2024, arXiv 2402.04744).

Digits, 64-256-256-10, both hidden layers N:M; AdamW with weight decay 0.01, the same steps and batches for every arm.
What is judged is the *binary* final network on test pictures. The clocks are the method sheet's: linear decay is over
at half the run, exponential reaches e^-10 at its end, the last tenth is binary. Each arm has the learning rate, of
three, with the lowest validation loss at 1:16 on a seed of its own; a smoke run takes the middle one.

Written down before the first run: the verdict counts that the exponential decay beats one-shot pruning of the dense run
from 1:8 on; that it is more accurate than SR-STE at 1:16 and 1:32, where the paper finds its gain; and that gradients
of pruned weights have a smaller second moment under the masked gradient than under SR-STE at 1:32, which is the paper's
explanation. All else is shown.
"""

import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apportion.data.digits import Digits, digits
from apportion.report import plots
from apportion.studies.finding import Comparison, Finding, Measured, Scale, Values, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.small_networks import DigitsNetwork, batches_of, best_rate, fit, judged, seeded
from apportion.studies.workbench import Workbench
from apportion.training import Hook
from apportion.weights import NofMPattern, WeightLayer, add_masks, choose_masks, prunable
from apportion.weights.progressive_gradient_flow import ProgressiveGradientFlow, finish

CLAIM = (
    "Letting pruned weights fade while N:M masks are trained (MdGf) gives a more accurate network than SR-STE at high "
    "sparsity, because less noise reaches the weights that are pruned."
)
BASELINE = (
    "SR-STE at the same steps and its own learning rate; one-shot N:M of the dense run, STE and random masks beside"
)

_WIDTHS = (64, 256, 256, 10)
_RATES = (5e-4, 1e-3, 2e-3)
_BATCH, _TUNED_AT = 64, "1:16"
_ONE_SHOT, _RANDOM = "one-shot", "random masks"
_SR_STE, _EXPONENTIAL, _MASKED = "SR-STE", "MdGf exponential", "MdGf exponential, masked gradient"
# ``decay_frac`` is of the decay phase, nine tenths of the run.
_FLOWS: dict[str, dict[str, Any]] = {
    "STE": {"recipe": "ste"},
    _SR_STE: {"recipe": "sr_ste"},
    "MdGf linear": {"recipe": "linear", "decay_frac": 0.5 / 0.9},
    _EXPONENTIAL: {"recipe": "exponential", "decay_frac": 1.0},
    _MASKED: {"recipe": "exponential", "decay_frac": 1.0, "gradient": "masked"},
    "SdGf stepwise": {"recipe": "stepwise"},
    "SdGf stepwise, masked gradient": {"recipe": "stepwise", "gradient": "masked"},
    "SdGf geometric": {"recipe": "geometric"},
}


@dataclass(frozen=True)
class _Size:
    """How much is measured."""

    patterns: tuple[str, ...] = ("2:4", "1:8", "1:16", "1:32")
    steps: int = 400
    tuned: bool = True


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(patterns=("1:8", "1:32"), steps=60, tuned=False),
    "default": _Size(),
    "long": _Size(steps=3000),
    "gpu": _Size(steps=3000),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    with one_thread():
        rates = {arm: _rate(arm, size, bench) for arm in ("dense", _RANDOM, *_FLOWS)}
        measured = Measured()
        for seed in seeds:
            settings = [asdict(size), rates, seed]
            measured.add(bench.measure(f"seed {seed}", settings, partial(_of_seed, size, rates, seed)))
    return Finding(
        slug="progressive_gradient_flow",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(size, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size, rates),
        plots={"accuracy": _picture(size, measured)},
    )


def _rate(arm: str, size: _Size, bench: Workbench) -> float:
    """The learning rate of an arm."""
    if not size.tuned:
        return _RATES[1]

    def trained(rate: float, data: Digits, seed: int) -> nn.Module:
        return _train(arm, _TUNED_AT, size.steps, rate, data, seed)[0]

    return best_rate(bench, arm, asdict(size), _RATES, trained)


def _of_seed(size: _Size, rates: dict[str, float], seed: int) -> dict[str, dict[str, float]]:
    """Every arm at every pattern."""
    data = digits(seed)
    dense, _ = _train("dense", "", size.steps, rates["dense"], data, seed)
    found = {"dense": judged(dense, data)}
    for pattern in size.patterns:
        pruned, _ = _train("dense", "", 0, 0.0, data, seed)
        pruned.load_state_dict(dense.state_dict())
        _prune(pruned, pattern)
        found[f"{pattern}: {_ONE_SHOT}"] = judged(pruned, data)
        for arm in (_RANDOM, *_FLOWS):
            if not _fits(arm, pattern):
                continue
            network, seen = _train(arm, pattern, size.steps, rates[arm], data, seed)
            found[f"{pattern}: {arm}"] = judged(network, data) | seen
    return found


def _fits(arm: str, pattern: str) -> bool:
    """Windows of 8M do not fit 64 inputs at high sparsity."""
    return arm != "SdGf geometric" or _WIDTHS[0] % (8 * int(pattern.split(":")[1])) == 0


def _train(
    arm: str, pattern: str, steps: int, rate: float, data: Digits, seed: int
) -> tuple[nn.Module, dict[str, float]]:
    """A finished binary network of an arm, and what was seen on the way."""
    network = seeded(partial(DigitsNetwork, _WIDTHS), seed)
    if steps == 0:
        return network, {}
    hooks: list[Hook[Any]] = []
    watched = _Watch()
    cost = {}
    if arm in _FLOWS:
        # Where geometric windows do not fit the pattern that learning rates are chosen at, the largest that does.
        chosen = _parse(pattern if _fits(arm, pattern) else "1:8")
        flow = ProgressiveGradientFlow(chosen, fine_tune_fraction=0.1, **_FLOWS[arm])
        hooks = [flow.start(network, _hidden(network), steps), watched]
        cost = {"training compute of the layers": flow.cost(steps)}
    elif arm == _RANDOM:
        draws = torch.Generator().manual_seed(seed)
        scores = {each.name: torch.rand(each.matrix().shape, generator=draws) for each in _hidden(network)}
        add_masks(network, choose_masks(scores, _parse(pattern)))
        cost = {"training compute of the layers": ProgressiveGradientFlow(_parse(pattern), "ste").cost(1)}
    batches = batches_of(*data.train, _BATCH, seed)

    def adam_w(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, rate, weight_decay=0.01, fused=True)

    fit(network, batches, steps, rate, seed=seed, hooks=hooks, optimizer=adam_w)
    finish(network)
    return network, watched.means() | cost


class _Watch(Hook[nn.Module]):
    """Means over the run of what the method's own hook logs."""

    every = 10
    names = ("second_moment_pruned", "second_moment_kept", "flip_rate")

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = defaultdict(list)

    def after_step(self, module: nn.Module, step: int, metrics: dict[str, Any], /) -> None:
        """Keep every tenth."""
        if step % self.every == 0:
            for name in self.names:
                self._seen[name].append(metrics[name])

    def means(self) -> dict[str, float]:
        """By their names, for people; second moments as powers of ten, but where no gradient arrives at all."""
        found = {name: float(torch.stack(values).mean()) for name, values in self._seen.items()}
        flips = found.pop("flip_rate", None)
        moments = {f"{name.replace('_', ' ')}, log10": math.log10(value) for name, value in found.items() if value}
        return moments | ({} if flips is None else {"flip rate": flips})


def _hidden(network: nn.Module) -> list[WeightLayer]:
    return prunable(network)[:-1]


def _prune(network: nn.Module, pattern: str) -> None:
    for layer in _hidden(network):
        matrix = layer.matrix().detach()
        layer.set_matrix(torch.where(_parse(pattern).keep(matrix.abs()), matrix, 0))


def _parse(pattern: str) -> NofMPattern:
    n, m = map(int, pattern.split(":"))
    return NofMPattern(n, m)


def _claims(size: _Size, measured: Values) -> list[Comparison]:
    def of(pattern: str, arm: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{pattern}: {arm}"][metric])

    claims: list[tuple[str, Tensor, bool]] = []
    for pattern in size.patterns:
        sparse = int(pattern.split(":")[1]) >= 8
        high = pattern in ("1:16", "1:32")
        better = partial(_more, of, pattern, "accuracy")
        claims.append(
            (f"{pattern}: {_EXPONENTIAL} is more accurate than one-shot", better(_EXPONENTIAL, _ONE_SHOT), sparse)
        )
        claims.append(
            (f"{pattern}: {_EXPONENTIAL} is more accurate than {_SR_STE}", better(_EXPONENTIAL, _SR_STE), high)
        )
        claims.append(
            (
                f"{pattern}: {_EXPONENTIAL} has a lower loss than {_SR_STE}",
                -_more(of, pattern, "loss", _EXPONENTIAL, _SR_STE),
                False,
            )
        )
        for arm in ("MdGf linear", "SdGf stepwise"):
            claims.append((f"{pattern}: {arm} is more accurate than {_SR_STE}", better(arm, _SR_STE), False))
        claims.append((f"{pattern}: STE is more accurate than random masks", better("STE", _RANDOM), False))
        claims.append(
            (
                f"{pattern}: the masked gradient is more accurate than the dense one, {_EXPONENTIAL}",
                better(_MASKED, _EXPONENTIAL),
                False,
            )
        )
    first, last = size.patterns[0], size.patterns[-1]
    moments = {arm: of(last, arm, "second moment pruned, log10") for arm in (_SR_STE, _EXPONENTIAL, _MASKED)}
    for arm, counted in ((_MASKED, True), (_EXPONENTIAL, False)):
        claims.append(
            (
                f"{last}: second moment of pruned weights' gradients (log10) is smaller under {arm} than {_SR_STE}",
                moments[_SR_STE] - moments[arm],
                counted,
            )
        )
    claims.append(
        (
            f"under {_SR_STE} that second moment is larger at {last} than at {first} (log10)",
            moments[_SR_STE] - of(first, _SR_STE, "second moment pruned, log10"),
            False,
        )
    )
    return [Comparison.positive(claim, margin.tolist(), part_of_verdict=counted) for claim, margin, counted in claims]


def _more(of: Any, pattern: str, metric: str, arm: str, other: str) -> Tensor:
    return of(pattern, arm, metric) - of(pattern, other, metric)


def _picture(size: _Size, measured: Values) -> str:
    arms = (_ONE_SHOT, _RANDOM, "STE", _SR_STE, "MdGf linear", _EXPONENTIAL, "SdGf stepwise")
    points = [
        _point(arm, pattern, measured[f"{pattern}: {arm}"]["accuracy"]) for arm in arms for pattern in size.patterns
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = plots.pareto(
            Path(folder) / "accuracy.svg",
            points,
            cost="M / N",
            quality="test accuracy of the binary network",
            title="Digits, N:M hidden layers",
            log_cost=True,
        )
        return path.read_text(encoding="utf-8")


def _point(arm: str, pattern: str, values: Sequence[float]) -> plots.ParetoPoint:
    array = torch.tensor(values)
    stderr = float(array.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0
    return plots.ParetoPoint(arm, 1 / _parse(pattern).density, float(array.mean()), quality_stderr=stderr)


def _notes(size: _Size, rates: dict[str, float]) -> list[str]:
    tuned = ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items())
    how = (
        f"chosen of {', '.join(f'{each:g}' for each in _RATES)} by validation loss at {_TUNED_AT}, one seed of its own"
    )
    return [
        f"Learning rates: {tuned}; {how if size.tuned else 'not tuned at this scale'}. (Geometric windows do not "
        f"fit at {_TUNED_AT}: that rate was chosen at 1:8.) One-shot is the dense run's network.",
        f"{size.steps} steps of {_BATCH} pictures; each seed has its own split, network and batches.",
        "Training compute of the layers: forward products with binary masks count by density; the backward product and "
        "the weights' gradient count in full, and so do steps with soft masks. One-shot and dense count 1.",
        "Second moments: running means of squared gradients (0.999), averaged over the run. They depend on how small "
        "the loss is, not on the recipe alone.",
    ]
