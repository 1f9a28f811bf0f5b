"""A run, from text to a judged dictionary: harvest (or find) a store, fit, calibrate, evaluate, and keep all of it.

The commands and the studies both go through here, so that what is typed and what is claimed is the same thing. A run's
folder holds ``run.json`` (what decides it), the training loop's files, ``dictionary/`` and ``evaluation.json``; every
part is written whole, so that the same call finishes a run that was killed at any moment. Several processes make one
run by calling the same functions with the same `Job`; see ``join_job``.
"""

import hashlib
import importlib.metadata
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, Rule, Threshold, TokenChoice, Uniform, Zipf
from apportion.data import corpus
from apportion.data.corpora import add_to_digest
from apportion.data.files import check_writable, read_json, write_json
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.distributed import fit_dictionary_over_mesh
from apportion.features.evaluate import SplicedLoss, evaluate_reconstruction
from apportion.features.fitting import MATRYOSHKA, Batches, Recipe, fit_dictionary
from apportion.features.gradient_sae import GradientScore, fit_gradient_dictionary
from apportion.features.job import Job
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.mutual_feature_choice import Phases
from apportion.features.transcoder import TranscoderSettings, fit_transcoder
from apportion.models import LanguageModel, Site, cache_dir, gradient_of, harvest, join_parts, load
from apportion.models.activations import ActivationStore, StoreView, read_manifest
from apportion.models.packaged import PACKAGES
from apportion.training.state import differences

FORMAT = "apportion.run/1"
RULES: dict[str, str] = {
    "topk": "every token gets exactly the budget (TopK)",
    "mutual": "the best pairs of the batch, budget a token on average (Mutual Choice, BatchTopK)",
    "matryoshka": "mutual, and each of four prefixes of the features must reconstruct by itself (Matryoshka BatchTopK)",
    "feature": "every feature gets its share of tokens by Zipf's law (Feature Choice)",
    "feature-uniform": "every feature gets the same share of tokens (Feature Choice)",
    "relu": "all positive scores, an L1 penalty steered to the budget",
    "jumprelu": "scores above learned thresholds, an L0 penalty steered to the budget",
    "gated": "a gate decides, an L1 penalty steered to the budget",
}
_ALIASES = {"batchtopk": "mutual"}

_LARGEST_BATCH, _SMALLEST_BATCH = 4096, 64
# Below some hundreds of Adam's steps nothing is learned, however large the batches.
_STEPS_WANTED = 300
# No tokeniser puts more characters than this into a token on average.
_CHARACTERS_A_TOKEN = 8
_ROWS_AT_ONCE = 4096
_DIFFERENCES_NAMED = 6
# 20 checkpoints a run: what a kill costs is at most a twentieth of it.
_CHECKPOINTS = 20


@dataclass(frozen=True)
class ActivationSource:
    """Which activations a dictionary is about: what decides a store and how it is split.

    Args:
        model: see ``apportion.models.load``.
        site: where to listen in it.
        text: see ``apportion.data.corpus``.
        tokens: tokens to store.
        context: tokens a context.
        dtype: of the stored activations.
        model_dtype: of the model.
        held_out: share of the tokens that training does not see; thresholds are calibrated on one half of it, quality
            is measured on the other.
        gradients: keep gradients of the loss, too: ``label``, ``sampled`` or None; see ``harvest``.
        target: for a transcoder, the site whose activations it makes of those at ``site``.
    """

    model: str
    site: str
    text: str = "english"
    tokens: int = 1_000_000
    context: int = 128
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    model_dtype: str = "float32"
    held_out: float = 0.2
    gradients: Literal["label", "sampled"] | None = None
    target: str | None = None

    def __post_init__(self) -> None:
        Site.parse(self.site)
        if self.target is not None:
            _check_target(Site.parse(self.site), Site.parse(self.target))
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out={self.held_out}: a share between 0 and 1, such as 0.2")
        if self.tokens < 1:
            raise InputError(f"tokens={self.tokens}: must be at least 1")


