"""Study of *Automatically Interpreting Millions of Features in LLMs* (Paulo et al. 2024, arXiv 2410.13928).

Two halves, since no judge that fits this machine is as good as the paper's. First the machinery, with a judge that
knows
the truth: features that follow simple rules on the standard library's source, explanations that name the rule, verdicts
that are wrong on a known share of windows. Detection must then score 1 less that share, another feature's explanation
must score a half, and fuzzing with marks on silent tokens must tell an explanation of the tokens from one of the
window.

Then the paper's finding on a real model, with the explainer and the scorer that need no chat model: the tokens that
stand out among the active ones, and a sentence encoder. Compared at equal number of features and equal k a token, on
the same
text: a TopK dictionary of SmolLM2's residual stream, the same untrained, the neurons of the same layer, and the neurons
turned by a random orthogonal matrix. As a control the same dictionary is trained on the same model with random weights
(Heap et al. 2025, arXiv 2501.17727), where an explanation can only name tokens.
"""

import copy
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apportion.allocate import TokenChoice
from apportion.data import corpus
from apportion.features import Recipe, SparseAutoencoder, fit_dictionary
from apportion.features.auto_interp import (
    Asker,
    Detection,
    Embedding,
    Examples,
    ExampleSettings,
    Explanation,
    FeatureExamples,
    Fuzzing,
    TokenShareExplainer,
    collect_examples,
)
from apportion.features.auto_interp.neurons import TopNeurons
from apportion.features.auto_interp.oracle import ANYWHERE, RULES, RuleFeatures, oracle
from apportion.features.contexts import ContextView, SparseEncoder
from apportion.models import ActivationStore, LanguageModel, cache_dir, harvest, load
from apportion.models.chat import ChatError
from apportion.models.sentences import SentenceEncoder
from apportion.models.spelling import speller
from apportion.report import ResultRow, plots
from apportion.studies.finding import Comparison, Finding, Row, Scale, collect_rows
from apportion.studies.machine import machine
from apportion.studies.workbench import Workbench

CLAIM = (
    "Scores by detection and fuzzing follow the truth of an explanation; latents of a sparse dictionary are easier to "
    "explain than the neurons of the same layer, even where only the top k of them count."
)
BASELINE = (
    "neurons of the same layer, top k by magnitude, the same number of features and the same k; shuffled explanations; "
    "dictionaries untrained and of a model with random weights"
)

SAE, UNTRAINED, NEURONS, TURNED, RANDOM_MODEL = (
    "SAE",
    "untrained SAE",
    "neurons",
    "rotated neurons",
    "SAE of a random model",
)
_NOISE = (0.0, 0.1, 0.3)
# Two standard errors of a mean over five rules with 50 + 50 verdicts each are 0.04 at most.
_BINOMIAL = 0.05
Measured = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class _Size:
    """How much of everything."""

    oracle_contexts: int = 6000
    model: str = "smollm2"
    layer: int = 11
    text: str = "english"
    windows: int = 1600
    n_features: int = 1536
    k: int = 8
    steps: int = 1200
    batch_size: int = 512
    latents: int = 100
    random_model: bool = True
    choices: tuple[str, ...] = ("quantiles", "top")
    dtype: str = "auto"
    device: str = "cpu"


_SIZES: dict[Scale, _Size] = {
    "smoke": _Size(1500, windows=0),
    "default": _Size(4000, windows=800, steps=300, latents=50, choices=("quantiles",)),
    "long": _Size(12_000, windows=4000, latents=200),
    "gpu": _Size(12_000, windows=30_000, n_features=1536, steps=4000, latents=500, dtype="bfloat16", device="cuda"),
}


def run(scale: Scale, seeds: list[int], bench: Workbench) -> Finding:
    """Measure; see the module's docstring."""
    size = _SIZES[scale]
    measured: Measured = defaultdict(lambda: defaultdict(list))
    comparisons, notes = _on_rules(size, seeds, bench, measured)
    pictures: dict[str, str] = {}
    if size.windows:
        more = _on_model(size, seeds, bench, measured)
        comparisons, notes = comparisons + more[0], notes + more[1]
        pictures["auroc"] = _picture(size, measured)
    return Finding(
        slug="auto_interp",
        claim=CLAIM,
        rows=collect_rows(measured),
        comparisons=comparisons,
        seeds=seeds,
        seconds=bench.seconds,
        machine=machine(),
        scale=scale,
        notes=notes,
        plots=pictures,
    )


# --- known truth -----------------------------------------------------------------------------------------------------


