"""Study of *Adaptive Sparse Allocation with Mutual Choice & Feature Choice SAEs* (Ayonrinde 2024, arXiv 2411.02124).

Two halves. On a synthetic dictionary, where the true features are known, claims (a) to (f) of the method sheet, each in
batch mode and in inference (threshold) mode, with a control in which the advantage must shrink. On residual streams of
SmolLM2, dictionaries of equal width, budget, steps and data order are compared on held-out documents in inference mode.

Effort is equal. On the synthetic dictionary every method has the same grid of learning rates and of weights of its
auxiliary loss (aux_k for TopK, aux_zipf for the paper's methods), each tried at full length on a seed that is used for
nothing else. On the model every rule has the same grid of learning rates, tried on documents outside the test. There
TopK and Mutual Choice have no auxiliary loss, but for the two conditions that compare such losses; Feature Choice has
aux_zipf, which keeps features alive in its first phase.

A third condition starts training at the true directions. It separates what the rules choose from what training finds
with them, and it is where the figures of the sheet's pilot come out (the seeds of its initial directions and of its
truth appear to have been the same); it is shown, not counted.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, TokenChoice, Zipf
from apportion.data import SyntheticDictionary, corpus
from apportion.features import Phases, Recipe, SparseAutoencoder, ZipfFit, fit_dictionary
from apportion.features.evaluate import SplicedLoss, evaluate_reconstruction
from apportion.models import ActivationStore, LanguageModel, Site, cache_dir, harvest, load
from apportion.models.activations import StoreView
from apportion.report import plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "At equal mean L0, Mutual Choice reconstructs better and recovers more of the model's loss than Token Choice "
    "(TopK); Feature Choice with Zipf quotas leaves no feature dead; aux_zipf_loss leaves fewer features underused "
    "than aux_k_loss."
)
BASELINE = (
    "TopK (Token Choice) dictionaries at the same budget, width, steps and data, tuned on a grid of the same size"
)

_TUNING_SEED = 1000
Measured = dict[str, dict[str, list[float]]]

# Learning rate and weight of the auxiliary loss (0: none) that the grid chose at the scale ``long``; shorter runs take
# them as they are.
_CHOSEN = {
    "TopK": (2e-2, 1 / 32),
    "Mutual Choice": (2e-2, 0.5),
    "Feature Choice, Zipf": (1e-2, 0.5),
    "TopK, no auxiliary loss": (1e-2, 0.0),
    "Mutual Choice, no auxiliary loss": (1e-2, 0.0),
}


@dataclass(frozen=True)
class _Synthetic:
    """Section 1.7 of the method sheet: d = 32, 128 true features, F = 160, budget 5, batches of 512."""

    steps: int = 1500
    tuned: bool = True  # search the grid, or take what it chose before
    rates: tuple[float, ...] = (3e-3, 1e-2, 2e-2)
    weights: tuple[float, ...] = (0.0, 1 / 32, 0.5)
    test_tokens: int = 20_000
    calibration_tokens: int = 50_000
    variants: bool = True  # also what the claims do not speak of: other auxiliary losses, uniform quotas, true starts


@dataclass(frozen=True)
class _Real:
    """The sheet's recipe for SmolLM2."""

    model: str = "smollm2"
    site: str = "layers.15.residual"
    text: str = "code"
    tokens: int = 200_000
    n_features: int = 2304
    budget: int = 32
    batch_size: int = 2048
    steps: int = 1200
    tuned_steps: int = 300
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    loss_contexts: int = 64
    dtype: str = "auto"
    device: str = "cpu"
    auxiliaries: bool = True

    @property
    def where(self) -> str:
        """The conditions in words."""
        return f"{self.model} {self.site}, {self.text}"


@dataclass(frozen=True)
class _Size:
    synthetic: _Synthetic = field(default_factory=_Synthetic)
    real: tuple[_Real, ...] = ()


