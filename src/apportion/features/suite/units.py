"""What the suite takes apart: a dictionary's features, or the dimensions of the activation itself.

Every evaluation asks the same of both: how strongly each unit is on (``encode``), and which direction it adds
(``directions``). A dictionary of apportion is affine behind its codes, so that setting codes to other values and
keeping the reconstruction error changes an activation by exactly ``(new codes - codes) @ directions``; nothing has to
be decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocate import MutualChoice
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.suite.result import NotApplicable
from apportion.models import LanguageModel, Site, capture

# Numbers in a dense block of codes: 128 MiB.
_DENSE_AT_ONCE = 2**25
RANDOM, ACTIVATIONS = "random dictionary", "activations"


@runtime_checkable
class Units(Protocol):
    """Things in an activation that can be on or off, each with a direction."""

    directions: Float[Tensor, "units d"]
    offset: Float[Tensor, "d"]

    def encode(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens units"]:
        """How strongly each unit is on, densely."""
        ...

    def pool(
        self, x: Float[Tensor, "tokens d"], owner: Int[Tensor, "tokens"], texts: int
    ) -> Float[Tensor, "texts units"]:
        """The sum of the units' values over the tokens of each text."""
        ...


class DictionaryUnits:
    """The features of a dictionary, in the units of the activations.

    ``directions`` are the decoder's rows over the input scale, so that ``encode(x) @ directions + offset`` is the
    reconstruction.

    Raises:
        NotApplicable: the dictionary's output is another space than its input (a transcoder).
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        if sae.d_in != sae.d_out:
            raise NotApplicable(
                f"the dictionary maps width {sae.d_in} to another space of width {sae.d_out}, so its features cannot "
                "be taken out of the activation that it reads"
            )
        self.sae = sae
        scale = sae.input_scale.detach()
        self.directions = sae.decoder_weight.detach() / scale
        self.offset = sae.decoder_bias.detach() / scale

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens units"]:
        """The codes of every token, in evaluation mode."""
        return self.sae.encode(x.float(), "threshold").to_dense()

    @torch.no_grad()
    def pool(
        self, x: Float[Tensor, "tokens d"], owner: Int[Tensor, "tokens"], texts: int
    ) -> Float[Tensor, "texts units"]:
        """The sum of the codes over the tokens of each text; never dense over tokens."""
        codes = self.sae.encode(x.float(), "threshold")
        units = self.sae.n_features
        places = owner.to(codes.col_indices)[codes.row_indices()] * units + codes.col_indices
        return torch.zeros(texts * units, device=x.device).index_add_(0, places, codes.values).view(texts, units)


class ActivationUnits:
    """The dimensions of the activation as they are: what a dictionary must beat at an equal number of units."""

    def __init__(self, width: int, device: str | torch.device = "cpu") -> None:
        self.directions = torch.eye(width, device=device)
        self.offset = torch.zeros(width, device=device)

    def encode(self, x: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens units"]:
        """The activation itself."""
        return x.float()

    def pool(
        self, x: Float[Tensor, "tokens d"], owner: Int[Tensor, "tokens"], texts: int
    ) -> Float[Tensor, "texts units"]:
        """The sum of the activations over the tokens of each text."""
        return torch.zeros(texts, x.shape[1], device=x.device).index_add_(0, owner.to(x.device), x.float())


@dataclass(frozen=True, eq=False)
class Subject:
    """What is evaluated: a dictionary, where it listens, and activations to fit the random control on.

    Args:
        lm: the model.
        site: where the dictionary listens.
        sae: the dictionary.
        sample: activations there, [tokens, d]; the random dictionary gets its scale and its thresholds from them.
        seed: of the random dictionary.
        made: what evaluations have computed of it that others may use.

    Raises:
        InputError: the dictionary's width is not that of the site.
    """

    lm: LanguageModel
    site: Site
    sae: SparseAutoencoder
    sample: Float[Tensor, "tokens d"]
    seed: int = 0
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        width = self.site.width(self.lm)
        if self.sae.d_in != width:
            raise InputError(
                f"the dictionary takes width {self.sae.d_in}, but {self.site} of {self.lm.name} has {width}"
            )
        self.sae.eval()

    @property
    def device(self) -> torch.device:
        """Where the model and the dictionary are."""
        return self.lm.device

    def check_causal(self) -> None:
        """Raise `NotApplicable` for a model that predicts no next token."""
        if not self.lm.is_causal:
            raise NotApplicable(f"{self.lm.name} predicts no next token, so there is no behaviour to change")

    def dictionary(self) -> DictionaryUnits:
        """The features."""
        return DictionaryUnits(self.sae)

    def random_dictionary(self) -> SparseAutoencoder:
        """Random unit directions for encoder and decoder, with the dictionary's number of features and mean L0."""
        if "random" not in self.made:
            self.made["random"] = random_dictionary(self.sae, self.sample, self.seed)
        made: SparseAutoencoder = self.made["random"]
        return made

    def units(self) -> dict[str, Units]:
        """The dictionary (under the empty name) and the two controls."""
        return {
            "": self.dictionary(),
            RANDOM: DictionaryUnits(self.random_dictionary()),
            ACTIVATIONS: ActivationUnits(self.sae.d_in, self.device),
        }


