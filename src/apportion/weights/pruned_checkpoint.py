"""From a dense model and two texts to a folder with a pruned one, and what it cost: what `apportion prune` does.

The folder is an ordinary transformers checkpoint whose pruned weights are zeros, with ``pruning.json`` beside it.
While a run is under way, ``parts/`` holds the blocks that are finished; it goes when ``pruning.json`` is there.
"""

import hashlib
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from apportion.data import corpus
from apportion.data.files import check_writable, read_json, write_json
from apportion.errors import InputError
from apportion.models import LanguageModel
from apportion.models.block_walk import walked_losses
from apportion.models.quiet import quiet_transformers
from apportion.models.saving import save_model
from apportion.weights.dsnot import DSnoT
from apportion.weights.layers import WeightLayer
from apportion.weights.one_shot import (
    LayerReport,
    OneShotReport,
    check_pattern,
    check_same_settings,
    layers_by_block,
    prune_model,
    settings_of,
)
from apportion.weights.one_shot_method import OneShotMethod
from apportion.weights.patterns import Pattern

REPORT = "pruning.json"
_PARTS = "parts"


@dataclass(frozen=True)
class Text:
    """Which text is calibrated and judged on.

    Attributes:
        calibration: a corpus, as `apportion.data.corpus` finds it.
        evaluation: another one to measure perplexity on; None: every other document of the first.
        samples: windows for calibration (Wanda, SparseGPT and DSnoT: 128).
        context: tokens of a window (theirs: 2048).
        evaluation_tokens: at least so many are judged on; at most a window more.
        seed: of the choice among the calibration windows.

    Raises:
        InputError: a value that cannot work.
    """

    calibration: str = "english"
    evaluation: str | None = None
    samples: int = 32
    context: int = 512
    evaluation_tokens: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("context", 2), ("evaluation_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}: at least {least}")


