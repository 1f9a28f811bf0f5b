import pytest

from apportion.data.tasks import cache_suite

SMALL = ("--tasks", "many_shot,math_find", "--contexts", "2", "--turns", "2", "--words", "20", "--keys", "12")


@pytest.fixture(autouse=True)
def own_prose(monkeypatch):
    monkeypatch.setattr(cache_suite, "prose", lambda: ("One more sentence of a few words. " * 100,))


def test_bench_cache_shows_a_table_for_each_task_and_mode(tiny_llama, typed):
    outcome = typed("bench-cache", tiny_llama, "--methods", "dense,knorm", *SMALL)

    assert outcome.code == 0, outcome.err
    for title in ("many_shot, multi_request", "many_shot, multi_turn", "math_find, multi_turn"):
        assert title in outcome.out
    assert "turn 2" in outcome.out
    assert "read a step" in outcome.out
    assert "below 0.8 on many_shot, math_find" in outcome.out
    assert "[1/4] many_shot, session 0: dense, knorm" in outcome.err


def test_bench_cache_keeps_results_and_goes_on(tiny_llama, typed, tmp_path):
    given = (*SMALL, "--out", tmp_path / "kept", "--quick", "--json")
    first = typed("bench-cache", tiny_llama, "--methods", "dense", *given)
    both = typed("bench-cache", tiny_llama, "--methods", "dense,snap_kv", *given)
    assert "dense" not in both.err
    summaries = {(each["task"], each["mode"], each["method"]): each for each in both.json["summaries"]}
    assert len(summaries) == 8
    for each in first.json["summaries"]:
        assert summaries[each["task"], each["mode"], each["method"]] == each
    snap = summaries["many_shot", "multi_request", "snap_kv"]
    assert snap["sessions"] == 2
    assert snap["figures"]["share_held"] < 0.8
    assert snap["figures"]["reusable"] == 1
    assert {row["metric"] for row in both.json["rows"]} == {"score"}
    assert both.json["methods"]["snap_kv"]["settings"]["budget"]["keys"] == 12

    other = typed("bench-cache", tiny_llama, "--methods", "dense", *given, "--seed", "1")
    assert other.code == 2
    assert "--out" in other.errors[0]
    assert "seed=0, not 1" in other.errors[0]


def test_a_model_can_write_its_answers(tiny_llama, typed):
    answer = typed(
        "bench-cache", tiny_llama, "--methods", "dense", *SMALL, "--write", "--modes", "query_aware", "--json"
    ).json

    assert {each["mode"] for each in answer["summaries"]} == {"query_aware"}


def test_saved_methods_are_judged_too(tiny_llama, typed, tmp_path):
    folder = tmp_path / "mine"
    keep = ("--prompt", "a", "--tokens", "1", "--method", "knorm", "--keys", "7", "--save", folder, "--json")
    assert typed("generate", tiny_llama, *keep).code == 0
    given = ("--methods", "knorm", "--saved", folder, *SMALL, "--quick", "--json")
    answer = typed("bench-cache", tiny_llama, *given).json

    assert set(answer["methods"]) == {"knorm", "key_norm"}
    assert answer["methods"]["key_norm"]["settings"]["budget"]["keys"] == 7


def test_tasks_can_be_listed(tiny_llama, typed):
    listed = typed("bench-cache", tiny_llama, "--tasks", "list", "--json").json
    assert {each["name"] for each in listed["tasks"]} == set(cache_suite.SUITE)
    assert "variable_tracking" in typed("bench-cache", tiny_llama, "--tasks", "list").out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--methods", "dense,best"), ("--methods", "'best'", "oracle")),
        (("--methods", ","), ("--methods", "commas")),
        (("--tasks", "sums"), ("--tasks", "'sums'", "needles")),
        (("--modes", "single"), ("--modes", "multi_turn")),
        (("--quick", "--write"), ("--modes", "token by token")),
        (("--budget", "1/8"), ("--budget 1/8 and --keys 12",)),
        (("--words", "2000"), ("--words", "256 positions", "shorter")),
        (("--saved", "nowhere"), ("--saved", "nowhere")),
    ],
)
def test_what_cannot_be_asked_is_refused(arguments, named, tiny_llama, typed):
    outcome = typed("bench-cache", tiny_llama, *SMALL, *arguments)

    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert all(part in outcome.errors[0] for part in named), outcome.errors
