"""Study of *Transcoders Find Interpretable LLM Feature Circuits* (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944).

Three parts. (a) An MLP of SmolLM2 is replaced by a transcoder, with and without a skip path, by a sparse autoencoder of
its output with equal features, budget, steps and data order, and by what needs no training: its own neurons that write
most, with the rest at zero or at their mean, and the best linear map of a rank equal to the budget. (b) Attributions of
readings of SmolLM2's residual stream must add up to them. (c) A small model learns a task whose answer two tokens
decide; circuits in transcoders of its MLPs must lead to these tokens, and taking the features that they name away must
hurt more than taking away as many others that fire as strongly.

Effort is equal: transcoders and the autoencoder have the same grid of learning rates, tried on documents outside the
test (at smaller scales one rate, that of the grid's middle, serves all). An autoencoder sees the answer that a
transcoder must compute, so the paper's "match or beat" is the harder half of the claim.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import TokenChoice
from apportion.data import corpus
from apportion.features import Recipe, TranscoderSettings, fit_dictionary, fit_transcoder
from apportion.features.evaluate import SplicedLoss
from apportion.features.frozen_pass import FrozenPass
from apportion.features.transcoder_circuits import parts_of
from apportion.models import LanguageModel, Site, cache_dir, harvest, load
from apportion.studies.finding import Comparison, Finding, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.transcoder_toy import Toy, measure_toy
from apportion.studies.workbench import Workbench

CLAIM = (
    "At equal active features a transcoder replaces an MLP at no more loss than a sparse autoencoder of its output, "
    "and far better than the MLP's own largest neurons; its features' contributions add up exactly, and name what an "
    "answer depends on."
)
BASELINE = (
    "an autoencoder of the MLP's output of equal width, budget, steps and data, tuned alike; neurons; linear maps"
)

_TUNING_SEED = 1000
_LARGEST_ERROR = 1e-4
Measured = dict[str, dict[str, list[float]]]

_SKIP = "transcoder with a skip path"
_LEARNED = ("transcoder", _SKIP, "MLP-out autoencoder")
_RATES = dict.fromkeys(_LEARNED, 4e-3)


@dataclass(frozen=True)
class _Real:
    """SmolLM2's MLP of one layer."""

    layer: int = 9
    text: str = "english"
    tokens: int = 160_000
    n_features: int = 4608
    budgets: tuple[int, ...] = (32,)
    steps: int = 600
    batch_size: int = 1024
    tuned_steps: int = 120
    rates: tuple[float, ...] = (4e-3, 8e-3)
    loss_contexts: int = 32
    held_out: float = 0.15
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def where(self) -> str:
        return f"smollm2 layer {self.layer} MLP, {self.text}"


@dataclass(frozen=True)
class _Size:
    real: tuple[_Real, ...]
    prompts: int = 8  # for exactness, a seed
    toy: Toy = field(default_factory=Toy)


_DEFAULT = _Real(tokens=40_000, n_features=2304, budgets=(8, 32), steps=40, rates=(4e-3,), loss_contexts=16)
_ON_GPU = _Real(
    layer=15,
    tokens=4_000_000,
    n_features=18_432,
    budgets=(16, 32, 64),
    steps=6000,
    batch_size=8192,
    tuned_steps=600,
    rates=(3e-4, 1e-3, 3e-3),
    loss_contexts=128,
    dtype="bfloat16",
    device="cuda",
)
_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        (
            replace(
                _DEFAULT,
                tokens=6_000,
                n_features=256,
                budgets=(8,),
                steps=6,
                batch_size=256,
                loss_contexts=4,
                held_out=0.4,
            ),
        ),
        1,
        Toy(steps=30, transcoder_steps=20, prompts=8),
    ),
    "default": _Size((_DEFAULT,), 3, Toy(steps=300, transcoder_steps=120, prompts=40)),
    "long": _Size((_Real(),)),
    "gpu": _Size((_ON_GPU,)),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    measured: Measured = defaultdict(lambda: defaultdict(list))
    comparisons: list[Comparison] = []
    notes: list[str] = []
    bench.say("loading smollm2")
    lms: dict[tuple[str, str], LanguageModel] = {}
    for real in size.real:
        key = (real.dtype, real.device)
        lms[key] = lms.get(key) or load("smollm2", dtype=real.dtype, device=real.device)
        more = _replaced(real, lms[key], seeds, bench, measured)
        comparisons, notes = comparisons + more[0], notes + more[1]
    comparisons += _exactness(size.prompts, seeds, bench, measured)
    with one_thread():
        more = _toy(size.toy, seeds, bench, measured)
    return Finding(
        slug="transcoder_circuits",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=comparisons + more[0],
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes + more[1],
    )


