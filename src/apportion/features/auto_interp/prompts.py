"""What the judge reads and how its answers are read; the wording is ours."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from apportion.features.auto_interp.windows import Example, levels
from apportion.models.chat import Message

EXPLANATION_MARK = "[EXPLANATION]:"
NULL_EXPLANATION = "various unrelated sentences"
_LONGEST_EXPLANATION = 600
_LISTED_TOKENS = 11
# How chat models commonly begin when they will not do a thing.
_REFUSAL = re.compile(
    r"^\W*(i('| a)m (very |truly )?sorry|sorry|i apologi[sz]e|i can('|’|no)?t\b|i('| a)m (not able|unable)|i won't"
    r"|as an ai\b|i must decline|unfortunately,? i)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Explanation:
    """What a feature is said to mean.

    Attributes:
        text: one sentence.
        flagged: the judge did not keep to the form: its whole answer was taken, or its first line.
    """

    text: str
    flagged: bool = False


# --- explaining ------------------------------------------------------------------------------------------------------

_EXPLAIN = f"""You study single features of a language model. A feature is active on some tokens of a text.
You are given fragments of text. Tokens on which one feature is active stand between << and >>; several neighbouring
ones share a pair. Find out what these places have in common: a word, a form, a meaning, a position, or what usually
comes next.
Answer with one short sentence that would let somebody recognise such places in other texts. Be as specific as the
fragments allow. Do not list the fragments, do not quote more than a word or two, and do not mention the markers.
End your answer with a line that begins with {EXPLANATION_MARK}"""
_WITH_ACTIVATIONS = """
Below each fragment the marked tokens are listed with the strength of the feature, a whole number from 1 to 10."""
_CONTRASTIVE = """
After the fragments with the feature come others in which it is not active at all. What you say must fit the former and
not the latter."""


def _shown(text: str, activations: str, number: int, with_activations: bool) -> str:
    lines = [f"Fragment {number}: {text}"]
    return "\n".join(lines + ([f"Strength: {activations}"] if with_activations else []))


# (fragments with the strengths of their marked tokens, fragments without the feature, explanation)
_TAUGHT = (
    (
        (
            ("The bridge was closed <<for>> repairs until the spring.", '("for", 8)'),
            ("He was fined <<for>> parking across the gate.", '("for", 9)'),
            ("They thanked her <<for>> the long letter.", '("for", 7)'),
        ),
        ("They waited for the train.", "A gift for my brother."),
        'The word "for" where it gives the reason for something that was done.',
    ),
    (
        (
            ("  return total / <<len>>(values)", '("len", 10)'),
            ("names = <<sorted>>(table, key=<<str>>.lower)", '("sorted", 9), ("str", 4)'),
            ("if <<isinstance>>(node, Leaf):", '("isinstance", 10)'),
        ),
        ("def total(values):", "for name in table:"),
        "Names of built-in Python functions and types where they are used in code.",
    ),
    (
        (
            ("The lake lies at 1,<<204>> metres above the sea.", '("204", 6)'),
            ("It weighed nearly 3,<<500>> kilograms when empty.", '("500", 8)'),
            ("Some 12,<<000>> people live on the island.", '("000", 9)'),
        ),
        ("Chapter 12 begins here.", "In 1987 they moved north."),
        "The digits after the comma in numbers of a thousand or more, mostly in measurements and counts.",
    ),
)


def explain_messages(
    train: Sequence[Example],
    largest: float,
    *,
    near_misses: Sequence[Example] = (),
    with_activations: bool = False,
) -> list[Message]:
    """The conversation that asks for an explanation.

    Args:
        train: windows with the feature.
        largest: the feature's largest activation, which a strength of 10 stands for.
        near_misses: windows without it; any make the explanation contrastive.
        with_activations: list the marked tokens' strengths.
    """
    system = _EXPLAIN + (_WITH_ACTIVATIONS if with_activations else "") + (_CONTRASTIVE if near_misses else "")
    messages: list[Message] = [{"role": "system", "content": system}]
    for positive, negative, explanation in _TAUGHT:
        shown = [_shown(text, said, n + 1, with_activations) for n, (text, said) in enumerate(positive)]
        messages.append({"role": "user", "content": _question(shown, negative if near_misses else ())})
        messages.append({"role": "assistant", "content": f"{EXPLANATION_MARK} {explanation}"})
    shown = [
        _shown(_one_line(example.marked()), _strengths(example, largest), number + 1, with_activations)
        for number, example in enumerate(train)
    ]
    without = [_one_line(example.text) for example in near_misses]
    return [*messages, {"role": "user", "content": _question(shown, without)}]


def _question(shown: Sequence[str], without: Sequence[str]) -> str:
    question = "\n".join(shown)
    if without:
        lines = [f"Fragment {len(shown) + n + 1}: {text}" for n, text in enumerate(without)]
        question = f"With the feature:\n{question}\n\nWithout it:\n" + "\n".join(lines)
    return question


def _strengths(example: Example, largest: float) -> str:
    strength = levels(example.activations, largest)
    places = [place for place, active in enumerate(example.active.tolist()) if active][:_LISTED_TOKENS]
    return ", ".join(f'("{_one_line(example.token(place)).strip()}", {strength[place]})' for place in places)


def read_explanation(answer: str) -> Explanation | None:
    """The explanation in an answer, or None where there is none: nothing was said, or it was refused."""
    _, mark, after = answer.rpartition(EXPLANATION_MARK)
    said = next((line.strip() for line in (after if mark else answer).splitlines() if line.strip()), "")
    said = said.strip().strip("*").strip()[:_LONGEST_EXPLANATION]
    if not said or (not mark and is_refusal(answer)):
        return None
    return Explanation(said, flagged=not mark)


def is_refusal(answer: str) -> bool:
    """Whether an answer reads like a refusal."""
    return bool(_REFUSAL.match(answer))


# --- judging ---------------------------------------------------------------------------------------------------------

_DETECT = """You are given a description of a feature of text, and numbered fragments of text.
For each fragment decide whether some part of it fits the description.
Answer with a Python list of whole numbers and nothing else, one for each fragment in the order in which they stand: 1
if it fits, 0 if it does not."""
_FUZZ = """You are given a description of a feature of text, and numbered fragments of text. In each fragment some
tokens stand between << and >>.
For each fragment decide whether the description fits the marked tokens themselves, in their context; what else the
fragment holds does not matter.
Answer with a Python list of whole numbers and nothing else, one for each fragment in the order in which they stand: 1
if the marked tokens fit, 0 if they do not."""
_TAUGHT_JUDGING = (
    (
        "Words that say how somebody feels",
        (
            ("The train was late again.", "The <<train>> was late again.", 0),
            ("She was overjoyed at the news.", "She was <<overjoyed>> at the news.", 1),
            ("Add two cups of flour.", "Add two <<cups>> of flour.", 0),
            ("Bored, he looked out of the window.", "<<Bored>>, he looked out of the window.", 1),
            ("Their anger did not last.", "Their <<anger>> did not last.", 1),
        ),
    ),
    (
        "Closing brackets at the end of a line of code",
        (
            ("total = sum(values)\ncount += 1", "total = sum(values<<)>>\ncount += 1", 1),
            ("A walk (of a mile) to the shop.", "A walk (of a <<mile>>) to the shop.", 0),
            ("items.append(name)", "items.append(name<<)>>", 1),
            ("import os, sys", "<<import>> os, sys", 0),
            ("The meeting ended early.", "The meeting <<ended>> early.", 0),
        ),
    ),
    (
        "Names of months",
        (
            ("The fair is held in June.", "The fair is held in <<June>>.", 1),
            ("May I come in?", "<<May>> I come in?", 0),
            ("By October the leaves had turned.", "By <<October>> the leaves had turned.", 1),
            ("Every week they wrote home.", "Every <<week>> they wrote home.", 0),
            ("From March to May it rained.", "From <<March>> to <<May>> it rained.", 1),
        ),
    ),
)


def judge_messages(explanation: str, texts: Sequence[str], *, marked: bool) -> list[Message]:
    """The conversation that asks which texts fit an explanation.

    Args:
        explanation: of the feature.
        texts: of the windows.
        marked: whether tokens in them are marked (fuzzing) or the whole window counts (detection).
    """
    messages: list[Message] = [{"role": "system", "content": _FUZZ if marked else _DETECT}]
    for taught, fragments in _TAUGHT_JUDGING:
        # As many as will be asked about: a model imitates the length of a list.
        kept = fragments[: max(1, min(len(texts), len(fragments)))]
        shown = [fragment[1] if marked else fragment[0] for fragment in kept]
        messages.append({"role": "user", "content": _to_judge(taught, shown)})
        messages.append({"role": "assistant", "content": str([fragment[2] for fragment in kept])})
    return [*messages, {"role": "user", "content": _to_judge(explanation, texts)}]


def _to_judge(explanation: str, texts: Sequence[str]) -> str:
    return "\n".join(
        [f"Description: {explanation}", ""] + [f"Fragment {n + 1}: {_one_line(text)}" for n, text in enumerate(texts)]
    )


def read_verdicts(answer: str, n: int) -> list[int] | None:
    """The list of ``n`` zeros and ones in an answer, or None where there is none.

    Words around it and code fences do not matter; a list of another length, or one that is cut off, is none.
    """
    for found in re.finditer(r"\[([^\[\]]*)\]", answer):
        items = [item.strip().strip("'\"").lower() for item in found[1].split(",")]
        if items and items[-1] == "":
            items.pop()
        if len(items) == n and all(item in ("0", "1", "true", "false") for item in items):
            return [int(item in ("1", "true")) for item in items]
    return None


def _one_line(text: str) -> str:
    """A window on one line, so that lines tell fragments apart."""
    return text.replace("\r", " ").replace("\n", "\\n")


# --- likelihoods -----------------------------------------------------------------------------------------------------

_TAUGHT_PAIRS = (
    ("Questions that ask for a reason", ("Why did the lamp go out again last night?", "I wonder why nobody answered.")),
    (
        "Lists of ingredients",
        ("two onions, a clove of garlic, olive oil and salt", "flour, eggs, milk and a little sugar"),
    ),
    (NULL_EXPLANATION, ("The harbour was empty at noon.", "def reset(self): self.count = 0")),
)


def described_prefix(explanation: str) -> str:
    """Text after which a base model expects windows that an explanation describes (surprisal scoring)."""
    parts = []
    for taught, texts in _TAUGHT_PAIRS:
        parts += [f"Texts with this in common: {taught}\n" + "".join(f"Text: {text}\n" for text in texts)]
    return "\n".join([*parts, f"Texts with this in common: {explanation}\nText: "])


# --- simulating ------------------------------------------------------------------------------------------------------

_SIMULATE = """You are given a description of a feature of text and the tokens of a fragment, one a line.
For each token guess how strong the feature is on it: 0 is not at all, 10 is as strong as it gets. On most tokens most
features are silent.
Answer with a Python list of whole numbers and nothing else, one for each token in the order in which they stand."""
_TAUGHT_LEVELS = (
    ("Names of months", (" fair", " is", " held", " in", " June", "."), [0, 0, 0, 0, 9, 0]),
    ("Words that say how somebody feels", ("She", " was", " over", "joyed"), [0, 0, 4, 9]),
)


def simulate_messages(explanation: str, tokens: Sequence[str]) -> list[Message]:
    """The conversation that asks for the strength of a feature on every token."""
    messages: list[Message] = [{"role": "system", "content": _SIMULATE}]
    for taught, shown, answer in _TAUGHT_LEVELS:
        messages.append({"role": "user", "content": _to_simulate(taught, shown)})
        messages.append({"role": "assistant", "content": str(answer)})
    return [*messages, {"role": "user", "content": _to_simulate(explanation, tokens)}]


def _to_simulate(explanation: str, tokens: Sequence[str]) -> str:
    return "\n".join([f"Description: {explanation}", "", *(f"{n + 1}: {_one_line(t)}" for n, t in enumerate(tokens))])


def read_levels(answer: str, n: int) -> list[int] | None:
    """The list of ``n`` whole numbers from 0 to 10 in an answer, or None where there is none."""
    for found in re.finditer(r"\[([^\[\]]*)\]", answer):
        items = [item.strip() for item in found[1].split(",")]
        if len(items) == n and all(re.fullmatch(r"\d+", item) and int(item) <= 10 for item in items):
            return [int(item) for item in items]
    return None
