"""Pruning a language model without training: block by block, each on what the pruned blocks before it put out.

A block's linear layers are watched while it runs, still dense, on the calibration text; then all of them are pruned,
and the block runs again, pruned, for the next one's inputs. In memory are the text's residual stream and one block's
statistics. What comes out is a function of the settings alone; with a folder, a run that was killed goes on after the
last block that was finished.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.models import LanguageModel
from apportion.models.block_walk import BlockWalk, in_attention
from apportion.models.families import blocks_of
from apportion.training.progress import progress_display
from apportion.weights.calibration import InputStatistics, statistics_of
from apportion.weights.layers import WeightLayer, prunable
from apportion.weights.one_shot_method import OneShotMethod, Pruned, Seen
from apportion.weights.patterns import Pattern, Unstructured

_FORMAT = 1


@dataclass(frozen=True)
class LayerReport:
    """What became of a layer.

    Attributes:
        name: of the layer.
        block: its number.
        shape: outputs and inputs.
        sparsity: the share of its weights that was pruned.
        error: the squared change of its output over its squared output, on the text it was calibrated on.
        mean_error: by how much its outputs' means have changed, a mean over outputs, over that of their sizes.
        seconds: the method took.
        figures: what else the method has to tell.
    """

    name: str
    block: int
    shape: tuple[int, int]
    sparsity: float
    error: float | None
    mean_error: float
    seconds: float
    figures: Mapping[str, float]


@dataclass(frozen=True)
class OneShotReport:
    """What became of a model.

    Attributes:
        settings: all that decides the result.
        layers: in the order in which they were pruned.
        seconds: this run took; a resumed one only counts what was left.
        resumed_from: blocks that were finished before.
    """

    settings: Mapping[str, Any]
    layers: Sequence[LayerReport]
    seconds: float
    resumed_from: int = 0

    @property
    def sparsity(self) -> float:
        """The share of the prunable weights that was pruned."""
        sizes = [each.shape[0] * each.shape[1] for each in self.layers]
        return sum(size * each.sparsity for size, each in zip(sizes, self.layers, strict=True)) / sum(sizes)

    @property
    def error(self) -> float | None:
        """The mean of the layers' errors."""
        errors = [each.error for each in self.layers if each.error is not None]
        return sum(errors) / len(errors) if errors else None

    def figure(self, name: str) -> float:
        """The mean over layers of something that the method told of them.

        Raises:
            KeyError: it told no such thing.
        """
        return sum(each.figures[name] for each in self.layers) / len(self.layers)


@torch.no_grad()
def prune_model(
    lm: LanguageModel,
    input_ids: Int[Tensor, "texts time"],
    method: OneShotMethod,
    pattern: Pattern,
    *,
    attention_mask: Int[Tensor, "texts time"] | Bool[Tensor, "texts time"] | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    folder: Path | str | None = None,
    batch_size: int = 4,
    device: torch.device | str | None = None,
    error_every: int = 1,
    progress: bool = True,
) -> OneShotReport:
    """Prune the linear layers of a model's blocks, in place.

    Args:
        lm: the dense model.
        input_ids: calibration texts.
        method: one of `apportion.weights.one_shot_catalogue`, or one of your own.
        pattern: what masks look like.
        attention_mask: 1 for tokens, 0 for padding, which does not count; None where nothing is padded.
        include: patterns of names (``"*.mlp.*"``) to prune.
        exclude: patterns to leave dense.
        folder: where finished blocks are kept, so that a run that is killed can go on; None keeps nothing.
        batch_size: texts that go through a block together; it changes nothing but speed and memory (and rounding).
        device: where blocks compute; the model's own place if None. A GPU need only hold one block.
        error_every: measure the errors of layers in every so many-th block, which takes their inputs' second moments;
            0 measures none.
        progress: a bar on a terminal, a line every ten seconds elsewhere, on stderr.

    Raises:
        InputError: the pattern fits some layer not, or would prune nothing or across layers; a layer lies outside the
            blocks, saw no token, or has weights or inputs that are not finite; ``folder`` holds a run with other
            settings.
    """
    started = time.perf_counter()
    by_block = layers_by_block(lm, include, exclude)
    check_pattern(pattern, method, [each for layers in by_block.values() for each in layers])
    settings = settings_of(lm, input_ids, attention_mask, method, pattern, include, exclude, error_every)
    parts = None if folder is None else _Parts(Path(folder), settings)
    done = 0 if parts is None else parts.count(len(blocks_of(lm.model)))
    walk = BlockWalk(lm, input_ids, attention_mask, batch_size=batch_size, device=device)
    reports: list[LayerReport] = []
    with progress_display(progress, len(walk), 0, ("sparsity", "error"), what="block", title="pruning") as display:
        while walk.place < len(walk):
            layers = by_block.get(walk.place, [])
            if walk.place < done:
                assert parts is not None
                tensors, found = parts.load(walk.place)
                _install(layers, tensors)
            else:
                found = _prune_block(walk, layers, method, pattern, _measured(walk.place, error_every))
                if parts is not None:
                    parts.save(walk.place, _tensors(layers), found)
            reports += found
            walk.advance()
            display.update(walk.place, _record(walk.place, found))
    return OneShotReport(settings, reports, time.perf_counter() - started, done)


