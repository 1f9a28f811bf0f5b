"""Features and a judge whose truth is known: what the machinery must get right whatever the judge.

A rule says of every character of a text whether it holds there; a feature of that rule fires on the tokens that have
such a character. The judge is told the rule's name as the explanation, looks the answer up in the text, and errs as
often as it is told to.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.allocate import Allocation
from apportion.features.auto_interp.windows import unmark
from apportion.models.chat import CallableChat, Messages
from apportion.models.spelling import Spelled

Rule = Callable[[str], Bool[np.ndarray, " characters"]]
# Said after a rule's name: the judge looks at the whole fragment, whatever is marked.
ANYWHERE = " anywhere in the fragment"


def _matching(pattern: str) -> Rule:
    compiled = re.compile(pattern)

    def rule(text: str) -> np.ndarray:
        holds = np.zeros(len(text), dtype=np.bool_)
        for found in compiled.finditer(text):
            holds[found.start() : found.end()] = True
        return holds

    return rule


def _inside_parentheses(text: str) -> np.ndarray:
    depth, holds = 0, np.zeros(len(text), dtype=np.bool_)
    for place, character in enumerate(text):
        depth = max(0, depth - (character == ")"))
        holds[place] = depth > 0
        depth += character == "("
    return holds


RULES: Mapping[str, Rule] = {
    "digits": _matching(r"\d"),
    "text inside parentheses": _inside_parentheses,
    "the word def": _matching(r"\bdef\b"),
    "the letter q": _matching(r"[qQ]"),
    "capitalised words": _matching(r"\b[A-Z][a-z]+"),
}


class RuleFeatures:
    """A dictionary whose codes are its inputs, and a view whose activations are the rules."""

    def __init__(
        self,
        token_ids: Int[np.ndarray, "contexts time"],
        spell: Callable[[Sequence[int]], Spelled],
        documents: Int[np.ndarray, " contexts"],
    ) -> None:
        self.n_features, self.n_contexts = len(RULES), len(token_ids)
        self._token_ids, self._documents = token_ids, documents
        self._activations = np.zeros((*token_ids.shape, len(RULES)), dtype=np.float32)
        for number, ids in enumerate(token_ids):
            said = spell(ids.tolist())
            for column, rule in enumerate(RULES.values()):
                holds = rule(said.text)
                fires = [bool(holds[start:stop].any()) for start, stop in said.spans]
                # Some strength or other, so that there are quantiles.
                self._activations[number, :, column] = np.where(fires, 1 + (ids * (column + 1)) % 7, 0)

    def encode(self, x: Float[Tensor, "tokens features"]) -> Allocation:
        """The positive entries."""
        row, column = x.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(x))
        crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(dim=0)])
        return Allocation(crow, column, x[row, column], (len(x), x.shape[1]))

    def contexts(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `apportion.features.contexts.ContextView`."""
        ids = torch.from_numpy(self._token_ids[start:stop].astype(np.int64))
        activations = torch.from_numpy(self._activations[start:stop])
        documents = torch.from_numpy(self._documents[start:stop].astype(np.int64))
        return ids, activations, torch.ones(ids.shape, dtype=torch.bool), documents


def oracle(noise: float = 0.0, seed: int = 0) -> CallableChat:
    """A judge that knows the rules and gives the wrong verdict on a share ``noise`` of the fragments."""

    def answer(messages: Messages) -> str:
        question = messages[-1]["content"]
        described, _, fragments = question.partition("\n\n")
        name = described.removeprefix("Description: ")
        rule = RULES[name.removesuffix(ANYWHERE)]
        marked = "<< and >>" in messages[0]["content"]
        verdicts = []
        for line in fragments.splitlines():
            shown = line.partition(": ")[2].replace("\\n", "\n")
            verdict = _verdict(rule, shown, marked, anywhere=name.endswith(ANYWHERE))
            verdicts.append(int(verdict != _errs(noise, f"{seed} {name} {shown}")))
        return str(verdicts)

    return CallableChat(answer, f"oracle, noise {noise:g}, seed {seed}")


def _verdict(rule: Rule, shown: str, marked: bool, anywhere: bool) -> bool:
    if not marked:
        return bool(rule(shown).any())
    text = unmark(shown)
    holds = rule(text)
    if anywhere:
        return bool(holds.any())
    inside = marked_characters(shown, text)
    return bool(holds[inside].any())


def marked_characters(shown: str, text: str) -> Bool[np.ndarray, " characters"]:
    """Which characters of a text stand between markers, given the text with them and without."""
    inside, found, place, at = False, np.zeros(len(text), dtype=np.bool_), 0, 0
    while at < len(shown):
        pair = shown[at : at + 2]
        if pair in ("<<", ">>"):
            inside, at = pair == "<<", at + 2
            continue
        found[place] = inside
        place, at = place + 1, at + (2 if pair in ("<\\", ">\\") else 1)
    return found


def _errs(noise: float, about: str) -> bool:
    drawn = int.from_bytes(hashlib.sha256(about.encode("utf-8", "surrogatepass")).digest()[:8], "little")
    return drawn / 2.0**64 < noise