@torch.no_grad()
def random_dictionary(sae: SparseAutoencoder, sample: Float[Tensor, "tokens d"], seed: int = 0) -> SparseAutoencoder:
    """The control: random unit directions (encoder and decoder the same), scaled and calibrated on ``sample``.

    It has as many features as ``sae`` and spends as many a token on ``sample``, on average, whatever the rule of
    ``sae`` is.
    """
    sample = sample.to(sae.decoder_weight.device).float()
    winners = sae.eval().encode(sample, "threshold").nnz / max(len(sample), 1)
    control = SparseAutoencoder(
        sae.d_in, sae.n_features, MutualChoice(min(max(winners, 1.0), sae.n_features)), seed=10_000 + seed
    ).to(sample.device)
    control.initialise_from(sample)
    control.calibrate(sample.split(1024), len(sample))
    return control.eval()


@torch.no_grad()
def pooled(
    lm: LanguageModel, site: Site, texts: Sequence[str], units: Sequence[Units], context: int, batch: int = 32
) -> tuple[Float[Tensor, "texts d"], list[Tensor]]:
    """Mean activation, and mean value of every unit, over the tokens of each text.

    As in SAEBench, padding and special tokens do not count; nor does the first token of a text, on which models park
    their attention and dictionaries here are not trained (ours; models with a beginning-of-text token lose none by it).

    Args:
        lm: the model.
        site: where to listen.
        texts: one or more.
        units: whose values to pool.
        context: tokens of a text that are read, counted from its beginning.
        batch: texts at a time.

    Raises:
        InputError: a text without a second token.
    """
    ids = [_tokens(lm, text, context) for text in texts]
    if short := [number for number, each in enumerate(ids) if len(each) < 2]:
        raise InputError(f"text {short[0]} has fewer than 2 tokens: {texts[short[0]][:40]!r}")
    special = set(lm.tokenizer.all_special_ids)
    activations = torch.zeros(len(texts), site.width(lm), device=lm.device)
    values = [torch.zeros(len(texts), each.directions.shape[0], device=lm.device) for each in units]
    # Alike lengths together, so that little is padding.
    order = sorted(range(len(texts)), key=lambda number: len(ids[number]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = max(len(ids[row]) for row in rows)
        block = torch.zeros(len(rows), length, dtype=torch.int64)
        mask = torch.zeros(len(rows), length, dtype=torch.int64)
        counts = torch.zeros(len(rows), length, dtype=torch.bool)
        for place, row in enumerate(rows):
            own = torch.tensor(ids[row])
            block[place, : len(own)] = own
            mask[place, : len(own)] = 1
            counts[place, 1 : len(own)] = torch.tensor([token not in special for token in ids[row][1:]])
        x = capture(lm, [site], block.to(lm.device), mask.to(lm.device))[site].float()[counts.to(lm.device)]
        owner = counts.nonzero()[:, 0].to(lm.device)
        number = torch.bincount(owner, minlength=len(rows)).clamp(min=1).unsqueeze(1)
        activations[rows] = torch.zeros(len(rows), x.shape[1], device=x.device).index_add_(0, owner, x) / number
        for each, store in zip(units, values, strict=True):
            store[rows] = each.pool(x, owner, len(rows)) / number
    return activations, values


def _tokens(lm: LanguageModel, text: str, context: int) -> list[int]:
    # Special tokens as the tokenizer adds them to a text of its own.
    ids = lm.tokenizer(text, verbose=False)["input_ids"]
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or context
    return list(ids[: min(context, limit)])


def in_blocks(total: int, units: int) -> list[slice]:
    """Slices of rows whose dense codes fit the memory that the suite allows itself."""
    step = max(1, _DENSE_AT_ONCE // max(units, 1))
    return [slice(start, start + step) for start in range(0, total, step)]
