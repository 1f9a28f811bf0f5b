"""Codes by greedy pursuit instead of by the encoder: the third way to allocate, beside thresholds and top-k.

A token's budget of features is spent one at a time: each round takes the feature whose direction correlates most with
what is still unexplained, then moves the code of all chosen features. Source of gradient pursuit (Blumensath & Davies
2008) at inference: Engels, Smith & Tegmark 2024, *Decomposing the Dark Matter of Sparse Autoencoders*, arXiv
2410.14670, and the released script; matching pursuit (Mallat & Zhang 1993) and orthogonal matching pursuit (Pati et al.
1993) are its neighbours.

| paper | here |
|---|---|
| x - b_dec | ``target``: the activation in scaled units, without the decoder bias |
| D (unit rows) | ``directions``: the decoder's rows, brought to unit norm (codes are scaled back) |
| r, D r | the residual; ``correlation`` [tokens, features] |
| support, w | the chosen features of each token; their code |
| k_n | ``budget``: the token's own L0 under the encoder, unless given |

A round of each method, with S the support and g = (D r) restricted to S:

| method | the code of S afterwards |
|---|---|
| ``gradient`` | max(w + s g, 0), with the exact line search s = ``|g|^2 / |g D|^2`` |
| ``matching`` | w + the correlation of the new feature, on that feature alone |
| ``orthogonal`` | least squares on S, without the features whose code it would make negative |

Only positive correlations are taken, so codes are never negative; a token stops early where there are none. Clipping
at 0 can raise the error of a round; the last iterate is kept, as in the paper. ``support="monotone"`` (our default, as
in saprmarks/dictionary_learning) keeps a chosen feature in S for good; ``"positive"`` is the paper's script, which
reads S off as {w > 0} each round. Either way a round may take a feature that was chosen before, and then adds none.

The fast form never looks at the residual: correlations are updated by rows of ``D D^T`` (the Gram matrix), and so is
the line search. It is used up to ``gram_limit`` features; above, correlations come from the residual each round.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from apportion.allocate import Allocation
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder

Method = Literal["gradient", "matching", "orthogonal"]
Support = Literal["monotone", "positive"]


class GradientPursuit:
    """An encoder that pursues each token's activation through a dictionary's decoder.

    Args:
        dictionary: any; only its decoder, decoder bias and input scale are used (and its encoder for default budgets).
        method: see the module.
        support: see the module; for ``method="gradient"`` alone.
        chunk: tokens at a time; the working memory is ``3 * chunk * features`` floats.
        gram_limit: keep the Gram matrix (features squared floats) up to so many features.

    Raises:
        InputError: an unknown method or support, or a chunk below 1.
    """

    def __init__(
        self,
        dictionary: SparseAutoencoder,
        *,
        method: Method = "gradient",
        support: Support = "monotone",
        chunk: int = 512,
        gram_limit: int = 8192,
    ) -> None:
        for name, value, known in (
            ("method", method, ("gradient", "matching", "orthogonal")),
            ("support", support, ("monotone", "positive")),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r}: one of {', '.join(known)}")
        if chunk < 1:
            raise InputError(f"chunk={chunk}: at least 1")
        self.dictionary, self.method, self.support, self.chunk = dictionary, method, support, chunk
        weight = dictionary.decoder_weight.detach()
        self.norms = weight.norm(dim=1).clamp(min=1e-12)
        self.directions = weight / self.norms.unsqueeze(1)
        self.gram = self.directions @ self.directions.T if len(weight) <= gram_limit else None

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "tokens d_out"], budget: int | Int64[Tensor, "_"] | None = None) -> Allocation:
        """The codes of some activations, in the units of the dictionary's own codes; only positive values.

        Args:
            x: what is to be reconstructed (for a dictionary that writes elsewhere than it reads: what it should write).
            budget: rounds, of every token or of each; at most so many features are used. None: as many as the
                dictionary's encoder uses on the token.

        Raises:
            InputError: a negative budget, or no budget where the encoder reads something else than ``x``.
            ValueError: wrong shapes.
        """
        dictionary = self.dictionary
        if x.ndim != 2 or x.shape[1] != dictionary.d_out:
            raise ValueError(f"x has shape {tuple(x.shape)}: give [tokens, {dictionary.d_out}]")
        rounds = self._rounds(x, budget)
        target = x * dictionary.input_scale - dictionary.decoder_bias
        parts = [
            self._pursue(target[start : start + self.chunk], rounds[start : start + self.chunk])
            for start in range(0, len(x), self.chunk)
        ]
        rows = torch.cat([row + number * self.chunk for number, (row, _, _) in enumerate(parts)] or [rounds[:0]])
        columns = torch.cat([column for _, column, _ in parts] or [rounds[:0]])
        values = torch.cat([value for _, _, value in parts] or [target.new_zeros(0)])
        crow = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(torch.bincount(rows, minlength=len(x)), dim=0, out=crow[1:])
        return Allocation(crow, columns, values / self.norms[columns], (len(x), dictionary.n_features))

    def _rounds(self, x: Tensor, budget: int | Tensor | None) -> Int64[Tensor, " tokens"]:
        if budget is None:
            if self.dictionary.d_in != self.dictionary.d_out:
                raise InputError("budget=None: the encoder reads something else than x, so give each token's budget")
            return self.dictionary.encode(x, mode="threshold").winners_per_row()
        rounds = budget if isinstance(budget, Tensor) else torch.full((len(x),), budget, dtype=torch.int64)
        if rounds.shape != (len(x),):
            raise ValueError(f"budget has shape {tuple(rounds.shape)}: give one number, or one for each of {len(x)}")
        if len(rounds) and int(rounds.min()) < 0:
            raise InputError(f"budget={int(rounds.min())}: rounds cannot be negative")
        return rounds.to(x.device)

    def _pursue(self, target: Tensor, rounds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and codes of a chunk, in the order of rows and columns."""
        # The largest budgets first: who still has some is then always a prefix, whose slices need no copies.
        order = rounds.argsort(descending=True, stable=True)
        state = _State.of(target[order], rounds[order], self.directions, self.gram)
        for number in range(int(rounds.max()) if len(rounds) else 0):
            alive = int((state.rounds > number).sum())
            if not bool(self._round(state, alive, number).any()):
                break
        token, slot = (state.code > 0).nonzero(as_tuple=True)
        row, column, value = order[token], state.chosen[token, slot], state.code[token, slot]
        place = (row * self.directions.shape[0] + column).argsort()
        return row[place], column[place], value[place]

    def _round(self, state: "_State", alive: int, number: int) -> Bool[Tensor, " alive"]:
        """One more feature for the first ``alive`` tokens; which of them found one."""
        found, feature = state.correlation[:alive].max(dim=1)
        goes_on = found > 0
        slot = state.take(feature, goes_on, number)
        own = slice(0, number + 1)
        chosen, code = state.chosen[:alive, own], state.code[:alive, own]
        member = state.member[:alive, own]
        correlation = state.correlation[:alive].gather(1, chosen)
        if self.method == "matching":
            change = torch.zeros_like(code).scatter(1, slot.unsqueeze(1), found.unsqueeze(1))
        elif self.method == "gradient":
            if self.support == "positive":
                newest = torch.zeros_like(member).scatter(1, slot.unsqueeze(1), True)
                member = member & ((code > 0) | newest)
            gradient = correlation * member
            curvature = (gradient.unsqueeze(1) @ state.products(alive, own) @ gradient.unsqueeze(2)).flatten()
            step = gradient.square().sum(dim=1) / curvature
            step = torch.where(curvature > 0, step, 0.0)  # No direction left to go.
            change = (code + step.unsqueeze(1) * gradient).clamp(min=0) - code
        else:
            change = state.least_squares(alive, own) - code
        state.move(alive, own, torch.where(goes_on.unsqueeze(1), change, 0.0))
        return goes_on