_ON_GPU = _Real(
    tokens=4_000_000,
    n_features=18_432,
    batch_size=8192,
    steps=6000,
    tuned_steps=600,
    rates=(2e-4, 5e-4, 1e-3),
    loss_contexts=128,
    dtype="bfloat16",
    device="cuda",
)
_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(_Synthetic(60, False, test_tokens=2_000, calibration_tokens=4_000, variants=False)),
    "default": _Size(
        _Synthetic(steps=450, tuned=False, variants=False),
        (_Real(tokens=100_000, steps=55, rates=(4e-3,), loss_contexts=16),),
    ),
    "long": _Size(
        _Synthetic(),
        (_Real(), _Real(site="layers.9.residual", text="english", auxiliaries=False)),
    ),
    "gpu": _Size(_Synthetic(), (_ON_GPU, replace(_ON_GPU, site="layers.9.residual", text="english"))),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    with one_thread():
        rows, comparisons, notes = _on_synthetic(size.synthetic, seeds, bench)
    pictures: dict[str, str] = {}
    for real in size.real:
        more = _on_model(real, seeds, bench)
        rows, comparisons = rows + more[0], comparisons + more[1]
        notes, pictures = notes + more[2], pictures | more[3]
    return Finding(
        slug="mutual_feature_choice",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots=pictures,
    )


# --- known truth ---------------------------------------------------------------------------------------------------


def _synthetic_candidates(size: _Synthetic) -> dict[str, list[Recipe]]:
    """The methods, each with all settings that are tried."""
    own_phases = Phases(refresh_every=20)
    base = Recipe(
        TokenChoice(5), n_features=160, steps=size.steps, batch_size=512, phases=own_phases, dead_after=10_240
    )
    mutual = replace(base, rule=MutualChoice(5))

    def grid(name: str, recipe: Recipe, auxiliary: Any, weights: Sequence[float]) -> list[Recipe]:
        pairs = [(rate, weight) for rate in size.rates for weight in weights] if size.tuned else [_CHOSEN[name]]
        return [
            replace(
                recipe, learning_rate=rate, auxiliary=auxiliary if weight else "none", auxiliary_weight=weight or 1 / 32
            )
            for rate, weight in pairs
        ]

    candidates = {
        "TopK": grid("TopK", base, "dead", size.weights),
        "Mutual Choice": grid("Mutual Choice", mutual, "zipf", size.weights),
        "Feature Choice, Zipf": grid(
            "Feature Choice, Zipf", replace(base, rule=FeatureChoice(5, profile=Zipf())), "zipf", size.weights
        ),
        "TopK, no auxiliary loss": grid("TopK, no auxiliary loss", base, "none", (0.0,)),
        "Mutual Choice, no auxiliary loss": grid("Mutual Choice, no auxiliary loss", mutual, "none", (0.0,)),
    }
    if size.variants:
        static = replace(own_phases, mutual_fraction=0)
        uniform = replace(base, rule=FeatureChoice(5), phases=static)
        from_start = replace(base, rule=FeatureChoice(5, profile=Zipf()), phases=static)
        candidates |= {
            "Mutual Choice, aux_k": grid("Mutual Choice, aux_k", mutual, "dead", size.weights[1:]),
            "Feature Choice, Zipf from the first step": grid("", from_start, "none", (0.0,)),
            "Feature Choice, uniform": grid("", uniform, "none", (0.0,)),
        }
    return candidates


def _true_starts(size: _Synthetic) -> dict[str, Recipe]:
    """The sheet's pilot: no auxiliary losses, its learning rate, feature index = true rank for Feature Choice."""
    base = Recipe(
        TokenChoice(5),
        n_features=160,
        steps=size.steps,
        batch_size=512,
        phases=Phases(mutual_fraction=0),
        auxiliary="none",
        learning_rate=3e-3,
    )
    rules = {
        "TopK": base.rule,
        "Mutual Choice": MutualChoice(5),
        "Feature Choice, Zipf": FeatureChoice(5, profile=Zipf()),
    }
    return {name: replace(base, rule=rule) for name, rule in rules.items()} if size.variants else {}


