"""Steering, clamping and ablating features of a running model, without the dictionary's error in the way.

The splice is ``x + decode(edited) - decode(codes)``: what the dictionary does not explain of an activation ``x`` stays,
and a token whose code is not edited keeps its activation to the bit (the error node of Marks et al. 2024, *Sparse
Feature Circuits*, arXiv 2403.19647; clamping as in Templeton et al. 2024, *Scaling Monosemanticity*).

| edit | code of feature i afterwards |
|---|---|
| ``steer(..., {i: strength})`` | code + strength, also where the feature was silent; may be negative |
| ``clamp(..., {i: value})`` | value, on every edited token |
| ``ablate(..., [i])`` | 0 |

Strengths and values are in the units of the code: adding 8 adds 8 rows of the decoder (divided by the dictionary's
input scale) to the activation. Which tokens are edited is ours:

- ``positions="all"``: every token, in plain passes and while generating;
- ``"prompt"``: those of passes that begin with an empty key-value cache;
- ``"generated"``: those of passes that go on from a cache (what the model itself has written, but for the last token);
- ``"last"``: the last token of every pass, from which the next one is predicted;
- a boolean mask ``[batch, time]``: those tokens, in passes of that shape.

Padding is never edited, nor (unless ``skip_first=False``) the first token of a text: models park attention there, its
activations are many times as large as others', and dictionaries are trained without it (``harvest``'s ``drop_first``).
Without a cache (``generate(use_cache=False)``) every pass begins anew, so that all its tokens count as prompt, and
``"generated"`` is refused.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from apportion.allocate import Allocation
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.models import Site, splice
from apportion.models.hooks import Pass, visit, watch_passes

Edit = Callable[[Allocation], Allocation]
Positions = str | Bool[Tensor, "batch time"]  # one of POSITIONS, or a mask

POSITIONS = ("all", "prompt", "generated", "last")


# --- edits -----------------------------------------------------------------------------------------------------------


def adding(strengths: Mapping[int, float]) -> Edit:
    """The edit that adds to the code of every token; nothing is rectified."""

    def edit(codes: Allocation) -> Allocation:
        return codes.plus(_constant(strengths, codes)) if strengths else codes

    return edit


def setting(values: Mapping[int, float]) -> Edit:
    """The edit that sets some features to the same values on every token; 0 silences one."""

    def edit(codes: Allocation) -> Allocation:
        if not values:
            return codes
        mine = torch.tensor(list(values), device=codes.device)
        others = codes.keep(~torch.isin(codes.col_indices, mine))
        there = {feature: value for feature, value in values.items() if value != 0}
        return others.plus(_constant(there, codes)) if there else others

    return edit


def in_turn(*edits: Edit) -> Edit:
    """The edit that makes several edits, each of what the one before it left."""

    def edit(codes: Allocation) -> Allocation:
        for each in edits:
            codes = each(codes)
        return codes

    return edit


def _constant(values: Mapping[int, float], like: Allocation) -> Allocation:
    """An allocation that gives every row the same entries."""
    rows = like.shape[0]
    features = sorted(values)
    columns = torch.tensor(features, dtype=torch.int64, device=like.device)
    given = torch.tensor([values[each] for each in features], dtype=like.values.dtype, device=like.device)
    crow = torch.arange(rows + 1, device=like.device) * len(features)
    return Allocation(crow, columns.repeat(rows), given.repeat(rows), like.shape)


# --- the splice ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def edit_codes(
    model: Any,
    site: Site | str,
    dictionary: SparseAutoencoder,
    edit: Edit,
    *,
    output_site: Site | str | None = None,
    keep_error: bool = True,
    positions: Positions = "all",
    skip_first: bool = True,
) -> Iterator[None]:
    """In every forward pass of a ``with`` block, edit a dictionary's codes at a site of a model.

    Args:
        model: a `LanguageModel` or a transformers model of any family; afterwards it is as it was.
        site: where the dictionary reads, such as ``layers.9.residual``.
        dictionary: on the model's device; its codes are those of inference (``mode="threshold"``).
        edit: maps the codes of the edited tokens (rows in the order of batch, then time) to others of that shape; see
            ``adding``, ``setting`` and ``in_turn``.
        output_site: where the dictionary writes, if that is not where it reads (a transcoder); it must come later in
            the forward pass.
        keep_error: True adds ``decode(edited) - decode(codes)`` to the activation; False puts ``decode(edited)`` in its
            place, which also loses what the dictionary does not explain.
        positions: which tokens, see the module.
        skip_first: leave the first token of every text as it is.

    Raises:
        InputError: the model lacks the site, or the dictionary does not fit it.
        RuntimeError: from the forward pass, if the dictionary was never trained or calibrated.
        ValueError: from the forward pass, if an edit returns another shape, a mask fits no pass, or
            ``positions="generated"`` meets a model without key-value cache.
    """
    read, write = _sites(model, dictionary, site, output_site)
    _check_positions(positions)
    weight = dictionary.decoder_weight
    codes: list[Allocation] = []

    def encode(activations: Tensor) -> None:
        chosen = _chosen(current, activations, positions, skip_first)
        codes[:] = [dictionary.encode(activations[chosen].to(weight), mode="threshold")]

    def replace(activations: Tensor) -> Tensor:
        if read == write:
            encode(activations)
        before = codes.pop()
        edited = edit(before)
        if edited.shape != before.shape:
            raise ValueError(f"the edit returned codes of shape {edited.shape} instead of {before.shape}")
        if not keep_error:
            changed = dictionary.decode(edited)
        else:
            change = edited.plus(before.with_values(-before.values))
            if not change.values.requires_grad:  # A change of 0 may still have a gradient.
                change = change.keep(change.values != 0)
            if change.nnz == 0:
                return activations
            changed = change.matmul(weight) / dictionary.input_scale
        return _put(activations, _chosen(current, activations, positions, skip_first), changed, add=keep_error)

    with contextlib.ExitStack() as stack:
        current = stack.enter_context(watch_passes(model))
        if read != write:
            stack.enter_context(visit(model, read, encode))
        stack.enter_context(splice(model, write, replace))
        yield


@contextlib.contextmanager
def steer(
    model: Any,
    site: Site | str,
    dictionary: SparseAutoencoder,
    strengths: Mapping[int, float],
    *,
    output_site: Site | str | None = None,
    keep_error: bool = True,
    positions: Positions = "all",
    skip_first: bool = True,
) -> Iterator[None]:
    """In a ``with`` block, add strengths to the codes of some features; see ``edit_codes``.

    With the error kept that adds the same vector to every edited token, so nothing is encoded.

    Raises:
        InputError: also if a feature does not exist or a strength is not a number.
    """
    strengths = checked_values(dictionary, strengths, "strength")
    if not keep_error:
        with edit_codes(
            model,
            site,
            dictionary,
            adding(strengths),
            output_site=output_site,
            keep_error=False,
            positions=positions,
            skip_first=skip_first,
        ):
            yield
        return
    _, write = _sites(model, dictionary, site, output_site)
    _check_positions(positions)
    direction = decoded_change(dictionary, strengths)

    def shift(activations: Tensor) -> Tensor:
        chosen = _chosen(current, activations, positions, skip_first)
        return _put(activations, chosen, direction.expand(int(chosen.sum()), -1), add=True)

    with contextlib.ExitStack() as stack:
        if strengths:
            current = stack.enter_context(watch_passes(model))
            stack.enter_context(splice(model, write, shift))
        yield


def decoded_change(dictionary: SparseAutoencoder, strengths: Mapping[int, float]) -> Tensor:
    """What adding strengths to a code adds to its reconstruction, ``[d_out]`` in the units of the activations."""
    weight = dictionary.decoder_weight
    features = torch.tensor(list(strengths), dtype=torch.int64, device=weight.device)
    added = torch.tensor(list(strengths.values()), dtype=weight.dtype, device=weight.device)
    return added @ weight[features] / dictionary.input_scale


def checked_values(dictionary: SparseAutoencoder, values: Mapping[int, float], what: str) -> dict[int, float]:
    """The values by feature, as plain numbers.

    Raises:
        InputError: a feature that the dictionary lacks, or a value that is not a finite number.
    """
    checked_features(dictionary, values)
    for feature, value in values.items():
        if not math.isfinite(value):
            raise InputError(f"{what} {value} of feature {feature}: give a finite number, such as 8")
    return {int(feature): float(value) for feature, value in values.items()}


def checked_features(dictionary: SparseAutoencoder, features: Iterable[int]) -> list[int]:
    """The features as plain numbers.

    Raises:
        InputError: one that the dictionary lacks.
    """
    wanted = [int(feature) for feature in features]
    for feature in wanted:
        if not 0 <= feature < dictionary.n_features:
            raise InputError(
                f"feature {feature}: the dictionary has {dictionary.n_features} features, 0 to "
                f"{dictionary.n_features - 1}"
            )
    return wanted


def _sites(
    model: Any, dictionary: SparseAutoencoder, site: Site | str, output_site: Site | str | None
) -> tuple[Site, Site]:
    read = Site.parse(site) if isinstance(site, str) else site
    write = read if output_site is None else Site.parse(output_site) if isinstance(output_site, str) else output_site
    for name, place, width in (("site", read, dictionary.d_in), ("output_site", write, dictionary.d_out)):
        if place.width(model) != width:
            raise InputError(
                f"{name}={place} has width {place.width(model)}, but the dictionary {_VERBS[name]} width {width}: give "
                "the site that it was trained on"
            )
    return read, write


_VERBS = {"site": "reads", "output_site": "writes"}


def _check_positions(positions: Positions) -> None:
    if isinstance(positions, str) and positions not in POSITIONS:
        raise InputError(f"positions={positions!r}: one of {', '.join(POSITIONS)}, or a boolean mask [batch, time]")


def _chosen(current: Pass, activations: Tensor, positions: Positions, skip_first: bool) -> Bool[Tensor, "batch time"]:
    """Which tokens of a pass are edited."""
    batch, time = activations.shape[:2]
    real, first = (each.to(activations.device) for each in current.tokens(batch, time))
    allowed = real & ~first if skip_first else real
    if isinstance(positions, Tensor):
        if positions.shape != real.shape:
            raise ValueError(
                f"positions is a mask of shape {tuple(positions.shape)}, but the pass has [batch, time] = "
                f"{[batch, time]}: give a mask of that shape, or one of {', '.join(POSITIONS)}"
            )
        return allowed & positions.to(allowed.device)
    if positions == "last":
        # The last token that is not padding, whichever side the padding is on.
        after = real.flip(1).cumsum(dim=1).flip(1)
        return allowed & (after == 1)
    if positions == "generated" and not current.cached:
        raise ValueError(
            "positions='generated' needs a key-value cache, without which no pass knows what was generated: leave out "
            "use_cache=False"
        )
    if positions in ("prompt", "generated") and (current.past == 0) != (positions == "prompt"):
        return torch.zeros_like(allowed)
    return allowed


def _put(activations: Tensor, chosen: Tensor, rows: Tensor, *, add: bool) -> Tensor:
    """The activations with ``rows`` added at, or in the place of, the chosen ones."""
    rows = rows.to(activations.device)
    if add:
        # Summed in the wider of the two dtypes: a small change of a large bfloat16 activation is rounded once.
        rows = activations[chosen] + rows
    return activations.index_put((chosen,), rows.to(activations.dtype))