def _on_rules(
    size: _Size, seeds: list[int], bench: Workbench, measured: Measured
) -> tuple[list[Comparison], list[str]]:
    margins: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        settings = {"contexts": size.oracle_contexts, "model": size.model, "seed": seed}
        found = bench.measure(f"rules, seed {seed}", settings, partial(_rules, size, seed))
        for name, value in found.items():
            condition, _, metric = name.rpartition(": ")
            measured[condition][metric].append(value)
        for noise in _NOISE:
            off = abs(found[f"rules, noise {noise:g}: detection, mean of the rules"] - (1 - noise))
            margins[f"detection is within {_BINOMIAL:g} of 1 - {noise:g}"].append(_BINOMIAL - off)
        shuffled = abs(found["rules, noise 0: detection, another rule's explanation"] - 0.5)
        margins["detection of another rule's explanation is within 0.1 of one half"].append(0.1 - shuffled)
        tokens = found["rules, noise 0: fuzzing-inactive, of the tokens"]
        windows = found["rules, noise 0: fuzzing-inactive, of the window"]
        margins["fuzzing at silent tokens scores an explanation of the tokens above one of the window"].append(
            tokens - windows - 0.2
        )
        margins["detection does not tell the two apart"].append(
            0.05
            - abs(found["rules, noise 0: detection, of the tokens"] - found["rules, noise 0: detection, of the window"])
        )
    notes = [
        f"Rules ({', '.join(RULES)}) on {size.oracle_contexts} windows of 32 tokens of the standard library's source; "
        "50 windows with the feature and 50 without, balanced accuracies. The judge is a function that knows the "
        "rules. The two explanations of fuzzing name the same rule, once for the marked tokens and once for the whole "
        "window; a difference of more than 0.2 counts."
    ]
    return [Comparison.positive(f"rules: {claim}", each) for claim, each in margins.items()], notes


def _rules(size: _Size, seed: int) -> dict[str, float]:
    """Balanced accuracies of one seed: of the sample of windows, and of the judge's errors."""
    spell, token_ids, documents = _code_windows(size)
    features = RuleFeatures(token_ids, spell, documents)
    settings = ExampleSettings(min_windows=60, split="context", seed=seed)
    examples = collect_examples(features, features, settings=settings, progress=False)
    names = list(RULES)
    shown = {name: examples.of(number, spell) for number, name in enumerate(names)}
    usable = [name for name in names if len(shown[name].test) >= 40 and len(shown[name].negatives) >= 40]
    found: dict[str, float] = {}
    for noise in _NOISE:
        ask = Asker(oracle(noise, seed))
        for name in usable:
            found[f"rules, noise {noise:g}: detection, {name}"] = _balanced(Detection(), shown[name], name, ask)
        own = [found[f"rules, noise {noise:g}: detection, {name}"] for name in usable]
        found[f"rules, noise {noise:g}: detection, mean of the rules"] = float(np.mean(own))
    ask = Asker(oracle(0.0, seed))
    for scorer in (Detection(), Fuzzing(), Fuzzing(inactive=True)):
        for of, addition in (("of the tokens", ""), ("of the window", ANYWHERE)):
            values = [_balanced(scorer, shown[name], name + addition, ask) for name in usable]
            found[f"rules, noise 0: {scorer.name}, {of}"] = float(np.mean(values))
    others = [_balanced(Detection(), shown[name], other, ask) for name in usable for other in usable if other != name]
    found["rules, noise 0: detection, another rule's explanation"] = float(np.mean(others))
    return found


def _balanced(scorer: Detection | Fuzzing, shown: FeatureExamples, explanation: str, ask: Asker) -> float:
    score = scorer.score(shown, Explanation(explanation), ask)
    assert score.balanced_accuracy is not None
    return score.balanced_accuracy


@cache
def _code_windows(size: _Size) -> tuple[Callable[..., Any], np.ndarray, np.ndarray]:
    """Windows of source code, and the document of each."""
    tokenizer = load(size.model, dtype="auto").tokenizer
    rows: list[list[int]] = []
    documents: list[int] = []
    for number, document in enumerate(islice(corpus("code"), size.oracle_contexts)):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        fresh = [ids[start : start + 32] for start in range(0, len(ids) - 31, 32)]
        rows += fresh
        documents += [number] * len(fresh)
        if len(rows) >= size.oracle_contexts:
            break
    return speller(tokenizer), np.array(rows[: size.oracle_contexts]), np.array(documents[: size.oracle_contexts])


# --- a language model ------------------------------------------------------------------------------------------------


