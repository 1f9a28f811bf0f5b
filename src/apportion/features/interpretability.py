"""What features say about a prompt: F1 scores for predicates, and several features for one (Makelov et al. 2024).

Allocated: to each feature the predicate it tells best, and to each predicate up to ``size`` features whose union tells
it best. arXiv 2405.08366, section 5. A feature is *active* where its value is above zero. F1 of at least a means that
precision and recall are both at least a / (2 - a).

| paper | here |
|---|---|
| binary attribute, P | a predicate: which prompts it is true of |
| F1 of feature and attribute | ``f1_scores`` |
| F1 of a union of features | ``union_f1`` |
| features with F1 >= t, kept or removed | ``interpretable``, with ``keep_features`` |
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from apportion.errors import InputError
from apportion.features.supervised_dictionaries import Attribute, Table, column_of


@dataclass(frozen=True, eq=False)
class Predicates:
    """Statements about prompts.

    Attributes:
        names: of the predicates, such as ``("IO", "Mary")`` or ``(("IO", "Pos"), ("Mary", "ABB"))``: attribute, value.
        truth: of which prompts each is true.
    """

    names: list[tuple[Attribute, Hashable]]
    truth: Bool[Tensor, "prompts predicates"]

    def index(self, attribute: Attribute, value: Hashable) -> int:
        """The column of a predicate.

        Raises:
            InputError: there is none.
        """
        if (attribute, value) not in self.names:
            raise InputError(f"no predicate says that {attribute!r} is {value!r}")
        return self.names.index((attribute, value))


def predicates_of(
    table: Table,
    attributes: Sequence[Attribute] | None = None,
    groups: Mapping[str, Mapping[str, Sequence[Hashable]]] | None = None,
    anywhere: Sequence[str] = (),
) -> Predicates:
    """Predicates that a table of attributes gives.

    Args:
        table: attributes of every prompt.
        attributes: each value of each is a predicate; a tuple of columns gives conjunctions. Default: every column.
        groups: coarser ones: by attribute and name of the group, the values that belong to it (names of women, say).
        anywhere: columns with values in common; that a value is in any of them is a predicate, of the attribute
            ``"A or B"``.

    Raises:
        InputError: a column is missing.
    """
    names: list[tuple[Attribute, Hashable]] = []
    truths: list[list[bool]] = []
    for attribute in table if attributes is None else attributes:
        column = column_of(table, attribute)
        for value in dict.fromkeys(column):
            names.append((attribute, value))
            truths.append([each == value for each in column])
    for attribute, own in (groups or {}).items():
        column = column_of(table, attribute)
        for group, members in own.items():
            names.append((attribute, group))
            truths.append([each in members for each in column])
    columns = [column_of(table, name) for name in anywhere]
    for value in dict.fromkeys(value for column in columns for value in column):
        names.append((" or ".join(anywhere), value))
        truths.append([value in row for row in zip(*columns, strict=True)])
    if not names:
        raise InputError("attributes is empty: there is no predicate to judge features by")
    return Predicates(names, torch.tensor(truths).T.contiguous())


def f1_scores(
    active: Bool[Tensor, "prompts features"], truth: Bool[Tensor, "prompts predicates"]
) -> Float[Tensor, "features predicates"]:
    """F1 of every feature for every predicate: ``2 both / (active + true)``; 0 where neither ever is."""
    both = active.float().T @ truth.float()
    either = active.sum(dim=0)[:, None] + truth.sum(dim=0)[None, :]
    return 2 * both / either.clamp(min=1)


def best_predicates(f1: Float[Tensor, "features predicates"], predicates: Predicates) -> list[tuple[str, float]]:
    """For every feature the predicate it tells best, in words, and the F1 score."""
    best, which = f1.max(dim=1)
    return [
        (" is ".join(map(str, predicates.names[column])), score)
        for column, score in zip(which.tolist(), best.tolist(), strict=True)
    ]


def union_f1(
    active: Bool[Tensor, "prompts features"], truth: Bool[Tensor, " prompts"], size: int
) -> tuple[float, list[int]]:
    """F1 of the best union of up to ``size`` features for one predicate, and which they are, in order of choice.

    Starts from the best single feature and adds what helps most, while anything helps: never below the best single one.
    (The paper unites 10 features of task dictionaries, 30 of those of general text.)

    Raises:
        InputError: a size below 1.
    """
    if size < 1:
        raise InputError(f"size={size}: must be at least 1")
    active_numbers, truth_numbers = active.double(), truth.double()
    fires = torch.zeros_like(truth)
    chosen: list[int] = []
    best = 0.0
    for _ in range(size):
        # What each feature would add to the union: prompts in all, and those of which the predicate is true.
        fresh = (~fires).double()
        more = fresh @ active_numbers
        right = (fresh * truth_numbers) @ active_numbers
        both = (fires & truth).sum() + right
        scores = 2 * both / (fires.sum() + more + truth.sum()).clamp(min=1)
        score, feature = scores.max(dim=0)
        if float(score) <= best:
            break
        best = float(score)
        chosen.append(int(feature))
        fires = fires | active[:, feature]
    return best, chosen


def interpretable(f1: Float[Tensor, "features predicates"], threshold: float = 0.6) -> Bool[Tensor, " features"]:
    """The features that tell some predicate with at least this F1; .6 suffices to keep most of what a task needs."""
    if not 0 < threshold <= 1:
        raise InputError(f"threshold={threshold}: must be above 0 and at most 1")
    return (f1 >= threshold).any(dim=1)


def keep_features(
    codes: Float[Tensor, "prompts features"],
    kept: Bool[Tensor, " features"],
    decoder_weight: Float[Tensor, "features d"],
    decoder_bias: Float[Tensor, " d"],
) -> Float[Tensor, "prompts d"]:
    """The reconstruction from some features only.

    In the place of a reconstruction in ``approximation`` it answers both questions: whether the interpretable part is
    sufficient, and (as ``mean + x - this``) whether it is necessary.
    """
    return (codes * kept) @ decoder_weight + decoder_bias
