"""Study of *Decomposing the Dark Matter of Sparse Autoencoders* (Engels, Smith & Tegmark 2024, arXiv 2410.14670).

Dictionaries of several widths and equal mean L0 are trained on the same activations; on documents that none of them has
seen, a linear map with bias is fitted to their errors on one part, and everything is measured on another. Errors are
also predicted from the reconstructions of dictionaries of the same width and budget at the previous layer, the MLP's
and the attention's output; and the encoder is compared with gradient pursuit at each token's own L0.

The paper's numbers come from Gemma 2 9B with dictionaries of up to a million features; here it is a small model and few
features. So the two magnitudes (about half of the error, over 90 % of its norm) are counted, and what a failure of
theirs means is for the notes to say. Controls stand beside: a reconstruction that is only too short has an error that
is 100 % linear; independent noise has one that is not linear at all; and on activations that are sparse by construction
the two estimates must follow the noises that were put in.
"""

import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import MutualChoice
from apportion.data import SyntheticDictionary, corpus
from apportion.features import Recipe, SparseAutoencoder, fit_dictionary
from apportion.features.dark_matter import (
    ErrorAudit,
    audit_errors,
    explained_elsewhere,
    loss_shares,
    noise_grid,
    norm_agreement,
    read_tokens,
)
from apportion.features.evaluate import SplicedLoss
from apportion.features.gradient_pursuit import GradientPursuit
from apportion.features.linear_fit import Tokens
from apportion.features.power_law import fit_power_law
from apportion.models import ActivationStore, Site, cache_dir, harvest, load
from apportion.report import plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine
from apportion.studies.workbench import Workbench

CLAIM = (
    "About half of a dictionary's error vector and over 90 % of its squared norm are linear in the activation; wider "
    "dictionaries reduce the linear part and hardly the rest, and fail on the same tokens; gradient pursuit at equal "
    "L0 reduces the nonlinear part only slightly, an earlier layer's reconstruction more."
)
BASELINE = (
    "The encoder's own code at equal L0 (for gradient pursuit), the narrower dictionary at equal mean L0 (for width), "
    "and reconstructions that are only too short or noisy (for linearity)"
)

Measured = dict[str, dict[str, list[float]]]
_TUNING_SEED = 1000
# "About half": at least this much.
_ABOUT_HALF = 0.4


@dataclass(frozen=True)
class _Size:
    """What is trained and measured."""

    widths: tuple[int, ...]
    steps: int
    model: str = "smollm2"
    layer: int = 15
    text: str = "english"
    tokens: int = 150_000
    budget: int = 32
    batch_size: int = 2048
    rates: tuple[float, ...] = (4e-3,)  # for 2304 features; others by the square root of their ratio
    tuned_steps: int = 300
    pursued: tuple[int, int] = (16_000, 8_000)  # fit and test tokens for gradient pursuit
    grid: tuple[float, ...] = (0.0, 0.5, 1.0)
    grid_tokens: tuple[int, int] = (8_000, 4_000)
    loss_contexts: int = 32
    sources: tuple[str, ...] = ("the previous layer", "the attention output", "the MLP output")
    on_errors: bool = False  # also train dictionaries on the two parts of the error
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def middle(self) -> int:
        """The width at which what needs one width is measured."""
        return self.widths[len(self.widths) // 2]


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(
        (48, 96, 160), 60, model="synthetic", tokens=8_000, budget=4, batch_size=256, pursued=(1000, 500),
        grid_tokens=(1000, 500),
    ),
    "default": _Size(
        (576, 1152, 2304), 120, tokens=100_000, batch_size=1024, pursued=(6_000, 3_000), loss_contexts=16,
        sources=("the previous layer",),
    ),
    "long": _Size(
        (1152, 2304, 4608), 400, tokens=250_000, rates=(2e-3, 4e-3), tuned_steps=100, pursued=(12_000, 6_000),
        sources=("the previous layer",), on_errors=True,
    ),
    "gpu": _Size(
        (2304, 4608, 9216, 18_432, 36_864), 6000, tokens=4_000_000, batch_size=8192, rates=(5e-4, 1e-3, 2e-3),
        tuned_steps=600, pursued=(60_000, 30_000), grid=(0.0, 0.25, 0.5, 0.75, 1.0), grid_tokens=(40_000, 20_000),
        loss_contexts=128, on_errors=True, dtype="bfloat16", device="cuda",
    ),
}  # fmt: skip


