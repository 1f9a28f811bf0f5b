"""What a change inside a model does to its predictions: cross-entropy on the text, and divergence from its own.

Cross-entropy can fall because a change is true to the model or because it leaks the answer; the Kullback-Leibler
divergence from the unchanged model's next-token distributions tells the two apart, and also measures how far steering
moves a model whatever it moves it to.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.models import LanguageModel
from apportion.models.families import base_of, finish_logits
from apportion.models.language import LOGITS_AT_ONCE

_CONTEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Change:
    """How the predictions of a changed model differ from its own; in nats, means over the counted predictions.

    Attributes:
        ce_increase: cross-entropy on the text, changed less unchanged.
        kl: divergence ``KL(unchanged || changed)`` of the next-token distributions.
    """

    ce_increase: float
    kl: float


class CleanPredictions:
    """The unchanged model's predictions of some contexts, to compare with.

    What is kept are the hidden states that the head reads, so that logits are never all in memory.

    Args:
        lm: the model, unchanged.
        input_ids: the contexts.
        counted: which predictions count; entry ``[b, t]`` is that of token ``t + 1``.

    Raises:
        InputError: the model does not predict the next token, or nothing counts.
    """

    def __init__(
        self,
        lm: LanguageModel,
        input_ids: Int[Tensor, "contexts time"],
        counted: Bool[Tensor, "contexts time_minus_1"],
    ) -> None:
        if not lm.is_causal:
            raise InputError(f"{lm.name} does not predict the next token: use a causal language model, such as smollm2")
        if not bool(counted.any()):
            raise InputError("counted is False everywhere: there are no predictions to compare")
        self._lm, self._ids, self._counted = lm, input_ids.long(), counted
        self._hidden = self._run()

    @torch.no_grad()
    def change(self) -> Change:
        """Run the model as it is now, under whatever is spliced into it, and compare."""
        lm, now = self._lm, self._run()
        targets = self._ids[:, 1:][self._counted].to(lm.device)
        head = lm.model.get_output_embeddings()
        step = max(1, LOGITS_AT_ONCE // head.weight.shape[0] // 2)
        increase = divergence = 0.0
        for start in range(0, len(targets), step):
            part = slice(start, start + step)
            before, after = (
                finish_logits(lm.model, head(hidden[part]).float()).log_softmax(-1) for hidden in (self._hidden, now)
            )
            wanted = targets[part].unsqueeze(1)
            increase += float((before.gather(1, wanted) - after.gather(1, wanted)).sum())
            divergence += float((before.exp() * (before - after)).sum())
        return Change(increase / len(targets), divergence / len(targets))

    @torch.no_grad()
    def _run(self) -> Tensor:
        found = []
        for start in range(0, len(self._ids), _CONTEXTS_AT_ONCE):
            ids, counted = (each[start : start + _CONTEXTS_AT_ONCE] for each in (self._ids, self._counted))
            out = base_of(self._lm.model)(input_ids=ids.to(self._lm.device), use_cache=False)
            found.append(out.last_hidden_state[:, :-1][counted.to(self._lm.device)])
        return torch.cat(found)
