"""Study of *Dynamic Sparse No Training* (Zhang et al. 2023, arXiv 2310.08915), with Wanda and SparseGPT beside it.

SmolLM2 is pruned to 60 % of zeros in each row, from a mask of magnitudes and from Wanda's, with and without swaps, and
judged by the loss on held-out code, by how far layers' outputs are off, and by how far their means are. Each arm goes
through the whole model by itself: what its pruned blocks put out is what its later blocks are calibrated on.

What counts was written down before the first run, from the pilot of the method sheet: swaps help a mask of magnitudes,
and on Wanda's mask a number of swaps scaled to the width of a row does better than the published 50. That DSnoT beats
Wanda, which the paper says of models thirty and more times as large, and that it beats making up for the means with a
bias, are computed and shown, but the pilot had them as ties or worse, and they do not count. Nothing is tuned.
"""

import random
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from apportion.models import LanguageModel, load
from apportion.models.block_walk import walked_losses
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Measured, Row, Scale, Values, collect_rows
from apportion.studies.machine import machine
from apportion.studies.workbench import Workbench
from apportion.weights.dsnot import DSnoT
from apportion.weights.one_shot import prune_model
from apportion.weights.one_shot_method import OneShotMethod
from apportion.weights.patterns import Pattern, Unstructured
from apportion.weights.pruned_checkpoint import Text, read_windows
from apportion.weights.sparsegpt import SparseGPT
from apportion.weights.wanda import Magnitude, Wanda

CLAIM = (
    "Swapping pruned for kept weights until each output's mean is right, without training, makes a pruned language "
    "model better, if the number of swaps fits the width of its rows."
)
BASELINE = "the same mask without swaps, and the published 50 swaps whatever the width, at the same zeros in every row"

_MAGNITUDE, _WANDA = "magnitude", "Wanda"
_SWAPPED, _PUBLISHED = f"{_WANDA}, swaps", f"{_WANDA}, 50 swaps, attention only (as published)"
_FROM_MAGNITUDE, _BIAS = f"{_MAGNITUDE}, swaps", f"{_WANDA}, mean-bias correction"
_SECOND = f"{_WANDA}, swaps for the squared error"
_LOSS, _ERROR, _MEAN, _SWAPS = "loss", "output error", "mean error", "swaps a row"

# Every arm by its name: the method, and who competes.
_ARMS: dict[str, tuple[OneShotMethod, str]] = {
    _MAGNITUDE: (Magnitude(), "row"),
    _FROM_MAGNITUDE: (DSnoT(start="magnitude"), "row"),
    _WANDA: (Wanda(), "row"),
    _SWAPPED: (DSnoT(), "row"),
    _PUBLISHED: (DSnoT(preset="reference"), "row"),
    _BIAS: (DSnoT(cycles=0, correct_mean=True), "row"),
    f"{_MAGNITUDE} over the layer": (Magnitude(), "layer"),
    f"{_MAGNITUDE}, 50 swaps": (DSnoT(start="magnitude", preset="reference", attention_only=False), "row"),
    f"{_WANDA}, 50 swaps": (DSnoT(preset="reference", attention_only=False), "row"),
    f"{_WANDA}, swaps in attention only": (DSnoT(attention_only=True), "row"),
    _SECOND: (DSnoT(objective="second_moment"), "row"),
    "SparseGPT": (SparseGPT(), "row"),
}
_FIRST_ARMS = tuple(_ARMS)[:6]
_LESS_SPARSE = (_WANDA, _SWAPPED, "SparseGPT")


@dataclass(frozen=True)
class _Size:
    """How much is measured, for each seed."""

    samples: int = 6  # calibration windows
    context: int = 192  # tokens of each
    evaluation_tokens: int = 2048
    arms: tuple[str, ...] = _FIRST_ARMS
    less_sparse: tuple[str, ...] = ()  # arms at 50 % too
    error_every: int = 3  # blocks whose layers' errors are measured
    blocks: tuple[int, ...] = ()  # that are pruned; all if empty


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(samples=2, context=48, evaluation_tokens=190, error_every=1, blocks=(2, 15)),
    "default": _Size(),
    "long": _Size(
        samples=16,
        context=256,
        evaluation_tokens=8192,
        arms=tuple(_ARMS),
        less_sparse=(_MAGNITUDE, *_LESS_SPARSE),
        error_every=1,
    ),
}
_SIZES["gpu"] = replace(_SIZES["long"], samples=128, context=2048, evaluation_tokens=32_768)


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    bench.say("loading smollm2")
    lm = load("smollm2")
    trial = _Trial(lm, size)
    arms: list[tuple[str, str | None, float]] = [("60 %: dense", None, 0.0)]
    arms += [(f"60 %: {name}", name, 0.6) for name in size.arms]
    arms += [(f"50 %: {name}", name, 0.5) for name in size.less_sparse]
    measured = Measured()
    for seed in seeds:
        for title, name, sparsity in arms:
            found = bench.measure(
                f"{title}, seed {seed}",
                [asdict(size), title, seed],
                partial(trial.measured, name, sparsity, seed),
            )
            measured.add({title: found})
    return Finding(
        slug="dsnot",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size),
        plots={"losses": _plot(measured)},
    )


