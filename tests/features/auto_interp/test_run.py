"""Many features at once: nothing is asked twice, whatever happens in between."""

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from apportion.errors import InputError
from apportion.features.auto_interp import (
    ChatExplainer,
    Detection,
    Interpretation,
    JudgeUnavailableError,
    Prices,
    Records,
    Surprisal,
    interpret_features,
    read_results,
)
from apportion.models.chat import CallableChat, ChatError
from benchmarks.explain import asked_again, interpret, killed_runs, made_up_examples, spell
from benchmarks.mock_judge import mock_judge


class Judge:
    """Answers like the mock server, and remembers what it was asked; ``trouble`` may raise."""

    def __init__(self, trouble=lambda feature, n: None) -> None:
        self.asked: Counter[str] = Counter()
        self.features: list[str] = []
        self.at_once = self.most_at_once = 0
        self._trouble, self._lock = trouble, threading.Lock()

    def __call__(self, messages):
        question = messages[-1]["content"]
        words = question.replace("<", " ").replace(">", " ").split()
        feature = next(word for word in words if word[0] == "f" and word[-1] == "x")
        with self._lock:
            self.asked[question] += 1
            self.features.append(feature)
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            self._trouble(int(feature[1:-1]), len(self.features))
        finally:
            with self._lock:
                self.at_once -= 1
        if not question.startswith("Description"):
            return f"[EXPLANATION]: texts with {feature}"
        return str([int(feature in line) for line in question.splitlines()[2:]])

    @property
    def interpretation(self) -> Interpretation:
        return Interpretation(ChatExplainer(), [Detection()], CallableChat(self, "judge"), spell)


def finish(folder, judge, n=12, **settings):
    return interpret_features(folder, judge.interpretation, made_up_examples(n), progress=False, **settings)


def test_features_are_explained_and_judged_and_the_records_say_how(tmp_path):
    judge = Judge()
    summary = finish(tmp_path / "out", judge, concurrency=4)

    records = read_results(tmp_path / "out")
    assert sorted(records) == list(range(12))
    assert records[7]["explanation"] == "texts with f7x"
    assert records[7]["scores"]["detection"]["balanced_accuracy"] == 1.0
    assert records[7]["usage"]["calls"] == 3
    assert len(read_results(tmp_path / "out", windows=True)[7]["scores"]["detection"]["windows"]) == 10
    assert summary.status == {"explained": 12}
    assert summary.usage.calls == 36 == sum(judge.asked.values())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["calls"] == 36


def test_as_many_features_at_once_as_asked_for(tmp_path):
    together = threading.Barrier(6, timeout=20)
    judge = Judge(lambda feature, n: together.wait() if n <= 6 else None)
    finish(tmp_path / "out", judge, concurrency=6)
    assert judge.most_at_once == 6


def test_a_second_call_asks_nothing_and_more_features_ask_for_themselves_alone(tmp_path):
    finish(tmp_path / "out", Judge())
    again = Judge()
    summary = finish(tmp_path / "out", again)
    assert not again.asked
    assert summary.done == 0
    assert summary.status == {"explained": 12}

    more = Judge()
    finish(tmp_path / "out", more, n=15)
    assert set(more.features) == {"f12x", "f13x", "f14x"}


def test_failures_that_may_pass_are_recorded_and_only_what_is_missing_is_asked_again(tmp_path):
    def trouble(feature, n):
        if feature % 3 == 0 and n > 14:
            raise ChatError("timeout", "too slow")

    first = Judge(trouble)
    summary = finish(tmp_path / "out", first, concurrency=1, patience=10)
    assert summary.status["failed"] >= 2
    assert summary.failures == {"timeout": summary.status["failed"]}
    answered = sum(first.asked.values()) - summary.status["failed"]

    second = Judge()
    assert finish(tmp_path / "out", second).status == {"explained": 12}
    assert sum(second.asked.values()) == 36 - answered