@dataclass
class _State:
    """A chunk of tokens half way: a slot for every round, filled or not.

    Attributes:
        target: what is to be explained, [tokens, d].
        rounds: how many each token has, largest first.
        directions, gram: of the dictionary.
        correlation: of every direction with what is unexplained, [tokens, features].
        chosen, code: feature and code of each slot, [tokens, slots]; feature 0 with code 0 where none was taken.
        member: whether a slot was filled.
    """

    target: Tensor
    rounds: Tensor
    directions: Tensor
    gram: Tensor | None
    correlation: Tensor
    chosen: Tensor
    code: Tensor
    member: Tensor
    first: Tensor  # correlations before the first round

    @classmethod
    def of(cls, target: Tensor, rounds: Tensor, directions: Tensor, gram: Tensor | None) -> "_State":
        shape = (len(target), int(rounds.max()) if len(rounds) else 0)
        correlation = target @ directions.T
        return cls(
            target,
            rounds,
            directions,
            gram,
            correlation,
            torch.zeros(shape, dtype=torch.int64, device=target.device),
            target.new_zeros(shape),
            torch.zeros(shape, dtype=torch.bool, device=target.device),
            correlation.clone() if gram is not None else correlation[:0],
        )

    def take(self, feature: Tensor, goes_on: Tensor, number: int) -> Int64[Tensor, " alive"]:
        """Put a feature into each token's slot of this round, unless it has one already; the slot that it is in."""
        alive = len(feature)
        before = (self.chosen[:alive, :number] == feature.unsqueeze(1)) & self.member[:alive, :number]
        is_new = goes_on & ~before.any(dim=1)
        self.chosen[:alive, number] = torch.where(is_new, feature, 0)
        self.member[:alive, number] = is_new
        old = before.to(torch.int8).argmax(dim=1) if number else torch.zeros_like(feature)
        return torch.where(is_new, torch.full_like(feature, number), old)

    def products(self, alive: int, own: slice) -> Float[Tensor, "alive slots slots"]:
        """Inner products of the chosen directions with each other."""
        chosen = self.chosen[:alive, own]
        if self.gram is not None:
            return self.gram[chosen.unsqueeze(2), chosen.unsqueeze(1)]
        rows = self.directions[chosen]
        return rows @ rows.transpose(1, 2)

    def least_squares(self, alive: int, own: slice) -> Float[Tensor, "alive slots"]:
        """The code of least error on the support, without the features that it would make negative."""
        products, right = self.products(alive, own), self._explained(alive, own)
        kept = self.member[:alive, own].clone()
        identity = torch.eye(products.shape[1], dtype=products.dtype, device=products.device)
        while True:
            both = kept.unsqueeze(1) & kept.unsqueeze(2)
            # A feature that is left out has an equation of its own: its code is 0. The ridge keeps twins apart.
            system = torch.where(both, products, 0.0) + identity * (1e-6 + (~kept).to(products.dtype).unsqueeze(2))
            solution = torch.linalg.solve(system, torch.where(kept, right, 0.0))
            negative = kept & (solution < 0)
            if not bool(negative.any()):
                return solution * kept
            kept &= ~negative

    def _explained(self, alive: int, own: slice) -> Float[Tensor, "alive slots"]:
        """Correlations of the chosen directions with the whole target."""
        if self.gram is not None:
            return self.first[:alive].gather(1, self.chosen[:alive, own])
        return (self.directions[self.chosen[:alive, own]] @ self.target[:alive].unsqueeze(2)).squeeze(2)

    def move(self, alive: int, own: slice, change: Tensor) -> None:
        """Change the codes, and the correlations with what is then unexplained."""
        # Empty slots hold feature 0 with code 0, so that two slots of one row may bear the same number: sums allow it.
        crow = torch.arange(alive + 1, device=change.device) * change.shape[1]
        columns, shape = self.chosen[:alive, own].reshape(-1), (alive, self.directions.shape[0])
        self.code[:alive, own] += change
        if self.gram is not None:
            moved = Allocation(crow, columns, change.reshape(-1), shape)
            self.correlation[:alive] -= moved.matmul(self.gram)
        else:
            code = Allocation(crow, columns, self.code[:alive, own].reshape(-1), shape)
            self.correlation[:alive] = (self.target[:alive] - code.matmul(self.directions)) @ self.directions.T
