"""Study of *CSKV: Training-Efficient Channel Shrinking for KV Cache* (Wang et al. 2024, arXiv 2409.10593).

SmolLM2's keys and values are coded by joint low-rank factors at equal numbers of channels. Where the factors come from
is compared: the closed form (the optimum of CSKV's loss), activation-aware and plain singular value decompositions of
the projections' weights, principal directions by head, random directions. A seed has its own calibration and evaluation
documents.

Four parts. *Rebuilding*: relative errors of keys and values on unseen text, means over layers. *Reading on*: the loss
on tokens that follow a compressed prompt, one at a time, in nats above the same model with a plain cache: channels,
windows, splits between keys and values, factors, four bits. *Training*: the paper's layer-wise reconstruction from both
decompositions, and through quantisation, in a few layers. *Needles*: answers about a compressed context.

The margins by which plain decompositions must be beaten are those of the method sheet's pilot (section 5.7); they were
fixed before anything here was measured.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.data import corpus
from apportion.data.tasks.shared_context import SharedContext, needles
from apportion.keys import ComposedMemory, KeyBudget, Trace, record_trace
from apportion.keys.cskv import CSKV
from apportion.keys.low_rank import (
    PARTS,
    Factors,
    Moments,
    activation_scale,
    at_random,
    biases_of,
    from_weights,
    joint_parts,
    principal,
    rank_of,
    relative_error,
)
from apportion.keys.memory import MakeComposed
from apportion.keys.one_by_one import one_by_one
from apportion.keys.quantising import quantisers
from apportion.keys.reconstruction import Batch, LayerReconstructions, Reconstruction, batch_of, train_factors
from apportion.keys.scoring import encode_parts
from apportion.keys.selectors import SinksAndRecent
from apportion.keys.side_by_side import read_on
from apportion.keys.trace import encode_texts, record_tokens
from apportion.models import LanguageModel, load
from apportion.models.key_projections import KeyProjections, key_projections
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "Keys and values compress to 20-40 % of their channels by joint low-rank codes that are fitted to activations and "
    "an exact window of recent tokens; at equal channels they lose less than a plain SVD of the weights, keys bear it "
    "far better than values, and the exact window helps."
)
BASELINE = "plain SVD of the projections' weights at the same channels and window"

Measured = dict[str, dict[str, list[float]]]

# Section 5.7 of the method sheet: relative error of the weights' SVD less that of the closed form, on unseen text.
_MARGINS = {("keys", 0.5): 0.086, ("keys", 0.2): 0.172, ("values", 0.5): 0.144, ("values", 0.2): 0.155}
_CLOSED, _SVD, _ASVD = "closed form", "SVD of the weights", "ASVD, alpha 0.5"


@dataclass(frozen=True)
class _Size:
    """How much is measured."""

    model: str = "smollm2"
    text: str = "english"
    calibration: int = 4  # texts a seed
    length: int = 512  # tokens of each
    texts: int = 4  # to judge on, a seed
    prefix: int = 384
    later: int = 57  # tokens after the prefix; all but the first are scored
    training_layers: tuple[int, ...] = (10,)
    training_steps: int = 150
    end_to_end_training: bool = False
    needles: int = 17  # prompts a seed: 51 in all with three
    needle_words: int = 100
    device: str = "cpu"


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        calibration=1, length=128, texts=1, prefix=64, later=5, training_steps=4, needles=1,
        needle_words=40,
    ),
    "default": _Size(),
    "long": _Size(
        calibration=8, length=1024, texts=5, later=129, training_layers=(5, 10, 15, 25), training_steps=400,
        end_to_end_training=True, needle_words=400,
    ),
    "gpu": _Size(
        calibration=32, length=2048, texts=16, prefix=3072, later=257, training_steps=1000, end_to_end_training=True,
        needles=50, needle_words=2000, device="cuda",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class _Arm:
    """A way to keep a prompt."""

    name: str
    factors: str = _CLOSED
    key_density: float = 0.2
    value_density: float = 0.6
    window: int = 32
    bits: int | None = None

    @property
    def label(self) -> str:
        return f"{self.name} (K {self.key_density:g}, V {self.value_density:g}, window {self.window})"


_AT_60 = _Arm("closed form")
_AT_80 = replace(_AT_60, key_density=0.1, value_density=0.3)
_HALF = replace(_AT_60, key_density=0.25, value_density=0.75)
_ARMS = [
    *(replace(at, name=name.lower() if name == _CLOSED else name, factors=name)
      for at in (_AT_60, _AT_80) for name in (_CLOSED, _ASVD, _SVD)),
    _HALF,
    replace(_HALF, key_density=0.5, value_density=0.5),
    replace(_HALF, key_density=0.75, value_density=0.25),
    *(replace(_HALF, window=window) for window in (0, 16)),
    replace(_AT_60, name="closed form, 4 bits", bits=4),
]  # fmt: skip
_NEEDLE_ARMS = [
    _AT_60,
    replace(_AT_60, name=_SVD, factors=_SVD),
    _AT_80,
    replace(_AT_60, key_density=0.6, value_density=0.2),
]


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    bench.say(f"loading {size.model}")
    lm = load(size.model, device=size.device)
    documents, projections = _Documents(lm, size), key_projections(lm)
    measured: Measured = defaultdict(lambda: defaultdict(list))
    with one_thread():
        for seed in seeds:
            found = bench.measure(
                f"seed {seed}", [asdict(size), seed], partial(_of_seed, lm, projections, size, documents, seed, bench)
            )
            for name, figures in found.items():
                for metric, value in figures.items():
                    measured[name][metric].append(value)
    return Finding(
        slug="cskv",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(size, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=_notes(size, measured),
        plots={"reading-on": _plot(measured)},
    )


class _Documents:
    """Texts of the corpus that are long enough, dealt out so that no two uses share a document."""

    def __init__(self, lm: LanguageModel, size: _Size) -> None:
        self._lm, self._size = lm, size
        self._source = self._long_enough()
        self._dealt: list[str] = []

    def of_seed(self, seed: int) -> tuple[list[str], list[str], list[str]]:
        """For calibration, to judge on, and as filler around needles."""
        size = self._size
        each = size.calibration + size.texts + 1
        while len(self._dealt) < (seed + 1) * each:
            self._dealt.append(next(self._source))
        own = self._dealt[seed * each : (seed + 1) * each]
        return own[: size.calibration], own[size.calibration : -1], own[-1:]

    def _long_enough(self) -> Iterator[str]:
        wanted = max(self._size.length, self._size.prefix + self._size.later)
        for document in corpus(self._size.text):
            if len(document.text) > max(4 * wanted, 8 * self._size.needle_words) and (
                len(self._lm.tokenizer(document.text, truncation=True, max_length=wanted)["input_ids"]) == wanted
            ):
                yield document.text


def _of_seed(
    lm: LanguageModel,
    projections: dict[int, KeyProjections],
    size: _Size,
    documents: _Documents,
    seed: int,
    bench: Workbench,
) -> dict[str, dict[str, float]]:
    calibration, judged, filler = documents.of_seed(seed)
    bench.say(f"seed {seed}: calibration and unseen text")
    fitted = _Fitted(lm, projections, calibration, size)
    ids = torch.stack(encode_texts(lm, judged, size.prefix + size.later))
    unseen = record_trace(lm, judged, tokens=size.prefix, hidden=True)
    found = _rebuilding(fitted, unseen, seed)
    bench.say(f"seed {seed}: training in layers {size.training_layers}")
    found |= _training(fitted, unseen, size)
    bench.say(f"seed {seed}: reading on")
    found |= _reading_on(lm, fitted, unseen, ids[:, size.prefix :], size)
    bench.say(f"seed {seed}: needles")
    tasks = needles(size.needles, filler=filler, words=size.needle_words, keys=2, seed=seed)
    return found | _needles(lm, fitted, tasks)


class _Fitted:
    """What is known of the model from one seed's calibration texts, and factors made from it."""

    def __init__(
        self, lm: LanguageModel, projections: dict[int, KeyProjections], texts: list[str], size: _Size
    ) -> None:
        self.lm, self.projections, self.size = lm, projections, size
        self.trace = record_tokens(lm, encode_texts(lm, texts, size.length), hidden=True)
        self.moments = self.moments_of(self.trace)
        if not size.end_to_end_training:
            kept = {layer: self.trace.steps[layer] for layer in size.training_layers}
            self.trace = Trace(self.trace.facts, kept)
        self._whole: dict[tuple[str, int, str, int], Factors] = {}

    def moments_of(self, trace: Trace) -> dict[int, Moments]:
        """The moments of every layer of a trace."""
        found = {layer: Moments() for layer in trace.layers}
        for layer, steps in trace.steps.items():
            widths = {part: x.shape[-1] for part, x in joint_parts(steps[0]).items()}
            for step in steps:
                found[layer].add(step, biases_of(self.projections[layer], widths))
        return found

    def factors(self, name: str, layer: int, part: str, density: float, seed: int = 0) -> Factors:
        """Factors of a layer's keys or values, for as many channels as a method of that density has."""
        second, groups = self.moments[layer].second[part], self.trace.facts[layer].groups
        rank = rank_of(density, len(second) // groups, groups, part)
        bias = biases_of(self.projections[layer], {each: len(self.moments[layer].second[each]) for each in PARTS})[part]
        if name == "principal directions by head":
            return principal(second, rank, bias, blocks=groups)
        key = (name, layer, part, seed)
        if key not in self._whole:
            self._whole[key] = self._all_channels(name, layer, part, bias, seed)
        # The best few channels of all of these are the first few.
        whole = self._whole[key]
        return Factors(whole.down[:, :rank], whole.up[:rank], bias)

    def _all_channels(self, name: str, layer: int, part: str, bias: Tensor, seed: int) -> Factors:
        if name == _CLOSED:
            return principal(self.moments[layer].second[part], len(bias), bias)
        if name == "random directions":
            return at_random(len(bias), bias, 1000 * seed + 2 * layer + PARTS.index(part))
        alpha = {_SVD: None, _ASVD: 0.5, "ASVD, alpha 1": 1.0}[name]
        scale = None if alpha is None else activation_scale(self.moments[layer], alpha)
        return from_weights(getattr(self.projections[layer], part), len(bias), scale)

    def method(self, arm: _Arm) -> CSKV:
        """The arm as a method that can be used."""
        densities = {"keys": arm.key_density, "values": arm.value_density}
        method = CSKV(arm.key_density, arm.value_density, arm.window, bits=arm.bits)
        factors = {
            layer: {part: self.factors(arm.factors, layer, part, densities[part]) for part in PARTS}
            for layer in self.moments
        }
        method.take(factors, self.lm)
        return method

    def batches(self, layers: list[int]) -> list[Batch]:
        """What layers made of each calibration text."""
        texts = range(len(self.trace.steps[layers[0]]))
        return [batch_of([self.trace.steps[layer][text] for layer in layers]) for text in texts]

    def train(
        self, name: str, layers: list[int], densities: Mapping[str, float], *, bits: int | None = None
    ) -> dict[int, dict[str, Factors]]:
        """Factors after the paper's training from one of the beginnings."""
        start = {layer: {part: self.factors(name, layer, part, densities[part]) for part in PARTS} for layer in layers}
        batches = self.batches(layers)
        settings = Reconstruction(learning_rate=_RATE, length=self.size.length)
        steps = self.size.training_steps
        given = (lambda step: batches[step % len(batches)]), steps, start, self.projections, quantisers(bits, 32)
        trained, _ = train_factors(*given, settings, device=self.size.device, progress=False)
        return trained


# Tokens of each text in one pass: more give no time, and their logits take memory.
_STRIDE = 28
# The pilot's; the paper's 5e-5 is for a thousand steps of a larger model.
_RATE = 5e-4


# --- rebuilding ------------------------------------------------------------------------------------------------------


def _rebuilding(fitted: _Fitted, unseen: Trace, seed: int) -> dict[str, dict[str, float]]:
    """Relative errors on unseen text, means over layers."""
    moments = fitted.moments_of(unseen)
    names = (_CLOSED, "ASVD, alpha 1", _ASVD, "principal directions by head", _SVD, "random directions")
    found: dict[str, dict[str, float]] = {}
    for name in names:
        found[f"rebuilding: {name}"] = {}
        for part, density in _MARGINS:
            errors = [
                relative_error(fitted.factors(name, layer, part, density, seed), moments[layer].second[part])
                for layer in unseen.layers
            ]
            found[f"rebuilding: {name}"][_error_of(part, density)] = sum(errors) / len(errors)
    return found


def _error_of(part: str, density: float) -> str:
    return f"relative error of {part} at {density:.0%}"


# --- training --------------------------------------------------------------------------------------------------------


def _training(fitted: _Fitted, unseen: Trace, size: _Size) -> dict[str, dict[str, float]]:
    """Mean squared errors, sums over parts and means over the trained layers, at 20 % of keys and 60 % of values."""
    layers, densities = list(size.training_layers), {"keys": 0.2, "values": 0.6}
    in_sample = fitted.batches(layers)
    # Whole groups of tokens.
    tokens = size.prefix - size.prefix % 32
    later = [batch_of([unseen.steps[layer][text] for layer in layers]) for text in range(len(unseen.steps[layers[0]]))]
    out_of_sample = [tuple(x[:, :tokens] for x in batch) for batch in later]
    plain, four_bits = quantisers(None, 32), quantisers(4, 32)
    arms: dict[str, dict[int, dict[str, Factors]]] = {}
    for name in (_CLOSED, _ASVD, _SVD):
        arms[name] = {
            layer: {part: fitted.factors(name, layer, part, densities[part]) for part in PARTS} for layer in layers
        }
        if name != _CLOSED:
            arms[f"{name}, trained"] = fitted.train(name, layers, densities)
    trained_for_bits = {
        f"{name}, trained through 4 bits": fitted.train(name, layers, densities, bits=4) for name in (_CLOSED, _ASVD)
    }
    found: dict[str, dict[str, float]] = {}
    for name, factors in {**arms, **trained_for_bits}.items():
        figures = {}
        for where, batches in (("calibration text", in_sample), ("unseen text", out_of_sample)):
            if name in arms:
                figures[f"error on {where}"] = _error(factors, fitted, plain, batches)
            figures[f"error on {where}, 4 bits"] = _error(factors, fitted, four_bits, batches)
        found[f"training: {name}"] = figures
    return found


@torch.no_grad()
def _error(factors: Mapping[int, Mapping[str, Factors]], fitted: _Fitted, bits: Any, batches: list[Batch]) -> float:
    module = LayerReconstructions(factors, fitted.projections, bits).to(fitted.size.device)
    losses = [sum(float(loss) for loss in module(batch).values()) for batch in batches]
    return sum(losses) / len(losses) / len(module.layers)


# --- reading on ------------------------------------------------------------------------------------------------------


def _reading_on(
    lm: LanguageModel, fitted: _Fitted, prompts: Trace, later: Tensor, size: _Size
) -> dict[str, dict[str, float]]:
    makers: dict[str, MakeComposed] = {"plain cache": ComposedMemory}
    for arm in _ARMS:
        makers[arm.label] = partial(one_by_one, fitted.method(arm))
    if size.end_to_end_training:
        makers |= _trained_arms(lm, fitted)
    found = read_on(lm, prompts, later, makers, stride=_STRIDE)
    dense = found["plain cache"]
    figures = {"reading on: plain cache": {"NLL": float(dense.nll.mean())}}
    for name, each in found.items():
        if each is not dense:
            figures[f"reading on: {name}"] = {
                "NLL above the plain cache": float((each.nll - dense.nll).mean()),
                "bytes held, share": each.usage.share_held,
            }
    return figures


def _trained_arms(lm: LanguageModel, fitted: _Fitted) -> dict[str, MakeComposed]:
    """All layers trained: too dear for the default scale."""
    makers: dict[str, MakeComposed] = {}
    densities = {"keys": _AT_60.key_density, "values": _AT_60.value_density}
    layers = sorted(fitted.moments)
    for name, bits in ((_ASVD, None), (_SVD, None), (_ASVD, 4), (_CLOSED, 4)):
        arm = replace(_AT_60, name=f"{name}, trained" + (" through 4 bits" if bits else ""), bits=bits)
        method = CSKV(arm.key_density, arm.value_density, arm.window, bits=bits)
        method.take(fitted.train(name, layers, densities, bits=bits), lm)
        makers[arm.label] = partial(one_by_one, method)
    return makers


# --- needles ---------------------------------------------------------------------------------------------------------


def _needles(lm: LanguageModel, fitted: _Fitted, tasks: list[SharedContext]) -> dict[str, dict[str, float]]:
    def recent(facts: Any) -> ComposedMemory:
        return ComposedMemory(facts, selector=SinksAndRecent(KeyBudget(keys=68, sinks=4, recent=64)))

    makers: dict[str, MakeComposed] = {"plain cache": ComposedMemory}
    makers |= {arm.label: partial(one_by_one, fitted.method(arm), turn=True) for arm in _NEEDLE_ARMS}
    makers["4 sinks and 64 recent keys"] = recent
    right: dict[str, list[float]] = defaultdict(list)
    nll: dict[str, list[float]] = defaultdict(list)
    for task in tasks:
        turn = task.turns[0]
        context, question, answer = encode_parts(lm, [task.context, turn.question, turn.answer])
        prompt = record_tokens(lm, [context], hidden=True)
        asked = torch.cat([question, answer])[None]
        found = read_on(lm, prompt, asked, makers, turn=len(question), stride=_STRIDE)
        for name, each in found.items():
            right[name].append(float(each.hit[:, -len(answer) :].all()))
            nll[name].append(float(each.nll[:, -len(answer) :].mean()))
    return {
        f"needles: {name}": {
            "answered right": sum(right[name]) / len(tasks),
            "NLL of the answer": sum(nll[name]) / len(tasks),
        }
        for name in makers
    }


# --- what it says ----------------------------------------------------------------------------------------------------


def _claims(size: _Size, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[name][metric], dtype=torch.float64)

    def worse(arm: _Arm) -> Tensor:
        return of(f"reading on: {arm.label}", "NLL above the plain cache")

    claims: list[tuple[str, Tensor, bool]] = []
    for (part, density), margin in _MARGINS.items():
        errors = [of(f"rebuilding: {name}", _error_of(part, density)) for name in (_SVD, _CLOSED)]
        sheet = "(the sheet's margin)"
        claim = f"{part} at {density:.0%}: the closed form's error is at least {margin} below plain SVD's {sheet}"
        claims.append((claim, errors[0] - errors[1] - margin, density == 0.2))
    for density in (0.5, 0.2):
        keys, values = (of(f"rebuilding: {_CLOSED}", _error_of(part, density)) for part in PARTS)
        claims.append((f"at {density:.0%} the error of values is at least twice that of keys", values - 2 * keys, True))
        for part in PARTS:
            by_head = of("rebuilding: principal directions by head", _error_of(part, density))
            gain = by_head - of(f"rebuilding: {_CLOSED}", _error_of(part, density))
            claims.append((f"{part} at {density:.0%}: joint codes lose less than codes by head", gain, False))
            aware = of(f"rebuilding: {_SVD}", _error_of(part, density)) - of(
                f"rebuilding: {_ASVD}", _error_of(part, density)
            )
            claims.append((f"{part} at {density:.0%}: ASVD loses less than plain SVD", aware, False))
    for at, compression in ((_AT_60, "60 %"), (_AT_80, "80 %")):
        svd, asvd = (replace(at, name=name, factors=name) for name in (_SVD, _ASVD))
        claims.append(
            (
                f"{compression} of channels gone: the closed form reads on better than plain SVD",
                worse(svd) - worse(at),
                True,
            )
        )
        claims.append(
            (
                f"{compression} of channels gone: the closed form reads on better than ASVD",
                worse(asvd) - worse(at),
                False,
            )
        )
    for other in (
        replace(_HALF, key_density=0.5, value_density=0.5),
        replace(_HALF, key_density=0.75, value_density=0.25),
    ):
        split = f"K {other.key_density:g} / V {other.value_density:g}"
        claims.append(
            (f"at equal channels K 0.25 / V 0.75 reads on better than {split}", worse(other) - worse(_HALF), True)
        )
    windows = [replace(_HALF, window=window) for window in (0, 16)] + [_HALF]
    for less, more in pairwise(windows):
        claim = f"an exact window of {more.window} reads on better than one of {less.window}"
        claims.append((claim, worse(less) - worse(more), True))
    four = replace(_AT_60, name="closed form, 4 bits", bits=4)
    claims.append(
        ("4 bits without training cost less than 0.05 nats on top", 0.05 - (worse(four) - worse(_AT_60)), False)
    )
    claims += _training_claims(of)
    claims += _needle_claims(of)
    return [Comparison.positive(claim, margin.tolist(), part_of_verdict=counted) for claim, margin, counted in claims]


def _training_claims(of: Any) -> list[tuple[str, Tensor, bool]]:
    seen = "error on calibration text"
    closed = of(f"training: {_CLOSED}", seen)
    claims = []
    for name in (_ASVD, _SVD):
        before, after = of(f"training: {name}", seen), of(f"training: {name}, trained", seen)
        claims.append((f"training lowers the error from {name}", before - after, False))
        claims.append((f"training from {name} stays above the closed form", after - closed, False))
    for name in (_CLOSED, _ASVD):
        ours = of(f"training: {name}, trained through 4 bits", "error on unseen text, 4 bits")
        plain = of(f"training: {name if name == _CLOSED else name + ', trained'}", "error on unseen text, 4 bits")
        claims.append(
            (f"training through 4 bits from {name} loses less at 4 bits than training without", plain - ours, False)
        )
    return claims


def _needle_claims(of: Any) -> list[tuple[str, Tensor, bool]]:
    dense = of("needles: plain cache", "answered right")
    at_60, value_poor = (of(f"needles: {arm.label}", "answered right") for arm in (_AT_60, _NEEDLE_ARMS[3]))
    recent = of("needles: 4 sinks and 64 recent keys", "answered right")
    return [
        ("needles: the plain cache answers at least 80 % (else the rest says nothing)", dense - 0.8, False),
        ("needles: 60 % of channels gone, at least 95 % of the plain cache's answers", at_60 - 0.95 * dense, False),
        ("needles: values compressed hardest answer fewer than keys compressed hardest", at_60 - value_poor, False),
        ("needles: more answers than with sinks and recent keys alone", at_60 - recent, False),
    ]


def _notes(size: _Size, measured: Measured) -> list[str]:
    held = {name: sum(each["bytes held, share"]) / len(each["bytes held, share"])
            for name, each in measured.items() if "bytes held, share" in each}  # fmt: skip
    at_60, at_80 = (held[f"reading on: {arm.label}"] for arm in (_AT_60, _AT_80))
    return [
        f"{size.model}, {size.text}: a seed has {size.calibration} calibration texts of {size.length} tokens and "
        f"{size.texts} others to judge on, all of different documents. Nothing was tuned.",
        f"Reading on: prompts of {size.prefix} tokens, then {size.later - 1} scored tokens that come one by one, "
        "computed together (each under the mask that it has alone), all methods side by side in one batch; differences "
        "are between the same tokens.",
        f"Channels are what is equal; bytes held include the exact window and this layer's share of the rotations: "
        f"{at_60:.2f} of a plain cache's at 60 % of channels gone, {at_80:.2f} at 80 %, since the window is much of so "
        "short a context. Factors count as weights of the model.",
        f"Training: layers {', '.join(map(str, size.training_layers))}, K 0.2 and V 0.6, {size.training_steps} steps "
        f"of one calibration text, AdamW at {_RATE:g} (the pilot's; the paper's is 5e-5 for longer runs). Errors are "
        "mean squares, keys and values added, means over these layers.",
        "4 bits: codes of keys per channel in groups of 32 tokens, of values per token.",
        f"Needles: {size.needles} prompts a seed of about {size.needle_words} words with two needles; the question is "
        "one turn, the answer is scored token by token.",
    ]


def _plot(measured: Measured) -> str:
    rows = []
    for name, metrics in measured.items():
        if "NLL above the plain cache" in metrics:
            row = Row.of(name, "NLL above the plain cache", metrics["NLL above the plain cache"])
            rows.append(ResultRow(name.removeprefix("reading on: "), row.metric, row.mean, row.stderr, row.n))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(Path(folder) / "reading.svg", rows, title="reading on after a compressed prompt")
        return path.read_text(encoding="utf-8")