def _on_synthetic(
    size: _Synthetic, seeds: list[int], bench: Workbench
) -> tuple[list[Row], list[Comparison], list[str]]:
    def measured_in(world: "_World", what: str, recipe: Recipe, true_start: bool = False) -> dict[str, float]:
        settings = {"recipe": recipe.to_json(), "world": world.to_json(), "true start": true_start}
        found: dict[str, float] = bench.measure(what, settings, partial(world.measure, recipe, true_start))
        return found

    tuning = _World(SyntheticDictionary(seed=_TUNING_SEED), size, _TUNING_SEED)
    recipes = {}
    for name, candidates in _synthetic_candidates(size).items():

        def score(tried: Recipe, what: str = f"synthetic, tuning {name}") -> float:
            return measured_in(tuning, what, replace(tried, seed=_TUNING_SEED))["FVU, threshold"]

        recipes[name] = _best(candidates, score)
    measured: Measured = defaultdict(lambda: defaultdict(list))
    tuned = ("TopK", "Mutual Choice")
    for seed in seeds:
        world = _World(SyntheticDictionary(seed=seed), size, seed)
        alike = _World(SyntheticDictionary(seed=seed, heterogeneity=0.0, constant_l0=True), size, seed)
        for label, place, chosen, true_start in (
            ("synthetic", world, recipes, False),
            ("synthetic, control", alike, {name: recipes[name] for name in tuned}, False),
            ("synthetic, true start", world, _true_starts(size), True),
        ):
            for name, recipe in chosen.items():
                what = f"{label}, seed {seed}: {name}"
                figures = measured_in(place, what, replace(recipe, seed=seed), true_start)
                for metric, value in figures.items():
                    measured[f"{label}: {name}"][metric].append(value)
    notes = [
        "Synthetic: d=32, 128 true features of frequency 1/rank, mean L0 5, log-normal difficulty 0.6; F=160, "
        f"{size.steps} steps of 512 tokens. Learning rate and weight of the auxiliary loss, "
        + ("chosen at full length on a seed of its own" if size.tuned else "as chosen at scale long")
        + ": "
        + "; ".join(f"{name} {_settings_of(recipe)}" for name, recipe in recipes.items())
        + ".",
        "Synthetic, control: every token has exactly 5 features, all tokens alike in difficulty.",
    ]
    claims = _synthetic_claims(measured)
    if size.variants:
        notes.append(
            "Synthetic, true start: the first 128 features begin at the true directions, learning rate 0.003, no "
            "auxiliary loss. What the rules choose is compared there without what training finds; the margins of the "
            "method sheet come from such a start. Not counted in the verdict."
        )
        claims += _true_start_claims(measured)
    return collect_rows(measured), claims, notes


def _settings_of(recipe: Recipe) -> str:
    names = {"dead": "aux_k", "zipf": "aux_zipf"}
    auxiliary = f" with {names[recipe.auxiliary]} {recipe.auxiliary_weight:g}" if recipe.auxiliary in names else ""
    return f"{recipe.learning_rate:g}{auxiliary}"


