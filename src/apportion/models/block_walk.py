"""Walking a model block by block: the residual stream of some texts is carried from one block to the next.

For whoever changes a block and wants the next one to see what the changed one puts out, with no more in memory than the
stream. What the model hands its blocks (masks, rotary embeddings of each kind of layer, positions) is noted once in a
pass whose blocks do nothing, and handed to them again as it was, whatever it is called.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.families import (
    attention_of,
    base_of,
    blocks_of,
    final_norm_of,
    projection_out_of,
    transformer_of,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]


class BlockWalk:
    """Some texts on their way through a model.

    Attributes:
        blocks: of the model, first to last.
        stream: the residual stream ``[batch, time, d_model]`` of each batch, before the next block.
        real: where each batch holds tokens and not padding.
        place: number of the next block.

    Args:
        model: a `LanguageModel` or a transformers model.
        input_ids: texts, all of them.
        attention_mask: 1 for tokens, 0 for padding; None where nothing is padded.
        batch_size: texts that go through a block together.
        device: where blocks compute; the model's own place if None. A block that lies elsewhere is moved there for as
            long as it is used, so that a GPU need only hold one.

    Raises:
        InputError: the model is of an unknown family, or there is no text.
    """

    def __init__(
        self,
        model: Any,
        input_ids: Int[Tensor, "texts time"],
        attention_mask: Int[Tensor, "texts time"] | Bool[Tensor, "texts time"] | None = None,
        *,
        batch_size: int = 4,
        device: torch.device | str | None = None,
    ) -> None:
        if input_ids.numel() == 0:
            raise InputError(f"input_ids has shape {tuple(input_ids.shape)}: there is no token to walk with")
        self._model = transformer_of(model).eval()
        self.blocks: Sequence[nn.Module] = list(blocks_of(self._model))
        home = next(self._model.parameters()).device
        self._device = home if device is None else torch.device(device)
        self.place = 0
        self.stream: list[Tensor] = []
        self.real: list[Tensor] = []
        self._calls: list[list[Call]] = []
        self._tuples = False  # whether blocks answer with tuples
        for start in range(0, len(input_ids), batch_size):
            ids = input_ids[start : start + batch_size].to(home)
            mask = None if attention_mask is None else attention_mask[start : start + batch_size].to(home)
            # Where nothing is padded, a model without a mask may take a faster way.
            mask = None if mask is None or bool(mask.bool().all()) else mask
            self._note(ids, mask)

    def __len__(self) -> int:
        return len(self.blocks)

    @torch.no_grad()
    def outputs(self) -> Iterator[tuple[Float[Tensor, "batch time d_model"], Bool[Tensor, "batch time"]]]:
        """What the next block makes of each batch, and which of it is tokens; the walk stays where it is.

        Raises:
            InputError: the walk is over.
        """
        if self.place >= len(self.blocks):
            raise InputError(f"the walk is over: {type(self._model).__name__} has {len(self.blocks)} blocks")
        block = self.blocks[self.place]
        with self._here(block):
            for stream, real, calls in zip(self.stream, self.real, self._calls, strict=True):
                args, kwargs = _moved(calls[self.place], self._device)
                yield _first(block(stream.to(self._device), *args, **kwargs)), real

    def advance(self) -> None:
        """Go through the next block as it is now."""
        self.stream = [output for output, _ in self.outputs()]
        self.place += 1

    @torch.no_grad()
    def finish(self) -> Iterator[Float[Tensor, "batch time width"]]:
        """What the model's head is given, for each batch, once the walk is over: the final norm comes after it.

        Raises:
            InputError: it is not over.
        """
        if self.place < len(self.blocks):
            raise InputError(f"the walk is before block {self.place} of {len(self.blocks)}: advance to the end first")
        norm, projection = final_norm_of(self._model), projection_out_of(self._model)
        home = next(self._model.parameters()).device
        for stream in self.stream:
            final = norm(stream.to(home))
            yield final if projection is None else projection(final)

    @torch.no_grad()
    def _note(self, ids: Tensor, mask: Tensor | None) -> None:
        """Let the model embed a batch, and note what it hands to each of its blocks."""
        calls: list[Call] = []
        streams: list[Tensor] = []

        def noting(forward: Any, first: bool) -> Any:
            def note(*args: Any, **kwargs: Any) -> Any:
                if args:
                    hidden, *rest = args
                else:
                    hidden, rest = kwargs.pop("hidden_states"), []
                calls.append((tuple(rest), kwargs))
                if not first:
                    return (hidden,) if self._tuples else hidden
                streams.append(hidden)
                if not self._calls:
                    # What kind of answer this model's blocks give is only known once one has given it.
                    self._tuples = isinstance(forward(hidden, *rest, **kwargs), tuple)
                return (hidden,) if self._tuples else hidden

            return note

        with contextlib.ExitStack() as changed:
            for number, block in enumerate(self.blocks):
                changed.enter_context(_instead(block, noting(block.forward, number == 0)))
            base_of(self._model)(input_ids=ids, attention_mask=mask, use_cache=False)
        self.stream.append(streams[0].to(self._device))
        self.real.append((torch.ones_like(ids) if mask is None else mask).bool().to(self._device))
        # Batches without padding are handed the same masks and positions: they are kept once.
        self._calls.append(
            [_same_or_new(call, self._calls[0][place]) if self._calls else call for place, call in enumerate(calls)]
        )

    @contextlib.contextmanager
    def _here(self, block: nn.Module) -> Iterator[None]:
        home = next(block.parameters()).device
        block.to(self._device)
        try:
            yield
        finally:
            block.to(home)


def in_attention(block: nn.Module) -> set[nn.Module]:
    """The modules of a block that belong to its attention."""
    return set(attention_of(block).modules())


@torch.no_grad()
def walked_losses(
    model: Any,
    input_ids: Int[Tensor, "texts time"],
    *,
    batch_size: int = 4,
    device: torch.device | str | None = None,
) -> Float[Tensor, "texts time-1"]:
    """As `LanguageModel.loss_per_token`, with one block at a time on the device.

    Args:
        model: a `LanguageModel`.
        input_ids: texts without padding.
        batch_size: texts that go through a block together.
        device: see `BlockWalk`.

    Raises:
        InputError: the model does not predict the next token.
    """
    walk = BlockWalk(model, input_ids, batch_size=batch_size, device=device)
    while walk.place < len(walk):
        walk.advance()
    losses, start = [], 0
    for hidden in walk.finish():
        losses.append(model.losses_of(hidden, input_ids[start : start + len(hidden)].to(hidden.device)))
        start += len(hidden)
    return torch.cat(losses)


@contextlib.contextmanager
def _instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """In a ``with`` block the module computes something else."""
    had = "forward" in vars(module)
    before = module.forward
    setattr(module, "forward", forward)  # noqa: B010  to mypy a method is nothing to assign to
    try:
        yield
    finally:
        if had:
            setattr(module, "forward", before)  # noqa: B010
        else:
            delattr(module, "forward")


def _first(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def _same_or_new(call: Call, known: Call) -> Call:
    """A call, with those of its tensors that equal a known one's replaced by them."""
    args = tuple(map(_either, call[0], known[0])) if len(call[0]) == len(known[0]) else call[0]
    return args, {name: _either(value, known[1].get(name)) for name, value in call[1].items()}


def _either(value: Any, known: Any) -> Any:
    if isinstance(value, tuple) and isinstance(known, tuple) and len(value) == len(known):
        return tuple(map(_either, value, known))
    if not isinstance(value, Tensor) or not isinstance(known, Tensor):
        return value
    same = value.shape == known.shape and value.dtype == known.dtype and torch.equal(value, known)
    return known if same else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    if isinstance(value, dict):
        return {name: _moved(each, device) for name, each in value.items()}
    return value
