"""All shared-context tasks by name, each for contexts of a given length: what a benchmark of caches asks."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from apportion.data.corpora import corpus
from apportion.data.tasks.global_information import common_words, frequent_words, many_shot, math_find
from apportion.data.tasks.mixed_tasks import functions_and_pairs, needles_and_pairs
from apportion.data.tasks.repo_qa import repo_qa
from apportion.data.tasks.shared_context import SharedContext, many_values, needles
from apportion.data.tasks.string_retrieval import key_value, prefix_suffix
from apportion.data.tasks.variable_tracking import variable_tracking
from apportion.errors import InputError

# Documents of the corpus that prose is taken from; whoever fits a method takes later ones.
PROSE_DOCUMENTS = 120


@dataclass(frozen=True)
class CacheTask:
    """A task of the suite.

    Attributes:
        make: ``make(count, words, turns, seed)``: contexts of about that many words (a word is 1.3 tokens or more) with
            that many turns, or as many as the task has.
        new_tokens: what a model may write as an answer.
        says: what is asked, in a line.
    """

    make: Callable[[int, int, int, int], list[SharedContext]]
    new_tokens: int
    says: str


@functools.cache
def prose() -> tuple[str, ...]:
    """Technical English that is always there, for the haystacks."""
    return tuple(each.text for each in itertools.islice(corpus("english"), PROSE_DOCUMENTS))


SUITE: dict[str, CacheTask] = {
    "needles": CacheTask(
        lambda count, words, turns, seed: needles(
            count, filler=prose(), words=words, keys=max(4, turns), turns=turns, seed=seed
        ),
        12,
        "numbers told in prose",
    ),
    "many_values": CacheTask(
        lambda count, words, turns, seed: many_values(
            count, filler=prose(), words=words, keys=max(2, turns), turns=turns, seed=seed
        ),
        24,
        "all numbers of a key, told in prose",
    ),
    "key_value": CacheTask(
        lambda count, words, turns, seed: key_value(count, pairs=max(turns, words // 7), turns=turns, seed=seed),
        12,
        "numbers of keys, told in sentences",
    ),
    "key_value_json": CacheTask(
        lambda count, words, turns, seed: key_value(
            count, pairs=max(turns, words // 2), turns=turns, form="json", seed=seed
        ),
        14,
        "numbers of keys, in JSON",
    ),
    "prefix_suffix": CacheTask(
        lambda count, words, turns, seed: prefix_suffix(count, lines=max(turns, words // 6), turns=turns, seed=seed),
        24,
        "lines of words, by how they begin and end",
    ),
    "variable_tracking": CacheTask(
        lambda count, words, turns, seed: variable_tracking(
            count, filler=prose(), words=words, chains=max(2, turns), turns=turns, seed=seed
        ),
        30,
        "variables that hold a value, over two hops",
    ),
    "common_words": CacheTask(
        lambda count, words, turns, seed: common_words(count, often=max(4, (words - 80) // 5), seed=seed),
        30,
        "the five words that come often (one turn)",
    ),
    "frequent_words": CacheTask(
        lambda count, words, turns, seed: frequent_words(
            count, words=words, kinds=max(8, min(30, words // 8)), turns=min(5, turns), seed=seed
        ),
        8,
        "the most frequent words of a Zipf-like list",
    ),
    "math_find": CacheTask(
        lambda count, words, turns, seed: math_find(
            count, numbers=min(8999, max(5, words // 2 * 2 - 1)), turns=min(5, turns), seed=seed
        ),
        8,
        "the largest, smallest, median number of a list",
    ),
    "many_shot": CacheTask(
        lambda count, words, turns, seed: many_shot(
            count, examples=max(turns, words // 4), kinds=max(turns, min(30, words // 8)), turns=turns, seed=seed
        ),
        4,
        "labels of words, from many examples",
    ),
    "repo_qa": CacheTask(
        lambda count, words, turns, seed: repo_qa(count, functions=max(turns, words // 30), turns=turns, seed=seed),
        160,
        "the function that a sentence describes",
    ),
    "repo_names": CacheTask(
        lambda count, words, turns, seed: repo_qa(
            count, functions=max(turns, words // 30), turns=turns, answer="name", seed=seed
        ),
        12,
        "the name of the function that a sentence describes",
    ),
    "needles_and_pairs": CacheTask(
        lambda count, words, turns, seed: needles_and_pairs(
            count,
            filler=prose(),
            words=words // 2,
            needles=max(3, turns),
            pairs=min(40, max(turns, words // 14)),
            turns=turns,
            seed=seed,
        ),
        12,
        "needles in prose and keys in sentences, by turns",
    ),
    "names_and_pairs": CacheTask(
        lambda count, words, turns, seed: functions_and_pairs(
            count,
            functions=max(turns, words // 40),
            pairs=min(60, max(turns, words // 28)),
            turns=turns,
            answer="name",
            seed=seed,
        ),
        12,
        "names of functions and keys in comments, by turns",
    ),
}


def task_named(name: str) -> CacheTask:
    """A task of the suite.

    Raises:
        InputError: there is none of that name.
    """
    if name not in SUITE:
        raise InputError(f"task {name!r}: one of {', '.join(SUITE)}")
    return SUITE[name]
