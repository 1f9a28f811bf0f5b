"""What a model writes depends on the prompt, the seed and the edits in force, and on nothing else."""

from pathlib import Path

import pytest
import torch

from apportion.errors import InputError
from apportion.models import LanguageModel, Site, load, splice
from apportion.models.generate import encode_prompts, generate


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


def test_prompts_of_different_lengths_give_what_each_gives_alone(lm: LanguageModel) -> None:
    prompts = ["a statement", "assignment to names of an object"]
    together = generate(lm, prompts, tokens=6)
    assert together == [generate(lm, [prompt], tokens=6)[0] for prompt in prompts]
    assert together == lm.generate(prompts, tokens=6)
    assert together[:1] == lm.generate(prompts[0], tokens=6)
    given = encode_prompts(lm, prompts)
    assert given["attention_mask"].sum(dim=1).tolist()[0] < given["input_ids"].shape[1]
    assert given["attention_mask"][:, -1].tolist() == [1, 1]


def test_a_seed_decides_what_is_drawn_and_nothing_else_is_touched(lm: LanguageModel) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = generate(lm, ["a statement"], temperature=1.0, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert generate(lm, ["a statement"], temperature=1.0, seed=1) == first
    assert generate(lm, ["a statement"], temperature=1.0, seed=2) != first


def test_a_splice_in_force_is_heard_in_what_is_written(lm: LanguageModel) -> None:
    plain = generate(lm, ["a statement"])
    with splice(lm, Site(1, "residual"), lambda x: x.flip(-1)):
        assert generate(lm, ["a statement"]) != plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "a prompt is empty"),
        ({"prompts": ["a", ""]}, "a prompt is empty"),
        ({"tokens": 0}, "tokens=0: at least 1"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"chat": True}, "has no chat template"),
    ],
)
def test_what_gives_no_text_is_refused(lm: LanguageModel, settings: dict, message: str) -> None:
    settings = {"prompts": ["a"], **settings}
    with pytest.raises(InputError, match=message):
        generate(lm, **settings)
