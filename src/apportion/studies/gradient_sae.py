"""Study of *Features that Make a Difference: Gradient SAEs* (Olmo et al. 2024, arXiv 2411.10397).

On residual streams of SmolLM2, TopK dictionaries trained by plain affinities and by gradient-weighted scores of several
betas are compared at equal k, width, steps, data order and tuning, on held-out documents. All are encoded alike, by
plain TopK. Fidelity is the increase in cross-entropy *and* the divergence from the model's own predictions; steering
is how far a random live feature, added at one fixed norm, moves the predictions.

The beta that counts is chosen on other documents than those it is judged on, by the increase in cross-entropy there.

Two further parts document the method. *Leakage*: a plain dictionary whose encoding alone looks at the label's gradient
has lower cross-entropy and higher divergence, which is why no figure above is taken that way. *Constructed*: where the
head reads only some small features, choosing by gradient finds them (with gradients at encoding).
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import TokenChoice
from apportion.data import corpus
from apportion.features import (
    GradientScore,
    Recipe,
    SparseAutoencoder,
    encode_with_gradients,
    fit_gradient_dictionary,
)
from apportion.features.evaluate import evaluate_reconstruction
from apportion.features.gradient_sae import effects
from apportion.features.predictions import Change, CleanPredictions
from apportion.models import LanguageModel, Site, cache_dir, gradient_of, harvest, load, splice
from apportion.models.activations import StoreView
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine, one_thread
from apportion.studies.workbench import Workbench

CLAIM = (
    "At equal budget, dictionaries trained with gradient-weighted TopK keep the spliced-in model closer to the "
    "original (cross-entropy, and divergence from its own predictions) than plain TopK, and their features steer it "
    "further per unit norm."
)
BASELINE = "TopK dictionaries at the same k, width, steps, data order and tuning, encoded the same way"

_TUNING_SEED = 1000
_PLAIN = "TopK"
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Size:
    """One site and everything that is trained there."""

    model: str = "smollm2"
    site: str = "layers.25.residual"
    text: str = "english"
    tokens: int = 16_000
    target: str = "label"
    n_features: int = 1152
    budgets: tuple[int, ...] = (16,)
    betas: tuple[float, ...] = (0.3, 1.0)
    batch_size: int = 512
    steps: int = 120
    rates: tuple[float, ...] = (4e-3,)
    contexts: int = 6  # on which predictions are compared
    leaking: tuple[float, ...] = (1.0,)  # betas of an encoding that looks at the label
    steered: int = 6  # features
    steered_contexts: int = 1
    dtype: str = "auto"
    device: str = "cpu"

    @property
    def where(self) -> str:
        """The conditions in words."""
        return f"{self.model} {self.site}, {self.text}"

    @property
    def chooses(self) -> bool:
        """Whether there is a choice of beta or learning rate to make."""
        return len(self.betas) > 1 or len(self.rates) > 1


_LONG = _Size(
    site="layers.20.residual",
    tokens=80_000,
    n_features=2304,
    budgets=(32,),
    batch_size=1024,
    steps=400,
    betas=(0.1, 0.3, 1.0),
    rates=(2e-3, 4e-3, 8e-3),
    contexts=32,
    leaking=(0.3, 1.0, 3.0, 10.0),
    steered=24,
    steered_contexts=2,
)
_ON_GPU = replace(
    _LONG,
    tokens=10_000_000,
    n_features=9216,
    budgets=(16, 32, 64),
    betas=(0.1, 0.3, 1.0, 3.0),
    batch_size=8192,
    steps=4000,
    rates=(5e-4, 1e-3),
    steered=64,
    dtype="bfloat16",
    device="cuda",
)
_SIZES: dict[Scale, tuple[_Size, ...]] = {
    "smoke": (
        _Size(
            site="layers.28.residual",
            tokens=1500,
            n_features=128,
            budgets=(8,),
            betas=(1.0,),
            batch_size=256,
            steps=8,
            contexts=1,
            steered=2,
        ),
    ),
    "default": (_Size(),),
    "long": (_LONG,),
    "gpu": (_ON_GPU, replace(_ON_GPU, site="layers.15.residual"), replace(_ON_GPU, target="sampled")),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    with one_thread():
        rows, comparisons, notes = _constructed(seeds, bench)
    pictures: dict[str, str] = {}
    for size in _SIZES[scale]:
        more = _on_model(size, seeds, bench)
        rows, comparisons = rows + more[0], comparisons + more[1]
        notes, pictures = notes + more[2], pictures | more[3]
    return Finding(
        slug="gradient_sae",
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


# --- known truth -----------------------------------------------------------------------------------------------------


def _constructed(seeds: list[int], bench: Workbench) -> tuple[list[Row], list[Comparison], list[str]]:
    measured: Measured = defaultdict(lambda: defaultdict(list))
    betas = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
    for seed in seeds:
        found = bench.measure(f"constructed, seed {seed}", [seed, betas], partial(_constructed_case, seed, betas))
        for beta, figures in zip(betas, found, strict=True):
            for metric, value in figures.items():
                measured[f"constructed: beta {beta:g} at encoding"][metric].append(value)
    plain, weighted = (measured[f"constructed: beta {beta} at encoding"] for beta in (0, 3))
    margins = {
        "beta 3 at encoding brings the divergence below 0.4 of beta 0's": [
            0.4 - with_gradient / without for with_gradient, without in zip(weighted["KL"], plain["KL"], strict=True)
        ],
        "beta 3 at encoding reconstructs worse": [
            after - before for after, before in zip(weighted["FVU"], plain["FVU"], strict=True)
        ],
    }
    note = (
        "Constructed: 64 orthonormal true features; each token has 12 of 48 large ones, which the head does not read, "
        "and 4 of 16 small ones, which it does; k = 8. Codes are chosen with gradients of the label's loss, so this "
        "shows what the score prefers, not fidelity."
    )
    claims = [
        Comparison.positive(f"constructed: {claim}", values, part_of_verdict=False) for claim, values in margins.items()
    ]
    return collect_rows(measured), claims, [note]


def _constructed_case(seed: int, betas: tuple[float, ...], tokens: int = 2000) -> list[dict[str, float]]:
    """Section 2.7 of the method sheet."""
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(64, 64, generator=draw)).Q
    head = 4 * torch.randn(16, 20, generator=draw)

    def active(count: int, of: int) -> Tensor:
        chosen = torch.rand(tokens, of, generator=draw).topk(count).indices
        return torch.zeros(tokens, of).scatter(1, chosen, 1.0)

    large = active(12, 48) * (1 + torch.rand(tokens, 48, generator=draw))
    small = active(4, 16) * (0.5 + 0.2 * torch.rand(tokens, 16, generator=draw))
    x = torch.cat([large, small], dim=1) @ directions
    sae = SparseAutoencoder(64, 64, TokenChoice(8)).eval()
    with torch.no_grad():
        sae.encoder_weight.copy_(directions)
        sae.decoder_weight.copy_(directions)

    def predictions(at: Tensor) -> Tensor:
        return (at @ directions[48:].T @ head).log_softmax(-1)

    leaf = x.clone().requires_grad_()
    clean = predictions(leaf)
    labels = torch.multinomial(clean.detach().exp(), 1, generator=draw)
    (gradients,) = torch.autograd.grad(-clean.gather(1, labels).sum(), leaf)
    clean = clean.detach()
    found = []
    with torch.no_grad():
        for beta in betas:
            output = sae.decode(encode_with_gradients(sae, x, gradients, GradientScore(beta)))
            kl = (clean.exp() * (clean - predictions(output))).sum(-1).mean()
            fvu = (x - output).square().sum() / (x - x.mean(0)).square().sum()
            found.append({"KL": float(kl), "FVU": float(fvu)})
    return found


# --- a language model ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Condition:
    """A way to train: how much gradients weigh, at which k and learning rate."""

    beta: float
    budget: int
    rate: float

    @property
    def name(self) -> str:
        return f"k={self.budget}, " + (_PLAIN if self.beta == 0 else f"beta {self.beta:g}")


def _on_model(
    size: _Size, seeds: list[int], bench: Workbench
) -> tuple[list[Row], list[Comparison], list[str], dict[str, str]]:
    bench.say(f"loading {size.model}, harvesting {size.tokens} tokens with gradients, {size.where}")
    lm = load(size.model, dtype=size.dtype, device=size.device)
    trials = _Trials(lm, size)
    label = size.where + (", sampled targets" if size.target == "sampled" else "")
    conditions = []
    for budget in size.budgets:
        for beta in (0.0, *size.betas):
            tried = [_Condition(beta, budget, rate) for rate in size.rates]

            def score(each: _Condition) -> float:
                what = f"{label}, tuning {each.name}, rate {each.rate:g}"
                settings = [asdict(size), asdict(each), _TUNING_SEED]
                return float(bench.measure(what, settings, partial(trials.chosen_by, each)))

            conditions.append(tried[0] if len(tried) == 1 else min(tried, key=score))
    measured: Measured = defaultdict(lambda: defaultdict(list))
    for seed in seeds:
        for each in conditions:
            what = f"{label}, seed {seed}: {each.name}"
            settings = [asdict(size), asdict(each), seed]
            result = bench.measure(what, settings, partial(trials.measure, each, seed))
            for metric, value in result["figures"].items():
                measured[f"{label}: {each.name}"][metric].append(value)
            for beta, figures in result["leaking"].items():
                for metric, value in figures.items():
                    measured[f"{label}, {each.name}: gradient at encoding, beta {beta}"][metric].append(value)
        moved = bench.measure(
            f"{label}, seed {seed}: random directions", [asdict(size), seed], partial(trials.random_steering, seed)
        )
        measured[f"{label}: random directions"]["KL moved by steering"].append(moved)
    chosen = {budget: _chosen(label, conditions, budget, measured) for budget in size.budgets}
    notes = [
        f"{label}: {trials.train.n_tokens} training tokens with gradients of the "
        + ("loss on drawn tokens" if size.target == "sampled" else "loss on the true next tokens")
        + f", F={size.n_features}, {size.steps} steps of {size.batch_size}, learning rates "
        + ", ".join(f"{each.name} {each.rate:g}" for each in conditions)
        + f"; {size.contexts} contexts each to choose beta by and to judge on, of other documents. Every dictionary is "
        "encoded by plain TopK. Steering: "
        f"{size.steered} random live features at norm {trials.strength:.3g}, a quarter of the median activation.",
        f"{label}: beta chosen "
        + "; ".join(f"k={budget}: {each.beta:g}" for budget, each in chosen.items())
        + ". The rows 'gradient at encoding' look at the label and are no measure of fidelity.",
    ]
    picture = {f"betas-{size.site}-{size.target}": _plot(label, conditions, measured)}
    return collect_rows(measured), _claims(label, size, conditions, chosen, measured), notes, picture


def _chosen(label: str, conditions: list[_Condition], budget: int, measured: Measured) -> _Condition:
    """The beta above 0 with the least increase in cross-entropy on the documents to choose by."""

    def score(each: _Condition) -> float:
        values = measured[f"{label}: {each.name}"]["CE increase, to choose by"]
        return sum(values) / len(values)

    return min((each for each in conditions if each.budget == budget and each.beta > 0), key=score)


class _Trials:
    """Fits dictionaries on pairs from a store, and judges them."""

    def __init__(self, lm: LanguageModel, size: _Size) -> None:
        self.lm, self.size, self.site = lm, size, Site.parse(size.site)
        name = f"study-{size.model}-{size.site}-{size.text}-{size.tokens}-{size.target}-{lm.model.dtype}"
        folder = cache_dir() / "stores" / name.replace("/", "-").replace("torch.", "")
        store = harvest(lm, size.site, corpus(size.text), folder, tokens=size.tokens, gradients=size.target)
        self.train, held_out = store.split(0.3)
        # Where nothing is chosen, a text of few documents need not be cut once more.
        choosing, self.test = held_out.split(0.5) if size.chooses else (held_out, held_out)
        self.choosing, self.judging = (_Spliced(lm, self.site, view, size.contexts) for view in (choosing, self.test))
        rows = torch.arange(min(2000, self.test.n_tokens))
        self.test_gradients = self.test.read(rows, gradient_of(size.site))
        self.strength = float(self.test.read(rows).norm(dim=1).median()) / 4
        self.steered = _Spliced(lm, self.site, self.test, size.steered_contexts)

    def fit(self, condition: _Condition, seed: int) -> SparseAutoencoder:
        """Train."""
        size = self.size
        recipe = Recipe(
            TokenChoice(condition.budget),
            n_features=size.n_features,
            steps=size.steps,
            batch_size=size.batch_size,
            learning_rate=condition.rate,
            auxiliary="dead",
            dead_after=20 * size.batch_size,
            seed=seed,
        )
        pairs = self.train.joint_batches(size.batch_size, seed=seed, sites=[size.site, gradient_of(size.site)])
        sae, _ = fit_gradient_dictionary(
            recipe, pairs, self.train.width, GradientScore(condition.beta), device=size.device, progress=False
        )
        return sae

    def chosen_by(self, condition: _Condition) -> float:
        """What learning rates are chosen by."""
        return self.choosing.with_reconstruction(self.fit(condition, _TUNING_SEED)).ce_increase

    def measure(self, condition: _Condition, seed: int) -> dict[str, Any]:
        """All figures of a dictionary; of a plain one also what encoding by the label's gradient does."""
        sae = self.fit(condition, seed)
        evaluation = evaluate_reconstruction(sae, self.test, device=self.size.device)
        change = self.judging.with_reconstruction(sae)
        live = (evaluation.density > 0).nonzero().flatten()
        figures = {
            "CE increase": change.ce_increase,
            "KL": change.kl,
            "CE increase, to choose by": self.choosing.with_reconstruction(sae).ce_increase,
            "FVU": evaluation.metrics["fvu"].value,
            "dead": evaluation.metrics["dead"].value,
            "mean effect of live features": float(effects(sae.cpu(), self.test_gradients)[:, live].mean()),
            "KL moved by steering": self._steering(sae.to(self.size.device), live, seed),
        }
        leaking = {}
        if condition.beta == 0 and self.size.target == "label":
            for beta in self.size.leaking:
                told = self.judging.with_gradient_encoding(sae, GradientScore(beta))
                leaking[f"{beta:g}"] = {"CE increase": told.ce_increase, "KL": told.kl}
        return {"figures": figures, "leaking": leaking}

    def random_steering(self, seed: int) -> float:
        """As `_steering` with directions that nobody trained."""
        size = self.size
        sae = SparseAutoencoder(self.train.width, size.n_features, TokenChoice(1), seed=10_000 + seed).eval()
        return self._steering(sae.to(size.device), torch.arange(size.n_features), seed)

    def _steering(self, sae: SparseAutoencoder, live: Tensor, seed: int) -> float:
        """How far random live features move the predictions per unit of norm, in nats, all at the same norm."""
        order = torch.randperm(len(live), generator=torch.Generator().manual_seed(seed))
        moved = []
        for feature in live[order[: self.size.steered]].tolist():
            with sae.steer(self.lm, self.site, {feature: self.strength}):
                moved.append(self.steered.clean.change().kl / self.strength)
        return sum(moved) / len(moved)


