"""The last token of prompts, gone through again and again while all before it is kept: for edits at the end only.

In a causal model nothing before the last token sees what is changed there. So its keys and values are computed once,
and a run with other activations at the last token costs one token instead of a prompt.
"""

import copy
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.errors import InputError
from apportion.models.families import base_of
from apportion.models.heads import HeadEdit, edit_heads
from apportion.models.language import LanguageModel
from apportion.models.prompts import TokenPrompts, logits_at_end


class LastToken:
    """Prompts read up to their last token.

    Args:
        model: a causal language model.
        prompts: all of one length, two tokens at least.

    Raises:
        InputError: the model does not predict the next token, or prompts differ in length.
    """

    def __init__(self, model: LanguageModel, prompts: TokenPrompts) -> None:
        if not model.is_causal:
            raise InputError(f"{model.name} does not predict the next token: use a causal language model, like smollm2")
        if not bool(prompts.attention_mask.bool().all()) or prompts.input_ids.shape[1] < 2:
            raise InputError(
                f"the prompts have {sorted(set(prompts.attention_mask.sum(dim=1).tolist()))} tokens: only prompts of "
                "one length, of two tokens at least, can be gone through from their last token"
            )
        self._model, self._prompts = model, prompts
        with torch.no_grad():
            read = base_of(model.model)(
                input_ids=prompts.input_ids[:, :-1], attention_mask=prompts.attention_mask[:, :-1], use_cache=True
            )
        self._before = read.past_key_values

    @torch.no_grad()
    def logits(
        self, values: Mapping[tuple[int, int], Float[Tensor, "rows width"]] | None = None, copies: int = 1
    ) -> Float[Tensor, "rows vocab"]:
        """What the model predicts after each prompt while heads put out other values at the last token.

        Args:
            values: by layer and head, for every row; values of early layers do not change those of later ones.
            copies: of the prompts, side by side in one pass: row ``c * prompts + p`` is copy c of prompt p.

        Raises:
            InputError: a layer or head that the model lacks.
        """
        # A pass writes into the cache that it is given.
        before = copy.deepcopy(self._before)
        ids, mask = self._prompts.input_ids[:, -1:], self._prompts.attention_mask
        if copies > 1:
            before.reorder_cache(torch.arange(len(ids), device=ids.device).repeat(copies))
            ids, mask = ids.repeat(copies, 1), mask.repeat(copies, 1)
        first = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        edits = [HeadEdit(layer, head, each.to(ids.device), first) for (layer, head), each in (values or {}).items()]
        with edit_heads(self._model, edits):
            hidden = base_of(self._model.model)(
                input_ids=ids, attention_mask=mask, past_key_values=before, use_cache=True
            ).last_hidden_state
            return logits_at_end(self._model, hidden, first)
