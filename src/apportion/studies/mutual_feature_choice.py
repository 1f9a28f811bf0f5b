"""Study of *Adaptive Sparse Allocation with Mutual Choice & Feature Choice SAEs* (Ayonrinde 2024, arXiv 2411.02124).

Two halves. On a synthetic dictionary, where the true features are known, claims (a) to (f) of the method sheet, each in
batch mode and in inference (threshold) mode, with a control in which the advantage must shrink. On the residual stream
of SmolLM2, dictionaries of equal width, budget, steps and data order are compared on held-out documents in inference
mode.

Every method gets the same learning-rate grid (``_GRID``) on a seed of its own; the best by FVU is used for all seeds.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
from apportion.report.data import ZipfFit as LawToDraw
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.progress import Steps, steps_shown
from apportion.studies.run import machine

CLAIM = (
    "At equal mean L0, Mutual Choice reconstructs better and recovers more of the model's loss than Token Choice "
    "(TopK); Feature Choice with Zipf quotas leaves no feature dead; aux_zipf_loss leaves fewer features underused "
    "than aux_k_loss."
)
BASELINE = (
    "TopK (Token Choice) dictionaries at the same budget, width, steps and data, learning rate tuned on the same grid"
)

_FREE = Phases(warmup_fraction=0, mutual_fraction=0)
_TUNING_SEED = 1000
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Synthetic:
    """Section 1.7 of the method sheet: d = 32, 128 true features, F = 160, budget 5, batches of 512."""

    steps: int = 1500
    tuned_steps: int = 400
    rates: tuple[float, ...] = (3e-3, 1e-2)
    test_tokens: int = 20_000
    calibration_tokens: int = 50_000
    variants: bool = True  # also what the claims do not speak of: auxiliary losses, uniform quotas, handing over


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
    steps: int = 150
    tuned_steps: int = 0
    rates: tuple[float, ...] = (2e-3,)
    loss_contexts: int = 24
    dtype: str = "auto"
    device: str = "cpu"
    auxiliaries: bool = True


@dataclass(frozen=True)
class _Size:
    synthetic: _Synthetic = field(default_factory=_Synthetic)
    real: _Real | None = field(default_factory=_Real)


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(_Synthetic(60, 20, (1e-2,), 2_000, 4_000, variants=False), None),
    "default": _Size(_Synthetic(steps=800, tuned_steps=200, variants=False)),
    "long": _Size(_Synthetic(), _Real(steps=1200, tuned_steps=300, rates=(5e-4, 1e-3, 2e-3, 4e-3), loss_contexts=64)),
    "gpu": _Size(
        _Synthetic(),
        _Real(
            text="code",
            tokens=4_000_000,
            n_features=18_432,
            batch_size=8192,
            steps=6000,
            tuned_steps=600,
            rates=(2e-4, 5e-4, 1e-3),
            loss_contexts=128,
            dtype="bfloat16",
            device="cuda",
        ),
    ),
}


def run(scale: Scale, seeds: list[int], progress: bool = True) -> Finding:
    """Measure; see the module's docstring."""
    started = time.perf_counter()
    size = _SIZES[scale]
    with steps_shown(progress, CLAIM.split(";")[0]) as steps:
        rows, comparisons, notes = _on_synthetic(size.synthetic, seeds, steps)
        pictures: dict[str, str] = {}
        if size.real is not None:
            more = _on_model(size.real, seeds, steps)
            rows, comparisons = rows + more[0], comparisons + more[1]
            notes, pictures = notes + more[2], more[3]
    return Finding(
        slug="mutual_feature_choice",
        claim=CLAIM,
        rows=rows,
        comparisons=comparisons,
        seeds=seeds,
        seconds=time.perf_counter() - started,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots=pictures,
    )


# --- known truth ---------------------------------------------------------------------------------------------------


def _synthetic_recipes(size: _Synthetic) -> dict[str, Recipe]:
    base = Recipe(
        TokenChoice(5),
        n_features=160,
        steps=size.steps,
        batch_size=512,
        auxiliary="none",
        phases=_FREE,
        learning_rate=1e-2,
    )
    zipf = FeatureChoice(5, profile=Zipf())
    recipes = {
        "TopK": base,
        "Mutual Choice": replace(base, rule=MutualChoice(5)),
        "Feature Choice, Zipf": replace(base, rule=zipf),
    }
    if size.variants:
        recipes |= {
            "Mutual Choice + aux_k": replace(base, rule=MutualChoice(5), auxiliary="dead"),
            "Mutual Choice + aux_zipf": replace(base, rule=MutualChoice(5), auxiliary="zipf"),
            "Feature Choice, uniform": replace(base, rule=FeatureChoice(5)),
            "Mutual, then Feature Choice": replace(base, rule=zipf, phases=replace(_FREE, mutual_fraction=0.5)),
        }
    return recipes


