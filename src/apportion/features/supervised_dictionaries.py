"""Principled Evaluations of Sparse Autoencoders for Interpretability and Control (Makelov et al. 2024, 2405.08366).

Allocated: one feature per attribute of a prompt, by its label: of all values' vectors each activation gets those of the
values its prompt has. Such a dictionary is what a task's activations look like if the attributes are the right ones; it
is the reference for dictionaries that were found without labels, in three tests: does it approximate (here), does it
control (``control.py``), can it be read (``interpretability.py``).

| paper | here |
|---|---|
| a_i(p), S_i | a column of a table of attributes, its values |
| a(p) ~ a-bar + sum_i u_{i, a_i(p)} | ``decoder_bias``, ``decoder_weight`` and ``encode`` of ``SupervisedDictionary`` |
| mean features, MSE features | ``fit_supervised(features="mean" or "mse")`` |
| C, (C^T C)^+ C^T A | the codes; ``solver="pinv"`` |
| attribute (IO, Pos) | ``attributes=[("IO", "Pos"), ...]`` |
| sufficiency, necessity | ``approximation`` |

What the two kinds of features are and are not. Mean features of an attribute do not depend on which others there are,
so a redundant attribute (one that others determine) is counted twice in their sum; MSE features share it out. Both are
the same, and exact least squares, where attributes are independent and all combinations equally frequent. A one-hot
design of two or more attributes never has full rank, since the columns of each sum to one: the pseudo-inverse picks the
solution of least norm, and all solutions give the same reconstructions *of combinations seen*, not the same vectors.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.allocate import Allocation
from apportion.errors import InputError

# What is known of every prompt: a value of each attribute. Prompts are in the same order in all columns.
Table = Mapping[str, Sequence[Hashable]]
Attribute = str | tuple[str, ...]
Place = TypeVar("Place", bound=Hashable)

# Below this share of the clean score, what mean ablation takes away is no denominator.
_SMALLEST_SHARE = 1e-3


@dataclass(frozen=True, eq=False)
class SupervisedDictionary:
    """One vector for every value of every attribute; a prompt's activation is the sum of those of its values.

    It has the ``decode``, ``decoder_weight`` and ``decoder_bias`` of other dictionaries. ``encode`` differs in what it
    reads: the labels, not the activation.

    Attributes:
        attributes: in the order of their features; a tuple is several columns taken as one attribute.
        values: of each attribute, in the order of its features.
        decoder_weight: a row per value, all attributes one below the other.
        decoder_bias: the mean activation.
        counts: prompts that each vector was fitted on.
    """

    attributes: tuple[Attribute, ...]
    values: tuple[tuple[Hashable, ...], ...]
    decoder_weight: Float[Tensor, "features d"]
    decoder_bias: Float[Tensor, " d"]
    counts: Int64[Tensor, " features"]

    @property
    def n_features(self) -> int:
        """How many vectors there are."""
        return self.decoder_weight.shape[0]

    def feature(self, attribute: Attribute, value: Hashable) -> int:
        """The row of the vector of a value.

        Raises:
            InputError: no such attribute, or none of its training prompts had this value.
        """
        if attribute not in self.attributes:
            raise InputError(f"attribute={attribute!r}: this dictionary has {', '.join(map(repr, self.attributes))}")
        place = self.attributes.index(attribute)
        if value not in self.values[place]:
            raise InputError(
                f"attribute {attribute!r} has no vector for the value {value!r}, which none of the prompts that the "
                "dictionary was fitted on had: fit it on prompts with every value"
            )
        return sum(len(each) for each in self.values[:place]) + self.values[place].index(value)

    def features_of(self, table: Table) -> Int64[Tensor, "prompts attributes"]:
        """The feature of every attribute of every prompt.

        Raises:
            InputError: a column is missing, columns differ in length, or a value has no vector.
        """
        columns = []
        for attribute in self.attributes:
            column = column_of(table, attribute)
            rows = {value: self.feature(attribute, value) for value in dict.fromkeys(column)}
            columns.append(torch.tensor([rows[value] for value in column], dtype=torch.int64))
        return torch.stack(columns, dim=1).to(self.decoder_weight.device)

    def encode(self, table: Table) -> Allocation:
        """The codes of prompts by their labels: exactly one 1 per attribute."""
        chosen = self.features_of(table)  # ascending in each row, as attributes lie one behind the other
        rows, count = chosen.shape
        ends = torch.arange(0, rows * count + 1, count, device=chosen.device)
        values = self.decoder_weight.new_ones(rows * count)
        return Allocation(ends, chosen.flatten(), values, (rows, self.n_features))

    def decode(self, codes: Allocation) -> Float[Tensor, "prompts d"]:
        """The reconstruction: the mean activation and the vectors."""
        return codes.matmul(self.decoder_weight) + self.decoder_bias

    def edit(self, x: Float[Tensor, "prompts d"], before: Table, after: Table) -> Float[Tensor, "prompts d"]:
        """The reference edit: from the *true* activations take the vectors of ``before`` and add those of ``after``.

        Whatever the dictionary does not explain stays. Attributes with the same value in both are not touched, so an
        edit to the same values changes nothing, bit for bit.
        """
        old, new = self.features_of(before), self.features_of(after)
        return x + (self.decoder_weight[new] - self.decoder_weight[old]).sum(dim=1)

    def removed(self, before: Table, after: Table) -> Bool[Tensor, "prompts features"]:
        """The features that ``edit`` takes away; as many are added."""
        old, new = self.features_of(before), self.features_of(after)
        taken = torch.zeros(old.shape[0], self.n_features, dtype=torch.bool, device=old.device)
        return taken.scatter_(1, old, old != new)


def fit_supervised(
    x: Float[Tensor, "prompts d"],
    table: Table,
    attributes: Sequence[Attribute] | None = None,
    *,
    features: Literal["mse", "mean"] = "mse",
    solver: Literal["pinv", "inv"] = "pinv",
) -> SupervisedDictionary:
    """Fit a dictionary to activations of labelled prompts.

    Args:
        x: an activation a prompt.
        table: their attributes.
        attributes: which; a tuple of columns is one attribute whose values are the combinations. Default: every column.
        features: ``mse`` minimises the squared error of the sum; ``mean`` takes the mean activation of each value less
            the mean of all, in one pass, which is the same where attributes are independent and balanced.
        solver: of ``mse``. ``pinv`` is the solution of least norm; ``inv`` insists on a unique one, which more than one
            attribute never has.

    Raises:
        InputError: unknown or repeated attributes, columns of the wrong length, activations that are not finite, or a
            design without full rank under ``inv``.
    """
    if features not in ("mse", "mean"):
        raise InputError(f"features={features!r}: one of mse, mean")
    if solver not in ("pinv", "inv"):
        raise InputError(f"solver={solver!r}: one of pinv, inv")
    chosen = tuple(table) if attributes is None else tuple(attributes)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"attributes={list(chosen)}: name at least one, and none twice")
    if not bool(x.isfinite().all()):
        raise InputError("x has NaN or infinite activations: leave such prompts out")
    columns = [column_of(table, attribute) for attribute in chosen]
    for attribute, column in zip(chosen, columns, strict=True):
        if len(column) != x.shape[0]:
            raise InputError(f"attribute {attribute!r} has {len(column)} values for {x.shape[0]} activations: one each")
    n_features = sum(len(set(column)) for column in columns)
    empty = SupervisedDictionary(
        attributes=chosen,
        values=tuple(tuple(dict.fromkeys(column)) for column in columns),
        decoder_weight=x.new_zeros(n_features, x.shape[1]),
        decoder_bias=x.mean(dim=0),
        counts=torch.zeros(n_features, dtype=torch.int64, device=x.device),
    )
    design = empty.encode(table).to_dense().double()
    centred = x.double() - x.double().mean(dim=0)
    counts = design.sum(dim=0)
    if features == "mean":
        weight = design.T @ centred / counts[:, None]
    else:
        weight = _least_squares(design, centred, solver)
    return SupervisedDictionary(empty.attributes, empty.values, weight.to(x.dtype), empty.decoder_bias, counts.long())


def _least_squares(design: Tensor, centred: Tensor, solver: str) -> Tensor:
    gram = design.T @ design
    if solver == "pinv":
        return torch.linalg.pinv(gram, hermitian=True) @ (design.T @ centred)
    rank = int(torch.linalg.matrix_rank(gram, hermitian=True))
    if rank < gram.shape[0]:
        raise InputError(
            f"solver='inv': the design has rank {rank} for {gram.shape[0]} features, so that many solutions fit "
            "equally well; solver='pinv' takes the one of least norm"
        )
    return torch.linalg.solve(gram, design.T @ centred)


def column_of(table: Table, attribute: Attribute) -> list[Hashable]:
    """The values of an attribute: a column of the table, or several taken together.

    Raises:
        InputError: the table lacks a column, or its columns differ in length.
    """
    names = attribute if isinstance(attribute, tuple) else (attribute,)
    for name in names:
        if name not in table:
            raise InputError(f"attribute {name!r} is not in the table, which has {', '.join(map(repr, table))}")
    if len({len(column) for column in table.values()}) > 1:
        lengths = {name: len(column) for name, column in table.items()}
        raise InputError(f"the table's columns differ in length ({lengths}): give one value a prompt in each")
    if not isinstance(attribute, tuple):
        return list(table[attribute])
    return list(zip(*(table[name] for name in names), strict=True))


def check_pairs(before: Table, after: Table, attribute: str) -> None:
    """Make sure that two lists of prompts differ, pair by pair, in one attribute and in no other.

    Raises:
        InputError: a pair differs in another attribute too, or not in this one.
    """
    if before.keys() != after.keys():
        raise InputError(f"the tables of a pair have other columns ({list(before)}, {list(after)}): give the same")
    for row, pair in enumerate(zip(column_of(before, attribute), column_of(after, attribute), strict=True)):
        differ = [name for name in before if before[name][row] != after[name][row]]
        if differ != [attribute]:
            raise InputError(
                f"pair {row} ({attribute}: {pair[0]!r} to {pair[1]!r}) differs in {differ or 'nothing'}: an edit of "
                f"{attribute!r} is judged on pairs that differ in {attribute!r} alone"
            )


def explained_variance(x: Float[Tensor, "prompts d"], output: Float[Tensor, "prompts d"]) -> float:
    """One minus the squared error over the squared distance from the mean, both summed over everything."""
    x = x.double()
    return float(1 - (x - output).square().sum() / (x - x.mean(dim=0)).square().sum())


@dataclass(frozen=True)
class Score:
    """A ratio of means, or NaN and why.

    Attributes:
        value: the ratio; NaN where its denominator is next to nothing.
        reason: why it is NaN; empty where it is not.
    """

    value: float
    reason: str = ""


@dataclass(frozen=True)
class Approximation:
    """Whether reconstructions do in a model what the activations do, and whether what they leave does nothing.

    Attributes:
        sufficiency: mean score with reconstructions in the place of activations, over the clean one; 1 is best.
        necessity: ``1 - |ablated - with errors only| / |ablated - clean|``; 1 if taking the reconstruction away does
            exactly what mean ablation does, and no more.
        clean, reconstructed, without, ablated: the four mean scores.
    """

    sufficiency: Score
    necessity: Score
    clean: float
    reconstructed: float
    without: float
    ablated: float


def approximation(
    run: Callable[[Mapping[Place, Float[Tensor, "prompts _"]]], Float[Tensor, " prompts"]],
    x: Mapping[Place, Float[Tensor, "prompts _"]],
    output: Mapping[Place, Float[Tensor, "prompts _"]],
    mean: Mapping[Place, Float[Tensor, "_"]],
) -> Approximation:
    """The first test of the paper, on all places of a cross-section at once.

    Scores are averaged over prompts before any ratio is taken: those of single prompts can be next to zero.

    Args:
        run: the score of each prompt (the logit difference, say) with given activations in place; with none, clean.
        x: the clean activations of every place.
        output: their reconstructions.
        mean: the mean activation of every place, over training prompts.

    Raises:
        InputError: the places of the three differ.
    """
    if not x or not x.keys() == output.keys() == mean.keys():
        raise InputError(f"places differ: x has {list(x)}, output {list(output)}, mean {list(mean)}")

    def score(activations: Mapping[Place, Tensor]) -> float:
        return float(run(activations).double().mean())

    clean, reconstructed = score({}), score(output)
    without = score({place: mean[place] + (x[place] - output[place]) for place in x})
    ablated = score({place: mean[place].expand_as(x[place]) for place in x})
    return Approximation(
        sufficiency=sufficiency(reconstructed, clean),
        necessity=necessity(without, ablated, clean),
        clean=clean,
        reconstructed=reconstructed,
        without=without,
        ablated=ablated,
    )


def sufficiency(reconstructed: float, clean: float) -> Score:
    """See ``Approximation``; takes mean scores."""
    if abs(clean) < 1e-6:
        return Score(float("nan"), f"the clean score is {clean:.2g}: the model does not do the task")
    return Score(reconstructed / clean)


def necessity(without: float, ablated: float, clean: float) -> Score:
    """See ``Approximation``; takes mean scores. An overshoot counts against it as much as a shortfall."""
    if abs(ablated - clean) <= max(_SMALLEST_SHARE * abs(clean), 1e-6):
        reason = f"mean ablation moves the score from {clean:.4g} to {ablated:.4g} only: these places do nothing here"
        return Score(float("nan"), reason)
    return Score(1 - abs(ablated - without) / abs(ablated - clean))
