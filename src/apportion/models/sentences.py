"""Sentences as vectors: an encoder such as all-MiniLM-L6-v2 (Reimers and Gurevych 2019, arXiv 1908.10084)."""

import threading
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.models.families import base_of
from apportion.models.language import LanguageModel, load


class SentenceEncoder:
    """Texts as unit vectors: the mean of a model's last hidden states over a text's tokens.

    Args:
        lm: an encoder, or the name of one, such as ``minilm``.
        batch_size: texts at once.
        longest: tokens of a text that are read; the rest is left out.

    Raises:
        InputError: see ``load``.
    """

    def __init__(self, lm: LanguageModel | str = "minilm", batch_size: int = 64, longest: int = 256) -> None:
        self.lm = load(lm) if isinstance(lm, str) else lm
        self.batch_size, self.longest = batch_size, longest
        self.name = f"{self.lm.name}@{self.lm.fingerprint[:12]}"
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """A unit vector for each text."""
        width = self.lm.d_model
        found = torch.zeros(len(texts), width)
        # Texts of like length together, so that little is padding.
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            with self._lock:
                inputs = self.lm.tokenizer(
                    [texts[place] or " " for place in part],
                    padding=True,
                    truncation=True,
                    max_length=self.longest,
                    return_tensors="pt",
                ).to(self.lm.device)
                hidden = base_of(self.lm.model)(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                ).last_hidden_state.float()
            mask = inputs["attention_mask"][:, :, None].float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            found[part] = nn.functional.normalize(mean, dim=1).cpu()
        return found