def _on_synthetic(size: _Synthetic, seeds: list[int], steps: Steps) -> tuple[list[Row], list[Comparison], list[str]]:
    recipes = _synthetic_recipes(size)
    world = _World(SyntheticDictionary(seed=_TUNING_SEED), size, _TUNING_SEED)
    rates = {}
    for name, recipe in recipes.items():
        steps.say(f"synthetic, learning rate of {name}")
        rates[name] = _best_rate(
            recipe, size.rates, size.tuned_steps, lambda tried: world.measure(tried)["FVU, threshold"]
        )
    measured: Measured = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for generator, label in (
            (SyntheticDictionary(seed=seed), ""),
            (SyntheticDictionary(seed=seed, heterogeneity=0.0, constant_l0=True), " (control)"),
        ):
            world = _World(generator, size, seed)
            chosen = recipes if not label else {name: recipes[name] for name in ("TopK", "Mutual Choice")}
            for name, recipe in chosen.items():
                steps.say(f"synthetic{label}, seed {seed}: {name}")
                results = world.measure(replace(recipe, learning_rate=rates[name], seed=seed))
                for metric, value in results.items():
                    measured[f"synthetic{label}: {name}"][metric].append(value)
    notes = [
        "Synthetic: d=32, 128 true features of frequency 1/rank, mean L0 5, log-normal difficulty 0.6; F=160, "
        f"{size.steps} steps of 512 tokens; learning rates "
        + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        + "."
    ]
    return collect_rows(measured), _synthetic_claims(measured), notes


class _World:
    """A synthetic dictionary with its training stream, calibration and test sets."""

    def __init__(self, generator: SyntheticDictionary, size: _Synthetic, seed: int) -> None:
        self.generator, self.seed = generator, seed
        self.test = generator.sample(size.test_tokens, seed=2**30 + seed)
        self.calibration = generator.sample(size.calibration_tokens, seed=2**30 + 2**20 + seed).x

    def measure(self, recipe: Recipe) -> dict[str, float]:
        """Train by a recipe and judge the dictionary by what is known."""

        def batches(step: int) -> Tensor:
            return self.generator.sample(recipe.batch_size, seed=step + 100_003 * self.seed).x

        sae, _ = fit_dictionary(
            recipe, batches, self.generator.d, calibration=lambda: self.calibration.split(8192), progress=False
        )
        return {**self._mode(sae, "batch"), **self._mode(sae, "threshold"), "MCC": self._mcc(sae)}

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
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"synthetic: {name}"][metric], dtype=torch.float64)

    def control(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"synthetic (control): {name}"][metric], dtype=torch.float64)

    claims: list[tuple[str, Tensor]] = []
    for mode in ("batch", "threshold"):
        fvu, dead, rare = f"FVU, {mode}", f"dead, {mode}", f"density < 1e-3, {mode}"
        tracks = f"correlation of L0 with true L0, {mode}"
        topk, mutual, feature = "TopK", "Mutual Choice", "Feature Choice, Zipf"
        gain = 1 - of(mutual, fvu) / of(topk, fvu)
        control_gain = 1 - control(mutual, fvu) / control(topk, fvu)
        claims += [
            (
                f"synthetic (a) Mutual Choice FVU is at most 0.75 of TopK's, {mode}",
                0.75 - of(mutual, fvu) / of(topk, fvu),
            ),
            (
                f"synthetic (b) Feature Choice (Zipf) FVU is at most 0.85 of TopK's, {mode}",
                0.85 - of(feature, fvu) / of(topk, fvu),
            ),
            (f"synthetic (b) Feature Choice (Zipf) has no dead feature, {mode}", 0.5 / 160 - of(feature, dead)),
            (
                f"synthetic (c) Mutual Choice has more features below density 1e-3 than TopK, {mode}",
                of(mutual, rare) - of(topk, rare),
            ),
            (f"synthetic (c) Feature Choice (Zipf) has none below density 1e-3, {mode}", 0.5 / 160 - of(feature, rare)),
            (
                f"synthetic (e) Mutual Choice's L0 follows the true L0, correlation above 0.7, {mode}",
                of(mutual, tracks) - 0.7,
            ),
            (
                f"synthetic (e) Feature Choice's L0 follows the true L0, correlation above 0.7, {mode}",
                of(feature, tracks) - 0.7,
            ),
            (f"synthetic (e) TopK's does not, correlation below 0.2, {mode}", 0.2 - of(topk, tracks).abs()),
            (f"synthetic (f) control: Mutual Choice's gain shrinks without heterogeneity, {mode}", gain - control_gain),
        ]
    for name in ("Mutual Choice", "Feature Choice, Zipf"):
        ratio = of(name, "FVU, threshold") / of(name, "FVU, batch")
        claims += [
            (f"synthetic (d) {name}: threshold FVU within 3 % of batch FVU", 0.03 - (ratio - 1)),
            (
                f"synthetic (d) {name}: threshold L0 within 5 % of the budget",
                0.05 - (of(name, "L0, threshold") / 5 - 1).abs(),
            ),
        ]
    return [Comparison.positive(claim, margins.tolist()) for claim, margins in claims]