class _World:
    """A synthetic dictionary with its training stream, calibration and test sets."""

    def __init__(self, generator: SyntheticDictionary, size: _Synthetic, seed: int) -> None:
        self.generator, self.seed, self.size = generator, seed, size
        self.test = generator.sample(size.test_tokens, seed=2**30 + seed)
        self.calibration = generator.sample(size.calibration_tokens, seed=2**30 + 2**20 + seed).x

    def to_json(self) -> dict[str, Any]:
        """All that decides it."""
        tokens = [self.size.test_tokens, self.size.calibration_tokens]
        return {"generator": asdict(self.generator), "seed": self.seed, "tokens": tokens}

    def measure(self, recipe: Recipe, true_start: bool = False) -> dict[str, float]:
        """Train by a recipe and judge the dictionary by what is known."""

        def batches(step: int) -> Tensor:
            return self.generator.sample(recipe.batch_size, seed=step + 100_003 * self.seed).x

        sae, _ = fit_dictionary(
            recipe,
            batches,
            self.generator.d,
            calibration=lambda: self.calibration.split(8192),
            start_from=self._at_the_truth if true_start else None,
            progress=False,
        )
        return {**self._mode(sae, "batch"), **self._mode(sae, "threshold"), "MCC": self._mcc(sae)}

    @torch.no_grad()
    def _at_the_truth(self, sae: SparseAutoencoder) -> None:
        for weight in (sae.encoder_weight, sae.decoder_weight):
            weight[: self.generator.n_true] = self.generator.directions

    @torch.no_grad()
    def _mode(self, sae: SparseAutoencoder, mode: Any) -> dict[str, float]:
        x, truth = self.test.x, (self.test.codes > 0).sum(dim=1)
        outs = [sae(part, mode) for part in x.split(512)]
        output = torch.cat([out.output for out in outs])
        l0 = torch.cat([out.codes.winners_per_row() for out in outs])
        density = torch.stack([out.codes.winners_per_column() for out in outs]).sum(dim=0) / x.shape[0]
        fvu = (x - output).square().sum() / (x - x.mean(dim=0)).square().sum()
        # L0 that never varies has no correlation with anything: that is the zero the claim speaks of.
        varies = bool(l0.float().std() > 0) and bool(truth.float().std() > 0)
        tracks = float(torch.corrcoef(torch.stack([l0.float(), truth.float()]))[0, 1]) if varies else 0.0
        return {
            f"FVU, {mode}": float(fvu),
            f"L0, {mode}": float(l0.float().mean()),
            f"dead, {mode}": float((density == 0).float().mean()),
            f"density < 1e-3, {mode}": float((density < 1e-3).float().mean()),
            f"correlation of L0 with true L0, {mode}": tracks,
        }

    def _mcc(self, sae: SparseAutoencoder) -> float:
        """Mean cosine of the true directions with their partners under the best one-to-one matching."""
        from scipy.optimize import linear_sum_assignment

        cosine = (sae.decoder_weight.detach() @ self.generator.directions.T).abs()
        rows, columns = linear_sum_assignment(-cosine.numpy())
        return float(cosine[rows, columns].mean())


def _synthetic_claims(measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str, label: str = "synthetic") -> Tensor:
        return torch.tensor(measured[f"{label}: {name}"][metric], dtype=torch.float64)

    topk, mutual, feature = "TopK", "Mutual Choice", "Feature Choice, Zipf"
    plain = ", no auxiliary loss"
    less_than_one = 0.5 / 160
    claims: list[tuple[str, Tensor]] = []
    for mode in ("batch", "threshold"):
        fvu, dead, rare = f"FVU, {mode}", f"dead, {mode}", f"density < 1e-3, {mode}"
        tracks = f"correlation of L0 with true L0, {mode}"
        gain = 1 - of(mutual, fvu) / of(topk, fvu)
        control_gain = 1 - of(mutual, fvu, "synthetic, control") / of(topk, fvu, "synthetic, control")
        claims += [
            (f"(a) Mutual Choice's FVU is at most 0.75 of TopK's, {mode}", 0.75 - of(mutual, fvu) / of(topk, fvu)),
            (
                f"(b) Feature Choice's (Zipf) FVU is at most 0.85 of TopK's, {mode}",
                0.85 - of(feature, fvu) / of(topk, fvu),
            ),
            (f"(b) Feature Choice (Zipf) has no dead feature, {mode}", less_than_one - of(feature, dead)),
            (
                f"(c) without auxiliary losses Mutual Choice has more features below density 1e-3 than TopK, {mode}",
                of(mutual + plain, rare) - of(topk + plain, rare),
            ),
            (f"(c) Feature Choice (Zipf) has none below density 1e-3, {mode}", less_than_one - of(feature, rare)),
            (
                f"(e) Mutual Choice's L0 follows the true L0, correlation above 0.7, {mode}",
                of(mutual, tracks) - 0.7,
            ),
            (
                f"(e) Feature Choice's L0 follows the true L0, correlation above 0.7, {mode}",
                of(feature, tracks) - 0.7,
            ),
            (f"(e) TopK's does not, correlation below 0.2, {mode}", 0.2 - of(topk, tracks).abs()),
            (f"(f) control: Mutual Choice's gain shrinks where all tokens are alike, {mode}", gain - control_gain),
        ]
    for name in (mutual, feature):
        ratio = of(name, "FVU, threshold") / of(name, "FVU, batch")
        claims += [
            (f"(d) {name}: threshold FVU within 3 % of batch FVU", 0.03 - (ratio - 1)),
            (
                f"(d) {name}: threshold L0 within 5 % of the budget",
                0.05 - (of(name, "L0, threshold") / 5 - 1).abs(),
            ),
        ]
    return [Comparison.positive(f"synthetic {claim}", margins.tolist()) for claim, margins in claims]