# --- where activations come from -------------------------------------------------------------------------------------


class _World(ABC):
    """Activations of one site and of places that write into it before, in three parts that share no document.

    Attributes:
        width: of the activations.
        sources: other sites, by the name that the tables give them.
        loss: measures the model's loss, if there is a model.
    """

    width: int
    sources: dict[str, str]
    loss: SplicedLoss | None

    @abstractmethod
    def batches(self, site: str | None, size: int, seed: int) -> Callable[[int], Tensor]:
        """Training tokens; the site is the world's own unless named."""

    @abstractmethod
    def fit(self, site: str | None = None) -> Tokens:
        """What linear maps are fitted to."""

    @abstractmethod
    def test(self, site: str | None = None) -> Tokens:
        """What everything is measured on."""


class _Model(_World):
    """A language model's activations, harvested once and kept for the next run of the study."""

    def __init__(self, size: _Size, bench: Workbench) -> None:
        bench.say(f"loading {size.model}")
        lm = load(size.model, dtype=size.dtype, device=size.device)
        layer = f"layers.{size.layer}"
        self.site = f"{layer}.residual"
        places = {
            "the previous layer": f"layers.{size.layer - 1}.residual",
            "the attention output": f"{layer}.attn_out",
            "the MLP output": f"{layer}.mlp_out",
        }
        self.sources = {name: places[name] for name in size.sources}
        sites = [*self.sources.values(), self.site]
        name = (
            f"study-dark_matter-{size.model}-{layer}-{size.text}-{size.tokens}-{len(sites)}-{lm.model.dtype}".replace(
                "/", "-"
            )
        )
        folder = cache_dir() / "stores" / name.replace("torch.", "")
        bench.say(f"harvesting {size.tokens} tokens at {len(sites)} sites")
        store: ActivationStore = harvest(lm, sites, corpus(size.text), folder, tokens=size.tokens)
        store.site = Site.parse(self.site)
        self.width = store.width
        self._train, held_out = store.split(0.5)
        self._fit, self._test = held_out.split(0.5)
        self.loss: SplicedLoss | None = SplicedLoss(lm, store.site, self._test, contexts=size.loss_contexts)
        self._kept: dict[tuple[str, str], Tokens] = {}

    def batches(self, site: str | None, size: int, seed: int) -> Callable[[int], Tensor]:
        return self._train.batches(size, seed=seed, site=site or self.site)

    def fit(self, site: str | None = None) -> Tokens:
        return self._tokens("fit", self._fit, site or self.site)

    def test(self, site: str | None = None) -> Tokens:
        return self._tokens("test", self._test, site or self.site)

    def _tokens(self, part: str, view: Any, site: str) -> Tokens:
        if (part, site) not in self._kept:
            rows = torch.arange(view.n_tokens)
            documents = self._kept[part, self.site].documents if (part, self.site) in self._kept else None
            if documents is None:
                self._kept[part, self.site] = read_tokens(view)
                return self._tokens(part, view, site)
            self._kept[part, site] = Tokens(view.read(rows, site), documents)
        return self._kept[part, site]