# --- (a) an MLP replaced ----------------------------------------------------------------------------------------------


class _Trials:
    """The store of one MLP's inputs and outputs, and everything that can stand in for that MLP."""

    def __init__(self, size: _Real, lm: LanguageModel) -> None:
        self.size, self.lm = size, lm
        self.into, self.out = Site(size.layer, "mlp_in"), Site(size.layer, "mlp_out")
        name = f"study-transcoder-{size.layer}-{size.text}-{size.tokens}-{lm.model.dtype}".replace("torch.", "")
        store = harvest(lm, [self.into, self.out], corpus(size.text), cache_dir() / "stores" / name, tokens=size.tokens)
        store.site = self.into
        self.train, held_out = store.split(size.held_out)
        self.choosing, self.test = held_out.split(0.6)
        self.spliced = SplicedLoss(lm, self.out, self.test, size.loss_contexts, source=self.into)
        self.of_output = SplicedLoss(lm, self.out, _At(self.test, self.out), size.loss_contexts)
        some = torch.arange(min(20_000, self.train.n_tokens))
        self._x, self._y = (self.train.read(some, site).to(size.device) for site in (self.into, self.out))

    def fit(self, kind: str, recipe: Recipe) -> Callable[[Tensor], Tensor]:
        """A trained stand-in, as a function of the MLP's input (or, of an autoencoder, of its output)."""
        size, width = self.size, self.train.width
        if kind == "MLP-out autoencoder":
            batches = self.train.batches(recipe.batch_size, recipe.seed, self.out)
            sae, _ = fit_dictionary(recipe, batches, width, device=size.device, progress=False)
            return lambda y: sae(y.float()).output
        pairs = self.train.joint_batches(recipe.batch_size, recipe.seed, sites=[self.into, self.out])
        # A free decoder that starts at zero: the better of the two on other documents, see the notes.
        settings = TranscoderSettings(skip=kind == _SKIP, unit_decoder=False)
        transcoder, _ = fit_transcoder(
            recipe, pairs, width, width, transcoder=settings, device=size.device, progress=False
        )
        return lambda x: transcoder(x.float()).output

    def untrained(self, kind: str, budget: int) -> Callable[[Tensor], Tensor]:
        """A stand-in that only looks at training activations."""
        if kind == "linear map of that rank":
            return _reduced_rank(self._x, self._y, budget)
        mlp: Any = self.out.resolve(self.lm.model)[0]
        dtype = self.lm.model.dtype

        def neurons(x: Tensor) -> Tensor:
            x = x.to(dtype)
            return (mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).float()

        weight = mlp.down_proj.weight.float()  # [d, neurons]
        norms = weight.norm(dim=0)
        mean = neurons(self._x).mean(dim=0) if kind.endswith("at their mean") else torch.zeros_like(norms)

        def largest(x: Tensor) -> Tensor:
            active = neurons(x)
            chosen = ((active - mean).abs() * norms).topk(budget, dim=1).indices
            kept = mean.expand_as(active).scatter(1, chosen, active.gather(1, chosen))
            return kept @ weight.T

        return largest

    @torch.no_grad()
    def fvu(self, function: Callable[[Tensor], Tensor], view: Any, of_output: bool) -> float:
        """Share of the variance of the MLP's output that a stand-in leaves unexplained."""
        total, errors, parts = 0.0, 0.0, []
        for start in range(0, view.n_tokens, 4096):
            rows = torch.arange(start, min(start + 4096, view.n_tokens))
            y = view.read(rows, self.out).to(self.size.device)
            x = y if of_output else view.read(rows, self.into).to(self.size.device)
            errors += float((function(x) - y).square().sum())
            parts.append(y)
        y = torch.cat(parts)
        total = float((y - y.mean(dim=0)).square().sum())
        return errors / total

    def score(self, kind: str, recipe: Recipe) -> float:
        """What learning rates are chosen by."""
        return self.fvu(self.fit(kind, recipe), self.choosing, kind == "MLP-out autoencoder")

    def measure(self, kind: str, recipe: Recipe | int) -> dict[str, float]:
        """FVU, and the model's loss with the stand-in in place of the MLP."""
        function = self.untrained(kind, recipe) if isinstance(recipe, int) else self.fit(kind, recipe)
        of_output = kind == "MLP-out autoencoder"
        spliced = self.of_output if of_output else self.spliced
        with torch.no_grad():
            losses = spliced.losses(function)
        counted = spliced.valid[:, :-1]
        increase = (losses - spliced.clean)[counted].mean()
        zeroed = (spliced.zero - spliced.clean)[counted].mean()
        return {
            "FVU": self.fvu(function, self.test, of_output),
            "loss added, nats": float(increase),
            "loss added, share of zero ablation": float(increase / zeroed),
        }