@dataclass(frozen=True, eq=False)
class PreparedStore:
    """A finished store and its three parts, which share no document."""

    source: ActivationSource
    store: ActivationStore
    train: StoreView
    calibration: StoreView
    test: StoreView

    @property
    def target(self) -> Site | None:
        """For a transcoder, the site of its output."""
        return None if self.source.target is None else Site.parse(self.source.target)

    @property
    def provenance(self) -> dict[str, Any]:
        """What of the data decides the weights of a dictionary."""
        manifest = self.store.manifest
        return {
            "model": manifest["model"]["name"],
            "site": str(self.store.site),
            **({} if self.source.target is None else {"target": self.source.target}),
            "held_out": self.source.held_out,
            "store": manifest["made_from"],
            "documents_sha256": manifest["documents"]["sha256"],
        }

    def calibration_batches(self) -> Iterator[Tensor]:
        """The held-out activations that thresholds are set on."""
        for start in range(0, self.calibration.n_tokens, _ROWS_AT_ONCE):
            yield self.calibration.read(torch.arange(start, min(start + _ROWS_AT_ONCE, self.calibration.n_tokens)))


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """A finished run.

    Attributes:
        folder: where it is.
        sae: the dictionary, in evaluation mode.
        evaluation: what ``evaluation.json`` holds, or None where nothing was measured.
        settings: what ``run.json`` holds.
        resumed_from: the step that this call went on from, None if it did all the training (or none of it).
    """

    folder: Path
    sae: SparseAutoencoder
    evaluation: dict[str, Any] | None
    settings: dict[str, Any]
    resumed_from: int | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training steps."""
        history = self.history()
        return float(history[-1]["seconds"]) if history else 0.0

    def history(self) -> list[dict[str, Any]]:
        """The logged records of training."""
        log = self.folder / "log.jsonl"
        return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []


# --- what a run is made of -------------------------------------------------------------------------------------------


def rule_name(name: str) -> str:
    """The name of a rule that people typed, without aliases and capitals.

    Raises:
        InputError: no such rule; lists them.
    """
    plain = _ALIASES.get(name.lower(), name.lower())
    if plain not in RULES:
        raise InputError(f"rule {name!r} is unknown: choose one of {', '.join(RULES)}")
    return plain


def make_recipe(
    rule: str,
    *,
    width: int,
    train_tokens: int,
    n_features: int | None = None,
    budget: float = 32,
    steps: int | None = None,
    epochs: float = 3,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    auxiliary: str | None = None,
    precision: str = "float32",
    seed: int = 0,
) -> Recipe:
    """The recipe of a rule by name, with what was not said filled in.

    Args:
        rule: a key of ``RULES``, or ``batchtopk``.
        width: of the activations.
        train_tokens: tokens to train on; they decide the steps of an epoch.
        n_features: F; default 8 times the width.
        budget: mean number of features a token; rules without a budget are steered to it.
        steps: optimiser steps; default as many as make ``epochs``.
        epochs: passes over the tokens, where ``steps`` is not given.
        batch_size: tokens a step; default 4096, or as many fewer (a power of two) as it takes for 300 steps.
        learning_rate: see ``Recipe``.
        auxiliary: see ``Recipe``; default ``zipf`` for rules with a budget (``dead`` for uniform quotas, under which no
            feature is underused by Zipf's law in earnest) and ``none`` for the penalised ones.
        precision: of the encoder product.
        seed: of the directions and of the order of the data.

    Raises:
        InputError: a value that cannot work; names it and what would do.
    """
    rule = rule_name(rule)
    n_features = 8 * width if n_features is None else n_features
    if n_features < 1:
        raise InputError(f"features={n_features}: must be at least 1")
    if not 0 < budget <= n_features:
        raise InputError(
            f"budget={budget:g}: must be above 0 and at most the number of features, which is {n_features}"
        )
    for name, value, choices in (
        ("auxiliary", auxiliary, (None, "zipf", "dead", "none")),
        ("precision", precision, ("float32", "bfloat16")),
    ):
        if value not in choices:
            raise InputError(f"{name}={value!r}: one of {', '.join(each for each in choices if each)}")
    if steps is None:
        if not 0 < epochs < math.inf:
            raise InputError(f"epochs={epochs}: must be above 0")
        seen = epochs * train_tokens
        if batch_size is None:
            fitting = max(_SMALLEST_BATCH, min(_LARGEST_BATCH, seen / _STEPS_WANTED))
            batch_size = 2 ** int(math.log2(fitting))
        steps = max(1, round(seen / max(batch_size, 1)))
    has_penalty = rule in ("relu", "jumprelu", "gated")
    default_auxiliary = "none" if has_penalty else "dead" if rule == "feature-uniform" else "zipf"
    return Recipe(
        rule=_rule(rule, budget),
        n_features=n_features,
        steps=steps,
        batch_size=_LARGEST_BATCH if batch_size is None else batch_size,
        gated=rule == "gated",
        nested=MATRYOSHKA if rule == "matryoshka" else (),
        learning_rate=learning_rate,
        auxiliary=auxiliary or default_auxiliary,  # type: ignore[arg-type]
        # Uniform quotas leave no ranks to learn from a Mutual Choice phase.
        phases=Phases(mutual_fraction=0.0) if rule == "feature-uniform" else Phases(),
        target_l0=budget if has_penalty else None,
        precision=precision,  # type: ignore[arg-type]
        seed=seed,
    )


def _rule(name: str, budget: float) -> Rule | LearnedThreshold:
    if name == "topk":
        if budget != int(budget):
            raise InputError(f"budget={budget:g}: rule topk gives every token the same whole number, such as 32")
        return TokenChoice(int(budget))
    rules: dict[str, Callable[[], Rule | LearnedThreshold]] = {
        "mutual": lambda: MutualChoice(budget),
        "matryoshka": lambda: MutualChoice(budget),
        "feature": lambda: FeatureChoice(budget, profile=Zipf()),
        "feature-uniform": lambda: FeatureChoice(budget, profile=Uniform()),
        "relu": lambda: Threshold(0.0),
        "gated": lambda: Threshold(0.0),
        "jumprelu": LearnedThreshold,
    }
    return rules[name]()


# --- the store -------------------------------------------------------------------------------------------------------


def check_text(text: str) -> None:
    """Make sure that there is text, before anything expensive begins.

    Raises:
        InputError: no such corpus, or an empty one.
    """
    next(iter(corpus(text)))


def store_folder(source: ActivationSource, lm: LanguageModel) -> Path:
    """Where the store of a source is kept unless a folder is named: runs with the same data share it."""
    decided_by = {
        "model": lm.fingerprint,
        "model_dtype": str(lm.model.dtype),
        "site": source.site,
        # Stores that were named before there were targets keep their names.
        **({} if source.target is None else {"target": source.target}),
        "text": _text_key(source.text, source.tokens),
        "tokens": source.tokens,
        "context": source.context,
        "dtype": source.dtype,
        **({"gradients": source.gradients} if source.gradients else {}),
    }
    digest = hashlib.sha256(json.dumps(decided_by, sort_keys=True).encode()).hexdigest()[:12]
    sites = source.site if source.target is None else f"{source.site}-{source.target}"
    parts = (Path(source.model).name, sites, Path(source.text).name, digest)
    return cache_dir() / "stores" / "-".join(re.sub(r"[^\w.]+", "_", part) for part in parts)


def prepare_store(
    source: ActivationSource,
    *,
    lm: LanguageModel | None = None,
    folder: Path | str | None = None,
    device: str = "cpu",
    progress: bool = True,
    parts: int = 1,
    job: Job | None = None,
) -> PreparedStore:
    """Find the activations of a source, or harvest them; an interrupted harvest is continued.

    A finished store is used as it is, however many processes harvested it.

    Args:
        source: which activations.
        lm: the model, if it is loaded already.
        folder: where they are or shall be; default a folder of the cache that all runs on the same data share.
        device: for the model.
        progress: show it on stderr.
        parts: in how many to harvest them, one after the other; see ``harvest``.
        job: the processes that harvest them, each a part, and all of which call this; they see the same folder.

    Raises:
        InputError: bad input of any kind, see ``load``, ``corpus`` and ``harvest``.
        ValueError: the model yields NaN or infinity.
    """
    job = job or Job()
    progress = progress and job.first
    check_text(source.text)
    lm = lm or load(source.model, source.model_dtype, device)
    sites = [source.site] if source.target is None else [source.site, source.target]
    for site in sites:
        Site.parse(site).resolve(lm.model)
    shared = folder is None
    folder = store_folder(source, lm) if folder is None else Path(folder).expanduser()
    complete = job.as_first_says(_is_complete(folder))
    if shared and complete:
        # Its name is a hash of all that decides it: no need to read the text again.
        store = ActivationStore.open(folder, source.site)
        store.check_model(lm)
        _say(progress, f"activations: {folder} ({store.n_tokens:,} tokens, harvested before)")
        return _split(source, store)
    own = range(parts) if job.size == 1 else [job.rank]
    parts = max(parts, job.size)
    by = f", {parts} parts by {job.size} processes (shown: the first)" if job.size > 1 and not complete else ""
    _say(progress, f"activations: harvesting into {folder}{by}")
    run = partial(
        harvest,
        lm,
        sites,
        corpus(source.text),
        folder,
        context=source.context,
        tokens=source.tokens,
        dtype=source.dtype,
        gradients=source.gradients,
        progress=progress,
    )
    if complete or parts == 1:
        if job.first:
            run()
    else:
        for number in own:
            run(part=(number, parts))
        job.wait()
        if job.first:
            join_parts(folder, corpus(source.text))
    job.wait()
    return _split(source, ActivationStore.open(folder))


def reopen_store(
    run: TrainedRun, folder: Path | str | None = None, *, device: str = "cpu", progress: bool = True
) -> PreparedStore:
    """The store that a run was trained on, harvested again if it is gone, or another one of the same model and site.

    Args:
        run: a finished run, or a dictionary of one.
        folder: another store.
        device: for the model, if it is needed.
        progress: show it on stderr.

    Raises:
        InputError: the store is of another model or site; or the dictionary does not say what it was trained on.
    """
    if "source" not in run.settings:
        raise InputError(
            f"{run.folder} does not say which activations it was trained on: it was not made by `apportion train`"
        )
    source = ActivationSource(**run.settings["source"])
    recorded = run.settings.get("store_folder")
    place = Path(folder).expanduser() if folder is not None else Path(recorded) if recorded else None
    if folder is None and (place is None or not _is_complete(place)):
        # In as many parts, or other tokens would be held out.
        parts = run.settings["provenance"]["store"].get("parts", 1)
        return prepare_store(source, device=device, progress=progress, parts=parts)
    assert place is not None
    store = ActivationStore.open(place, source.site)
    trained_on, found = run.settings["provenance"]["store"]["model"], store.manifest["model"]
    if found["fingerprint"] != trained_on:
        raise InputError(
            f"the store {place} is of {found['name']} (fingerprint {found['fingerprint'][:12]}), the dictionary of "
            f"{source.model} (fingerprint {trained_on[:12]}): give a store of the same model"
        )
    return _split(source, store)


def _check_target(site: Site, target: Site) -> None:
    """A transcoder's output is computed from its input, by an MLP or by more of the model."""
    order = {"attn_out": 0, "mlp_in": 1, "mlp_out": 2, "residual": 3, "heads": -1, "embeddings": -2}
    at, to = ((-1 if each.layer is None else each.layer, order[each.kind]) for each in (site, target))
    if to <= at:
        raise InputError(
            f"target {target}: it must be computed after site {site}, such as layers.9.mlp_out after mlp_in"
        )


def _split(source: ActivationSource, store: ActivationStore) -> PreparedStore:
    for site in (source.target, source.site):
        if site is not None:
            store.width_of(site)
    store.site = Site.parse(source.site)
    train, held_out = store.split(source.held_out)
    try:
        calibration, test = held_out.split(0.5)
    except InputError as error:
        raise InputError(
            f"held_out={source.held_out}: of {source.text} that leaves {held_out.n_contexts} contexts in "
            f"{len(held_out.documents())} documents, too few for thresholds and for measuring: hold out more, or give "
            "more text, in more documents"
        ) from error
    return PreparedStore(source, store, train, calibration, test)


def _is_complete(folder: Path) -> bool:
    return (folder / "manifest.json").exists() and bool(read_manifest(folder)["complete"])


def _text_key(text: str, tokens: int) -> str:
    if text.startswith("hf:"):
        return text
    if text in ("english", "code"):
        # Reading them takes seconds, and they change with what is installed only.
        return " ".join([text, sys.version, *(_version(each) for each in ("numpy", "scipy", "scikit-learn"))])
    digest, characters = hashlib.sha256(), 0
    for document in corpus(text):
        add_to_digest(digest, document)
        characters += len(document.text)
        if characters > _CHARACTERS_A_TOKEN * tokens:
            break
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


# --- the run ---------------------------------------------------------------------------------------------------------


def check_run_folder(folder: Path | str) -> None:
    """Make sure that a run can be kept in a folder, before anything expensive begins.

    Raises:
        InputError: it cannot be written, or holds something else.
    """
    check_writable(folder)
    # A process killed in the middle of a write leaves a hidden file behind.
    found = sorted(path.name for path in Path(folder).iterdir() if not path.name.startswith("."))
    if found and "run.json" not in found:
        raise InputError(f"{folder} is not empty ({', '.join(found[:3])}) and holds no run: choose a new folder")


def train_run(
    folder: Path | str,
    prepared: PreparedStore,
    recipe: Recipe,
    *,
    score: GradientScore | None = None,
    judge: Callable[[SparseAutoencoder], dict[str, Any]] | None = None,
    device: str = "cpu",
    progress: bool = True,
    job: Job | None = None,
    transcoder: TranscoderSettings | None = None,
    **settings: Any,
) -> TrainedRun:
    """Train and judge a dictionary in a folder; what an earlier call has done there is not done again.

    Args:
        folder: of the run; new, empty, or of the same run.
        prepared: the activations.
        recipe: how to train.
        score: let gradients help to choose the winners, see ``fit_gradient_dictionary``; the source must have them.
        judge: measures the finished dictionary, see ``evaluate_dictionary``; None leaves it unmeasured.
        device: where to train.
        progress: show it on stderr.
        job: the processes that train it, over its mesh, and all of which call this. The first one writes the files and
            measures; what the others return has no evaluation.
        transcoder: what is special about a transcoder, where the source has a target.
        settings: overrides of ``TrainingSettings`` that do not decide the weights, such as ``tensorboard``.

    Raises:
        InputError: the folder holds another run (names what differs), cannot be written, or the disk is full; a
            transcoder over a mesh.
        NonFiniteLossError: training diverged; checkpoints are kept.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the run can be continued.
    """
    folder, job = Path(folder), job or Job()
    progress = progress and job.first
    if score is not None and job.mesh is not None:
        raise InputError("a gradient-weighted dictionary is trained by one process: leave out the mesh, or the score")
    check_run_folder(folder)
    if score is not None and prepared.target is not None:
        raise InputError(
            "gradients weigh the features of a dictionary, not of a transcoder: leave out the one or the other"
        )
    provenance = prepared.provenance | ({"gradient_score": asdict(score)} if score is not None else {})
    if prepared.target is not None:
        check_transcoder(job, recipe)
        transcoder = transcoder or TranscoderSettings()
        provenance["transcoder"] = asdict(transcoder)
    content = {
        "format": FORMAT,
        "recipe": recipe.to_json(),
        "provenance": provenance,
        "source": _portable(prepared.source),
        "store_folder": str(prepared.store.folder.resolve()),
    }
    _refuse_other_run(folder, content)
    if job.first:
        write_json(folder / "run.json", content)
    dictionary, resumed_from = folder / "dictionary", None
    if job.as_first_says((dictionary / "config.json").exists()):
        _say(progress, f"dictionary: {dictionary} is trained already")
        sae = SparseAutoencoder.load(dictionary, device)
    else:
        settings = {"checkpoint_every": max(1, min(500, recipe.steps // _CHECKPOINTS)), **settings}
        over = ""
        if job.mesh is not None:
            over = f", over {job.mesh.size('data')} x {job.mesh.size('feature')} processes"
        _say(
            progress,
            f"training: {recipe.steps:,} steps of {recipe.batch_size:,} tokens, {recipe.n_features:,} features{over}",
        )
        fit: Callable[..., Any] = fit_dictionary
        batches: Batches = prepared.train.batches(recipe.batch_size, recipe.seed)
        site = prepared.source.site
        if job.mesh is not None:
            fit = partial(fit_dictionary_over_mesh, mesh=job.mesh)
        elif score is not None:
            fit = partial(fit_gradient_dictionary, score=score)
            batches = prepared.train.joint_batches(recipe.batch_size, recipe.seed, sites=[site, gradient_of(site)])
        elif prepared.target is not None:
            fit = partial(fit_transcoder, d_out=prepared.store.width_of(prepared.target), transcoder=transcoder)
            batches = prepared.train.joint_batches(recipe.batch_size, recipe.seed, sites=[site, prepared.target])
        sae, result = fit(
            recipe,
            batches,
            prepared.train.width,
            # One calibrated dictionary is enough.
            calibration=prepared.calibration_batches if job.first else None,
            folder=folder,
            provenance=provenance,
            device=device,
            progress=progress,
            **settings,
        )
        resumed_from = result.resumed_from
        sae.metadata = {**sae.metadata, "provenance": provenance, "source": content["source"]}
        if job.first:
            sae.to(device).save(dictionary)
    if not job.first:
        job.wait()
        return TrainedRun(folder, sae, None, content, resumed_from)
    # The dictionary has all that is worth keeping; with Adam's moments the checkpoints take six times its space.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None
    if evaluation is None and judge is not None:
        _say(progress, f"evaluating on {prepared.test.n_tokens:,} held-out tokens")
        evaluation = judge(sae)
        write_json(folder / "evaluation.json", evaluation)
    job.wait()
    return TrainedRun(folder, sae, evaluation, content, resumed_from)


def check_transcoder(job: Job, recipe: Recipe) -> None:
    """Make sure that a transcoder can be trained by a recipe, before anything expensive begins.

    Raises:
        InputError: a gated one, or several processes.
    """
    if job.mesh is not None:
        raise InputError("a transcoder is trained by one process: start `apportion train` without torchrun")
    if recipe.gated:
        raise InputError("rule gated: a transcoder has no separate gate; choose another rule, such as relu or jumprelu")


def open_run(folder: Path | str, device: str = "cpu") -> TrainedRun:
    """Open a finished run, or a dictionary that one has written.

    Raises:
        InputError: neither is there, or the run is not finished.
    """
    folder = Path(folder).expanduser()
    if (folder / "run.json").exists():
        settings = _run_json(folder)
        if not (folder / "dictionary" / "config.json").exists():
            raise InputError(f"the run {folder} is not finished: run the same `apportion train` again, it continues")
        evaluation = read_json(folder / "evaluation.json") if (folder / "evaluation.json").exists() else None
        return TrainedRun(folder, SparseAutoencoder.load(folder / "dictionary", device), evaluation, settings)
    if (folder / "config.json").exists():
        sae = SparseAutoencoder.load(folder, device)
        return TrainedRun(folder, sae, None, dict(sae.metadata))
    if not folder.exists():
        raise InputError(f"{folder} does not exist: give the folder of a run or of a dictionary")
    raise InputError(f"{folder} holds neither a run (run.json) nor a dictionary (config.json)")


def evaluate_dictionary(
    sae: SparseAutoencoder, prepared: PreparedStore, loss: SplicedLoss | None, *, device: str = "cpu"
) -> dict[str, Any]:
    """All figures of a dictionary on the test part, ready for JSON.

    Args:
        sae: the dictionary.
        prepared: the activations.
        loss: for the model's loss with the reconstruction spliced in; None leaves it out.
        device: where to compute.

    Raises:
        InputError: the dictionary is of another width than the store; there is nothing to evaluate on.
    """
    if sae.d_in != prepared.test.width:
        raise InputError(
            f"the dictionary takes activations of width {sae.d_in}, but {prepared.store.folder} holds width "
            f"{prepared.test.width}: give a store of the site that it was trained on"
        )
    evaluation = evaluate_reconstruction(sae, prepared.test, target=prepared.target, device=device).to_json()
    if loss is not None:
        evaluation["metrics"] |= {name: asdict(metric) for name, metric in loss.evaluate(sae).items()}
        evaluation["loss_contexts"] = len(loss.ids)
    return dict(_finite(evaluation))


def spliced_loss(prepared: PreparedStore, lm: LanguageModel, contexts: int = 64) -> SplicedLoss | None:
    """What measures the model's loss, or None for a model that predicts no next token."""
    if not lm.is_causal:
        return None
    prepared.store.check_model(lm)
    site = Site.parse(prepared.source.site)
    if prepared.target is None:
        return SplicedLoss(lm, site, prepared.test, contexts)
    return SplicedLoss(lm, prepared.target, prepared.test, contexts, source=site)


def _refuse_other_run(folder: Path, content: Mapping[str, Any]) -> None:
    if not (folder / "run.json").exists():
        return
    before = _run_json(folder)
    kept = ("recipe", "provenance")
    # As JSON has it: a tuple that was written is a list when it is read.
    now = json.loads(json.dumps({name: content[name] for name in kept}))
    different = differences({name: before.get(name) for name in kept}, now)
    if different:
        named = "; ".join(different[:_DIFFERENCES_NAMED]).replace("(checkpoint:", "(there:")
        raise InputError(f"{folder} holds another run: {named}. Choose another folder, or repeat the run as it was")


def _run_json(folder: Path) -> dict[str, Any]:
    content = read_json(folder / "run.json")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{folder / 'run.json'} is not of a run of apportion (format {FORMAT!r})")
    return content


def _portable(source: ActivationSource) -> dict[str, Any]:
    """A source whose relative paths are absolute, so that it can be found from another working folder."""
    content = asdict(source)
    if source.model not in PACKAGES and Path(source.model).expanduser().exists():
        content["model"] = str(Path(source.model).expanduser().absolute())
    if source.text not in ("english", "code") and not source.text.startswith("hf:"):
        content["text"] = str(Path(source.text).expanduser().absolute())
    return content


def _finite(content: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _say(progress: bool, message: str) -> None:
    if progress:
        print(message, file=sys.stderr, flush=True)