class _Trial:
    """A model that is pruned over and over, always from its dense weights."""

    def __init__(self, lm: LanguageModel, size: _Size) -> None:
        self._lm, self._size = lm, size
        self._found: dict[int, tuple[Tensor, Tensor]] = {}
        self._dense = {name: each.clone() for name, each in lm.model.state_dict().items()}
        self._without_bias = [each for each in lm.model.modules() if isinstance(each, nn.Linear) and each.bias is None]

    def measured(self, name: str | None, sparsity: float, seed: int) -> dict[str, float]:
        """The figures of one arm, or of the dense model."""
        calibration, evaluation = self._texts(seed)
        found = {} if name is None else self._pruned(name, sparsity, calibration)
        loss = float(walked_losses(self._lm, evaluation).double().mean())
        self._restore()
        return {_LOSS: loss, **found}

    def _pruned(self, name: str, sparsity: float, calibration: Tensor) -> dict[str, float]:
        method, scope = _ARMS[name]
        pattern: Pattern = Unstructured(sparsity, scope)  # type: ignore[arg-type]
        include = [f"*.layers.{block}.*" for block in self._size.blocks] or ["*"]
        report = prune_model(
            self._lm,
            calibration,
            method,
            pattern,
            include=include,
            error_every=self._size.error_every,
            progress=False,
        )
        found = {_MEAN: sum(each.mean_error for each in report.layers) / len(report.layers)}
        if report.error is not None:
            found[_ERROR] = report.error
        if isinstance(method, DSnoT):
            found[_SWAPS] = report.figure("swaps")
        return found

    def _texts(self, seed: int) -> tuple[Tensor, Tensor]:
        """Windows of one seed, each from other documents than the other kind's."""
        if seed not in self._found:
            self._found[seed] = self._read(seed)
        return self._found[seed]

    def _read(self, seed: int) -> tuple[Tensor, Tensor]:
        size = self._size
        text = Text("code", None, size.samples, size.context, 4 * size.evaluation_tokens, seed)
        windows = read_windows(self._lm, text)
        count = -(-size.evaluation_tokens // (size.context - 1))
        chosen = random.Random(seed).sample(range(len(windows.evaluation)), count)
        return windows.calibration, windows.evaluation[chosen]

    def _restore(self) -> None:
        for each in self._without_bias:
            each.register_parameter("bias", None)
        self._lm.model.load_state_dict(self._dense)


def _claims(measured: Values) -> list[Comparison]:
    def lower(better: str, worse: str) -> list[float]:
        pairs = zip(measured[f"60 %: {worse}"][_LOSS], measured[f"60 %: {better}"][_LOSS], strict=True)
        return [other - own for other, own in pairs]

    claims = [
        ("60 %, mask of magnitudes: swaps lower the loss", _FROM_MAGNITUDE, _MAGNITUDE, True),
        ("60 %, Wanda's mask: swaps scaled to the width do better than 50 as published", _SWAPPED, _PUBLISHED, True),
        ("60 %, Wanda's mask: swaps scaled to the width lower the loss", _SWAPPED, _WANDA, False),
        ("60 %, Wanda's mask: 50 swaps as published lower the loss", _PUBLISHED, _WANDA, False),
        ("60 %: swaps lower the loss more than mean-bias correction", _SWAPPED, _BIAS, False),
        ("60 %: swaps for the mean lower the loss more than swaps for the squared error", _SWAPPED, _SECOND, False),
        ("60 %: SparseGPT has a lower loss than Wanda with swaps", "SparseGPT", _SWAPPED, False),
    ]
    return [
        Comparison.positive(claim, lower(better, worse), part_of_verdict=counted)
        for claim, better, worse, counted in claims
        if f"60 %: {better}" in measured and f"60 %: {worse}" in measured
    ]


def _notes(size: _Size) -> list[str]:
    pruned = "all blocks' linear layers" if not size.blocks else f"linear layers of blocks {size.blocks}"
    return [
        f"Each seed has its own {size.samples} windows of {size.context} tokens of Python's standard library to "
        f"calibrate on, and its own windows with at least {size.evaluation_tokens} predicted tokens of other files to "
        f"be judged on; {pruned} are pruned. Perplexity is exp(loss).",
        "Equal budget: every arm keeps the same number of weights in every row, but for magnitudes over the layer and "
        "SparseGPT (exact for 128 columns); mean-bias correction has one more number a row, and SparseGPT changes the "
        "weights that stay.",
        "Swaps: at most 1.2 % of a row's width, none beyond the error's change of sign. As published: 50, down to an "
        "error of 0.1 in sums over a text (here of fewer tokens than the paper's 2048), overshoot allowed.",
        "output error: squared change of a layer's output over its squared output, on the calibration text, a mean "
        f"over layers of every {size.error_every}. block; mean error: change of the outputs' means over their size.",
        "Nothing is tuned. SmolLM2's weights were quantised to 4 bits once, so that ties among magnitudes are many.",
    ]


def _plot(measured: Values) -> str:
    rows = []
    for name, metrics in measured.items():
        for metric in (_LOSS, _ERROR):
            if metric in metrics:
                row = Row.of(name.removeprefix("60 %: "), metric, metrics[metric])
                rows.append(ResultRow(row.name, row.metric, row.mean, row.stderr, row.n))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(Path(folder) / "losses.svg", rows, title="SmolLM2 with 60 % zeros")
        return path.read_text(encoding="utf-8")
