"""Greater-than: "The war lasted from the year 1743 to the year 17" -> a tens digit above 4.

The task of Hanna et al. 2023 (arXiv 2305.00586) for tokenizers that give every digit a token of its own (SmolLM2,
Llama 2, Gemma, ...): there the next token is the tens digit and not the two-digit year of GPT-2. A tens digit equal to
that of the first year is neither counted as right nor as wrong, since the last digit decides there.
"""

import numpy as np

from apportion.data.tasks.pairs import Prompt, PromptPairs, check_count, compose

NOUNS = (
    *("war", "trial", "campaign", "project", "mission", "conflict", "tour", "study", "strike", "battle"),
    *("expedition", "journey", "process", "program", "crisis", "operation", "search", "marriage", "voyage", "reign"),
)


def greater_than(pairs: int, seed: int = 0, nouns: tuple[str, ...] = NOUNS) -> PromptPairs:
    """Draw pairs of prompts; in the counterfactual the first year ends in 01, after which any tens digit may follow.

    Centuries are 12 to 19; the tens digit runs through 1 to 8, each as often as the others (0 has nothing below it and
    9 nothing above). Attributes: ``century``, ``tens``, ``noun``. Roles: ``noun``, ``tens``, ``units`` (of the first
    year) and ``end``. Judged by the probability of greater digits minus that of smaller ones.

    Args:
        pairs: how many.
        seed: of the draw; the same seed gives the same pairs.
        nouns: what may last.

    Raises:
        InputError: less than one pair.
    """
    check_count(pairs)
    generator = np.random.default_rng(np.random.SeedSequence([seed, 0x67]))
    tens = generator.permutation(np.resize(np.arange(1, 9), pairs))
    clean, other = [], []
    for digit in tens.tolist():
        noun, century = str(generator.choice(nouns)), str(generator.integers(12, 20))
        units = int(generator.integers(10))
        clean.append(_prompt(noun, century, digit, digit, units))
        other.append(_prompt(noun, century, digit, 0, 1))
    return PromptPairs("greater-than", tuple(clean), tuple(other), metric="probability_difference")


def _prompt(noun: str, century: str, asked: int, tens: int, units: int) -> Prompt:
    text, roles = compose(
        "The",
        ("noun", f" {noun}"),
        f" lasted from the year {century}",
        ("tens", str(tens)),
        ("units", str(units)),
        f" to the year {century}",
    )
    return Prompt(
        text=text,
        answers=tuple(str(digit) for digit in range(asked + 1, 10)),
        distractors=tuple(str(digit) for digit in range(asked)),
        roles=roles,
        attributes={"century": century, "tens": str(tens), "noun": noun},
    )