def test_answers_of_an_unfinished_feature_are_not_asked_for_again(tmp_path):
    def trouble(feature, n):
        if feature == 5 and n == 18:  # the last of its three questions
            raise ChatError("busy", "later")

    first, second = Judge(trouble), Judge()
    finish(tmp_path / "out", first, concurrency=1)
    finish(tmp_path / "out", second)
    assert len(second.asked) == 1
    assert max((first.asked + second.asked).values()) == 2  # the one that failed


def test_a_judge_that_fails_on_everything_ends_the_run_and_keeps_what_was_done(tmp_path):
    def trouble(feature, n):
        if feature >= 4:
            raise ChatError("unreachable", "gone")

    judge = Judge(trouble)
    with pytest.raises(JudgeUnavailableError, match="unreachable: gone"):
        finish(tmp_path / "out", judge, n=40, concurrency=1, patience=5)
    assert sum(judge.asked.values()) == 4 * 3 + 5
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"]["explained"] == 4
    assert finish(tmp_path / "out", Judge(), n=40).status == {"explained": 40}


def test_refusals_and_nonsense_are_results(tmp_path):
    def answer(messages):
        question = messages[-1]["content"]
        return "I'm sorry, I can't." if "f3x" in question else "[EXPLANATION]: something"

    interpretation = Interpretation(ChatExplainer(), [Detection()], CallableChat(answer), spell)
    summary = interpret_features(tmp_path / "out", interpretation, made_up_examples(6), progress=False)
    records = read_results(tmp_path / "out")
    assert records[3]["status"] == "no explanation"
    assert records[3]["why"] == "refusal"
    assert records[2]["scores"]["detection"]["failed"] == {"nonsense": 10}
    assert summary.failures == {"refusal": 1, "nonsense": 50}


def test_a_key_that_is_not_accepted_ends_the_run_at_once(tmp_path):
    def trouble(feature, n):
        raise InputError("does not accept the key")

    with pytest.raises(InputError, match="key"):
        finish(tmp_path / "out", Judge(trouble), n=100, concurrency=2)


def test_a_budget_that_is_spent_ends_the_run(tmp_path):
    judge = Judge()
    with pytest.raises(InputError, match=r"max_cost=0.01 is spent"):
        finish(tmp_path / "out", judge, n=200, concurrency=1, prices=Prices(1.0, 1.0), max_cost=0.01)
    assert 3 <= sum(judge.asked.values()) < 100


def test_other_settings_are_refused_by_name(tmp_path):
    finish(tmp_path / "out", Judge(), about={"dictionary": "a"})
    with pytest.raises(InputError, match=r'dictionary \(there: "a", this run: "b"\)'):
        finish(tmp_path / "out", Judge(), about={"dictionary": "b"})
    interpretation = Interpretation(ChatExplainer("activations"), [Detection()], CallableChat(Judge(), "judge"), spell)
    with pytest.raises(InputError, match=r"explainer\.style"):
        interpret_features(
            tmp_path / "out", interpretation, made_up_examples(12), about={"dictionary": "a"}, progress=False
        )


def test_a_folder_with_other_things_or_in_use_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        finish(tmp_path / "mine", Judge())
    with Records(tmp_path / "out", {}), pytest.raises(InputError, match="another process"):
        Records(tmp_path / "out", {})


def test_a_last_line_that_was_cut_off_is_taken_off_and_a_damaged_one_is_named(tmp_path):
    finish(tmp_path / "out", Judge())
    results = tmp_path / "out" / "results.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole[:-20])
    judge = Judge()
    assert len(read_results(tmp_path / "out")) == 11
    assert finish(tmp_path / "out", judge).done == 1
    assert not judge.asked  # the journal still has the answers
    assert len(read_results(tmp_path / "out")) == 12

    lines = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join([lines[0], b"{broken\n", *lines[2:]]))
    with pytest.raises(InputError, match="line 2, is damaged"):
        finish(tmp_path / "out", Judge())


