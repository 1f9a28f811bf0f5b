import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.models import LanguageModel, Site
from apportion.models.heads import (
    HeadEdit,
    edit_heads,
    head_outputs,
    heads_written_by,
    write_weight,
    written_by_heads,
)
from apportion.models.patching import ablate_heads, attribute_heads, keep_heads, mean_outputs, patch_heads
from apportion.models.prompts import TokenPairs, TokenPrompts, judge, predict
from apportion.models.restart import Restart
from apportion.models.splice import splice

FAMILIES = [
    "llama", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "phi", "gpt2", "gpt_neox", "opt", "opt_350m",
]  # fmt: skip


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Those that predict the next token."""
    return str(request.param)


@pytest.fixture
def lm(model: Any) -> LanguageModel:
    return LanguageModel("tiny", model, tokenizer=None)


def token_pairs() -> TokenPairs:
    """Three pairs of seven tokens; the second pair is padded to that length."""
    generator = torch.Generator().manual_seed(3)
    clean = torch.randint(3, 97, (3, 7), generator=generator)
    other = clean.clone()
    other[:, 2] = torch.randint(3, 97, (3,), generator=generator)
    other[:, 4] = torch.randint(3, 97, (3,), generator=generator)
    mask = torch.ones_like(clean)
    mask[1, 5:] = 0
    positions = {"word": torch.tensor([2, 2, 4]), "end": torch.tensor([6, 4, 6])}
    answers, distractors = torch.tensor([[5], [6], [7]]), torch.tensor([[8, 9], [10, -1], [11, 12]])
    both = [TokenPrompts(ids * mask, mask, positions, answers, distractors) for ids in (clean, other)]
    return TokenPairs("made up", both[0], both[1], "logit_difference")


def test_the_heads_together_write_what_the_attention_puts_out(lm: LanguageModel, parts: Any, blocks: Any) -> None:
    from apportion.models import capture

    prompts = token_pairs().clean
    outputs = head_outputs(lm, prompts.input_ids, prompts.attention_mask)
    written = written_by_heads(lm, outputs)
    for layer in range(lm.n_layers):
        site = Site(layer, "attn_out")
        whole = capture(lm, [site], prompts.input_ids, prompts.attention_mask)[site]
        bias = getattr(parts(blocks[layer])["attention"], "bias", None)
        expected = whole if bias is None else whole - bias
        torch.testing.assert_close(written[:, :, layer].sum(2), expected, rtol=1e-4, atol=1e-5)
        assert write_weight(lm, layer).shape == (lm.n_heads, lm.head_width, lm.d_model)


@pytest.mark.parametrize("first", [0, 3])
def test_a_restart_predicts_what_a_whole_pass_does(lm: LanguageModel, first: int) -> None:
    prompts = token_pairs().clean
    whole = predict(lm, prompts)
    restart = Restart(lm, prompts, first)
    for layer in range(lm.n_layers):
        twice = restart.logits(layer, copies=2)
        torch.testing.assert_close(twice, torch.cat([whole, whole]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("role", [None, "word"])
def test_patching_from_a_restart_is_patching_in_a_whole_pass(lm: LanguageModel, role: str | None) -> None:
    pairs = token_pairs()
    found = patch_heads(lm, pairs, role=role)
    other = head_outputs(lm, pairs.counterfactual.input_ids, pairs.counterfactual.attention_mask)
    before = judge(predict(lm, pairs.clean), pairs.clean, pairs.metric)
    for layer in range(lm.n_layers):
        for head in range(lm.n_heads):
            values, positions = other[:, :, layer, head], None
            if role is not None:
                positions = pairs.clean.positions[role]
                values = values[torch.arange(3), positions]
            with edit_heads(lm, [HeadEdit(layer, head, values, positions)]):
                after = judge(predict(lm, pairs.clean), pairs.clean, pairs.metric)
            torch.testing.assert_close(found[:, layer, head], before - after, rtol=1e-3, atol=1e-5)


def test_patching_all_heads_of_the_first_layer_of_an_equal_prompt_changes_nothing(lm: LanguageModel) -> None:
    pairs = token_pairs()
    same = TokenPairs("same", pairs.clean, pairs.clean, pairs.metric)
    assert patch_heads(lm, same).abs().max() < 1e-5
    assert patch_heads(lm, same, metric="kl").abs().max() < 1e-5


def test_denoising_is_noising_of_the_pair_turned_round(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    turned = TokenPairs("turned", pairs.counterfactual, pairs.clean, pairs.metric)
    torch.testing.assert_close(patch_heads(lm, pairs, direction="denoising"), -patch_heads(lm, turned))
    divergence = patch_heads(lm, pairs, direction="denoising", metric="kl")
    torch.testing.assert_close(divergence, patch_heads(lm, turned, metric="kl"))
    assert divergence.min() > -1e-5


def test_ablation_puts_zero_or_the_mean_in_a_heads_place(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    before = judge(predict(lm, pairs.clean), pairs.clean, pairs.metric)
    means = mean_outputs(lm, pairs)
    both = torch.cat([
        head_outputs(lm, each.input_ids, each.attention_mask) for each in (pairs.clean, pairs.counterfactual)
    ])  # fmt: skip
    torch.testing.assert_close(means[0, 1], both[:, 1].mean(0))
    torch.testing.assert_close(means[0, 6], both[[0, 2, 3, 5], 6].mean(0))
    for kind, values in (("zero", torch.zeros(1, 7, lm.head_width)), ("mean", means[:, :, 1, 2])):
        with edit_heads(lm, [HeadEdit(1, 2, values)]):
            after = judge(predict(lm, pairs.clean), pairs.clean, pairs.metric)
        torch.testing.assert_close(ablate_heads(lm, pairs, kind)[:, 1, 2], before - after, rtol=1e-3, atol=1e-5)


def test_the_mean_of_an_ablation_may_be_over_more_prompts(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    few = pairs.select(slice(0, 2))
    torch.testing.assert_close(
        ablate_heads(lm, few, means_over=pairs), ablate_heads(lm, pairs)[:2], rtol=1e-3, atol=1e-5
    )
    assert not torch.allclose(ablate_heads(lm, few), ablate_heads(lm, pairs)[:2], atol=1e-3)
    shorter = [replace(each, input_ids=each.input_ids[:, :5], attention_mask=each.attention_mask[:, :5])
               for each in (pairs.clean, pairs.counterfactual)]  # fmt: skip
    with pytest.raises(InputError, match="means_over has 5 tokens"):
        ablate_heads(lm, few, means_over=TokenPairs("short", shorter[0], shorter[1], pairs.metric))


def test_attribution_is_the_slope_of_patching(lm: LanguageModel) -> None:
    pairs = token_pairs()
    estimate = attribute_heads(lm, pairs)
    outputs = [head_outputs(lm, each.input_ids, each.attention_mask) for each in (pairs.clean, pairs.counterfactual)]
    step = 2e-3  # small, for the kinks of ReLUs
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        here = [each[:, :, layer, head] for each in outputs]
        moved = []
        for sign in (1, -1):
            with edit_heads(lm, [HeadEdit(layer, head, here[0] + sign * step * (here[1] - here[0]))]):
                moved.append(judge(predict(lm, pairs.clean), pairs.clean, pairs.metric))
        slope = (moved[1] - moved[0]) / (2 * step)
        torch.testing.assert_close(estimate[:, layer, head], slope, rtol=2e-2, atol=2e-3)


def test_importance_is_the_size_of_attribution_against_silence(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    importance = attribute_heads(lm, pairs, kind="importance")
    outputs = head_outputs(lm, pairs.clean.input_ids, pairs.clean.attention_mask)[:, :, 2, 1]
    moved = []
    for factor in (1.01, 0.99):
        with edit_heads(lm, [HeadEdit(2, 1, outputs * factor)]):
            moved.append(judge(predict(lm, pairs.clean), pairs.clean, pairs.metric))
    torch.testing.assert_close(importance[:, 2, 1], ((moved[0] - moved[1]) / 0.02).abs(), rtol=2e-2, atol=2e-3)


def test_keeping_all_heads_is_the_model_and_keeping_none_leaves_no_head_its_own_work(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    every = torch.ones(lm.n_layers, lm.n_heads, dtype=torch.bool)
    torch.testing.assert_close(keep_heads(lm, pairs, every), judge(predict(lm, pairs.clean), pairs.clean, pairs.metric))
    other = head_outputs(lm, pairs.counterfactual.input_ids, pairs.counterfactual.attention_mask)
    edits = [
        HeadEdit(layer, head, other[:, :, layer, head]) for layer in range(lm.n_layers) for head in range(lm.n_heads)
    ]
    with edit_heads(lm, edits):
        alone = judge(predict(lm, pairs.clean), pairs.clean, pairs.metric)
    torch.testing.assert_close(keep_heads(lm, pairs, ~every), alone)


def test_gradients_flow_into_the_values_of_an_edit(llama: Any) -> None:
    lm, pairs = LanguageModel("tiny", llama, None), token_pairs()
    values = torch.zeros(3, lm.head_width, requires_grad=True)
    with edit_heads(lm, [HeadEdit(0, 1, values, pairs.clean.positions["word"])]):
        judge(predict(lm, pairs.clean), pairs.clean, pairs.metric).sum().backward()
    assert values.grad is not None
    assert values.grad.abs().max() > 0


def test_metrics_read_answers_and_distractors_and_never_the_filling() -> None:
    prompts = token_pairs().clean
    logits = torch.zeros(3, 97)
    logits[:, -1] = 100  # what index -1 would read
    logits[0, 5], logits[0, 9], logits[1, 6], logits[1, 10] = 3.0, 1.0, 2.0, 5.0
    assert judge(logits, prompts, "logit_difference").tolist() == [2.0, -3.0, 0.0]
    sure = torch.full((3, 97), -math.inf)
    sure[:, [5, 8, 9, 50]] = 0
    assert judge(sure, prompts, "probability_difference").tolist() == [-0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda lm, pairs: patch_heads(lm, pairs, role="verb"), "role 'verb'"),
        (lambda lm, pairs: edit_heads(lm, [HeadEdit(9, 0, torch.zeros(1, 7, 8))]).__enter__(), "layer 9"),
        (lambda lm, pairs: HeadEdit(0, 0, torch.zeros(3, 8)), "need positions"),
    ],
)
def test_what_cannot_be_is_refused(llama: Any, call: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        call(LanguageModel("tiny", llama, None), token_pairs())


@torch.no_grad()
def test_another_projection_reads_the_heads_and_is_gone_afterwards(lm: LanguageModel) -> None:
    ids = token_pairs().clean.input_ids
    before = lm.model(ids).logits
    weight, bias = write_weight(lm, 1), torch.linspace(-1, 1, lm.d_model)
    with heads_written_by(lm, 1, weight, bias):
        found = lm.model(ids).logits
    with splice(lm, Site(1, "attn_out"), lambda written: written + bias):
        expected = lm.model(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)
    assert torch.equal(lm.model(ids).logits, before)
