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
        first: the first position that is computed again; those before it serve as keys and values alone. At most the
            last position of the shortest prompt.
    """

    def __init__(self, model: LanguageModel, prompts: TokenPrompts, first: int = 0) -> None:
        self._model, self._prompts, self._first = model, prompts, first
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._cache: Any = None
        self._before: list[tuple[Tensor, Tensor]] = []
        ids, mask, base = prompts.input_ids, prompts.attention_mask, base_of(model.model)
        with torch.no_grad():
            if first > 0:
                from transformers import DynamicCache

                self._cache = DynamicCache()
                base(input_ids=ids[:, :first], attention_mask=mask[:, :first], past_key_values=self._cache)
                self._before = [(layer.keys, layer.values) for layer in self._cache.layers]
            handles = [
                block.register_forward_pre_hook(self._note_call, with_kwargs=True) for block in blocks_of(model.model)
            ]
            try:
                base(
                    input_ids=ids[:, first:],
                    attention_mask=mask,
                    past_key_values=self._cache,
                    use_cache=self._cache is not None,
                )
            finally:
                for handle in handles:
                    handle.remove()

    def _note_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append((args, kwargs))

    @torch.no_grad()
    def logits(self, layer: int, copies: int = 1) -> Float[Tensor, "rows vocab"]:
        """What the model predicts after each prompt, computed from block ``layer`` on.

        Splices and edits at that block and above it are in force; they see the positions from ``first`` on.

        Args:
            layer: the first block to compute.
            copies: of the prompts, side by side in one pass: row ``c * prompts + p`` is copy c of prompt p.
        """
        blocks, cache = blocks_of(self._model.model), self._cache_of(layer, copies)
        args, kwargs = self._calls[layer]
        hidden = (args[0] if args else kwargs["hidden_states"]).repeat(copies, 1, 1)
        for block, (args, kwargs) in zip(list(blocks)[layer:], self._calls[layer:], strict=True):
            others = {name: self._copied(each, copies, cache) for name, each in kwargs.items()}
            others.pop("hidden_states", None)
            output = block(hidden, *(self._copied(each, copies, cache) for each in args[1:]), **others)
            hidden = output[0] if isinstance(output, tuple) else output
        hidden = final_norm_of(self._model.model)(hidden)
        projection = projection_out_of(self._model.model)
        hidden = hidden if projection is None else projection(hidden)
        end = self._prompts.positions["end"] - self._first
        return logits_at_end(self._model, hidden, end.repeat(copies))

    def _cache_of(self, layer: int, copies: int) -> Any:
        """Keys and values of the positions before ``first``, for each copy; a pass adds to them, so it has its own."""
        if self._cache is None:
            return None
        from transformers import DynamicCache

        cache = DynamicCache()
        for place, (keys, values) in list(enumerate(self._before))[layer:]:
            cache.update(keys.repeat(copies, 1, 1, 1), values.repeat(copies, 1, 1, 1), place)
        return cache

    def _copied(self, argument: Any, copies: int, cache: Any) -> Any:
        """An argument of a block (mask, rotary embeddings, ...) for a larger batch; what serves all rows stays."""
        if self._cache is not None and argument is self._cache:
            return cache
        if isinstance(argument, tuple):
            return tuple(self._copied(each, copies, cache) for each in argument)
        if not isinstance(argument, Tensor) or argument.dim() < 2 or argument.shape[0] != len(self._prompts):
            return argument
        if len(self._prompts) == 1:
            return argument
        return argument.repeat(copies, *(1 for _ in argument.shape[1:]))
