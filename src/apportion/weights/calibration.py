"""What the inputs of linear layers look like on some texts: statistics that are gathered while a block runs.

Wanda needs the inputs' norms, SparseGPT their second moments, DSnoT their means and variances. All are sums over
tokens, so they are added up batch by batch, in float64, without padding, and none of the inputs is kept.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.models.block_walk import BlockWalk
from apportion.weights.layers import WeightLayer


class InputStatistics:
    """Sums over the tokens that one linear layer has seen.

    Attributes:
        samples: texts.
        tokens: of all of them.
        second_sum: the sum of ``x x^T``, if it was asked for.

    Args:
        width: of the inputs.
        second_moment: also add up ``x x^T``: ``width`` times ``width`` numbers.
        device: where sums are kept.
    """

    def __init__(self, width: int, second_moment: bool = True, device: torch.device | str = "cpu") -> None:
        self.samples, self.tokens = 0, 0
        self._sum = torch.zeros(width, dtype=torch.float64, device=device)
        self._square_sum = torch.zeros_like(self._sum)
        self._variances = torch.zeros_like(self._sum)
        self.second_sum = torch.zeros(width, width, dtype=torch.float64, device=device) if second_moment else None

    @torch.no_grad()
    def add(self, inputs: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"]) -> None:
        """Add a batch of texts.

        Args:
            inputs: of the layer.
            real: which places hold tokens; the others do not count.
        """
        kept = real.sum(dim=1).double()
        rows = torch.where(real.unsqueeze(2), inputs, 0).double()
        sums, squares = rows.sum(dim=1), rows.square().sum(dim=1)
        some = kept > 0
        counts = kept[some].unsqueeze(1)
        variance = squares[some] / counts - (sums[some] / counts).square()
        self.samples += int(some.sum())
        self.tokens += int(kept.sum())
        self._sum += sums.sum(dim=0)
        self._square_sum += squares.sum(dim=0)
        self._variances += variance.clamp_min(0).sum(dim=0)
        if self.second_sum is not None:
            # A float32 product of one batch, added up in float64: the sum of many batches loses nothing.
            flat = inputs[real].float()
            self.second_sum += flat.T @ flat

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """Over tokens."""
        return self._sum / self.tokens

    @property
    def square_mean(self) -> Float[Tensor, " d_in"]:
        """Of the squares, over tokens."""
        return self._square_sum / self.tokens

    @property
    def norm(self) -> Float[Tensor, " d_in"]:
        """The root mean square: but for a constant, the norm of each input over all tokens."""
        return self.square_mean.sqrt()

    @property
    def variance(self) -> Float[Tensor, " d_in"]:
        """The (biased) variance within a text, a mean over texts: how texts differ does not count."""
        return self._variances / max(1, self.samples)

    @property
    def second_moment(self) -> Float[Tensor, "d_in d_in"]:
        """``x x^T``, a mean over tokens.

        Raises:
            ValueError: it was not asked for.
        """
        if self.second_sum is None:
            raise ValueError("second_moment was not gathered: make InputStatistics with second_moment=True")
        return self.second_sum / self.tokens

    def check(self, name: str) -> None:
        """Refuse statistics that nothing can be chosen by.

        Raises:
            InputError: the layer saw no token, or something that is not finite.
        """
        if self.tokens == 0:
            raise InputError(
                f"{name} saw no calibration tokens (an expert that was never chosen, or a part of the model that text "
                "does not reach): give more calibration text, or leave it out (exclude)"
            )
        if not bool(torch.isfinite(self._square_sum).all()):
            raise InputError(
                f"{name} is given inputs that are not finite: the model overflows on this text; load it in float32"
            )


@contextlib.contextmanager
def watch(
    layers: Sequence[WeightLayer], walk: BlockWalk, second_moment: bool = True
) -> Iterator[Mapping[str, InputStatistics]]:
    """In a ``with`` block, gather what layers of the walk's next block are given.

    Layers that are handed the very same tensor (queries, keys and values) share their statistics.

    Args:
        layers: of that block.
        walk: its ``outputs`` are to be taken within the ``with`` block, once.
        second_moment: see `InputStatistics`.
    """
    found: dict[str, InputStatistics] = {
        each.name: InputStatistics(each.matrix().shape[1], second_moment=False) for each in layers
    }
    owner: dict[str, str] = {}
    last: list[tuple[Tensor, str]] = []
    batches = iter(walk.real)
    state: dict[str, Tensor] = {}

    def begin(*_: Any) -> None:
        state["real"] = next(batches)

    def watching(layer: WeightLayer) -> Any:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs, name = args[0], layer.name
            if name not in owner:
                shared = bool(last) and last[0][0] is inputs
                owner[name] = last[0][1] if shared else name
                if shared:
                    found[name] = found[owner[name]]
                else:
                    found[name] = InputStatistics(inputs.shape[-1], second_moment, inputs.device)
            last[:] = [(inputs, owner[name])]
            if owner[name] == name:
                found[name].add(*_as_texts(name, inputs, state["real"]))

        return see

    with contextlib.ExitStack() as hooks:
        handles = [walk.blocks[walk.place].register_forward_pre_hook(begin)]
        handles += [each.module.register_forward_pre_hook(watching(each)) for each in layers]
        for handle in handles:
            hooks.callback(handle.remove)
        yield found


def statistics_of(
    layers: Sequence[WeightLayer], walk: BlockWalk, second_moment: bool = True
) -> Mapping[str, InputStatistics]:
    """What layers of the walk's next block are given, as the block is now; the walk stays where it is.

    Raises:
        InputError: a layer saw nothing, or something that is not finite.
    """
    with watch(layers, walk, second_moment) as found:
        for _ in walk.outputs():
            pass
    for name, statistics in found.items():
        statistics.check(name)
    return found


def _as_texts(name: str, inputs: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's inputs as texts, and where they are tokens."""
    if inputs.shape[:-1].numel() == real.numel():
        # OPT flattens the texts of a batch before its MLP.
        return inputs.reshape(*real.shape, -1), real
    if not bool(real.all()):
        raise InputError(
            f"{name} sees {inputs.shape[:-1].numel()} of {real.numel()} places, and which of them are padding is not "
            "known: calibrate with texts of one length"
        )
    # An expert sees some tokens of all texts: they count as one text.
    flat = inputs.reshape(1, -1, inputs.shape[-1])
    return flat, torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