# --- a language model -----------------------------------------------------------------------------------------------


def _model_recipes(size: _Real) -> dict[str, Recipe]:
    base = Recipe(
        TokenChoice(size.budget),
        n_features=size.n_features,
        steps=size.steps,
        batch_size=size.batch_size,
        auxiliary="none",
        phases=_FREE,
        learning_rate=size.rates[0],
    )
    mutual = MutualChoice(size.budget)
    recipes = {
        "TopK": base,
        "Mutual Choice": replace(base, rule=mutual),
        "Feature Choice, Zipf": replace(
            base, rule=FeatureChoice(size.budget, profile=Zipf()), phases=replace(_FREE, mutual_fraction=0.6)
        ),
    }
    if size.auxiliaries:
        silence = size.batch_size * 20
        recipes["Mutual Choice + aux_k"] = replace(base, rule=mutual, auxiliary="dead", dead_after=silence)
        recipes["Mutual Choice + aux_zipf"] = replace(base, rule=mutual, auxiliary="zipf", dead_after=silence)
    return recipes


def _on_model(
    size: _Real, seeds: list[int], steps: Steps
) -> tuple[list[Row], list[Comparison], list[str], dict[str, str]]:
    steps.say(f"loading {size.model}")
    lm = load(size.model, dtype=size.dtype, device=size.device)
    train, calibration, test = _views(lm, size)
    bench = _Bench(lm, size, train, calibration, test)
    recipes = _model_recipes(size)
    rates = {}
    for name, recipe in recipes.items():
        tuned = name.split(" + ")[0]  # the auxiliary loss does not change which rate the rule itself prefers
        if tuned not in rates:
            steps.say(f"{size.model}, learning rate of {name}")
            rates[tuned] = _best_rate(recipe, size.rates, size.tuned_steps, bench.fvu)
        recipes[name] = replace(recipe, learning_rate=rates[tuned])
    measured: Measured = defaultdict(lambda: defaultdict(list))
    densities: dict[str, Tensor] = {}
    fits: dict[str, ZipfFit] = {}
    for seed in seeds:
        for name, recipe in recipes.items():
            steps.say(f"{size.model}, seed {seed}: {name}")
            results, density, fit = bench.measure(replace(recipe, seed=seed))
            for metric, value in results.items():
                measured[f"{size.model}: {name}"][metric].append(value)
            if seed == seeds[0]:
                densities[name] = density
                if fit is not None:
                    fits[name] = fit
    notes = [
        f"{size.model}, {size.site}, {train.n_tokens} training tokens of {size.text}, F={size.n_features}, budget "
        f"{size.budget}, {size.steps} steps of {size.batch_size}; calibrated on {calibration.n_tokens} and tested on "
        f"{test.n_tokens} held-out tokens of other documents; learning rates "
        + ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
        + ".",
        f"Zipf fits of the densities on test text, seed {seeds[0]}: "
        + "; ".join(
            f"{name}: exponent {fit.exponent:.2f}, offset {fit.offset:g}, R^2 of the log densities {fit.r_squared:.3f}"
            for name, fit in fits.items()
        )
        + ".",
    ]
    pictures = {"density": _density_plot(densities, fits, f"{size.model} {size.site}")}
    return collect_rows(measured), _model_claims(size, measured), notes, pictures