def layers_by_block(
    lm: LanguageModel, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[int, list[WeightLayer]]:
    """The layers of each block that can be pruned.

    Raises:
        InputError: there are none; one that was asked for by name lies outside the blocks.
    """
    place = {module: number for number, block in enumerate(blocks_of(lm.model)) for module in block.modules()}
    # Names without a star are meant one by one; of those that match a pattern, only what is in a block is meant.
    named = {each for each in include if not set("*?[") & set(each)}
    found = prunable(lm.model, include, exclude, where=lambda name, module: module in place or name in named)
    by_block: dict[int, list[WeightLayer]] = {}
    for layer in found:
        if layer.module not in place:
            raise InputError(f"include: {layer.name} is in none of the model's blocks, and only blocks are pruned")
        by_block.setdefault(place[layer.module], []).append(layer)
    return by_block


def check_pattern(pattern: Pattern, method: OneShotMethod, layers: Sequence[WeightLayer]) -> None:
    """Refuse what cannot be done, before anything expensive begins.

    Raises:
        InputError: see `prune_model`.
    """
    if pattern.density >= 1:
        raise InputError(f"pattern {pattern} keeps every weight: nothing would be pruned; use a sparsity such as 0.5")
    if isinstance(pattern, Unstructured) and pattern.scope == "global":
        raise InputError("scope='global': blocks are pruned one after the other, so use row or layer")
    method.check(pattern)
    for layer in layers:
        out, width = layer.matrix().shape
        pattern.check((out, width), layer.name)


def _measured(block: int, every: int) -> bool:
    return every > 0 and block % every == 0


def _prune_block(
    walk: BlockWalk, layers: Sequence[WeightLayer], method: OneShotMethod, pattern: Pattern, measure_error: bool
) -> list[LayerReport]:
    if not layers:
        return []
    statistics = statistics_of(layers, walk, method.second_moment or measure_error)
    attention = in_attention(walk.blocks[walk.place])
    return [
        _prune_layer(
            walk.place,
            layer,
            Seen(layer.name, statistics[layer.name], layer.module in attention),
            method,
            pattern,
            measure_error,
        )
        for layer in layers
    ]


def _prune_layer(
    block: int, layer: WeightLayer, seen: Seen, method: OneShotMethod, pattern: Pattern, measure_error: bool
) -> LayerReport:
    started = time.perf_counter()
    home = layer.matrix()
    # A copy: what the model holds is overwritten below, and compared with this.
    weight = home.to(seen.statistics.mean.device, torch.float32, copy=True)
    if not bool(torch.isfinite(weight).all()):
        raise InputError(f"{layer.name} has weights that are not finite: the model is damaged")
    pruned = method.prune(weight, seen, pattern)
    seconds = time.perf_counter() - started
    layer.set_matrix(pruned.weight.to(home.dtype))
    if pruned.bias is not None:
        _add_bias(layer.module, pruned.bias)
    shape = (weight.shape[0], weight.shape[1])
    return LayerReport(
        name=layer.name,
        block=block,
        shape=shape,
        sparsity=1 - float(pruned.mask.sum()) / pruned.mask.numel(),
        error=output_error(weight, pruned.weight, seen.statistics) if measure_error else None,
        mean_error=_mean_error(weight, pruned, seen.statistics),
        seconds=seconds,
        figures=dict(pruned.figures),
    )


def output_error(
    weight: Float[Tensor, "out in"], pruned: Float[Tensor, "out in"], statistics: InputStatistics
) -> float:
    """``tr(dW M dW^T) / tr(W M W^T)``: the squared change of a layer's output over its squared output."""
    moment = statistics.second_moment.float()
    change = weight - pruned
    return float(((change @ moment) * change).sum() / ((weight @ moment) * weight).sum().clamp_min(1e-30))


def _mean_error(weight: Tensor, pruned: Pruned, statistics: InputStatistics) -> float:
    mean = statistics.mean
    off = (weight - pruned.weight).double() @ mean
    if pruned.bias is not None:
        off = off - pruned.bias.double()
    return float(off.abs().mean() / (weight.double() @ mean).abs().mean().clamp_min(1e-30))


def _add_bias(module: nn.Module, bias: Tensor) -> None:
    if getattr(module, "bias", None) is None:
        like = module.weight
        assert isinstance(like, Tensor)
        module.register_parameter("bias", nn.Parameter(bias.to(like), requires_grad=False))
    else:
        assert isinstance(module.bias, Tensor)
        module.bias.add_(bias.to(module.bias))


def _record(step: int, found: Sequence[LayerReport]) -> dict[str, float | int | None]:
    errors = [each.error for each in found if each.error is not None]
    return {
        "step": step,
        "sparsity": sum(each.sparsity for each in found) / max(1, len(found)),
        "error": sum(errors) / len(errors) if errors else None,
    }


def settings_of(
    lm: LanguageModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    method: OneShotMethod,
    pattern: Pattern,
    include: Sequence[str],
    exclude: Sequence[str],
    error_every: int,
) -> dict[str, Any]:
    """All that decides what `prune_model` makes of a dense model, JSON-ready."""
    digest = hashlib.sha256(str(tuple(input_ids.shape)).encode())
    for each in (input_ids, attention_mask):
        if each is not None:
            digest.update(each.cpu().long().numpy().tobytes())
    return {
        "format": _FORMAT,
        "model": lm.fingerprint,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        **method.settings(),
        "pattern": str(pattern),
        "scope": getattr(pattern, "scope", "group"),
        "include": list(include),
        "exclude": list(exclude),
        "calibration": digest.hexdigest()[:16],
        "calibration_tokens": int(input_ids.numel() if attention_mask is None else attention_mask.bool().sum()),
        "error_every": error_every,
    }


def _tensors(layers: Sequence[WeightLayer]) -> dict[str, Tensor]:
    """What a block's layers hold now."""
    found = {}
    for layer in layers:
        found[f"{layer.name}.weight"] = layer.parameter.detach().cpu().contiguous()
        if (bias := getattr(layer.module, "bias", None)) is not None:
            found[f"{layer.name}.bias"] = bias.detach().cpu().contiguous()
    return found


def _install(layers: Sequence[WeightLayer], tensors: Mapping[str, Tensor]) -> None:
    for layer in layers:
        layer.parameter.copy_(tensors[f"{layer.name}.weight"])
        if (bias := tensors.get(f"{layer.name}.bias")) is not None:
            own = getattr(layer.module, "bias", None)
            _add_bias(layer.module, bias if own is None else bias.to(own) - own)


class _Parts:
    """Finished blocks in a folder: a file each, and the settings that they were made with."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        path = folder / "settings.json"
        if not path.exists():
            write_json(path, settings)
            return
        check_same_settings(read_json(path), settings, folder)

    def count(self, blocks: int) -> int:
        """How many blocks are finished, from the first one on."""
        return next((number for number in range(blocks) if not self._path(number).exists()), blocks)

    def load(self, block: int) -> tuple[dict[str, Tensor], list[LayerReport]]:
        """A finished block."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(block), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
                rows = json.loads(file.metadata()["layers"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self._path(block)} is damaged ({error}): remove it, and run the same again") from error
        return tensors, [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows]

    def save(self, block: int, tensors: Mapping[str, Tensor], layers: Sequence[LayerReport]) -> None:
        """Keep one."""
        from safetensors.torch import save_file

        with write_atomically(self._path(block)) as temporary:
            save_file(dict(tensors), temporary, metadata={"layers": json.dumps([asdict(each) for each in layers])})

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block:03d}.safetensors"


def check_same_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with other settings than a run began with.

    Raises:
        InputError: names what differs.
    """
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if differing:
        what = ", ".join(f"{name} was {before.get(name)!r} and is {now.get(name)!r}" for name in differing[:3])
        raise InputError(
            f"{folder} was begun with other settings ({what}): give the same ones to go on, or another folder"
        )
