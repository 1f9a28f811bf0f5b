"""SEA: its lists, its estimator, what leaks and what learns."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.keys import SeaAttention, SeaSettings, attention_losses, fit_to_trace, mass_on_trace, model_loss
from apportion.keys.sea_distillation import dense_attention, mass_read, spread_estimate
from apportion.keys.sea_lists import (
    KeyLists,
    attend_lists,
    choose_columns,
    columns_of,
    key_starts,
    lists_of_columns,
    row_budget,
    row_lengths,
)
from apportion.keys.trace import Trace
from apportion.models.key_memory import LayerFacts
from apportion.training import TrainingSettings

SMALL = SeaSettings(heads=3, head_width=8, keys=4, columns=8, length=40, feature_factor=2)
WHOLE = dataclasses.replace(SMALL, causal=False)


def layer(settings: SeaSettings = SMALL, *, all_that_is_read: bool = False) -> SeaAttention:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sea = SeaAttention(settings).eval()
    if all_that_is_read:
        sea.mixing.weight.data.zero_()
        sea.mixing.bias.data.fill_(50.0)  # both sigmoids are 1
    return sea


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def qkv(n: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = draw(3, batch, 3, n, 8, seed=seed)
    return q, k, v


def every(batch: int, n: int) -> Tensor:
    return torch.ones(batch, n, dtype=torch.bool)


# --- columns and lists -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [8, 32, 64])
def test_keys_are_shared_out_among_columns(columns: int) -> None:
    lengths = torch.arange(1, 301)
    place = torch.arange(300).expand(300, 300)
    found, starts = columns_of(lengths, place, columns), key_starts(lengths, columns)
    for length in range(1, 301):
        here = found[length - 1, :length]
        brute = [int(((key + 0.5) / length * columns - 1e-4) // 1) for key in range(length)]
        assert here.tolist() == brute
        assert (here.diff() >= 0).all()
        assert int(here.min()) >= 0
        assert int(here.max()) < columns
        assert len(here.unique()) == min(length, columns)
        assert starts[length - 1].diff().tolist() == torch.bincount(here, minlength=columns).tolist()


def test_lists_hold_the_keys_of_the_chosen_columns_or_the_own_token() -> None:
    real = every(2, 30)
    real[1, 21:] = False
    for causal in (True, False):
        lengths = row_lengths(real, causal)
        chosen = draw(2, 3, 30, 8) > 1.2
        own = real.cumsum(1) - 1
        lists = lists_of_columns(chosen, lengths, own, 30)
        column = columns_of(lengths, torch.arange(30).expand(2, 30, 30), 8)
        mask = chosen.gather(3, column[:, None].expand(2, 3, 30, 30)) & (torch.arange(30) < lengths[..., None])[:, None]
        alone = ~mask.any(-1) & real[:, None]
        assert alone.any()
        mask |= alone[..., None] & torch.eye(30, dtype=torch.bool)
        assert torch.equal(lists.mask(), mask)
        assert torch.equal(lists.counts(), mask.sum(-1))
        same = KeyLists.of_mask(mask)
        assert torch.equal(same.col_indices, lists.col_indices)
        assert torch.equal(same.crow_indices, lists.crow_indices)


def test_attention_over_lists_is_masked_attention_with_the_same_gradients() -> None:
    mask = draw(2, 3, 20, 25, seed=5) > 0.7
    mask[0, 1, 3] = False  # a query without any key
    inputs = [draw(2, 3, n, 8, seed=seed).requires_grad_() for seed, n in enumerate((20, 25, 25))]
    out = attend_lists(*inputs, KeyLists.of_mask(mask), 0.3)
    logits = (inputs[0] @ inputs[1].transpose(-1, -2) * 0.3).masked_fill(~mask, -1e30)
    dense = (logits.softmax(-1) * mask) @ inputs[2]
    torch.testing.assert_close(out, dense)
    assert not out[0, 1, 3].any()
    weight = draw(2, 3, 20, 8, seed=9)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((dense * weight).sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharing", ["heads", "none", "queries", "all"])
def test_each_pool_spends_its_budget_on_its_best(sharing: Any) -> None:
    scores, budget = (
        draw(2, 3, 10, 8).softmax(-1),
        torch.randint(3, 20, (2, 10), generator=torch.Generator().manual_seed(1)),
    )
    chosen = choose_columns(scores, budget, sharing)
    if sharing == "heads":
        assert torch.equal(chosen.sum((1, 3)), budget)
    elif sharing == "none":
        assert torch.equal(chosen.sum(3), (budget[:, None] / 3).round().long().expand(2, 3, 10))
    elif sharing == "queries":
        assert torch.equal(chosen.sum((2, 3)), (budget.sum(1, keepdim=True) / 3).round().long().expand(2, 3))
    else:
        assert torch.equal(chosen.sum((1, 2, 3)), budget.sum(1))
    pools = {"heads": (0, 2), "none": (0, 1, 2), "queries": (0, 1), "all": (0,)}[sharing]
    others = [dim for dim in range(4) if dim not in pools]
    worst_in = scores.masked_fill(~chosen, torch.inf).amin(others)
    best_out = scores.masked_fill(chosen, -torch.inf).amax(others)
    assert (worst_in >= best_out).all()


@pytest.mark.parametrize("causal", [True, False])
def test_heads_read_their_keys_on_average_and_never_more_than_there_are(causal: bool) -> None:
    settings = dataclasses.replace(SMALL, causal=causal, length=128, keys=12, columns=16)
    lists = layer(settings)(*qkv(100)).lists
    lengths = row_lengths(every(2, 100), causal)
    in_row = lists.counts().sum(1)
    assert (lists.counts() <= lengths[:, None]).all()
    assert (in_row[lengths <= 12] == 3 * lengths[lengths <= 12]).all()
    # A column more or less, columns of one key more or less, and heads that read their own token.
    off = (in_row - 36).abs()[lengths >= 16]
    per_column = (lengths / 16).ceil()[lengths >= 16]
    assert (off <= per_column / 2 + 3 * 12 * 16 / lengths[lengths >= 16] + 3).all()
    assert float(in_row[lengths >= 16].float().mean()) == pytest.approx(36, rel=0.06)
    between = (lengths > 12) & (lengths < 16)
    assert (in_row[between] == 36).all()


def test_the_budget_is_in_columns_of_the_keys_there_are() -> None:
    lengths = torch.tensor([[0, 1, 4, 8, 16, 40]])
    assert row_budget(lengths, 4, 3, 8).tolist() == [[1, 12, 12, 12, 6, 2]]


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sharing", ["heads", "none"])
def test_a_column_for_every_key_and_a_budget_for_all_is_dense_attention(causal: bool, sharing: Any) -> None:
    settings = dataclasses.replace(SMALL, causal=causal, columns=40, keys=40, sharing=sharing)
    q, k, v = qkv(40)
    real = every(2, 40)
    real[0, :7] = False
    output = layer(settings, all_that_is_read=True)(q, k, v, real)
    exact = dense_attention(q, k, real, causal) @ v
    torch.testing.assert_close(output.context, exact * real[:, None, :, None], rtol=1e-4, atol=1e-5)
    small = layer(dataclasses.replace(settings, columns=8), all_that_is_read=True)
    torch.testing.assert_close(small(q, k, v, real).context, output.context, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_in_a_causal_layer_hears_of_a_later_token() -> None:
    sea = layer()
    for place in (39, 20, 7):
        one, other = qkv(40), qkv(40)
        for each in other:
            each[:, :, place:] = 5 * draw(2, 3, 40 - place, 8, seed=place)
        before, after = sea(*one), sea(*other)
        for name in ("context", "estimate", "read"):
            torch.testing.assert_close(
                getattr(before, name)[:, :, :place], getattr(after, name)[:, :, :place], rtol=0, atol=1e-6
            )
        assert torch.equal(before.lists.mask()[:, :, :place], after.lists.mask()[:, :, :place])
        assert not torch.allclose(before.context[:, :, place], after.context[:, :, place])


@torch.no_grad()
@pytest.mark.parametrize("settings", [SMALL, WHOLE], ids=["causal", "whole"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("padding", [5, 8])
def test_padding_changes_nothing(settings: SeaSettings, left: bool, padding: int) -> None:
    sea, parts = layer(settings), qkv(33)
    real = every(2, 33)
    kept = slice(padding, 33) if left else slice(0, 33 - padding)
    real[0] = False
    real[0, kept] = True
    for each in parts:
        each[0, :, ~real[0]] = 1e3
    padded, alone = sea(*parts, real), sea(*(each[:1, :, kept] for each in parts))
    torch.testing.assert_close(padded.context[:1, :, kept], alone.context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded.estimate[:1, :, kept], alone.estimate, rtol=1e-4, atol=1e-5)
    assert not padded.context[0, :, ~real[0]].any()
    n = 33 - padding
    assert torch.equal(padded.lists.mask()[:1, :, :n, :n], alone.lists.mask())
    torch.testing.assert_close(padded.context[1:], sea(*(each[1:] for each in parts)).context, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 6, 17])
def test_decoding_gives_what_a_whole_pass_gives(prompt: int) -> None:
    sea, parts = layer(), qkv(30)
    real = every(2, 30)
    if prompt > 6:
        real[0, :4] = False
    whole = sea(*parts, real).context
    context, state = sea.begin(*(each[:, :, :prompt] for each in parts), real[:, :prompt])
    torch.testing.assert_close(context, whole[:, :, :prompt], rtol=1e-4, atol=1e-5)
    for place in range(prompt, 30):
        step = sea.step(*(each[:, :, place : place + 1] for each in parts), state)
        torch.testing.assert_close(step, whole[:, :, place : place + 1], rtol=1e-4, atol=1e-5)


def test_the_budget_may_change_after_training() -> None:
    sea, parts = layer(), qkv(40)
    counts = [float(sea(*parts, budget=keys).lists.counts()[:, :, -1].float().mean()) for keys in (2, 4, 8)]
    assert counts == [pytest.approx(each, abs=2) for each in (2, 4, 8)]
    same = sea(*parts, budget=4).context
    assert torch.equal(same, sea(*parts).context)


@torch.no_grad()
def test_jitter_moves_some_keys_in_training_only() -> None:
    settings = dataclasses.replace(SMALL, jitter=0.3)
    sea, parts = layer(settings), qkv(40)
    steady = sea(*parts).lists.mask()
    assert torch.equal(steady, sea(*parts).lists.mask())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        moved = sea.train()(*parts).lists.mask()
    assert 0 < float((moved != steady).float().mean()) < 0.1
    assert not moved.triu(1).any()
    sea.settings = dataclasses.replace(settings, jitter=1e-9)
    assert torch.equal(sea(*parts).lists.mask(), steady)


# --- learning --------------------------------------------------------------------------------------------------------


def learned_by(loss: Callable[[Any], Tensor], settings: SeaSettings = SMALL) -> set[str]:
    """Names of the parameters, and of inputs, that a loss sends a gradient to."""
    sea, (q, k, v) = layer(settings).train(), (each.requires_grad_() for each in qkv(40))
    output = sea(q, k, v)
    real, teacher = every(2, 40), dense_attention(*qkv(40, seed=1)[:2], every(2, 40), settings.causal)
    losses = attention_losses(output, q, k, teacher, teacher @ qkv(40, seed=1)[2], real, settings.causal)
    loss(losses).backward()
    named = dict(sea.named_parameters()) | {"queries": q, "keys": k, "values": v}
    return {name for name, tensor in named.items() if tensor.grad is not None and tensor.grad.any()}


@pytest.mark.parametrize("settings", [SMALL, WHOLE], ids=["causal", "whole"])
def test_the_estimator_learns_from_its_two_losses_alone(settings: SeaSettings) -> None:
    others = learned_by(lambda losses: losses.scores + losses.context, settings)
    assert others == {"queries", "keys", "values", "mixing.weight", "mixing.bias"}
    own = learned_by(lambda losses: losses.estimate, settings)
    parameters = {name for name, _ in layer(settings).named_parameters() if name.startswith("estimator.")}
    assert parameters <= own
    assert "mixing.weight" not in own


@torch.no_grad()
def test_losses_vanish_where_the_student_is_the_teacher() -> None:
    q, k, v = qkv(8)
    everything = dataclasses.replace(SMALL, columns=8, keys=40)
    output = layer(everything, all_that_is_read=True)(q, k, v)
    real = every(2, 8)
    teacher = dense_attention(q, k, real, True)
    losses = attention_losses(output, q, k, teacher, teacher @ v, real, True)
    assert float(losses.scores) == pytest.approx(0, abs=1e-5)
    assert float(losses.context) == pytest.approx(0, abs=1e-10)
    assert float(losses.estimate) > 1e-3
    spread = spread_estimate(output.estimate, real, True)
    same = attention_losses(output, q, k, spread, teacher @ v, real, True)
    assert float(same.estimate) == pytest.approx(0, abs=1e-5)


def test_an_estimate_is_spread_over_the_keys_of_its_columns() -> None:
    real = every(1, 20)
    real[0, 13:] = False
    estimate = draw(1, 3, 20, 8).softmax(-1)
    spread = spread_estimate(estimate, real, True)
    assert not spread.triu(1).any()
    torch.testing.assert_close(spread[:, :, :13].sum(-1), torch.ones(1, 3, 13))
    assert not spread[:, :, 13:].any()
    expected = estimate[0, 0, 11, [int((j + 0.5) / 12 * 8 - 1e-4) for j in range(12)]]
    torch.testing.assert_close(spread[0, 0, 11, :12], expected / expected.sum())


def test_the_loss_of_a_whole_model_is_weighted_as_in_the_paper() -> None:
    a, b, logits, labels = draw(2, 5, 4), draw(2, 5, 4, seed=1), draw(2, 5, 7), torch.zeros(2, 5, dtype=torch.int64)
    other = logits + draw(2, 5, 7, seed=1)
    hidden = 5 * (a - b).square().mean()
    q, p = logits.log_softmax(-1), other.log_softmax(-1)
    divergence = 0.2 * (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(model_loss([(a, b)], logits, other), hidden + divergence)
    with_labels = model_loss([(a, b), (a, a)], logits, other, labels)
    torch.testing.assert_close(with_labels, hidden / 2 + divergence - 0.1 * q[..., 0].mean())


def test_an_estimator_learns_a_layer_of_a_trace(make_step: Any) -> None:
    steps = [make_step(40, batch=1, seed=seed) for seed in range(3)]
    trace = Trace({0: LayerFacts(layer=0, heads=4, groups=2, width=8, layers=1)}, {0: steps})
    settings = SeaSettings(heads=4, head_width=8, keys=4, columns=8, length=40, feature_factor=2)
    sea, result = fit_to_trace(trace, 0, settings, TrainingSettings(steps=40, learning_rate=1e-2, log_every=1))
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    mass, keys = mass_on_trace(sea, steps[0])
    untrained, _ = mass_on_trace(layer(settings), steps[0])
    assert untrained < mass < 1
    assert keys == pytest.approx(4, abs=0.6)
    most, _ = mass_on_trace(sea, steps[0], budget=40)
    assert most == pytest.approx(1, abs=1e-5)
    with pytest.raises(InputError, match="layer 0 has 4 heads of width 8"):
        fit_to_trace(trace, 0, SMALL, TrainingSettings(steps=1, learning_rate=1e-2))


def test_mass_read_is_a_share_of_the_exact_weights() -> None:
    weights = dense_attention(*qkv(10)[:2], every(2, 10), True)
    mask = torch.eye(10, dtype=torch.bool).expand(2, 3, 10, 10)
    expected = weights.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(mass_read(KeyLists.of_mask(mask), weights), expected)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": 48}, "columns=48 is more than length=40"),
        ({"columns": 6}, "columns=6: the decoder needs a multiple of 4"),
        ({"columns": 7, "causal": False}, "columns=7: the decoder needs a multiple of 2"),
        ({"keys": 41}, "keys=41: from 1 to length=40"),
        ({"keys": 0}, "keys=0: at least 1"),
        ({"sharing": "all"}, "sharing='all': a causal layer would leak"),
        ({"jitter": 1.5}, "jitter=1.5"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(SMALL, **changed)


def test_inputs_that_cannot_work_are_refused() -> None:
    sea = layer()
    with pytest.raises(InputError, match="41 tokens: this layer was made for length=40"):
        sea(*qkv(41))
    with pytest.raises(InputError, match="2 heads of width 8: this layer has heads=3"):
        sea(*(each[:, :2] for each in qkv(40)))
    with pytest.raises(InputError, match="keys=50: from 1 to length=40"):
        sea(*qkv(40), budget=50)
    with pytest.raises(InputError, match="does not decode"):
        layer(WHOLE).begin(*qkv(40))
    _, state = sea.begin(*qkv(40))
    with pytest.raises(InputError, match="one token more than length=40"):
        sea.step(*qkv(1), state)


def test_the_settings_for_bert_are_the_papers() -> None:
    settings = SeaSettings.whole()
    assert (settings.columns, settings.feature_factor, settings.causal) == (128, 1.0, False)
    assert settings.features == 266
    assert SeaSettings().features == 2129