class _At:
    """A view at another site than its own."""

    def __init__(self, view: Any, site: Site) -> None:
        self._view, self._site = view, site

    @property
    def n_contexts(self) -> int:
        return int(self._view.n_contexts)

    def contexts(self, start: int, stop: int, site: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self._view.contexts(start, stop, site or self._site)
        return found


def _reduced_rank(x: Tensor, y: Tensor, rank: int) -> Callable[[Tensor], Tensor]:
    """The linear map of a rank with the least squared error: least squares, then its outputs' largest directions."""
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    a, b = (x - x_mean).double(), (y - y_mean).double()
    ridge = 1e-4 * a.square().mean() * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    full = torch.linalg.solve(a.T @ a + ridge, a.T @ b)
    _, vectors = torch.linalg.eigh((a @ full).T @ (a @ full))
    kept = vectors[:, -rank:]
    matrix = (full @ kept @ kept.T).float()
    return lambda new: (new.float() - x_mean) @ matrix + y_mean


_UNTRAINED = ("largest neurons", "largest neurons, others at their mean", "linear map of that rank")


def _replaced(
    size: _Real, lm: LanguageModel, seeds: list[int], bench: Workbench, measured: Measured
) -> tuple[list[Comparison], list[str]]:
    bench.say(f"harvesting {size.tokens} tokens, {size.where}")
    trials = _Trials(size, lm)
    settings = asdict(size)
    rates: dict[tuple[str, int], float] = {}
    for budget in size.budgets:
        base = Recipe(
            TokenChoice(budget),
            size.n_features,
            size.steps,
            size.batch_size,
            auxiliary="dead",
            dead_after=20 * size.batch_size,
        )
        recipes = {}
        for kind in _LEARNED:
            chosen = _RATES[kind]
            if len(size.rates) > 1:
                scores = []
                for rate in size.rates:
                    tried = replace(base, steps=size.tuned_steps, learning_rate=rate, seed=_TUNING_SEED)
                    what = f"{size.where}, budget {budget}, tuning {kind}"
                    scores.append(bench.measure(what, [settings, tried.to_json()], partial(trials.score, kind, tried)))
                chosen = size.rates[scores.index(min(scores))]
            recipes[kind] = replace(base, learning_rate=chosen)
            rates[kind, budget] = chosen
        for seed in seeds:
            label = f"{size.where}, budget {budget}"
            for kind in (*_LEARNED, *_UNTRAINED):
                recipe = replace(recipes[kind], seed=seed) if kind in recipes else budget
                key = recipe.to_json() if isinstance(recipe, Recipe) else budget
                what = f"{label}, seed {seed}: {kind}" if kind in recipes else f"{label}: {kind}"
                # What needs no training is the same for every seed.
                found = bench.measure(what, [settings, key, kind], partial(trials.measure, kind, recipe))
                for metric, value in found.items():
                    measured[f"{label}: {kind}"][metric].append(value)
    grid = f", from {', '.join(f'{rate:g}' for rate in size.rates)}" if len(size.rates) > 1 else " of all"
    notes = [
        f"{size.where}: {trials.train.n_tokens} training tokens, F={size.n_features}, {size.steps} steps of "
        f"{size.batch_size}, aux_k; {trials.test.n_tokens} test tokens of other documents; learning rates{grid}: "
        + "; ".join(f"{kind}, budget {budget} {rate:g}" for (kind, budget), rate in rates.items())
        + ". TopK, so that every token has the budget exactly. Transcoders have a free decoder that starts at zero. "
        "Before this was chosen, on layer 9 with F=2304, budget 32, 150 steps of 1024, one seed, held-out text: FVU "
        "0.241 so, 0.249 with unit rows, 0.257 with a random start as well, 0.203 with unit rows and a skip path; "
        "0.206 of the autoencoder."
    ]
    return [each for budget in size.budgets for each in _claims(size, budget, measured)], notes


def _claims(size: _Real, budget: int, measured: Measured) -> list[Comparison]:
    label = f"{size.where}, budget {budget}"

    def of(kind: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{label}: {kind}"][metric], dtype=torch.float64)

    added, sae = "loss added, nats", "MLP-out autoencoder"
    best_neurons = torch.minimum(*(of(kind, "FVU") for kind in _UNTRAINED[:2]))
    best_neurons_added = torch.minimum(*(of(kind, added) for kind in _UNTRAINED[:2]))
    counted = [
        ("the transcoder adds no more loss than the autoencoder", of(sae, added) - of("transcoder", added)),
        ("with a skip path it adds no more loss than the autoencoder", of(sae, added) - of(_SKIP, added)),
        (
            "the transcoder's FVU is below half of what as many neurons leave",
            0.5 * best_neurons - of("transcoder", "FVU"),
        ),
        (
            "the transcoder adds less than 0.75 of the loss that as many neurons add",
            0.75 * best_neurons_added - of("transcoder", added),
        ),
        (
            "the transcoder's FVU is below that of the linear map of that rank",
            of("linear map of that rank", "FVU") - of("transcoder", "FVU"),
        ),
    ]
    shown = [
        ("the transcoder's FVU is below the autoencoder's", of(sae, "FVU") - of("transcoder", "FVU")),
        ("a skip path lowers the transcoder's FVU", of("transcoder", "FVU") - of(_SKIP, "FVU")),
        ("a skip path lowers the loss that it adds", of("transcoder", added) - of(_SKIP, added)),
    ]
    return [Comparison.positive(f"{label}: {claim}", margins.tolist()) for claim, margins in counted] + [
        Comparison.positive(f"{label}: {claim}", margins.tolist(), part_of_verdict=False) for claim, margins in shown
    ]


# --- (b) exactness ----------------------------------------------------------------------------------------------------


def _exactness(prompts: int, seeds: list[int], bench: Workbench, measured: Measured) -> list[Comparison]:
    """Readings of layer 20's MLP input, taken apart into embeddings, heads by source, and whole MLPs."""
    lm = load("smollm2")
    text = " ".join(document.text[:400] for document, _ in zip(corpus("english"), range(40), strict=False))
    ids = torch.tensor(lm.tokenizer(text)["input_ids"])

    def worst(seed: int) -> float:
        draw = torch.Generator().manual_seed(seed)
        largest = 0.0
        for _ in range(prompts):
            start = int(torch.randint(len(ids) - 24, (), generator=draw))
            frozen = FrozenPass(lm, ids[start : start + 24], {})
            direction = torch.randn(lm.d_model, generator=draw)
            token = int(torch.randint(1, 24, (), generator=draw))
            reading = frozen.of_mlp_input(20, direction, token)
            parts = parts_of(frozen, reading, token)
            # Independently: what the parts without the biases add up to, against the model's own activation.
            written = sum(parts.candidates.values()) + sum(
                value for node, value in parts.unexplained.items() if node.kind != "bias"
            )
            size = sum(map(abs, parts.candidates.values()))
            largest = max(largest, abs(written - reading.value) / max(abs(reading.value), 1e-3 * size))
        return largest

    errors = []
    for seed in seeds:
        error = float(bench.measure(f"exactness, seed {seed}", [prompts, seed], partial(worst, seed)))
        errors.append(error)
        measured["exactness: layer 20 of smollm2"]["largest relative error"].append(error)
    margins = [_LARGEST_ERROR - error for error in errors]
    return [Comparison.positive(f"exactness: written parts explain a reading within {_LARGEST_ERROR:g}", margins)]


# --- (c) a known circuit ----------------------------------------------------------------------------------------------


def _toy(size: Toy, seeds: list[int], bench: Workbench, measured: Measured) -> tuple[list[Comparison], list[str]]:
    for seed in seeds:
        found = bench.measure(f"known circuit, seed {seed}", [asdict(size), seed], partial(measure_toy, size, seed))
        for metric, value in found.items():
            measured["known circuit: two tokens decide"][metric].append(value)
    of = measured["known circuit: two tokens decide"]
    ratio = torch.tensor(of["log probability lost, top features"]) - 3 * torch.tensor(
        of["log probability lost, other features"]
    )
    found_it = torch.tensor(of["strongest source decides"]) - 0.9
    comparisons = [
        Comparison.positive(
            "known circuit: the strongest source is a token that decides, 90 % of prompts", found_it.tolist()
        ),
        Comparison.positive("known circuit: the top five features hurt more than three times as much", ratio.tolist()),
    ]
    notes = [
        f"known circuit: two layers of width {size.width} learn (a + b) mod {size.numbers} of two tokens among "
        f"{size.length - 3} distractors; transcoders of both MLPs, {size.n_features} features, budget {size.budget}; "
        f"{size.prompts} prompts a seed. Each top feature is compared with another that fires at its layer and token, "
        "and as much is taken away along either. Chance of a deciding source is "
        f"{2 / (size.length - 1):.2f}."
    ]
    return comparisons, notes