def _true_start_claims(measured: Measured) -> list[Comparison]:
    def ratio(name: str) -> Tensor:
        of, base = (
            torch.tensor(measured[f"synthetic, true start: {each}"]["FVU, threshold"], dtype=torch.float64)
            for each in (name, "TopK")
        )
        return of / base

    margins = {
        "(a) Mutual Choice's FVU is at most 0.75 of TopK's, threshold": 0.75 - ratio("Mutual Choice"),
        "(b) Feature Choice's (Zipf) FVU is at most 0.85 of TopK's, threshold": 0.85 - ratio("Feature Choice, Zipf"),
    }
    return [
        Comparison.positive(f"synthetic, true start {claim}", each.tolist(), part_of_verdict=False)
        for claim, each in margins.items()
    ]


# --- a language model -----------------------------------------------------------------------------------------------


def _model_recipes(size: _Real) -> dict[str, Recipe]:
    base = Recipe(
        TokenChoice(size.budget),
        n_features=size.n_features,
        steps=size.steps,
        batch_size=size.batch_size,
        auxiliary="none",
        phases=Phases(refresh_every=min(100, max(1, size.steps // 10))),
    )
    mutual, silence = MutualChoice(size.budget), size.batch_size * 20
    recipes = {
        "TopK": base,
        "Mutual Choice": replace(base, rule=mutual),
        # The whole method: a Mutual Choice phase with aux_zipf, then Feature Choice. Without that loss features that
        # die in the first phase stay dead in the second: a quota of negative scores has no gradient.
        "Feature Choice, Zipf": replace(
            base, rule=FeatureChoice(size.budget, profile=Zipf()), auxiliary="zipf", dead_after=silence
        ),
    }
    if size.auxiliaries:
        recipes["Mutual Choice, aux_k"] = replace(base, rule=mutual, auxiliary="dead", dead_after=silence)
        recipes["Mutual Choice, aux_zipf"] = replace(base, rule=mutual, auxiliary="zipf", dead_after=silence)
    return recipes


def _on_model(
    size: _Real, seeds: list[int], bench: Workbench
) -> tuple[list[Row], list[Comparison], list[str], dict[str, str]]:
    bench.say(f"loading {size.model}")
    lm = load(size.model, dtype=size.dtype, device=size.device)
    bench.say(f"harvesting {size.tokens} tokens, {size.where}")
    trials = _Trials(lm, size, *_views(lm, size))
    recipes = _model_recipes(size)
    for name in list(recipes):
        like = name.split(", aux")[0]  # the auxiliary loss does not change which rate the rule itself prefers
        if like != name:
            recipes[name] = replace(recipes[name], learning_rate=recipes[like].learning_rate)
            continue
        candidates = [replace(recipes[name], learning_rate=rate) for rate in size.rates]

        def score(tried: Recipe, name: str = name) -> float:
            shorter = replace(tried, steps=size.tuned_steps, seed=_TUNING_SEED)
            what = f"{size.where}, tuning {name}"
            return float(bench.measure(what, [asdict(size), shorter.to_json()], partial(trials.fvu, shorter)))

        recipes[name] = _best(candidates, score)
    measured: Measured = defaultdict(lambda: defaultdict(list))
    densities: dict[str, Tensor] = {}
    fits: dict[str, ZipfFit] = {}
    for seed in seeds:
        for name, recipe in recipes.items():
            seeded = replace(recipe, seed=seed)
            what = f"{size.where}, seed {seed}: {name}"
            result = bench.measure(what, [asdict(size), seeded.to_json()], partial(trials.measure, seeded))
            for metric, value in result["figures"].items():
                measured[f"{size.where}: {name}"][metric].append(value)
            if seed == seeds[0]:
                densities[name] = torch.tensor(result["density"])
                if result["zipf"] is not None:
                    fits[name] = ZipfFit(**result["zipf"])
    rates = "; ".join(f"{name} {recipe.learning_rate:g}" for name, recipe in recipes.items())
    grid = (
        f"chosen from {', '.join(f'{rate:g}' for rate in size.rates)} by {size.tuned_steps} steps on a seed of its own"
    )
    laws = "; ".join(
        f"{name}: exponent {fit.exponent:.2f}, offset {fit.offset:g}, R^2 of the log densities {fit.r_squared:.3f}"
        for name, fit in fits.items()
    )
    notes = [
        f"{size.where}: {trials.train.n_tokens} training tokens, F={size.n_features}, budget {size.budget}, "
        f"{size.steps} steps of {size.batch_size}; {trials.calibration.n_tokens} tokens to calibrate and to choose by, "
        f"{trials.test.n_tokens} to test on, all of other documents. Learning rates"
        f"{', ' + grid if len(size.rates) > 1 else ''}: {rates}.",
        f"{size.where}, FVU of single tokens: {trials.sinks()}",
        f"{size.where}, Zipf fits of the densities on test text, seed {seeds[0]}: {laws}.",
    ]
    name = f"density-{size.site}-{size.text}"
    return (
        collect_rows(measured),
        _model_claims(size, measured),
        notes,
        {name: _density_plot(densities, fits, size.where)},
    )


def _views(lm: LanguageModel, size: _Real) -> tuple[StoreView, StoreView, StoreView]:
    """Training, calibration and test parts of a store that is kept between runs of the study."""
    name = f"study-{size.model}-{size.site}-{size.text}-{size.tokens}-{lm.model.dtype}".replace("/", "-")
    folder = cache_dir() / "stores" / name.replace("torch.", "")
    store: ActivationStore = harvest(lm, Site.parse(size.site), corpus(size.text), folder, tokens=size.tokens)
    train, held_out = store.split(0.2)
    calibration, test = held_out.split(0.5)
    return train, calibration, test


class _Trials:
    """Fits dictionaries on the store and judges them on held-out text, in inference mode."""

    def __init__(
        self, lm: LanguageModel, size: _Real, train: StoreView, calibration: StoreView, test: StoreView
    ) -> None:
        self.size, self.train, self.calibration, self.test = size, train, calibration, test
        self.spliced = SplicedLoss(lm, Site.parse(size.site), test, contexts=size.loss_contexts)

    def fit(self, recipe: Recipe) -> SparseAutoencoder:
        """Train and calibrate."""
        sae, _ = fit_dictionary(
            recipe,
            self.train.batches(recipe.batch_size, seed=recipe.seed),
            self.train.width,
            calibration=lambda: _in_batches(self.calibration),
            device=self.size.device,
            progress=False,
        )
        return sae

    def fvu(self, recipe: Recipe) -> float:
        """What the learning rate is chosen by; on the calibration part, so that the test part stays unseen."""
        return evaluate_reconstruction(self.fit(recipe), self.calibration, device=self.size.device).metrics["fvu"].value

    def measure(self, recipe: Recipe) -> dict[str, Any]:
        """All figures of a recipe.

        Thresholds calibrated on other documents give the L0 that a user gets. For the comparison at equal budget they
        are then calibrated on the test text itself, which fixes its mean L0 and nothing else: a few per cent of L0
        between documents would otherwise decide differences of a few per cent in FVU.
        """
        sae, device = self.fit(recipe), self.size.device
        with torch.no_grad():
            active = sum(sae.encode(part.to(device)).nnz for part in _in_batches(self.test))
        sae.calibrate((part.to(device) for part in _in_batches(self.test)), self.test.n_tokens)
        evaluation = evaluate_reconstruction(sae, self.test, device=device)
        loss = self.spliced.evaluate(sae)
        mean_density = self.size.budget / self.size.n_features
        figures = {
            name: evaluation.metrics[name].value for name in ("fvu", "fvu_without_sinks", "cossim", "l0", "dead")
        }
        figures["l0, thresholds of other documents"] = active / self.test.n_tokens
        figures |= {name: loss[name].value for name in ("ce_loss_score", "ce_loss_score_mean", "ce_increase")}
        figures["underused"] = float((evaluation.density < mean_density / 32).float().mean())
        if evaluation.zipf is not None:
            figures["Zipf exponent"] = evaluation.zipf.exponent
        zipf = None if evaluation.zipf is None else asdict(evaluation.zipf)
        return {"figures": figures, "density": evaluation.density.tolist(), "zipf": zipf}

    def sinks(self) -> str:
        """How the largest tokens of the test text compare with those that were trained on."""
        test, train = (torch.cat([part.norm(dim=1) for part in _in_batches(view)]) for view in (self.test, self.train))
        median = train.median()
        return (
            f"the largest norm is {test.max() / median:.1f} times the median on the test text and "
            f"{train.max() / median:.1f} times on the training text; {int((test > 4 * median).sum())} test tokens "
            "exceed 4 times (fvu_without_sinks leaves those out)."
        )


def _in_batches(view: StoreView) -> Iterator[Tensor]:
    for start in range(0, view.n_tokens, 8192):
        yield view.read(torch.arange(start, min(start + 8192, view.n_tokens)))


def _model_claims(size: _Real, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{size.where}: {name}"][metric], dtype=torch.float64)

    topk, mutual, feature = "TopK", "Mutual Choice", "Feature Choice, Zipf"
    less_than_one = 0.5 / size.n_features
    claims = [
        ("Mutual Choice's FVU is below TopK's", of(topk, "fvu") - of(mutual, "fvu")),
        (
            "Mutual Choice's FVU is below TopK's, attention sinks left out",
            of(topk, "fvu_without_sinks") - of(mutual, "fvu_without_sinks"),
        ),
        ("Mutual Choice recovers more loss than TopK", of(mutual, "ce_loss_score") - of(topk, "ce_loss_score")),
        ("Feature Choice (Zipf) has no dead feature on held-out text", less_than_one - of(feature, "dead")),
    ]
    claims += [
        (
            f"{name}'s L0 on held-out text is within 5 % of the budget",
            0.05 - (of(name, "l0, thresholds of other documents") / size.budget - 1).abs(),
        )
        for name in (mutual, feature)
    ]
    if size.auxiliaries:
        fewer = of("Mutual Choice, aux_k", "underused") - of("Mutual Choice, aux_zipf", "underused")
        claims.append(("aux_zipf leaves fewer features underused than aux_k", fewer))
    return [Comparison.positive(f"{size.where}: {claim}", margins.tolist()) for claim, margins in claims]


def _density_plot(densities: dict[str, Tensor], fits: dict[str, ZipfFit], where: str) -> str:
    """Density by rank with the fitted laws, as SVG text."""
    with tempfile.TemporaryDirectory() as folder:
        path = plots.density_rank(
            Path(folder) / "density.svg",
            {name: density.numpy() for name, density in densities.items()},
            fits,
            title=f"Feature density by rank, {where}",
        )
        return path.read_text(encoding="utf-8")


def _best(candidates: list[Recipe], score: Callable[[Recipe], float]) -> Recipe:
    """The recipe with the lowest score; a single one is not tried."""
    if len(candidates) == 1:
        return candidates[0]
    scores = [score(each) for each in candidates]
    return candidates[scores.index(min(scores))]
