"""Decoding by ops that choose and attend in one go is decoding by the steps that these stand for."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from apportion.keys import ComposedMemory, KeyBudget
from apportion.keys.chunks import ChunkSelection
from apportion.keys.double_sparsity import LabelSelector
from apportion.keys.landmarks import Landmarks
from apportion.keys.selectors import TopKeys
from apportion.keys.shadow_kv import ShadowKV
from apportion.keys.trace import part_of
from apportion.models.key_memory import LayerFacts, Rotation, Step

PROMPT, TOKENS = 90, 100


def make_step(group: int, *, dtype: torch.dtype, softcap: float | None, padding: int = 0) -> Step:
    draw = torch.Generator().manual_seed(3)

    def numbers(heads: int) -> torch.Tensor:
        return torch.randn(2, heads, TOKENS, 16, generator=draw)

    angles = torch.arange(TOKENS)[None, :, None] * torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01])
    rotation = Rotation(angles.cos(), angles.sin())
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :padding] = False
    queries, keys, values = (numbers(heads) for heads in (2 * group, 2, 2))
    queries, keys, values = (each.to(dtype) for each in (rotation.apply(queries), rotation.apply(keys), values))
    return Step(queries, keys, values, real, 0.25, softcap, rotation)


def decode(memory: ComposedMemory, step: Step) -> list[Any]:
    """A prompt, some tokens one by one, two at once, and one more: outputs and who was read, at each."""
    memory.attend(part_of(step, 0, PROMPT))
    memory.close()
    found = []
    borders = [*range(PROMPT, 97), 99, TOKENS]
    for start, stop in itertools.pairwise(borders):
        out = memory.attend(part_of(step, start, stop))
        selection = memory.newest_selection
        assert selection is not None
        found.append((out, selection.mask(stop), replace(memory.usage)))
    return found


def compare(one: list[Any], other: list[Any], dtype: torch.dtype) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for (out, mask, usage), (same_out, same_mask, same_usage) in zip(one, other, strict=True):
        assert torch.equal(mask, same_mask)
        torch.testing.assert_close(out, same_out, rtol=tolerance, atol=tolerance)
        assert usage == same_usage


CASES = [(3, torch.float32, None), (1, torch.float32, 2.0), (3, torch.bfloat16, 2.0)]


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("group", "dtype", "softcap"), CASES)
@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("budget", [{"budget": KeyBudget(keys=12)}, {"budget": KeyBudget(share=0.5), "counted": "all"}])
def test_shadow_kv(
    monkeypatch: pytest.MonkeyPatch,
    budget: dict[str, Any],
    offload: bool,
    group: int,
    dtype: torch.dtype,
    softcap: float | None,
    padding: int,
) -> None:
    step = make_step(group, dtype=dtype, softcap=softcap, padding=padding)
    facts = LayerFacts(layer=0, heads=2 * group, groups=2, width=16, layers=3)
    method = ShadowKV(**budget, chunk=4, local=1, outliers=2, rank_share=0.4, offload=offload)
    fast, slow = method.memory(facts), method.memory(facts)
    found = decode(fast, step)
    assert isinstance(fast.newest_selection, ChunkSelection) != bool(padding)
    monkeypatch.setattr(Landmarks, "in_one_go", False)
    compare(found, decode(slow, step), dtype)
    assert not isinstance(slow.newest_selection, ChunkSelection)
    assert isinstance(fast.selector, Landmarks)
    assert isinstance(slow.selector, Landmarks)
    assert fast.selector.hit_rate == slow.selector.hit_rate


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 2.0)])
@pytest.mark.parametrize(("bits", "of_group"), [(4, False), (16, True)])
@pytest.mark.parametrize("policy", ["head", "max", "mean", "max of softmax"])
def test_labels(
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    bits: int,
    of_group: bool,
    dtype: torch.dtype,
    softcap: float | None,
    padding: int,
) -> None:
    step = make_step(3, dtype=dtype, softcap=softcap, padding=padding)
    facts = LayerFacts(layer=0, heads=6, groups=2, width=16, layers=3)
    channels = torch.rand(2 if of_group else 6, 16, generator=torch.Generator().manual_seed(0)).argsort(-1)[:, :5]
    budget = KeyBudget(share=0.2, sinks=1, recent=2)

    def memory() -> ComposedMemory:
        return ComposedMemory(facts, selector=LabelSelector(channels, bits, budget, policy))

    found = decode(memory(), step)
    monkeypatch.setattr(LabelSelector, "select", TopKeys.select)
    compare(found, decode(memory(), step), dtype)


def test_what_needs_a_gradient_takes_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step(3, dtype=torch.float32, softcap=None)
    facts = LayerFacts(layer=0, heads=6, groups=2, width=16, layers=3)
    memory = ShadowKV(KeyBudget(keys=12), chunk=4, local=1, outliers=2).memory(facts)
    memory.attend(part_of(step, 0, PROMPT))
    queries = step.queries.clone().requires_grad_()
    out = memory.attend(part_of(replace(step, queries=queries), PROMPT, PROMPT + 1))
    out.square().sum().backward()
    assert queries.grad is not None
    assert queries.grad[:, :, PROMPT].abs().max() > 0