class _Spliced:
    """Some contexts of a view, and what the model says of them with a site replaced."""

    def __init__(self, lm: LanguageModel, site: Site, view: StoreView, contexts: int) -> None:
        self.lm, self.site = lm, site
        chosen = torch.linspace(0, view.n_contexts - 1, min(contexts, view.n_contexts)).long().unique().tolist()
        parts = [view.contexts(each, each + 1) for each in chosen]
        self.ids, self.x, self.valid = (torch.cat([part[which] for part in parts]) for which in range(3))
        name = gradient_of(site)
        self.gradients = torch.cat([view.contexts(each, each + 1, name)[1] for each in chosen])
        self.clean = CleanPredictions(lm, self.ids, self.valid[:, :-1])

    def with_reconstruction(self, sae: SparseAutoencoder) -> Change:
        """By plain encoding."""
        return self._with(lambda x, _: sae(x).output)

    def with_gradient_encoding(self, sae: SparseAutoencoder, score: GradientScore) -> Change:
        """By an encoding that looks at the gradients, at the tokens where they were taken."""
        return self._with(lambda x, gradients: sae.decode(encode_with_gradients(sae, x, gradients, score)))

    def _with(self, reconstruct: Callable[[Tensor, Tensor], Tensor]) -> Change:
        # Contexts come in the order of the clean run, some at a time.
        starts = _counting()

        def replace_valid(activations: Tensor) -> Tensor:
            start = starts(len(activations))
            part = slice(start, start + len(activations))
            valid = self.valid[part].to(activations.device)
            gradients = self.gradients[part].to(activations.device)
            out = activations.clone()
            with torch.no_grad():
                out[valid] = reconstruct(activations[valid].float(), gradients[valid]).to(out.dtype)
            return out

        with splice(self.lm, self.site, replace_valid):
            return self.clean.change()