def test_the_journal_forgets_finished_features(tmp_path, monkeypatch):
    monkeypatch.setattr("apportion.features.auto_interp.records._LARGEST_JOURNAL", 2000)
    with Records(tmp_path / "out", {}) as records:
        for feature in range(100):
            for question in range(5):
                records.note(feature, f"q{question}", "x" * 100)
            if feature != 50:
                records.finish({"feature": feature, "status": "explained"})
        assert (tmp_path / "out" / "journal.jsonl").stat().st_size < 6000
    with Records(tmp_path / "out", {}) as records:
        assert sorted(records.answers(50)) == [f"q{question}" for question in range(5)]
        assert records.answers(49) == {}


def test_the_estimate_counts_what_the_run_asks(tmp_path):
    judge = Judge()
    examples = made_up_examples(30)
    estimate = judge.interpretation.estimate(examples, prices=Prices(1.0, 2.0), concurrency=3, seconds_a_call=2.0)
    assert not judge.asked
    summary = finish(tmp_path / "out", judge, n=30, prices=Prices(1.0, 2.0))
    assert estimate.usage.calls == summary.usage.calls == 90
    assert estimate.usage.prompt_tokens == pytest.approx(summary.usage.prompt_tokens, rel=0.1)
    assert estimate.seconds == 60.0
    assert estimate.cost == pytest.approx(summary.cost, rel=0.5)


def test_scorers_that_the_judge_cannot_serve_are_refused_before_anything_is_asked():
    with pytest.raises(InputError, match="'surprisal' needs score, which the judge judge does not have"):
        Interpretation(ChatExplainer(), [Surprisal()], CallableChat(Judge(), "judge"), spell)
    with pytest.raises(InputError, match="style 'default' needs chat, which no judge"):
        Interpretation(ChatExplainer(), [], None, spell)
    with pytest.raises(InputError, match="one of each"):
        Interpretation(ChatExplainer(), [Detection(), Detection()], CallableChat(Judge()), spell)


def test_a_feature_with_too_few_windows_is_not_asked_about(tmp_path):
    judge, examples = Judge(), made_up_examples(4)
    examples.n_windows[2] = 0
    interpret_features(tmp_path / "out", judge.interpretation, examples, progress=False)
    assert read_results(tmp_path / "out")[2]["status"] == "too few examples"
    assert "f2x" not in judge.features


def test_ctrl_c_keeps_what_was_done(tmp_path, monkeypatch):
    from apportion.features.auto_interp.run import _Work

    original = _Work.run
    first = Judge(lambda feature, n: time.sleep(0.02))

    def interrupted(self, workers, show):
        def pressed():
            if len(first.features) > 10:
                raise KeyboardInterrupt

        original(self, workers, pressed)

    with monkeypatch.context() as patch:
        patch.setattr(_Work, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finish(tmp_path / "out", first, n=100, concurrency=2)
    done = {f"f{feature}x" for feature in read_results(tmp_path / "out")}
    assert 0 < len(done) < 100
    second = Judge()
    finish(tmp_path / "out", second, n=100)
    assert not done & set(second.features)


@pytest.mark.slow
def test_killed_again_and_again_no_finished_feature_is_asked_about(tmp_path: Path):
    faults = {"429": 0.03, "500": 0.02, "closed": 0.02, "cut off": 0.01, "refusal": 0.02, "nonsense": 0.02}
    kills, concurrency, features = 2, 8, 120
    with mock_judge(faults) as judge:
        finished = killed_runs(tmp_path / "out", judge, features, concurrency, kills, timeout=5, every=0.5)
        summary = interpret(tmp_path / "out", judge.url, features, concurrency, timeout=5)
        stats = judge.stats()
    again = asked_again(stats["log"], finished)
    assert again["about finished features"] == 0
    assert again["twice"] <= kills * concurrency
    assert sum(summary.status.values()) == features
    assert set(summary.status) <= {"explained", "no explanation"}
    assert os.path.getsize(tmp_path / "out" / "results.jsonl") > 0
