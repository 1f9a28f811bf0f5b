"""Shared-context tasks: a reader finds every answer in the context, and metrics give credit for nothing else."""

import re
import statistics
from collections import Counter
from collections.abc import Callable

import pytest

from apportion.data.tasks import cache_suite
from apportion.data.tasks.cache_suite import SUITE, task_named
from apportion.data.tasks.global_information import LABELS, common_words, frequent_words, many_shot, math_find
from apportion.data.tasks.metrics import METRICS, functions_of, metric_score
from apportion.data.tasks.mixed_tasks import functions_and_pairs, needles_and_pairs
from apportion.data.tasks.repo_qa import repo_qa, short_functions
from apportion.data.tasks.shared_context import SharedContext, Turn, many_values, needles
from apportion.data.tasks.string_retrieval import key_value, prefix_suffix
from apportion.data.tasks.variable_tracking import variable_tracking
from apportion.errors import InputError

PROSE = ("The quick brown fox jumps over the lazy dog. It was a fine day for all of them. " * 60,)


def read_needle(context: str, question: str) -> str:
    key = re.fullmatch(r" The special magic number for (\w+) is", question)
    if key is None:
        return read_sentence(context, question)
    (number,) = re.findall(rf"The special magic number for {key[1]} is (\d{{4}})\.", context)
    return number


def read_sentence(context: str, question: str) -> str:
    key = re.fullmatch(r" The number of the (\w+(?: \w+)?) is", question)
    assert key
    (number,) = re.findall(rf"The number of the {key[1]} is (\d{{4}})\.", context)
    return number


def read_json(context: str, question: str) -> str:
    import json

    return f'"{json.loads(context)[json.loads(question[:-1])]}"'


def read_line(context: str, question: str) -> str:
    first, last = re.findall(r'"([^"]+)"', question)
    (line,) = [line for line in context.splitlines() if line.startswith(first + " ") and line.endswith(" " + last)]
    return line


def read_variables(context: str, question: str) -> str:
    value = re.findall(r"\d+", question)[0]
    holds: dict[str, str] = {}
    for name, number, other in re.findall(r"VAR (\w+) = (?:(\d+)|VAR (\w+))\.", context):
        holds[name] = number or holds[other]
    return " ".join(name for name, held in holds.items() if held == value)


def counted(context: str) -> list[tuple[str, int]]:
    return Counter(re.findall(r"[a-z]+", context)).most_common()


def read_common(context: str, question: str) -> str:
    wanted = int(re.findall(r"\d+", question)[0])
    counts = counted(context)
    assert counts[wanted - 1][1] > counts[wanted][1]
    return " ".join(word for word, _ in counts[:wanted])


def read_frequent(context: str, question: str) -> str:
    rank = ["The most", "second", "third", "fourth", "fifth"].index(
        next(each for each in ("second", "third", "fourth", "fifth", "The most") if each in question)
    )
    counts = counted(context)
    assert len({times for _, times in counts[: rank + 2]}) == rank + 2
    return counts[rank][0]


def read_number(context: str, question: str) -> str:
    numbers = sorted(map(int, re.findall(r"\d+", context)))
    found = {
        "second largest": numbers[-2],
        "second smallest": numbers[1],
        "largest": numbers[-1],
        "smallest": numbers[0],
        "median": statistics.median(numbers),
    }
    return str(next(number for name, number in found.items() if name in question))


def read_label(context: str, question: str) -> str:
    word = re.findall(r"Word: (\w+)", question)[0]
    (label,) = set(re.findall(rf"Word: {word}\nLabel: (\w+)", context))
    return label


def read_values(context: str, question: str) -> str:
    key = re.findall(r"numbers for (\w+) are", question)[0]
    found = re.findall(rf"One of the special magic numbers for {key} is (\d{{4}})\.", context)
    assert len(set(found)) == 3
    return " ".join(found)


def read_function_or_comment(context: str, question: str) -> str:
    if "The function" in question:
        return read_function(context, question)
    assert re.search(rf"^{re.escape(question[1:])} \d{{4}}\.$", context, re.MULTILINE)
    return read_sentence(context, question.removeprefix("\n#"))


def read_function(context: str, question: str) -> str:
    said = re.findall(r'"(.*)"', question)[0]
    (found,) = [each for each in functions_of(context) if said in each]
    return found if question.endswith(":\n") else found.split("(")[0].removeprefix("def ")


READERS: dict[str, Callable[[str, str], str]] = {
    "needles": read_needle,
    "key_value": read_sentence,
    "key_value_json": read_json,
    "prefix_suffix": read_line,
    "variable_tracking": read_variables,
    "common_words": read_common,
    "frequent_words": read_frequent,
    "math_find": read_number,
    "many_shot": read_label,
    "repo_qa": read_function,
    "repo_names": read_function,
    "needles_and_pairs": read_needle,
    "many_values": read_values,
    "names_and_pairs": read_function_or_comment,
}


@pytest.fixture(autouse=True)
def own_prose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_suite, "prose", lambda: PROSE)


