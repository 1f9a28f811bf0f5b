"""SCBench's protocol: what each mode shows a method, a full cache as one forward pass, and results that are kept."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.data.tasks.shared_context import SharedContext, Turn
from apportion.errors import InputError
from apportion.keys import KeyBudget, KeyMethod
from apportion.keys.baselines import DenseKeys, OracleKeys, RandomKeyChoice, WindowKeys
from apportion.keys.key_norm import KeyNorm
from apportion.keys.kvpress_adapter import KvPress
from apportion.keys.quantized import QuantizedKeys
from apportion.keys.scbench import MODES, Protocol, run_session
from apportion.keys.scbench_results import Record, Session, summarise
from apportion.keys.scbench_runs import run_bench
from apportion.keys.scoring import encode_parts, score_answers
from apportion.keys.shared_prompt import copied, digest_of
from apportion.keys.snap_kv import SnapKV
from apportion.keys.streaming_llm import StreamingLLM
from apportion.models import LanguageModel, load
from apportion.models.key_door import attend_with
from key_methods import ShortKeys

TURNS = (Turn(" from, and", " some more"), Turn(" of them, which", " are words"), Turn(" too, and", " so on and on"))
CONTENT = SharedContext("some words to go on from, and some more of them that are an assignment or a statement", TURNS)
SESSION = Session("words", 0, CONTENT)
ALL = Protocol(MODES)
AT_ONCE = Protocol(MODES, steps=False)
FEW = KeyBudget(keys=6)
METHODS: dict[str, KeyMethod] = {
    "dense": DenseKeys(),
    "oracle": OracleKeys(FEW),
    "window": WindowKeys(FEW),
    "random": RandomKeyChoice(FEW),
    "streaming_llm": StreamingLLM(KeyBudget(keys=6, sinks=2)),
    "window in the prompt": StreamingLLM(KeyBudget(keys=6, sinks=2), prompt="selected"),
    "snap_kv": SnapKV(FEW, window=4),
    "knorm": KeyNorm(FEW),
    "quantized": QuantizedKeys(4, 4, 4),
    "kvpress": KvPress(ShortKeys(), budget=FEW),
}


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture(scope="module")
def records(lm: LanguageModel) -> list[Record]:
    return run_session(lm, SESSION, METHODS, ALL)


def of(records: Sequence[Record], method: str, mode: str) -> list[Record]:
    return [record for record in records if record.method == method and record.mode == mode]


def nlls(records: Sequence[Record], method: str, mode: str) -> list[float]:
    return [record.nll for record in of(records, method, mode)]


def transcript_nll(lm: LanguageModel, parts: Sequence[str]) -> list[float]:
    """Of each answer in one forward pass over a whole transcript."""
    ids = encode_parts(lm, parts)
    losses = lm.loss_per_token(torch.cat(ids)[None])[0]
    ends = torch.tensor([len(part) for part in ids]).cumsum(0) - 1
    return [float(losses[ends[place - 1] : ends[place]].mean()) for place in range(2, len(parts), 2)]


def test_a_full_cache_scores_as_one_forward_pass_over_the_right_transcript(
    lm: LanguageModel, records: list[Record]
) -> None:
    whole = transcript_nll(lm, [CONTENT.context, *(text for turn in TURNS for text in (turn.question, turn.answer))])
    alone = [transcript_nll(lm, [CONTENT.context, turn.question, turn.answer])[0] for turn in TURNS]
    assert nlls(records, "dense", "multi_turn") == pytest.approx(whole, rel=1e-4)
    # The same context and question give the same in every mode.
    assert nlls(records, "dense", "multi_request") == pytest.approx(alone, rel=1e-4)
    assert nlls(records, "dense", "query_aware") == pytest.approx(alone, rel=1e-4)


def test_the_first_question_is_scored_as_score_answers_does(lm: LanguageModel, records: list[Record]) -> None:
    for name, method in METHODS.items():
        for mode, aware in (("multi_request", False), ("multi_turn", True), ("query_aware", True)):
            (expected,) = score_answers(lm, [CONTENT], method, query_aware=aware)
            # Draws depend on what was drawn before.
            if name != "random":
                assert nlls(records, name, mode)[0] == pytest.approx(expected.nll, rel=1e-3), (name, mode)


def test_answers_at_once_and_token_by_token_are_read_alike(lm: LanguageModel, records: list[Record]) -> None:
    at_once = run_session(lm, SESSION, METHODS, AT_ONCE)
    assert [replace(each, nll=0, prefill_seconds=0).method for each in at_once] == [each.method for each in records]
    for name in METHODS:
        for mode in MODES:
            # A quantised cache packs tokens when they come; random keys are drawn in another order.
            if name not in ("quantized", "random"):
                assert nlls(at_once, name, mode) == pytest.approx(nlls(records, name, mode), rel=1e-3), (name, mode)
    assert all(each.bytes_per_step is None and each.tokens_per_second is None for each in at_once)


def test_requests_leave_the_cache_as_it_was_and_their_order_changes_nothing(
    lm: LanguageModel, records: list[Record]
) -> None:
    backwards = replace(SESSION, content=SharedContext(CONTENT.context, TURNS[::-1]))
    again = run_session(lm, backwards, METHODS, Protocol(("multi_request",)))
    for name in METHODS:
        assert nlls(again, name, "multi_request")[::-1] == pytest.approx(nlls(records, name, "multi_request"), rel=1e-5)
        assert all(each.reusable for each in of(records, name, "multi_request"))
    assert all(each.reusable is None for each in records if each.mode != "multi_request")


def test_a_digest_sees_every_change_of_a_cache(lm: LanguageModel) -> None:
    for method in METHODS.values():
        with attend_with(lm, method.memory):
            ids = torch.randint(3, 300, (1, 20), generator=torch.Generator().manual_seed(0))
            cache = lm.model(ids, use_cache=True).past_key_values
            before = digest_of(cache)
            other = copied(cache)
            assert digest_of(other) == before
            lm.model(ids[:, :1], past_key_values=other)
            assert digest_of(cache) == before != digest_of(other)


def test_methods_are_judged_together_as_they_are_alone(lm: LanguageModel, records: list[Record]) -> None:
    for name in ("snap_kv", "window in the prompt", "quantized"):
        alone = run_session(lm, SESSION, {name: METHODS[name]}, ALL)
        for mode in MODES:
            assert nlls(alone, name, mode) == pytest.approx(nlls(records, name, mode), rel=1e-4)


def test_a_method_that_forgets_sees_the_question_only_in_some_modes(records: list[Record]) -> None:
    prompts = {mode: [each.prompt_tokens for each in of(records, "snap_kv", mode)] for mode in MODES}
    context = prompts["multi_request"][0]
    assert prompts["multi_request"] == [context] * 3
    assert prompts["multi_turn"] == [prompts["multi_turn"][0]] * 3
    assert prompts["multi_turn"][0] == prompts["query_aware"][0] > context
    # Which makes a difference, though the first turn of two modes is one and the same.
    aware, unaware = (nlls(records, "snap_kv", mode) for mode in ("query_aware", "multi_request"))
    assert nlls(records, "snap_kv", "multi_turn")[0] == pytest.approx(aware[0], rel=1e-5)
    assert min(abs(a - b) for a, b in zip(aware, unaware, strict=True)) > 1e-4


def test_the_stages_of_a_cache_are_measured(records: list[Record]) -> None:
    plain = 2 * 3 * 2 * 8 * 4  # bytes of a token: keys and values of 3 layers with 2 heads of width 8
    for record in records:
        assert record.prefill_seconds > 0
        assert record.compress_seconds >= 0
        assert record.bytes_per_step is not None
        assert record.tokens_per_second is not None
        assert record.tokens_per_second > 0
    (dense, *_), (snap, *_), (oracle, *_), (window, *_) = (
        of(records, name, "multi_request") for name in ("dense", "snap_kv", "oracle", "streaming_llm")
    )
    assert dense.share_held == dense.share_read == 1
    assert dense.bytes_held % plain == 0
    assert oracle.bytes_held == dense.bytes_held
    assert 0 < oracle.share_read < 0.5
    assert oracle.bytes_per_step < dense.bytes_per_step
    assert snap.bytes_held < 0.7 * dense.bytes_held
    assert window.bytes_held == 6 * plain
    assert dense.prefill_share_read == 1
    assert 0 < of(records, "window in the prompt", "multi_request")[0].prefill_share_read < 0.8


def test_a_model_can_write_the_answers(lm: LanguageModel) -> None:
    content = SharedContext(CONTENT.context, (Turn(" from, and", " zzz"), Turn(" of", " zzz", "label")))
    session = Session("words", 0, content)
    protocol = Protocol(MODES, generate=True, new_tokens=5)
    written = run_session(lm, session, {"dense": DenseKeys(), "oracle": OracleKeys(FEW)}, protocol)
    prompt = lm.tokenizer(CONTENT.context + " from, and", return_tensors="pt")
    out = lm.model.generate(**prompt, max_new_tokens=5, do_sample=False)
    expected = lm.tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    for mode in MODES:
        assert of(written, "dense", mode)[0].text == expected
    assert all(each.score == 0 for each in written)
    # What the model has written is gone afterwards: scores with the right answers fed are as before.
    fed = run_session(lm, session, {"dense": DenseKeys(), "oracle": OracleKeys(FEW)}, ALL)
    assert [each.nll for each in written] == pytest.approx([each.nll for each in fed], rel=1e-5)
    # The text that the model would have written is scored as right by either way.
    right = Session("words", 0, SharedContext(CONTENT.context, (Turn(" from, and", expected),)))
    assert all(each.exact and each.score == 1 for each in run_session(lm, right, {"dense": DenseKeys()}, ALL))


def record(session: int, turn: int, score: float, **more: Any) -> Record:
    base = Record("t", session, "multi_turn", "m", turn, "", score, score == 1, 1.0, 5, 1.0, 1.0, 0.0, 10, 1.0)
    return replace(base, **more)


def test_summaries_weigh_sessions_alike_and_bear_missing_turns() -> None:
    records = [
        record(0, 0, 1.0, share_read=0.5),
        record(0, 1, 0.0, share_read=None),
        record(0, 2, 0.0, share_read=None),
        record(0, 3, 0.0, reusable=False),
        record(1, 0, 1.0, nll=3.0, share_read=0.1, reusable=True),
        record(1, 1, 0.5, part="other"),
    ]
    first, second = summarise(records)
    assert (first.sessions, first.score) == (2, (0.25 + 1) / 2)
    assert first.by_turn == (1.0, 0.0, 0.0, 0.0)
    assert first.figures["nll"] == 2.0
    assert first.figures["share_read"] == pytest.approx(0.3)
    assert first.figures["reusable"] == 0.0
    assert second.part == "other"
    assert second.by_turn == (None, 0.5)
    json.dumps([each.as_dict() for each in (first, second)], allow_nan=False)


def test_an_interrupted_benchmark_goes_on_and_methods_can_be_added(lm: LanguageModel, tmp_path: Path) -> None:
    sessions = [replace(SESSION, number=number) for number in range(3)]
    protocol = Protocol(("multi_request",), steps=False)
    one = {"dense": DenseKeys()}
    two = {**one, "knorm": KeyNorm(FEW)}
    said: list[str] = []

    def interrupted() -> Any:
        yield from sessions[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(lm, interrupted(), one, protocol, folder=tmp_path, say=said.append)
    whole = run_bench(lm, sessions, one, protocol, folder=tmp_path, say=said.append)
    assert [each.split(":")[0] for each in said] == [f"words, session {number}" for number in range(3)]
    assert [each.session for each in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    said.clear()
    more = run_bench(lm, sessions, two, protocol, folder=tmp_path, say=said.append)
    assert said == [f"words, session {number}: knorm" for number in range(3)]
    assert [each for each in more if each.method == "dense"] == whole
    assert run_bench(lm, sessions, one, protocol, folder=tmp_path, say=said.append) == whole
    assert len(said) == 3
    assert {each.name for each in tmp_path.rglob("*") if each.is_file()} == {
        "bench.json",
        *(f"words-{number}.json" for number in range(3)),
    }
    with pytest.raises(InputError, match="holds knorm with"):
        run_bench(lm, sessions, {"knorm": KeyNorm(KeyBudget(keys=7))}, protocol, folder=tmp_path)
    with pytest.raises(InputError, match="made=None, not 3"):
        run_bench(lm, sessions, one, protocol, folder=tmp_path, made_by={"made": 3})
    with pytest.raises(InputError, match="holds results with protocol="):
        run_bench(lm, sessions, one, ALL, folder=tmp_path)
    other = replace(CONTENT, context=CONTENT.context + " too")
    with pytest.raises(InputError, match="another context"):
        run_bench(lm, [replace(SESSION, content=other)], one, protocol, folder=tmp_path)
    (tmp_path / "sessions" / "words-0.json").write_text('{"context": 3}')
    with pytest.raises(InputError, match="is damaged"):
        run_bench(lm, sessions, one, protocol, folder=tmp_path)
    run_bench(lm, [SESSION], {"press": KvPress(ShortKeys())}, protocol, folder=tmp_path / "presses")


def test_what_cannot_be_asked_is_refused(lm: LanguageModel) -> None:
    for make, named in (
        (lambda: Protocol(()), "modes="),
        (lambda: Protocol(("single",)), "modes="),
        (lambda: Protocol(steps=False, generate=True), "generate=True"),
        (lambda: run_session(lm, Session("t", 0, SharedContext("a", ())), METHODS, ALL), "no turns"),
        (
            lambda: run_session(lm, Session("t", 0, SharedContext("words " * 300, TURNS)), METHODS, ALL),
            "has 256",
        ),
        (
            lambda: run_session(
                lm, Session("t", 0, SharedContext("an assign", (Turn(" to", " a"), Turn("ment", " b")))), METHODS, ALL
            ),
            "depend on the question",
        ),
    ):
        with pytest.raises(InputError, match=named):
            make()


def test_a_fan_computes_the_prompt_once(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(args[0].shape[1]), with_kwargs=True
    )
    try:
        run_session(
            lm,
            SESSION,
            {"a": DenseKeys(), "b": KeyNorm(FEW), "c": OracleKeys(FEW)},
            Protocol(("multi_request",), steps=False),
        )
    finally:
        handle.remove()
    context = len(encode_parts(lm, [CONTENT.context, TURNS[0].question])[0])
    assert passes.count(context) == 1
    assert len(passes) == 1 + 3 * 3