def _counting() -> Callable[[int], int]:
    """Where each of several lengths begins when they are laid end to end."""
    ends = [0]

    def begin(length: int) -> int:
        ends.append(ends[-1] + length)
        return ends[-2]

    return begin


def _claims(
    label: str, size: _Size, conditions: list[_Condition], chosen: dict[int, _Condition], measured: Measured
) -> list[Comparison]:
    def of(name: str, metric: str) -> Tensor:
        return torch.tensor(measured[f"{label}: {name}"][metric], dtype=torch.float64)

    claims: list[tuple[str, Tensor, bool]] = []
    for each in conditions:
        plain = f"k={each.budget}, {_PLAIN}"
        if each.beta == 0:
            continue
        counted = each == chosen[each.budget]
        for claim, metric, sign in (
            ("raises cross-entropy less than TopK", "CE increase", -1),
            ("diverges less from the model's predictions", "KL", -1),
            ("steers further per unit norm", "KL moved by steering", 1),
        ):
            margin = sign * (of(each.name, metric) - of(plain, metric))
            claims.append((f"{each.name} {claim}", margin, counted))
        claims.append((f"{each.name} leaves fewer features dead", of(plain, "dead") - of(each.name, "dead"), False))
        slope = "mean effect of live features"
        claims.append(
            (f"{each.name}: live features have steeper slopes", of(each.name, slope) - of(plain, slope), False)
        )
    if size.target == "label":
        for budget in size.budgets:
            name = f"k={budget}, {_PLAIN}"
            told = measured[f"{label}, {name}: gradient at encoding, beta 1"]
            increase, kl = (torch.tensor(told[metric], dtype=torch.float64) for metric in ("CE increase", "KL"))
            told_at = f"k={budget}: a plain dictionary told the label at encoding"
            own_increase, own_kl = of(name, "CE increase"), of(name, "KL")
            claims += [
                (f"{told_at} has lower cross-entropy than without", own_increase - increase, False),
                (f"{told_at} diverges further than without", kl - own_kl, False),
                (
                    f"{told_at} has below 0.8 of its own increase (the sheet's pilot)",
                    0.8 - increase / own_increase,
                    False,
                ),
                (f"{told_at} has above 1.2 of its own divergence (the sheet's pilot)", kl / own_kl - 1.2, False),
            ]
    return [
        Comparison.positive(f"{label}: {claim}", margin.tolist(), part_of_verdict=counted)
        for claim, margin, counted in claims
    ]


def _plot(label: str, conditions: list[_Condition], measured: Measured) -> str:
    """Fidelity, dead features and steering of every condition, as SVG text."""
    rows = []
    for metric in ("CE increase", "KL", "dead", "KL moved by steering"):
        for each in conditions:
            row = Row.of(each.name, metric, measured[f"{label}: {each.name}"][metric])
            rows.append(ResultRow(each.name, metric, row.mean, row.stderr, row.n))
    with tempfile.TemporaryDirectory() as folder:
        path = plots.bars_with_errors(Path(folder) / "betas.svg", rows, title=label)
        return path.read_text(encoding="utf-8")