@pytest.mark.parametrize("name", SUITE)
@pytest.mark.parametrize("words", [200, 600])
def test_a_reader_finds_every_answer(name: str, words: int) -> None:
    task = task_named(name)
    made = task.make(4, words, 4, 3)
    assert made == task.make(4, words, 4, 3)
    assert made != task.make(4, words, 4, 4)
    for content in made:
        assert content.turns
        assert len({turn.question for turn in content.turns}) == len(content.turns)
        for turn in content.turns:
            found = READERS[name](content.context, turn.question)
            order = sorted if name == "common_words" else list
            assert order(found.split()) == order(turn.answer.split())
            assert metric_score(turn.metric, turn.answer, turn.answer, content.context) == 1
            assert metric_score(turn.metric, "", turn.answer, content.context) == 0


def test_longer_contexts_are_longer() -> None:
    for name, task in SUITE.items():
        short, long = (len(task.make(1, words, 2, 0)[0].context) for words in (200, 800))
        assert long > 2 * short, name


def test_the_parts_of_a_mixed_task_take_turns() -> None:
    turns = needles_and_pairs(1, filler=PROSE, words=80, turns=5, seed=0)[0].turns
    assert [turn.part for turn in turns] == ["needles", "pairs", "needles", "pairs", "needles"]
    of_code = functions_and_pairs(1, functions=5, pairs=4, turns=4, seed=0)[0]
    assert [turn.part for turn in of_code.turns] == ["functions", "pairs", "functions", "pairs"]
    assert [turn.metric for turn in of_code.turns] == ["most_similar", "contained"] * 2
    # Comments do not make a function longer.
    assert sorted(map(len, functions_of(of_code.context)))[-1] <= max(map(len, short_functions().values()))
    assert len(functions_of(of_code.context)) == 5


def test_names_are_unique_when_there_are_many() -> None:
    context = key_value(1, pairs=500, turns=5)[0].context
    names = re.findall(r"number of the (\w+ \w+) is", context)
    assert len(names) == len(set(names)) == 500


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        ("contained", "it is 4821.", " 4821", 1),
        ("contained", "it is 48213", " 4821", 0),
        ("contained", "It Is Apple", " apple", 1),
        ("contained", "pineapple", " apple", 0),
        ("contained", "anything", " ", 0),
        ("fraction", "ocean and apple, not appl", " apple ocean lemon appl", 0.75),
        ("first_number", "The 2nd: 4821", " 4821", 0),
        ("first_number", "is 4821, or 1234", " 4821", 1),
        ("label", " alpha beta gamma delta", " beta", 0),
        ("label", " Beta, of course", " beta", 1),
        ("label", "...", " beta", 0),
    ],
)
def test_metrics_give_credit_for_the_answer_alone(metric: str, prediction: str, answer: str, score: float) -> None:
    assert metric_score(metric, prediction, answer) == score


def test_a_function_is_found_if_it_is_the_most_similar_and_similar_enough() -> None:
    content = repo_qa(1, functions=4, turns=1, seed=1)[0]
    turn = content.turns[0]
    others = [each for each in functions_of(content.context) if each != turn.answer.strip()]
    lines = turn.answer.strip().split("\n")
    assert metric_score("most_similar", turn.answer + "\n\n\ndef more(): ...", turn.answer, content.context) == 1
    assert metric_score("most_similar", others[0], turn.answer, content.context) == 0
    assert metric_score("most_similar", lines[0], turn.answer, content.context) == 0
    assert len(short_functions()) > 100


def test_an_unknown_metric_or_task_is_refused() -> None:
    with pytest.raises(InputError, match="metric 'rouge'"):
        metric_score("rouge", "", "")
    with pytest.raises(InputError, match="task 'sums'"):
        task_named("sums")
    assert set(METRICS) == {"contained", "fraction", "first_number", "label", "most_similar"}
    assert Turn("", "").metric in METRICS
    assert SharedContext("", ()).turns == ()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: key_value(1, pairs=3, turns=4), "turns=4"),
        (lambda: key_value(1, form="yaml"), "form='yaml'"),
        (lambda: prefix_suffix(1, lines=3, turns=4), "turns=4"),
        (lambda: prefix_suffix(1, length=4), "length=4"),
        (lambda: variable_tracking(1, filler=PROSE, chains=2, turns=3), "turns=3"),
        (lambda: variable_tracking(1, filler=PROSE, words=10**6), "words=1000000"),
        (lambda: common_words(1, often=2), "often=2"),
        (lambda: frequent_words(1, turns=6), "turns=6"),
        (lambda: math_find(1, numbers=100), "numbers=100"),
        (lambda: many_shot(1, kinds=65), "kinds=65"),
        (lambda: repo_qa(1, functions=10**4), "functions=10000"),
        (lambda: repo_qa(1, answer="number"), "answer='number'"),
        (lambda: needles_and_pairs(1, filler=PROSE, turns=9), "turns=9"),
        (lambda: functions_and_pairs(1, functions=2, turns=6), "turns=6"),
        (lambda: functions_and_pairs(1, pairs=200), "pairs=200"),
        (lambda: functions_and_pairs(1, answer="number"), "answer='number'"),
        (lambda: many_values(1, filler=PROSE, values=0), "values=0"),
        (lambda: many_values(1, filler=PROSE, keys=2, turns=3), "turns=3"),
        (lambda: needles(1, filler=PROSE, words=10**6), "words=1000000"),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make()


def test_labels_are_told_apart() -> None:
    assert len(set(LABELS)) == len(LABELS)