def _views(lm: LanguageModel, size: _Real) -> tuple[StoreView, StoreView, StoreView]:
    """Training, calibration and test parts of a store that is kept between runs of the study."""
    name = f"study-{size.model}-{size.site}-{size.text}-{size.tokens}-{lm.model.dtype}".replace("/", "-")
    folder = cache_dir() / "stores" / name.replace("torch.", "")
    store: ActivationStore = harvest(lm, Site.parse(size.site), corpus(size.text), folder, tokens=size.tokens)
    train, held_out = store.split(0.2)
    calibration, test = held_out.split(0.5)
    return train, calibration, test


class _Bench:
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

    def measure(self, recipe: Recipe) -> tuple[dict[str, float], Tensor, ZipfFit | None]:
        """All figures of a recipe.

        Thresholds calibrated on other documents give the L0 that a user gets. For the comparison at equal budget they
        are then calibrated on the test text itself, which fixes its mean L0 and nothing else: a few per cent of L0
        between documents would otherwise decide differences of a few per cent in FVU.
        """
        sae = self.fit(recipe)
        l0_as_used = evaluate_reconstruction(sae, self.test, device=self.size.device).metrics["l0"].value
        sae.calibrate((part.to(self.size.device) for part in _in_batches(self.test)), self.test.n_tokens)
        evaluation = evaluate_reconstruction(sae, self.test, device=self.size.device)
        loss = self.spliced.evaluate(sae)
        mean_density = self.size.budget / self.size.n_features
        figures = {name: evaluation.metrics[name].value for name in ("fvu", "l0", "cossim", "dead")}
        figures["l0, thresholds of other documents"] = l0_as_used
        figures |= {name: loss[name].value for name in ("ce_loss_score", "ce_loss_score_mean", "ce_increase")}
        figures["underused"] = float((evaluation.density < mean_density / 32).float().mean())
        if evaluation.zipf is not None:
            figures["Zipf exponent"] = evaluation.zipf.exponent
        return figures, evaluation.density, evaluation.zipf


def _in_batches(view: StoreView) -> Iterator[Tensor]:
    for start in range(0, view.n_tokens, 8192):
        yield view.read(torch.arange(start, min(start + 8192, view.n_tokens)))


def _model_claims(size: _Real, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{size.model}: {name}"][metric], dtype=torch.float64)

    topk, mutual, feature = "TopK", "Mutual Choice", "Feature Choice, Zipf"
    one = 0.5 / size.n_features
    claims = [
        (f"{size.model}: Mutual Choice's FVU is below TopK's", of(topk, "fvu") - of(mutual, "fvu")),
        (
            f"{size.model}: Mutual Choice recovers more loss than TopK",
            of(mutual, "ce_loss_score") - of(topk, "ce_loss_score"),
        ),
        (f"{size.model}: Feature Choice (Zipf) has no dead feature on held-out text", one - of(feature, "dead")),
    ]
    claims += [
        (
            f"{size.model}: {name}'s L0 on held-out text is within 5 % of the budget",
            0.05 - (of(name, "l0, thresholds of other documents") / size.budget - 1).abs(),
        )
        for name in (mutual, feature)
    ]
    if size.auxiliaries:
        claims.append(
            (
                f"{size.model}: aux_zipf leaves fewer features underused than aux_k",
                of("Mutual Choice + aux_k", "underused") - of("Mutual Choice + aux_zipf", "underused"),
            )
        )
    return [Comparison.positive(claim, margins.tolist()) for claim, margins in claims]


def _density_plot(densities: dict[str, Tensor], fits: dict[str, ZipfFit], where: str) -> str:
    """Density by rank with the fitted laws, as SVG text."""
    with tempfile.TemporaryDirectory() as folder:
        path = plots.density_rank(
            Path(folder) / "density.svg",
            {name: density.numpy() for name, density in densities.items()},
            {name: LawToDraw(fit.exponent, fit.scale, fit.offset) for name, fit in fits.items()},
            title=f"Feature density by rank, {where}",
        )
        return path.read_text(encoding="utf-8")


def _best_rate(recipe: Recipe, rates: tuple[float, ...], tuned_steps: int, score: Callable[[Recipe], float]) -> float:
    """The rate with the lowest score in a shorter run on a seed that is used for nothing else."""
    if len(rates) == 1:
        return rates[0]
    tried = {rate: score(replace(recipe, learning_rate=rate, steps=tuned_steps, seed=_TUNING_SEED)) for rate in rates}
    return min(tried, key=lambda rate: tried[rate])
