"""Going through a model's last blocks again and again, from a residual stream that is kept."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.models.families import base_of, blocks_of, final_norm_of, projection_out_of
from apportion.models.language import LanguageModel
from apportion.models.prompts import TokenPrompts, logits_at_end


class Restart:
    """One forward pass on some prompts, kept so that it can be gone through again from any block on.

    Args:
        model: a causal language model.
        prompts: what it reads.
    """

    def __init__(self, model: LanguageModel, prompts: TokenPrompts) -> None:
        self._model, self._prompts = model, prompts
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = [
            block.register_forward_pre_hook(self._note_call, with_kwargs=True) for block in blocks_of(model.model)
        ]
        try:
            with torch.no_grad():
                base_of(model.model)(
                    input_ids=prompts.input_ids, attention_mask=prompts.attention_mask, use_cache=False
                )
        finally:
            for handle in handles:
                handle.remove()

    def _note_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((args, kwargs))

    @torch.no_grad()
    def logits(self, layer: int, copies: int = 1) -> Float[Tensor, "rows vocab"]:
        """What the model predicts after each prompt, computed from block ``layer`` on.

        Splices and edits at that block and above it are in force.

        Args:
            layer: the first block to compute.
            copies: of the prompts, side by side in one pass: row ``c * prompts + p`` is copy c of prompt p.
        """
        blocks = blocks_of(self._model.model)
        args, kwargs = self._calls[layer]
        hidden = (args[0] if args else kwargs["hidden_states"]).repeat(copies, 1, 1)
        for block, (args, kwargs) in zip(list(blocks)[layer:], self._calls[layer:], strict=True):
            others = {name: self._copied(each, copies) for name, each in kwargs.items() if name != "hidden_states"}
            output = block(hidden, *(self._copied(each, copies) for each in args[1:]), **others)
            hidden = output[0] if isinstance(output, tuple) else output
        hidden = final_norm_of(self._model.model)(hidden)
        projection = projection_out_of(self._model.model)
        hidden = hidden if projection is None else projection(hidden)
        return logits_at_end(self._model, hidden, self._prompts.positions["end"].repeat(copies))

    def _copied(self, argument: Any, copies: int) -> Any:
        """An argument of a block (mask, rotary embeddings, ...) for a larger batch; what serves all rows stays."""
        if isinstance(argument, tuple):
            return tuple(self._copied(each, copies) for each in argument)
        if not isinstance(argument, Tensor) or argument.dim() < 2 or argument.shape[0] != len(self._prompts):
            return argument
        if len(self._prompts) == 1:
            return argument
        return argument.repeat(copies, *(1 for _ in argument.shape[1:]))