class _Trials:
    """Dictionaries of one model, and how well their features are explained."""

    def __init__(self, size: _Size, bench: Workbench) -> None:
        self.size, self.bench = size, bench
        self.residual = f"layers.{size.layer}.residual"
        self.neurons = f"layers.{size.layer}.neurons"

    @cached_property
    def lm(self) -> LanguageModel:
        """The model."""
        return load(self.size.model, dtype=self.size.dtype, device=self.size.device)

    @cached_property
    def encoder(self) -> Embedding:
        """The scorer; it keeps the vectors of windows, which all dictionaries share."""
        return Embedding(SentenceEncoder("minilm"))

    @cached_property
    def by_examples(self) -> Embedding:
        """The control that reads no explanation."""
        return Embedding(self.encoder.vectors, by_examples=True)

    @cached_property
    def store(self) -> ActivationStore:
        """The model's activations at both sites."""
        return self._harvested(self.lm, "model")

    @cached_property
    def random_store(self) -> ActivationStore:
        """The same of the model with random weights."""
        return self._harvested(randomised(self.lm), "random")

    def _harvested(self, lm: LanguageModel, name: str) -> ActivationStore:
        size = self.size
        self.bench.say(f"harvesting {size.windows} windows of the {name}")
        parts = ["study-auto_interp", size.model, size.layer, size.text, size.windows, lm.model.dtype, name]
        folder = cache_dir() / "stores" / "-".join(str(part) for part in parts).replace("torch.", "").replace("/", "-")
        return harvest(
            lm,
            [self.residual, self.neurons],
            corpus(size.text),
            folder,
            context=32,
            tokens=31 * size.windows,
            max_norm_ratio=None,
        )

    def view(self, store: ActivationStore, site: str) -> ActivationStore:
        """A store, read at one of its sites."""
        return ActivationStore.open(store.folder, site)

    def dictionary(self, name: str, seed: int) -> tuple[SparseEncoder, ContextView]:
        """One of those that are compared, and the activations that it reads."""
        size = self.size
        if name in (NEURONS, TURNED):
            view = self.view(self.store, self.neurons)
            return TopNeurons(view.width, size.k, 1000 + seed if name == TURNED else None), view
        view = self.view(self.random_store if name == RANDOM_MODEL else self.store, self.residual)
        rule = TokenChoice(size.k)
        if name == UNTRAINED:
            sae = SparseAutoencoder(view.width, size.n_features, rule, seed=seed)
            sae.initialise_from(view.read(torch.arange(min(4096, view.n_tokens))))
            return sae.eval(), view
        recipe = Recipe(
            rule, size.n_features, size.steps, size.batch_size, auxiliary="dead", learning_rate=1e-3, seed=seed
        )
        sae, _ = fit_dictionary(
            recipe, view.batches(size.batch_size, seed=seed), view.width, device=size.device, progress=False
        )
        return sae.cpu().eval(), view

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """AUROC over latents of one dictionary."""
        encoder, view = self.dictionary(name, seed)
        found: dict[str, Any] = {}
        for choice in self.size.choices:
            examples, rows = self.chosen(encoder, view, seed, choice)
            figures = self.scored(examples, rows)
            label = "" if choice == "quantiles" else f", {choice} examples"
            found |= {f"{metric}{label}": value for metric, value in figures.items()}
        found["usable features"] = self.usable / self.size.n_features
        return found

    usable = 0

    def chosen(self, encoder: SparseEncoder, view: ContextView, seed: int, choice: str) -> tuple[Examples, list[int]]:
        """Windows, and random features of those that fire neither too rarely nor too often."""
        settings = ExampleSettings(
            train=20,
            test=20,
            non_activating=20,
            quantiles=10,
            choice=choice,
            min_windows=40,
            pool=10**6,
            seed=22 + seed,
        )
        spread = collect_examples(encoder, view, settings=settings, progress=False)
        enough = (spread.chosen[:, :20] >= 0).all(axis=1) & (spread.chosen[:, 20:] >= 0).all(axis=1)
        fits = enough & (spread.window_density >= 0.015) & (spread.window_density <= 0.25)
        usable = np.flatnonzero(fits)
        self.usable = len(usable)
        random = np.random.default_rng(seed)
        return spread, sorted(random.permutation(usable)[: self.size.latents].tolist())

    @cached_property
    def spell(self) -> Callable[[Sequence[int]], Any]:
        """What tokens say."""
        return speller(self.lm.tokenizer)

    @cached_property
    def explainer(self) -> TokenShareExplainer:
        """Names the tokens that stand out against the whole text."""
        ids = self.store.token_ids_of(np.arange(self.store.n_contexts)).ravel()
        return TokenShareExplainer.from_texts(self.spell([token]).text for token in ids.tolist())

    def scored(self, examples: Examples, features: list[int]) -> dict[str, float]:
        """Mean AUROC: of explanations, of other features' explanations, of examples, and by strength."""
        ask = Asker(None)
        shown, said = [], []
        for feature in features:
            each = examples.of(feature, self.spell)
            try:
                said.append(self.explainer.explain(each, ask))
                shown.append(each)
            except ChatError:  # all white space: nothing to name
                continue
        values: dict[str, list[float]] = defaultdict(list)
        for place, each in enumerate(shown):
            own = self.encoder.score(each, said[place], ask)
            other = self.encoder.score(each, said[(place + 1) % len(said)], ask)
            control = self.by_examples.score(each, said[place], ask)
            by_strength = [value for value in own.auroc_by_quantile if value is not None]
            half = len(by_strength) // 2
            for metric, value in (
                ("AUROC, explanation", own.auroc),
                ("AUROC, shuffled explanation", other.auroc),
                ("AUROC, five examples", control.auroc),
                ("AUROC, weaker half", float(np.mean(by_strength[:half]))),
                ("AUROC, stronger half", float(np.mean(by_strength[half:]))),
            ):
                assert value is not None
                values[metric].append(value)
        return {metric: float(np.mean(each)) for metric, each in values.items()} | {"features": float(len(shown))}


