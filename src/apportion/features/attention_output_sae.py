"""Dictionaries of what attention heads output, and where a feature's value comes from.

Source: *Interpreting Attention Layer Outputs with Sparse Autoencoders* (Kissane, Krzyzanowski, Bloom, Conmy, Nanda
2024, arXiv 2406.17759).

Allocated: dictionary features per token, on the outputs of all heads of a layer side by side (the site ``heads``,
before the output projection, where it is still visible which coordinate belongs to which head). Any `Recipe` trains
one; the paper's own is an L1 penalty with resampling of dead features (`apportion.features.resampling`). What a
feature's pre-activation is made of is then shared out exactly: over heads, over source positions, over both. Patterns
are taken as they are, so this says how a value came about and not what would happen if something were changed; and
*where* it comes from is decided by the pattern, so that random directions localise about as sharply as features do.

| paper | here |
|---|---|
| z_cat = [z_1; ...; z_H] | activations of ``Site(layer, "heads")`` |
| W_enc[:, i], b_enc, b_dec | `Reader`: ``weight`` and ``bias`` of a feature in the units of the activations |
| h_{i,k} | ``head_shares(sae, heads)[i, k]`` |
| A, v | ``AttentionAtWork.pattern``, ``.values`` (of `watch_attention`; copied where query heads share values) |
| DFA_h, DFA_src | ``by_head``, ``by_source`` of `DirectFeatureAttribution` |
| W_dec W_O W_enc^resid, W_dec W_O W_U | `connections`, `output_directions` with `logit_lens` |

Recursive attribution (RDFA) is in `apportion.features.attention_attribution`, the query-key side in
`apportion.features.attention_scores`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from apportion.allocate import Allocation
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.models import Site
from apportion.models.families import transformer_of
from apportion.models.linear import AttentionAtWork


@dataclass(frozen=True, eq=False)
class Reader:
    """A feature as a linear function of the activations: where it fires, its value is ``x @ weight + bias``."""

    weight: Float[Tensor, " d_in"]
    bias: Float[Tensor, ""]

    @classmethod
    def of(cls, sae: SparseAutoencoder, feature: int) -> "Reader":
        """What a feature reads, in the units of the activations; everything that is no input is in the bias.

        Raises:
            InputError: there is no such feature.
        """
        check_feature(sae, feature)
        row, scale = sae.encoder_weight[feature].detach(), sae.input_scale.detach()
        moved = sae.input_bias().detach() @ row if sae.d_in == sae.d_out else row.new_zeros(())
        if not sae.gated:
            return cls(row * scale, sae.encoder_bias[feature].detach() - moved)
        # An open gate passes a rescaled product (Rajamanoharan et al. 2024), which is as linear.
        slope = sae.log_magnitude[feature].detach().exp()
        return cls(row * scale * slope, sae.magnitude_bias[feature].detach() - moved * slope)


def check_feature(sae: SparseAutoencoder, feature: int) -> None:
    """Make sure that a dictionary has a feature of that number.

    Raises:
        InputError: it has not.
    """
    if not 0 <= feature < sae.n_features:
        raise InputError(f"feature={feature}: the dictionary has features 0 to {sae.n_features - 1}")


@torch.no_grad()
def head_shares(sae: SparseAutoencoder, heads: int) -> Float[Tensor, "features heads"]:
    """How much of each feature's direction lies in each head's coordinates: norms of its blocks over their sum.

    Raises:
        InputError: the dictionary's width is not that many heads of equal width.
    """
    blocks = sae.decoder_weight.view(sae.n_features, heads, _head_width(sae, heads))
    norms = blocks.norm(dim=2)
    return norms / norms.sum(dim=1, keepdim=True).clamp(min=torch.finfo(norms.dtype).tiny)


@dataclass(frozen=True, eq=False)
class DirectFeatureAttribution:
    """A feature's pre-activation at one token as a sum over heads and source positions, and a bias.

    Attributes:
        table: what each head brings from each source; masked sources have exactly 0.
        bias: ``b_enc - b_dec @ w``, in the units of the activations.
        destination: the token.
    """

    table: Float[Tensor, "heads sources"]
    bias: float
    destination: int

    @property
    def by_head(self) -> Float[Tensor, " heads"]:
        """Summed over sources."""
        return self.table.sum(dim=1)

    @property
    def by_source(self) -> Float[Tensor, " sources"]:
        """Summed over heads."""
        return self.table.sum(dim=0)

    @property
    def pre_activation(self) -> float:
        """The sum of it all."""
        return float(self.table.sum()) + self.bias

    def of(self, source: int, head: int | None = None) -> float:
        """What comes from a source, by one head or by all.

        Raises:
            InputError: the source lies behind the token, or does not exist, or the head does not.
        """
        if not 0 <= source < self.table.shape[1]:
            raise InputError(f"source={source}: the text has tokens 0 to {self.table.shape[1] - 1}")
        if source > self.destination:
            raise InputError(
                f"source={source} comes after destination={self.destination}: attention looks back only, so give a "
                f"source from 0 to {self.destination}"
            )
        if head is None:
            return float(self.table[:, source].sum())
        if not 0 <= head < self.table.shape[0]:
            raise InputError(f"head={head}: the layer has heads 0 to {self.table.shape[0] - 1}")
        return float(self.table[head, source])


@torch.no_grad()
def direct_feature_attribution(
    sae: SparseAutoencoder, work: AttentionAtWork, feature: int, destination: int, row: int = 0
) -> DirectFeatureAttribution:
    """Where a feature's pre-activation at one token comes from.

    Args:
        sae: a dictionary of the layer's heads.
        work: of the layer, from `watch_attention`.
        feature: which; it need not fire.
        destination: the token.
        row: which text of the batch.

    Raises:
        InputError: no such feature, token or text; the dictionary has another width than the heads side by side.
    """
    check_heads(sae, work)
    batch, _, time, _ = work.pattern.shape
    for name, value, count in (("destination", destination, time), ("row", row, batch)):
        if not 0 <= value < count:
            raise InputError(f"{name}={value}: must be from 0 to {count - 1}")
    reader = Reader.of(sae, feature)
    table = attribution_tables(
        reader.weight[None], work, torch.tensor([row], device=reader.weight.device), torch.tensor([destination])
    )[0]
    return DirectFeatureAttribution(table, float(reader.bias), destination)


@torch.no_grad()
def attribution_tables(
    weights: Float[Tensor, "n heads_times_width"],
    work: AttentionAtWork,
    rows: Int[Tensor, " n"],
    destinations: Int[Tensor, " n"],
) -> Float[Tensor, "n heads sources"]:
    """``pattern * (values @ weight)``, head by head, for several directions at once, each at a token of its own.

    Summed over heads and sources it is ``heads @ weight`` exactly.
    """
    n_heads, head_width = work.values.shape[1], work.values.shape[3]
    by_head = weights.to(work.values.dtype).view(-1, n_heads, head_width, 1)
    return work.pattern[rows, :, destinations] * (work.values[rows] @ by_head).squeeze(3)


def localisation(by_source: Float[Tensor, "*n sources"]) -> Float[Tensor, "*n"]:
    """Share of what is positive that comes from the strongest source; never evidence of a good dictionary.

    Print it beside that of random directions (`random_attribution`): the pattern localises, whatever reads.
    """
    positive = by_source.clamp(min=0)
    return positive.amax(dim=-1) / positive.sum(dim=-1).clamp(min=torch.finfo(positive.dtype).tiny)


@torch.no_grad()
def random_attribution(
    work: AttentionAtWork, row: int, destination: int, directions: int = 64, seed: int = 0
) -> Float[Tensor, "directions heads sources"]:
    """Tables of random unit directions at a token: the control for where a feature's value comes from.

    A direction and its opposite are the same control, so each is turned to read a positive value, as features do.
    """
    width = work.values.shape[1] * work.values.shape[3]
    drawn = torch.randn(directions, width, generator=torch.Generator().manual_seed(seed)).to(work.values)
    drawn /= drawn.norm(dim=1, keepdim=True)
    device = work.pattern.device
    places = (torch.full((directions,), each, device=device) for each in (row, destination))
    tables = attribution_tables(drawn, work, *places)
    return tables * tables.sum(dim=(1, 2), keepdim=True).sign()


def check_heads(sae: SparseAutoencoder, work: AttentionAtWork) -> None:
    """Make sure that a dictionary is one of a layer's heads.

    Raises:
        InputError: its width is another one; says what it may be of instead.
    """
    heads, width = work.values.shape[1], work.values.shape[3]
    if sae.d_in != heads * width:
        raise InputError(
            f"the dictionary takes activations of width {sae.d_in}, but {heads} heads of width {width} are "
            f"{heads * width} side by side: give a dictionary of the site layers.L.heads"
        )


def _head_width(sae: SparseAutoencoder, heads: int) -> int:
    if heads < 1 or sae.d_out % heads:
        raise InputError(
            f"heads={heads}: the dictionary's width {sae.d_out} is not that many heads of equal width; give the number "
            "of query heads of the layer that it was trained on"
        )
    return sae.d_out // heads


# --- weights alone ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def output_directions(sae: SparseAutoencoder, model: Any, site: Site) -> Float[Tensor, "features d_model"]:
    """What each feature of a layer's heads adds to the attention's output per unit of its value: ``W_dec @ W_O``.

    The projection is asked rather than read, since families keep its weight one way or the other. With `logit_lens`
    this is the feature's say on the next token. (Gemma 2 and 3 norm the attention's output before they add it.)

    Raises:
        InputError: the site is not a layer's heads, or not of the dictionary's width.
    """
    if site.kind != "heads":
        raise InputError(f"site {site}: only features of a layer's heads pass its output projection")
    inner = transformer_of(model)
    if site.width(inner) != sae.d_out:
        raise InputError(f"site {site} has width {site.width(inner)}, the dictionary {sae.d_out}: give its own site")
    project, _ = site.resolve(inner)
    directions = sae.decoder_weight.detach() / sae.input_scale
    place = next(project.parameters())
    asked = directions.to(place)
    return (project(asked) - project(torch.zeros_like(asked))).to(directions)


@torch.no_grad()
def connections(
    directions: Float[Tensor, "features d_model"], reader: SparseAutoencoder, features: list[int] | None = None
) -> Float[Tensor, "features readers"]:
    """How much a unit of each direction moves the pre-activations of a residual dictionary, whatever the text.

    ``W_dec W_O W_enc`` of the paper, for ``output_directions`` and a dictionary of the stream that they are added to.
    Which of two strongly connected features ever fire together is another question.

    Args:
        directions: in the residual stream.
        reader: a dictionary of the stream.
        features: of the reader; all by default.

    Raises:
        InputError: the widths differ.
    """
    if directions.shape[1] != reader.d_in:
        raise InputError(
            f"directions have width {directions.shape[1]}, but the reading dictionary has {reader.d_in}: both must be "
            "of the residual stream"
        )
    rows = reader.encoder_weight.detach() if features is None else reader.encoder_weight.detach()[features]
    return directions @ rows.T * reader.input_scale


@torch.no_grad()
def with_error_kept(sae: SparseAutoencoder, edit: Callable[[Allocation], Allocation]) -> Callable[[Tensor], Tensor]:
    """For `splice`: activations with edited codes, and with what the dictionary misses of them added as it is.

    So that what changes is the edit and not the dictionary's own damage: ``z + decode(edited) - decode(codes)``. The
    error is of the same forward pass, and a constant.
    """

    def replace(activations: Tensor) -> Tensor:
        x = activations.detach().flatten(0, -2)
        codes = sae.encode(x.to(sae.encoder_weight), mode="threshold")
        change = sae.decode(edit(codes)) - sae.decode(codes)
        return activations + change.to(activations).view(activations.shape)

    return replace


# --- training --------------------------------------------------------------------------------------------------------


def active_subspace_start(
    sample: Float[Tensor, "tokens d_in"], variance: float = 0.99
) -> Callable[[SparseAutoencoder], None]:
    """For ``fit_dictionary(start_from=...)``: initial directions inside the subspace that the activations occupy.

    Outputs of attention occupy few of their dimensions, and a feature that starts outside them never fires. The idea is
    that of later work than the paper (section 3.4, item 7 of our method sheet, whose numbers we could not confirm).

    Args:
        sample: activations.
        variance: the share of their variance that the subspace must hold.

    Raises:
        InputError: a share outside 0 to 1, or a sample without variance.
    """
    if not 0 < variance <= 1:
        raise InputError(f"variance={variance}: a share above 0 and up to 1, such as 0.99")
    if len(sample) < 2 or not bool((centred := sample.float() - sample.float().mean(dim=0)).any()):
        raise InputError(f"the sample of {len(sample)} tokens has no variance: give more activations")
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    share = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum()
    held = int((share < variance).sum()) + 1
    basis = vectors.flip(1)[:, :held]

    @torch.no_grad()
    def start(sae: SparseAutoencoder) -> None:
        inside = sae.decoder_weight @ basis @ basis.T
        inside /= inside.norm(dim=1, keepdim=True).clamp(min=1e-12)
        # The encoder keeps the norms it began with.
        sae.encoder_weight.copy_(inside * sae.encoder_weight.norm(dim=1, keepdim=True))
        sae.decoder_weight.copy_(inside)

    return start