class _Synthetic(_World):
    """Sparse sums of known directions, and a noisier version of them that stands for an earlier layer."""

    def __init__(self, size: _Size) -> None:
        self.width, self.loss = 32, None
        self.sources = {"the previous layer": "previous"}
        generator = SyntheticDictionary()
        count = size.tokens // 2
        self._train = generator.sample(count, seed=1).x
        self._held = [generator.sample(count // 2, seed=seed).x for seed in (2, 3)]

    def batches(self, site: str | None, size: int, seed: int) -> Callable[[int], Tensor]:
        def batch(step: int) -> Tensor:
            chosen = torch.randint(len(self._train), (size,), generator=_generator(step + 10_007 * seed))
            return self._at(self._train[chosen], site)

        return batch

    def fit(self, site: str | None = None) -> Tokens:
        return self._part(0, site)

    def test(self, site: str | None = None) -> Tokens:
        return self._part(1, site)

    def _part(self, number: int, site: str | None) -> Tokens:
        x = self._held[number]
        return Tokens(self._at(x, site), 10_000 * number + torch.arange(len(x)) // 100)

    def _at(self, x: Tensor, site: str | None) -> Tensor:
        return x if site is None else 0.7 * x + 0.1 * torch.randn(x.shape, generator=_generator(len(x)))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _first(tokens: Tokens, count: int) -> Tokens:
    return Tokens(tokens.x[:count], tokens.documents[:count])


# --- what is measured ------------------------------------------------------------------------------------------------


class _Trials:
    """Trains dictionaries and audits their errors."""

    def __init__(self, world: _World, size: _Size) -> None:
        self.world, self.size = world, size
        self._seed = -1
        self._trained: dict[tuple[str, str | None], SparseAutoencoder] = {}

    def recipe(self, width: int, rate: float, seed: int) -> Recipe:
        """Widths are trained alike; the learning rate goes with the square root of the width, as by default."""
        return Recipe(
            MutualChoice(self.size.budget),
            n_features=width,
            steps=self.size.steps,
            batch_size=self.size.batch_size,
            auxiliary="none",
            learning_rate=1e-2 if self.size.model == "synthetic" else rate * (2304 / width) ** 0.5,
            seed=seed,
        )

    def dictionary(self, recipe: Recipe, site: str | None = None) -> SparseAutoencoder:
        """Trained once a seed, and calibrated on the test text: all widths have the same mean L0 there."""
        if recipe.seed != self._seed:
            self._seed, self._trained = recipe.seed, {}
        key = (str(recipe.to_json()), site)
        if key not in self._trained:
            batches = self.world.batches(site, recipe.batch_size, recipe.seed)
            self._trained[key] = self._fitted(recipe, batches, self.world.test(site).x)
        return self._trained[key]

    def _fitted(self, recipe: Recipe, batches: Callable[[int], Tensor], calibration: Tensor) -> SparseAutoencoder:
        sae, _ = fit_dictionary(
            recipe,
            batches,
            calibration.shape[1],
            calibration=lambda: calibration.split(8192),
            device=self.size.device,
            progress=False,
        )
        return sae.requires_grad_(False)

    def _audit(self, reconstruct: Any, fit: Tokens | None = None, test: Tokens | None = None) -> ErrorAudit:
        fit, test = fit or self.world.fit(), test or self.world.test()
        return audit_errors(reconstruct, fit, test, device=self.size.device)

    def tuning(self, recipe: Recipe) -> float:
        """What a learning rate is chosen by: FVU on the tokens that the linear maps are fitted to."""
        sae, x = self.dictionary(recipe), self.world.fit().x
        left = sum(float((part - self._reconstruct(sae, part)).square().sum()) for part in x.split(8192))
        return left / float((x - x.mean(dim=0)).square().sum())

    def _reconstruct(self, sae: SparseAutoencoder, x: Tensor) -> Tensor:
        out = [sae.decode(sae.encode(part.to(self.size.device), mode="threshold")).cpu() for part in x.split(4096)]
        return torch.cat(out)

    def audit(self, recipe: Recipe) -> dict[str, Any]:
        """The audit of a width, and the error norms of some test tokens."""
        sae = self.dictionary(recipe)
        audit = self._audit(sae)
        test = self.world.test().x
        active = sum(sae.encode(part.to(self.size.device), mode="threshold").nnz for part in test.split(8192))
        figures = {name: metric.value for name, metric in audit.metrics.items()}
        figures["l0"] = active / len(test)
        norms = audit.errors[:: max(1, len(audit.errors) // 5000)].norm(dim=1)
        return {"figures": figures, "norms": [float(f"{each:.5g}") for each in norms.tolist()]}

    def losses(self, recipe: Recipe) -> dict[str, float]:
        """What each part of the error costs the model, beside its share of the squared error."""
        if self.world.loss is None:
            return {}
        sae = self.dictionary(recipe)
        audit = self._audit(sae)
        found = {name: metric.value for name, metric in loss_shares(self.world.loss, sae, audit.linear).items()}
        metrics = audit.metrics
        found["squared error, share of the nonlinear part"] = metrics["fvu_nonlinear"].value / metrics["fvu"].value
        return found

    def pursuit(self, recipe: Recipe) -> dict[str, dict[str, float]]:
        """The encoder and gradient pursuit at each token's own L0, on the same (fewer) tokens."""
        sae = self.dictionary(recipe)
        parts = [
            _first(each, count)
            for each, count in zip((self.world.fit(), self.world.test()), self.size.pursued, strict=True)
        ]
        pursuit = GradientPursuit(sae)

        def by_pursuit(x: Tensor) -> Tensor:
            return sae.decode(pursuit.encode(x.to(self.size.device))).cpu()

        names = ("fvu", "fvu_linear", "fvu_nonlinear", "r2_error")
        return {
            name: {metric: self._audit(how, *parts).metrics[metric].value for metric in names}
            for name, how in (("encoder", partial(self._reconstruct, sae)), ("gradient pursuit", by_pursuit))
        }

    def elsewhere(self, recipe: Recipe) -> dict[str, dict[str, float]]:
        """Errors predicted from other dictionaries' reconstructions; the raw previous layer is the bar above them."""
        fit, test = self.world.fit(), self.world.test()
        sae = self.dictionary(recipe)
        errors = [each.x - self._reconstruct(sae, each.x) for each in (fit, test)]
        sources = {}
        for name, site in self.world.sources.items():
            other = self.dictionary(recipe, site)
            x = self.world.fit(site).x, self.world.test(site).x
            sources[f"{name}'s reconstruction"] = tuple(self._reconstruct(other, each) for each in x)
            if name == "the previous layer":
                sources["the previous layer itself"] = x
        return explained_elsewhere(fit, errors[0], test, errors[1], sources)  # type: ignore[arg-type]

    def controls(self, recipe: Recipe) -> dict[str, float]:
        """What the audit says where the answer is known."""
        sae = self.dictionary(recipe)
        fit, test = (
            _first(each, count)
            for each, count in zip((self.world.fit(), self.world.test()), self.size.grid_tokens, strict=True)
        )
        generator = _generator(recipe.seed)

        def noisy(x: Tensor) -> Tensor:
            return x + x.std(dim=0) * torch.randn(x.shape, generator=generator)

        figures = {
            "R^2 of the error of 0.9 x": self._audit(lambda x: 0.9 * x, fit, test).metrics["r2_error"].value,
            "R^2 of the error that is noise": self._audit(noisy, fit, test).metrics["r2_error"].value,
        }
        return figures | noise_grid(sae, fit, test, scales=self.size.grid, seed=recipe.seed).correlations()

    def on_errors(self, recipe: Recipe) -> dict[str, float]:
        """FVU of dictionaries trained alike on the linear and on the nonlinear error of a dictionary."""
        sae = self.dictionary(recipe)
        linear = self._audit(sae).linear
        batches = self.world.batches(None, recipe.batch_size, recipe.seed)

        def part(x: Tensor, name: str) -> Tensor:
            predicted = linear(x)
            return predicted if name == "linear" else x - self._reconstruct(sae, x) - predicted

        figures = {}
        for name in ("linear", "nonlinear"):
            test = part(self.world.test().x, name)

            def errors(step: int, name: str = name) -> Tensor:
                return part(batches(step), name)

            own = self._fitted(recipe, errors, test)
            left = (test - self._reconstruct(own, test)).square().sum()
            figures[f"fvu of a dictionary of the {name} error"] = float(left / (test - test.mean(dim=0)).square().sum())
        return figures


# --- the study -------------------------------------------------------------------------------------------------------


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    world: _World = _Synthetic(size) if size.model == "synthetic" else _Model(size, bench)
    trials = _Trials(world, size)
    where = "synthetic" if size.model == "synthetic" else f"{size.model} layers.{size.layer}.residual, {size.text}"

    def measured_as(what: str, recipe: Recipe, measurement: Callable[[Recipe], Any]) -> Any:
        return bench.measure(f"{where}, {what}", [asdict(size), recipe.to_json()], partial(measurement, recipe))

    rate = size.rates[0]
    if len(size.rates) > 1:
        tried = [replace(trials.recipe(size.middle, each, _TUNING_SEED), steps=size.tuned_steps) for each in size.rates]
        scores = [measured_as(f"tuning, rate {each.learning_rate:g}", each, trials.tuning) for each in tried]
        rate = size.rates[scores.index(min(scores))]

    measured: Measured = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        norms = {}
        for width in size.widths:
            found = measured_as(f"seed {seed}: F={width}", trials.recipe(width, rate, seed), trials.audit)
            norms[width] = torch.tensor(found["norms"]).unsqueeze(1)
            _keep(measured, f"{where}: F={width}", found["figures"])
        agreement = norm_agreement(norms[size.widths[0]], norms[size.widths[-1]])
        _keep(measured, f"{where}: smallest and largest", {"R^2 of one's error norms on the other's": agreement})
        recipe = trials.recipe(size.middle, rate, seed)
        for name, figures in measured_as(f"seed {seed}: gradient pursuit", recipe, trials.pursuit).items():
            _keep(measured, f"{where}, F={size.middle}, fewer tokens: {name}", figures)
        for name, figures in measured_as(f"seed {seed}: other sources", recipe, trials.elsewhere).items():
            _keep(measured, f"{where}, F={size.middle}, predicted from: {name or 'the activation'}", figures)
        for name, of in (("parts of the loss", trials.losses), ("controls", trials.controls)):
            _keep(measured, f"{where}, F={size.middle}: {name}", measured_as(f"seed {seed}: {name}", recipe, of))
        if size.on_errors:
            found = measured_as(f"seed {seed}: dictionaries of errors", recipe, trials.on_errors)
            _keep(measured, f"{where}, F={size.middle}: dictionaries of errors", found)
    notes, law = _notes(size, world, where, rate, measured)
    return Finding(
        slug="dark_matter",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=_claims(size, where, measured),
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes + law,
        plots={"width": _width_plot(size, where, measured)},
    )


def _keep(measured: Measured, name: str, figures: dict[str, float]) -> None:
    for metric, value in figures.items():
        measured[name][metric].append(value)


def _claims(size: _Size, where: str, measured: Measured) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[name][metric], dtype=torch.float64)

    def at(width: int, metric: str) -> Tensor:
        return of(f"{where}: F={width}", metric)

    small, large = size.widths[0], size.widths[-1]
    middle = f"{where}, F={size.middle}"

    def drop(metric: str) -> Tensor:
        return 1 - at(large, metric) / at(small, metric)

    def gain(metric: str) -> Tensor:
        """Of gradient pursuit over the encoder."""
        fewer = f"{middle}, fewer tokens"
        return 1 - of(f"{fewer}: gradient pursuit", metric) / of(f"{fewer}: encoder", metric)

    def source_gain(name: str) -> Tensor:
        predicted = f"{middle}, predicted from"
        return 1 - of(f"{predicted}: {name}", "fvu_left") / of(f"{predicted}: the activation", "fvu_left")

    previous = "the previous layer's reconstruction"
    controls = f"{middle}: controls"
    counted = [
        (
            f"(1) about half of the error vector is linear in x: R^2, mean over dimensions, is at least {_ABOUT_HALF}, "
            f"F={large}",
            at(large, "r2_error_mean_over_dimensions") - _ABOUT_HALF,
        ),
        (f"(1) R^2 of the squared error norm is above 0.9, F={large}", at(large, "r2_squared_norm") - 0.9),
        (
            "(2) the largest dictionary fails on the same tokens as the smallest: R^2 of error norms above 0.5",
            of(f"{where}: smallest and largest", "R^2 of one's error norms on the other's") - 0.5,
        ),
        (
            "(3) from the smallest to the largest width the linear FVU drops, relatively, over twice as much as the "
            "nonlinear",
            drop("fvu_linear") - 2 * drop("fvu_nonlinear"),
        ),
        ("(5) gradient pursuit's FVU is below the encoder's at each token's own L0", gain("fvu")),
        (
            "(5) gradient pursuit reduces the nonlinear FVU relatively less than the whole",
            gain("fvu") - gain("fvu_nonlinear"),
        ),
        (
            "(5) the previous layer's reconstruction reduces the nonlinear FVU more than gradient pursuit does",
            source_gain(previous) - gain("fvu_nonlinear"),
        ),
    ]
    shown = [
        (
            "(1) the same weighted by variance: R^2 of the error is at least 0.4",
            at(large, "r2_error") - _ABOUT_HALF,
        ),
        (
            "(1) at most half of the linear error is shrinkage, which rescaling the features removes",
            0.5 - at(large, "linear_error_by_rescaling"),
        ),
        (
            "(5) the previous layer's reconstruction is worth no more than the previous layer itself",
            source_gain("the previous layer itself") - source_gain(previous),
        ),
        ("control: the error of 0.9 x is linear, R^2 > 0.999", of(controls, "R^2 of the error of 0.9 x") - 0.999),
        ("control: noise is not, R^2 < 0.05", 0.05 - of(controls, "R^2 of the error that is noise")),
        (
            "control: the linear estimate follows dense noise, rank correlation above 0.9",
            of(controls, "linear error with dense noise") - 0.9,
        ),
        (
            "control: the nonlinear estimate follows noise in the reconstruction, rank correlation above 0.9",
            of(controls, "nonlinear error with reconstruction noise") - 0.9,
        ),
    ]
    if f"{middle}: parts of the loss" in measured:
        parts = f"{middle}: parts of the loss"
        share = of(parts, "squared error, share of the nonlinear part")
        shown.append(
            (
                "(4) the nonlinear error costs loss in proportion: its share of the repair is within 0.2 of its share "
                "of the squared error",
                0.2 - (of(parts, "ce_share_nonlinear") - share).abs(),
            )
        )
    if size.on_errors:
        errors = f"{middle}: dictionaries of errors"
        nonlinear, linear = (of(errors, f"fvu of a dictionary of the {name} error") for name in ("nonlinear", "linear"))
        shown.append(("(4) the nonlinear error is harder to learn: a dictionary of it is worse", nonlinear - linear))
    return [Comparison.positive(f"{where} {claim}", margins.tolist()) for claim, margins in counted] + [
        Comparison.positive(f"{where} {claim}", margins.tolist(), part_of_verdict=False) for claim, margins in shown
    ]


def _notes(size: _Size, world: _World, where: str, rate: float, measured: Measured) -> tuple[list[str], list[str]]:
    chosen = (
        f", chosen from {', '.join(f'{each:g}' for each in size.rates)} by {size.tuned_steps} steps on another seed"
        if len(size.rates) > 1
        else ""
    )
    notes = [
        f"{where}: Mutual Choice dictionaries of {', '.join(map(str, size.widths))} features, mean L0 {size.budget} on "
        f"the test text, {size.steps} steps of {size.batch_size}; learning rate {rate:g} at 2304 features{chosen}, "
        f"others by the square root of the width. Linear maps are fitted to {len(world.fit())} tokens and tested on "
        f"{len(world.test())}, of documents that nobody trained on, without first tokens of contexts and sinks.",
        "R^2 is counted as the paper counts it, averaged over dimensions; weighted by variance it stands beside. "
        "'linear_error_by_rescaling' is how much of the linear error is only shrinkage.",
        "'fvu_left' is the FVU when the error is predicted from the activation and the source together; for the "
        "activation alone it is the nonlinear FVU. The previous layer itself is the bar above its reconstruction: what "
        "the raw activations give is not explained by features.",
    ]
    means = [float(torch.tensor(measured[f"{where}: F={width}"]["fvu"]).mean()) for width in size.widths]
    law = fit_power_law(size.widths, means)
    nonlinear = float(torch.tensor(measured[f"{where}: F={size.widths[-1]}"]["fvu_nonlinear"]).mean())
    error = "not known with three widths" if len(size.widths) == 3 else f"standard error {law.errors[0]:.2g}"
    return notes, [
        f"Power law in width, fitted to the mean FVUs: constant {law.constant:.3f} ({error}), exponent "
        f"{law.exponent:.2f}; the paper reads the constant as the nonlinear FVU, which is {nonlinear:.3f} at the "
        "largest width."
    ]


def _width_plot(size: _Size, where: str, measured: Measured) -> str:
    """FVU and its two parts by width, as SVG text."""
    points = []
    for metric in ("fvu", "fvu_linear", "fvu_nonlinear"):
        for width in size.widths:
            row = Row.of("", metric, measured[f"{where}: F={width}"][metric])
            points.append(plots.ParetoPoint(metric, width, row.mean, quality_stderr=row.stderr or 0.0))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.pareto(
            Path(folder) / "width.svg",
            points,
            cost="features",
            quality="fraction of variance",
            title=f"Error by width at mean L0 {size.budget}, {where}",
            log_cost=True,
        )
        return path.read_text(encoding="utf-8")