def randomised(lm: LanguageModel, seed: int = 0) -> LanguageModel:
    """A model whose weight matrices are normal noise of the same mean and spread; embeddings and norms stay."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(seed)
    kept = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and id(weight) not in kept:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_((noise * weight.float().std().cpu() + weight.float().mean().cpu()).to(weight))
    return LanguageModel(f"{lm.name}-random-{seed}", model, lm.tokenizer)


def _on_model(
    size: _Size, seeds: list[int], bench: Workbench, measured: Measured
) -> tuple[list[Comparison], list[str]]:
    trials = _Trials(size, bench)
    names = [SAE, UNTRAINED, NEURONS, TURNED, *([RANDOM_MODEL] if size.random_model else [])]
    where = f"{size.model} layer {size.layer + 1}"
    for seed in seeds:
        for name in names:
            found = bench.measure(
                f"{where}, seed {seed}: {name}", {**asdict(size), "name": name}, partial(trials.measure, name, seed)
            )
            for metric, value in found.items():
                measured[f"{where}: {name}"][metric].append(value)

    def of(name: str, metric: str = "AUROC, explanation") -> Tensor:
        return torch.tensor(measured[f"{where}: {name}"][metric], dtype=torch.float64)

    claims = [
        ("SAE latents are explained better than top-k neurons, by more than 0.03", of(SAE) - of(NEURONS) - 0.03),
        ("SAE latents are explained better than rotated neurons, by more than 0.03", of(SAE) - of(TURNED) - 0.03),
        (
            "explanations of SAE latents beat those of other latents, by more than 0.05",
            of(SAE) - of(SAE, "AUROC, shuffled explanation") - 0.05,
        ),
    ]
    shown = [("SAE latents are explained better than those of an untrained SAE", of(SAE) - of(UNTRAINED))]
    if size.random_model:
        shown.append(
            ("SAE latents are explained better than those of a random model's SAE", of(SAE) - of(RANDOM_MODEL))
        )
    shown.append(
        ("explanations of SAE latents beat five examples without words", of(SAE) - of(SAE, "AUROC, five examples"))
    )
    if "top" in size.choices:
        weak = of(SAE, "AUROC, weaker half") - of(SAE, "AUROC, weaker half, top examples")
        shown.append(("on weak activations explanations from quantiles beat those from top examples", weak))
    notes = [
        f"{where} of 30, {size.windows} windows of 32 tokens ({size.text}), first token of each left out. All "
        f"dictionaries have {size.n_features} features and {size.k} a token; dictionaries take {size.steps} steps of "
        f"{size.batch_size} tokens at learning rate 1e-3. {size.latents} random features of those in 1.5 to 25 % of "
        "the windows with at least 20 windows for the explainer and 20 for the test, which share no document.",
        "The explainer names five tokens, the judge is a sentence encoder (MiniLM) that reads windows of 32 tokens: "
        "levels are low, and only differences between rows mean something. 'usable features' is the share of a "
        "dictionary that could be tested at all.",
    ]
    comparisons = [Comparison.positive(f"{where}: {claim}", margins.tolist()) for claim, margins in claims]
    comparisons += [
        Comparison.positive(f"{where}: {claim}", margins.tolist(), part_of_verdict=False) for claim, margins in shown
    ]
    return comparisons, notes


def _picture(size: _Size, measured: Measured) -> str:
    """Bars of AUROC by dictionary, as SVG text."""
    metrics = ("AUROC, explanation", "AUROC, shuffled explanation", "AUROC, five examples")
    rows = [
        ResultRow(**asdict(Row.of(name.partition(": ")[2], metric, values)))
        for name, found in measured.items()
        for metric, values in found.items()
        if metric in metrics
    ]
    with tempfile.TemporaryDirectory() as folder:
        title = f"How well features are explained, {size.model} layer {size.layer + 1}"
        return plots.bars_with_errors(Path(folder) / "auroc.svg", rows, title=title).read_text(encoding="utf-8")
