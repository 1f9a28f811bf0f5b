"""Chat models: local, behind a server, a function, and what was recorded."""

import json
import threading
from pathlib import Path

import pytest
import torch

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.models.chat import CallableChat, ChatError, ChatModel, Generation, ReplayChat, SamplingParams
from apportion.models.chat_server import ChatServer
from apportion.models.local_chat import LocalChat
from benchmarks.mock_judge import mock_judge
from tiny_families import CAUSAL, tiny_model

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Say something about f7x."}]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def local(lm: LanguageModel) -> LocalChat:
    return LocalChat(lm, batch_size=4)


def test_all_are_chat_models(local, tmp_path):
    for chat in (local, CallableChat(lambda messages: "yes"), ChatServer("m", "http://127.0.0.1:9/v1")):
        assert isinstance(chat, ChatModel)
    assert isinstance(ReplayChat(tmp_path / "answers.jsonl", local), ChatModel)


def test_a_local_model_says_what_the_likeliest_tokens_are(local, lm):
    said = local.generate(ASKED, SamplingParams(max_tokens=5, top_logprobs=3))

    ids = torch.tensor([lm.tokenizer(local.prompt(ASKED))["input_ids"]])
    for token, top in zip(said.tokens, said.top_logprobs, strict=True):
        expected = lm.model(ids).logits[0, -1].log_softmax(dim=-1)
        best = int(expected.argmax())
        assert token == lm.tokenizer.decode([best])
        assert max(top.values()) == pytest.approx(float(expected[best]), abs=1e-4)
        ids = torch.cat([ids, torch.tensor([[best]])], dim=1)
    assert len(said.tokens) == said.completion_tokens == 5
    assert said.finish_reason == "length"


def test_answers_do_not_depend_on_who_else_asks(local):
    questions = [[{"role": "user", "content": "word " * n}] for n in range(1, 9)]
    alone = [local.generate(question, SamplingParams(max_tokens=6)) for question in questions]
    together: dict[int, Generation] = {}

    def ask(number: int) -> None:
        together[number] = local.generate(questions[number], SamplingParams(max_tokens=6))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[number].text for number in range(len(questions))] == [each.text for each in alone]


def test_a_question_that_is_too_long_does_not_take_the_others_with_it(local):
    with pytest.raises(ChatError, match="takes 256") as failed:
        local.generate([{"role": "user", "content": "long " * 500}], SamplingParams(max_tokens=5))
    assert failed.value.kind == "too long"
    assert not failed.value.passing
    assert local.generate(ASKED, SamplingParams(max_tokens=2)).completion_tokens == 2


def test_sampling_repeats_itself_under_a_seed_and_leaves_the_global_random_state_alone(local):
    state = torch.get_rng_state()
    first, again, other = (
        local.generate(ASKED, SamplingParams(max_tokens=12, temperature=1.0, seed=seed)).text for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("family", CAUSAL)
def test_likelihoods_are_those_of_one_plain_pass_in_every_family(family, lm):
    chat = LocalChat(LanguageModel(family, tiny_model(family), _Letters()), batch_size=2)
    prefix, continuations = "the prefix", ["abc", "z", "longer one"]

    found = chat.score(prefix, continuations)

    for text, values in zip(continuations, found, strict=True):
        before, after = _Letters().ids(prefix), _Letters().ids(text)
        logits = tiny_model(family)(torch.tensor([before + after])).logits[0].float().log_softmax(dim=-1)
        expected = [float(logits[len(before) + n - 1, token]) for n, token in enumerate(after)]
        assert values == pytest.approx(expected, abs=1e-4)


class _Letters:
    """A tokenizer for models without one."""

    chat_template = None
    pad_token_id = eos_token_id = 0

    def ids(self, text: str) -> list[int]:
        return [3 + ord(character) % 90 for character in text]

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": self.ids(text)}


def test_answers_are_recorded_and_repeated_without_anybody_to_ask(tmp_path):
    asked = []

    def answer(messages):
        asked.append(messages)
        return f"answer {len(asked)}"

    recording = ReplayChat(tmp_path / "answers.jsonl", CallableChat(answer, "someone"))
    first = recording.generate(ASKED, SamplingParams(max_tokens=5))
    assert recording.generate(ASKED, SamplingParams(max_tokens=5)) == first
    assert len(asked) == 1

    replay = ReplayChat(tmp_path / "answers.jsonl")
    assert replay.generate(ASKED, SamplingParams(max_tokens=5)) == first
    assert replay.name == "someone"
    with pytest.raises(ChatError, match="holds no answer"):
        replay.generate(ASKED, SamplingParams(max_tokens=6))


def test_damaged_and_missing_records_are_named(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        ReplayChat(tmp_path / "nothing.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        ReplayChat(tmp_path / "bad.jsonl")


def test_a_server_answers_like_any_other(tmp_path):
    with mock_judge() as judge:
        chat = ChatServer("mock", judge.url)
        said = chat.generate(ASKED, SamplingParams(max_tokens=20))
    assert said.text == "[EXPLANATION]: texts with the word f7x"
    assert said.prompt_tokens > 0
    assert said.completion_tokens == 12
    with pytest.raises(NotImplementedError, match="no likelihoods"):
        chat.score("a", ["b"])


@pytest.mark.parametrize(
    ("fault", "kind", "passing"),
    [
        ("429", "busy", True),
        ("500", "server error", True),
        ("closed", "unreachable", True),
        ("silence", "timeout", True),
        ("cut off", "nonsense", False),
    ],
)
def test_what_a_server_does_wrong_has_a_name_and_another_attempt_mends_it(fault, kind, passing):
    with mock_judge({fault: 1.0}) as judge:
        once = ChatServer("mock", judge.url, retries=0, timeout=0.3)
        with pytest.raises(ChatError) as failed:
            once.generate(ASKED, SamplingParams(max_tokens=20))
        assert failed.value.kind == kind
        assert failed.value.passing == passing
    with mock_judge({fault: 1.0}) as judge:
        again = ChatServer("mock", judge.url, retries=1, timeout=0.3)
        assert "f7x" in again.generate(ASKED, SamplingParams(max_tokens=20)).text


def test_a_server_that_is_not_there_is_unreachable():
    with pytest.raises(ChatError, match="cannot be reached") as failed:
        ChatServer("mock", "http://127.0.0.1:9/v1", retries=0).generate(ASKED, SamplingParams(max_tokens=5))
    assert failed.value.kind == "unreachable"


def test_the_official_server_needs_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(InputError, match="OPENAI_API_KEY"):
        ChatServer("gpt")


def test_generations_survive_json():
    said = Generation("yes", tokens=("yes",), top_logprobs=({"yes": -0.1},), completion_tokens=1)
    assert Generation.from_json(json.loads(json.dumps(said.to_json()))) == said


def test_a_local_model_stops_where_it_is_told_to(local):
    whole = local.generate(ASKED, SamplingParams(max_tokens=8)).text
    stop = whole[len(whole) // 2]
    said = local.generate(ASKED, SamplingParams(max_tokens=8, stop=stop))
    assert said.text == whole.split(stop)[0]
    assert said.finish_reason == "stop"