@dataclass(frozen=True)
class Windows:
    """Windows of tokens.

    Attributes:
        calibration: to prune by.
        evaluation: held out.
    """

    calibration: Int[Tensor, "texts time"]
    evaluation: Int[Tensor, "others time"]


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What `prune_to_folder` leaves.

    Attributes:
        folder: with the pruned model.
        report: of its layers.
        perplexity_before, perplexity_after: of the dense and of the pruned model on held-out text.
        evaluated_tokens: that they were measured on.
        text: where all text came from.
        finished_before: whether everything had been done already.
    """

    folder: Path
    report: OneShotReport
    perplexity_before: float
    perplexity_after: float
    evaluated_tokens: int
    text: Mapping[str, Any] = field(default_factory=dict)
    finished_before: bool = False

    def to_json(self) -> dict[str, Any]:
        """What ``pruning.json`` holds."""
        return {
            "settings": dict(self.report.settings),
            "text": dict(self.text),
            "sparsity": self.report.sparsity,
            "perplexity": {
                "before": _number(self.perplexity_before),
                "after": _number(self.perplexity_after),
                "tokens": self.evaluated_tokens,
            },
            "error": self.report.error,
            "seconds": self.report.seconds,
            "layers": [asdict(each) for each in self.report.layers],
        }


def read_windows(lm: LanguageModel, text: Text) -> Windows:
    """Cut text into windows of tokens, those that are judged on from other documents.

    Documents are joined, with the end-of-text token between them, and cut. There are up to four times as many
    calibration windows as are wanted, of which the seed chooses.

    Raises:
        InputError: there is no such text, or too little of it; the model reads fewer tokens at once.
    """
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and text.context > limit:
        raise InputError(f"context={text.context}: {lm.name} reads at most {limit} tokens at once")
    judged = math.ceil(text.evaluation_tokens / (text.context - 1))
    # Hardly any tokenizer makes fewer tokens than one of eight characters.
    characters = 8 * text.context * max(4 * text.samples, judged)
    if text.evaluation is None:
        calibration, evaluation = _documents(text.calibration, characters, 2)
    else:
        (calibration,), (evaluation,) = (
            _documents(source, characters, 1) for source in (text.calibration, text.evaluation)
        )
    found = _cut(lm, calibration, text.context, 4 * text.samples)
    _check_enough(len(found), text.samples, "calibration", text)
    chosen = sorted(random.Random(text.seed).sample(range(len(found)), text.samples))
    held_out = _cut(lm, evaluation, text.context, judged)
    _check_enough(len(held_out), judged, "evaluation", text)
    return Windows(found[chosen], held_out)


def prune_to_folder(
    lm: LanguageModel,
    windows: Windows,
    method: OneShotMethod,
    pattern: Pattern,
    folder: Path | str,
    *,
    text: Mapping[str, Any] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    batch_size: int = 4,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> PrunedCheckpoint:
    """Prune a model, in place, and write it.

    A run that was killed goes on after the last block that was finished; one that was finished is only read.

    Args:
        lm: the dense model.
        windows: texts.
        method: see `prune_model`.
        pattern: see `prune_model`.
        folder: for the pruned model.
        text: where the windows came from, for the report.
        include: see `prune_model`.
        exclude: see `prune_model`.
        batch_size: see `prune_model`.
        device: see `prune_model`.
        progress: see `prune_model`.

    Raises:
        InputError: see `prune_model`; the folder holds something else; a method moves biases that the model lacks.
    """
    folder = Path(folder)
    check_output_folder(folder)
    by_block = layers_by_block(lm, include, exclude)
    layers = [each for found in by_block.values() for each in found]
    check_pattern(pattern, method, layers)
    _check_biases(method, layers)
    evaluation = _key(windows.evaluation)
    if (folder / REPORT).exists():
        own = settings_of(lm, windows.calibration, None, method, pattern, include, exclude, error_every=1)
        return _finished(folder, {**own, "evaluation": evaluation})
    before = _dense_loss(lm, windows.evaluation, evaluation, folder / _PARTS / "dense.json", batch_size, device)
    report = prune_model(
        lm,
        windows.calibration,
        method,
        pattern,
        include=include,
        exclude=exclude,
        folder=folder / _PARTS,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    after = _loss(lm, windows.evaluation, batch_size, device)
    save_model(lm, folder)
    tokens = windows.evaluation.shape[0] * (windows.evaluation.shape[1] - 1)
    report = replace(report, settings={**report.settings, "evaluation": evaluation})
    done = PrunedCheckpoint(folder, report, _perplexity(before), _perplexity(after), tokens, text or {})
    write_json(folder / REPORT, done.to_json())
    shutil.rmtree(folder / _PARTS, ignore_errors=True)
    return done


def check_output_folder(folder: Path | str) -> None:
    """Make sure that a pruned model can be written to a folder, before anything expensive begins.

    Raises:
        InputError: it cannot be written, or holds something else.
    """
    folder = Path(folder)
    check_writable(folder)
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found and REPORT not in found and _PARTS not in found:
        raise InputError(
            f"{folder} is not empty ({', '.join(found[:3])}) and holds no pruned model: choose a new folder"
        )


def _finished(folder: Path, settings: Mapping[str, Any]) -> PrunedCheckpoint:
    """What an earlier run left."""
    content = read_json(folder / REPORT)
    try:
        check_same_settings(content["settings"], settings, folder)
        layers = [LayerReport(**{**each, "shape": tuple(each["shape"])}) for each in content["layers"]]
        report = OneShotReport(settings, layers, content["seconds"], 1 + max(each.block for each in layers))
        perplexity, text = content["perplexity"], content["text"]
        before, after = (math.inf if perplexity[name] is None else perplexity[name] for name in ("before", "after"))
        return PrunedCheckpoint(folder, report, before, after, perplexity["tokens"], text, finished_before=True)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / REPORT} is no report of a pruning ({error}): choose a new folder") from error


def _check_biases(method: OneShotMethod, layers: Sequence[WeightLayer]) -> None:
    """Refuse a method that moves biases, where a checkpoint has no place for them."""
    lacking = [each.name for each in layers if getattr(each.module, "bias", None) is None]
    if isinstance(method, DSnoT) and method.correct_mean and lacking:
        raise InputError(
            f"correct_mean needs biases, and {lacking[0]} has none ({len(lacking)} layers in all): a checkpoint of "
            "this architecture could not hold them; use prune_model, which gives the layers biases in memory"
        )


def _dense_loss(
    lm: LanguageModel, ids: Tensor, key: str, path: Path, batch_size: int, device: torch.device | str | None
) -> float:
    """Of the model before it is pruned: from the file of a run that was killed, if it is of the same text."""
    kept = read_json(path) if path.exists() else {}
    if kept.get("evaluation") != key:
        kept = {"evaluation": key, "loss": _loss(lm, ids, batch_size, device)}
        write_json(path, kept)
    return float(kept["loss"])


def _loss(lm: LanguageModel, ids: Tensor, batch_size: int, device: torch.device | str | None) -> float:
    loss = float(walked_losses(lm, ids, batch_size=batch_size, device=device).double().mean())
    if math.isnan(loss):
        raise InputError(f"{lm.name} gives losses that are not numbers on the held-out text: load it in float32")
    return loss


def _key(ids: Tensor) -> str:
    return hashlib.sha256(ids.cpu().long().numpy().tobytes()).hexdigest()[:16]


def _documents(source: str, characters: int, hands: int) -> list[list[str]]:
    """The documents of a corpus dealt out to some hands, until each has so many characters."""
    dealt: list[list[str]] = [[] for _ in range(hands)]
    lengths = [0] * hands
    for number, each in enumerate(corpus(source)):
        dealt[number % hands].append(each.text)
        lengths[number % hands] += len(each.text)
        if min(lengths) >= characters:
            break
    return dealt


def _cut(lm: LanguageModel, texts: Iterable[str], context: int, most: int) -> Tensor:
    """Windows of the joined texts, each after what the tokenizer begins a text with."""
    separator = [] if lm.tokenizer.eos_token_id is None else [lm.tokenizer.eos_token_id]
    begins = [each for each in lm.tokenizer("")["input_ids"][:1] if each == lm.tokenizer.bos_token_id]
    own = context - len(begins)
    tokens: list[int] = []
    # A whole document is longer than a model reads at once, about which transformers would warn.
    with quiet_transformers():
        for text in texts:
            tokens += lm.tokenizer(text, add_special_tokens=False)["input_ids"] + separator
            if len(tokens) >= own * most:
                break
    count = min(most, len(tokens) // own)
    windows = torch.tensor(tokens[: count * own], dtype=torch.int64).view(count, own)
    return torch.cat([torch.tensor(begins, dtype=torch.int64).expand(count, -1), windows], dim=1)


def _check_enough(found: int, wanted: int, what: str, text: Text) -> None:
    if found < wanted:
        more = " (every other document is held out for evaluation)" if text.evaluation is None else ""
        raise InputError(
            f"{what}: the text gives {found} windows of {text.context} tokens, and {wanted} are wanted{more}: give "
            "more text, fewer samples or a smaller context"
        )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
