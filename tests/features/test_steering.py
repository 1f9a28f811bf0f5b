"""Editing the codes of a running model: what changes, where it changes, and what must stay to the bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.allocate import Allocation, MutualChoice, TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder, steering
from apportion.models import LanguageModel, Site, capture, splice
from apportion.models.hooks import visit
from tiny_families import CAUSAL, VOCABULARY, tiny_model

SITE = Site(1, "residual")
D, F = 32, 64
IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
EVERY = {"skip_first": False}


@pytest.fixture(params=CAUSAL)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


def dictionary_for(model: Any, site: Site = SITE, k: int = 4) -> SparseAutoencoder:
    sae = SparseAutoencoder(D, F, TokenChoice(k))
    sae.initialise_from(at(model, site).flatten(0, 1))
    return sae.eval().requires_grad_(False)


def at(model: Any, site: Site = SITE, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    return capture(model, [site], ids, mask)[site]


def codes_of(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Dense codes ``[batch, time, features]``."""
    return sae.encode(x.flatten(0, -2), mode="threshold").to_dense().unflatten(0, x.shape[:-1])


def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def moved(before: Tensor, after: Tensor) -> list[list[bool]]:
    return (before != after).any(dim=-1).tolist()


# --- what must not change --------------------------------------------------------------------------------------------


def test_an_edit_that_edits_nothing_leaves_every_logit_to_the_bit(model: Any) -> None:
    sae = dictionary_for(model)
    plain = logits(model)
    for edit in (sae.steer(model, SITE, {}), sae.clamp(model, SITE, {}), sae.ablate(model, SITE, [])):
        with edit:
            assert torch.equal(logits(model), plain)


def test_an_encoder_can_be_edited_too() -> None:
    bert = tiny_model("bert")
    sae = dictionary_for(bert)
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    plain = at(bert, mask=mask)
    with sae.steer(bert, SITE, {1: 5.0}):
        assert moved(plain, at(bert, mask=mask)) == [[False, *[True] * 6], [False, *[True] * 4, False, False]]


def test_ablating_a_silent_feature_leaves_every_logit_to_the_bit(model: Any) -> None:
    sae = dictionary_for(model)
    silent = int((codes_of(sae, at(model)).sum(dim=(0, 1)) == 0).nonzero()[0])
    plain = logits(model)
    with sae.ablate(model, SITE, [silent], **EVERY):
        assert torch.equal(logits(model), plain)


def test_tokens_where_an_ablated_feature_is_silent_keep_their_activations_to_the_bit(llama: Any) -> None:
    sae = dictionary_for(llama)
    x = at(llama)
    fires = codes_of(sae, x)
    feature = int((fires > 0).sum(dim=(0, 1)).argmax())
    with sae.ablate(llama, SITE, [feature], **EVERY):
        assert moved(x, at(llama)) == (fires[..., feature] > 0).tolist()


def test_an_error_inside_leaves_the_model_as_it_was(llama: Any) -> None:
    sae = dictionary_for(llama)
    plain = logits(llama)

    def fail(codes: Allocation) -> Allocation:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), steering.edit_codes(llama, SITE, sae, fail):
        logits(llama)
    assert torch.equal(logits(llama), plain)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in llama.modules())


# --- what changes ----------------------------------------------------------------------------------------------------


def test_the_activation_changes_by_the_change_of_the_decoded_code(model: Any) -> None:
    sae = dictionary_for(model)
    x = at(model)
    codes = codes_of(sae, x)
    feature = int((codes > 0).sum(dim=(0, 1)).argmax())
    row = sae.decoder_weight[feature] / sae.input_scale
    wanted = {
        sae.steer(model, SITE, {feature: 3.0}, **EVERY): torch.full(x.shape[:2], 3.0),
        sae.clamp(model, SITE, {feature: 2.0}, **EVERY): 2.0 - codes[..., feature],
        sae.ablate(model, SITE, [feature], **EVERY): -codes[..., feature],
    }
    for edit, change in wanted.items():
        with edit:
            torch.testing.assert_close(at(model) - x, change.unsqueeze(-1) * row, rtol=1e-4, atol=1e-5)


def test_the_quick_way_to_steer_is_the_edit_of_codes(model: Any) -> None:
    sae = dictionary_for(model)
    strengths = {5: 4.0, 3: -2.0}
    with sae.steer(model, SITE, strengths):
        quick = logits(model)
    with steering.edit_codes(model, SITE, sae, steering.adding(strengths)):
        slow = logits(model)
    torch.testing.assert_close(quick, slow, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(quick, logits(model), atol=1e-2)


def test_without_its_error_the_activation_is_the_decoded_edited_code(llama: Any) -> None:
    sae = dictionary_for(llama)
    with splice(llama, SITE, lambda x: sae(x.flatten(0, 1)).output.view_as(x)):
        reconstructed = logits(llama)
    for edit in (
        sae.steer(llama, SITE, {}, keep_error=False, **EVERY),
        sae.ablate(llama, SITE, [], keep_error=False, **EVERY),
    ):
        with edit:
            torch.testing.assert_close(logits(llama), reconstructed)
    x = at(llama)
    edited = codes_of(sae, x)
    edited[..., 7] += 5.0
    with sae.steer(llama, SITE, {7: 5.0}, keep_error=False, **EVERY):
        expected = (edited @ sae.decoder_weight + sae.decoder_bias) / sae.input_scale
        torch.testing.assert_close(at(llama), expected, rtol=1e-4, atol=1e-5)


def test_edits_in_turn_see_what_the_one_before_left(llama: Any) -> None:
    sae = dictionary_for(llama)
    x = at(llama)
    codes = codes_of(sae, x)
    edit = steering.in_turn(steering.adding({2: 1.0, 9: 1.0}), steering.setting({2: 4.0, 11: 0.0}))
    with steering.edit_codes(llama, SITE, sae, edit, **EVERY):
        change = at(llama) - x
    wanted = codes.clone()
    wanted[..., 9] += 1.0
    wanted[..., 2], wanted[..., 11] = 4.0, 0.0
    expected = (wanted - codes) @ sae.decoder_weight / sae.input_scale
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_a_dictionary_that_writes_elsewhere_is_edited_there(llama: Any) -> None:
    reads, writes = Site(1, "mlp_in"), Site(1, "mlp_out")
    sae = dictionary_for(llama, reads)
    codes, y = codes_of(sae, at(llama, reads)), at(llama, writes)
    feature = int((codes > 0).sum(dim=(0, 1)).argmax())
    with sae.ablate(llama, reads, [feature], output_site=writes, **EVERY):
        change = at(llama, writes) - y
        assert torch.equal(at(llama, reads), capture(llama, [reads], IDS)[reads])
    expected = -codes[..., feature, None] * sae.decoder_weight[feature] / sae.input_scale
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


def test_a_bfloat16_model_is_rounded_once() -> None:
    model = tiny_model("llama")
    half = copy.deepcopy(model).bfloat16()
    sae = dictionary_for(model)
    x = at(half)
    with sae.steer(half, SITE, {1: 3.0}, **EVERY):
        expected = x.float() + 3.0 * sae.decoder_weight[1] / sae.input_scale
        assert torch.equal(at(half), expected.bfloat16())


def test_gradients_flow_through_an_edit(llama: Any) -> None:
    sae = dictionary_for(llama)
    strength = torch.tensor(1.0, requires_grad=True)

    def scaled(codes: Allocation) -> Allocation:
        return codes.with_values(codes.values * strength)

    with steering.edit_codes(llama, SITE, sae, scaled):
        llama(input_ids=IDS).logits.square().sum().backward()
    assert strength.grad is not None
    assert strength.grad != 0


# --- where it changes ------------------------------------------------------------------------------------------------


def test_the_first_token_and_padding_are_left_alone(model: Any) -> None:
    sae = dictionary_for(model)
    for mask, wanted in (
        (None, [[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]),
        (torch.tensor([[1] * 7, [1] * 5 + [0] * 2]), [[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]]),
        (torch.tensor([[1] * 7, [0] * 2 + [1] * 5]), [[0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]),
    ):
        plain = at(model, mask=mask)
        with sae.steer(model, SITE, {1: 5.0}):
            assert moved(plain, at(model, mask=mask)) == [[bool(each) for each in row] for row in wanted]


def test_the_last_token_is_the_last_that_is_not_padding(llama: Any) -> None:
    sae = dictionary_for(llama)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
    plain = at(llama, mask=mask)
    with sae.steer(llama, SITE, {1: 5.0}, positions="last"):
        changed = moved(plain, at(llama, mask=mask))
    assert [row.index(True) for row in changed] == [4, 6]
    assert sum(map(sum, changed)) == 2


def test_a_mask_of_positions_edits_those_and_refuses_other_passes(llama: Any) -> None:
    sae = dictionary_for(llama)
    wanted = torch.zeros(2, 7, dtype=torch.bool)
    wanted[0, 3] = wanted[1, 6] = True
    plain = at(llama)
    with sae.steer(llama, SITE, {1: 5.0}, positions=wanted):
        assert moved(plain, at(llama)) == wanted.tolist()
        with pytest.raises(ValueError, match=r"mask of shape \(2, 7\), but the pass has \[batch, time\] = \[2, 4\]"):
            at(llama, ids=IDS[:, :4])


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_while_generating_every_kind_of_position_is_what_its_name_says(llama: Any, positions: Any) -> None:
    sae = dictionary_for(llama)
    edited: list[list[list[bool]]] = []
    before: list[Tensor] = []

    with (
        visit(llama, SITE, lambda x: before.append(x)),
        sae.steer(llama, SITE, {1: 5.0}, positions=positions),
        visit(llama, SITE, lambda x: edited.append(moved(before[-1], x))),
    ):
        generate(llama, IDS[:1, :4], n=3)
    whole = [0, 1, 1, 1]
    prompt, later = {
        "all": (whole, [1]),
        "prompt": (whole, [0]),
        "generated": ([0] * 4, [1]),
        "last": ([0, 0, 0, 1], [1]),
    }[positions]
    assert edited == [[[bool(each) for each in row]] for row in (prompt, later, later)]


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, n: int = 4, **more: Any) -> Any:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=n,
        min_new_tokens=n,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **more,
    )


def test_generating_with_a_cache_gives_what_plain_passes_give(model: Any) -> None:
    sae = dictionary_for(model)
    with sae.clamp(model, SITE, {1: 6.0, 4: 0.0}):
        out = generate(model, IDS[:, :5])
        plain = logits(model, out.sequences)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), plain[:, 4:-1], rtol=1e-3, atol=1e-3)


def test_left_padding_changes_nothing_of_a_steered_text(model: Any) -> None:
    sae = dictionary_for(model)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :3], mask[1, :3] = 0, 0
    with sae.clamp(model, SITE, {1: 6.0, 4: 0.0}):
        together = generate(model, ids, mask)
        alone = generate(model, ids[1:, 3:])
    assert torch.equal(together.sequences[1, 3:], alone.sequences[0])
    torch.testing.assert_close(
        torch.stack(together.logits, dim=1)[1], torch.stack(alone.logits, dim=1)[0], rtol=1e-3, atol=1e-3
    )


def test_right_padding_changes_nothing_of_a_steered_text(model: Any) -> None:
    sae = dictionary_for(model)
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    with sae.clamp(model, SITE, {1: 6.0, 4: 0.0}):
        together = logits(model, IDS, mask)
        alone = logits(model, IDS[1:, :5])
    torch.testing.assert_close(together[1, :5], alone[0], rtol=1e-4, atol=1e-4)


def test_a_mask_of_an_earlier_pass_is_forgotten(llama: Any) -> None:
    sae = dictionary_for(llama)
    with sae.steer(llama, SITE, {1: 5.0}):
        expected = logits(llama)
        logits(llama, mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
        assert torch.equal(logits(llama), expected)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_what_cannot_be_edited_is_refused_before_any_pass(llama: Any) -> None:
    sae = dictionary_for(llama)
    refused = {
        "feature 64: the dictionary has 64 features, 0 to 63": lambda: sae.steer(llama, SITE, {F: 1.0}),
        "feature -1": lambda: sae.ablate(llama, SITE, [-1]),
        "strength nan of feature 3": lambda: sae.steer(llama, SITE, {3: float("nan")}),
        "value inf of feature 3": lambda: sae.clamp(llama, SITE, {3: float("inf")}),
        "has 3 layers": lambda: sae.ablate(llama, "layers.7.residual", [1]),
        "positions='first'": lambda: sae.steer(llama, SITE, {1: 1.0}, positions="first"),
    }
    for message, make in refused.items():
        with pytest.raises(InputError, match=message), make():
            pass
    narrow = SparseAutoencoder(D // 2, F, TokenChoice(4))
    with (
        pytest.raises(InputError, match="has width 32, but the dictionary reads width 16"),
        narrow.ablate(llama, SITE, [1]),
    ):
        pass


def test_generated_positions_without_a_cache_are_refused(llama: Any) -> None:
    sae = dictionary_for(llama)
    with (
        pytest.raises(ValueError, match="needs a key-value cache"),
        sae.steer(llama, SITE, {1: 1.0}, positions="generated"),
    ):
        generate(llama, IDS, use_cache=False)


def test_an_uncalibrated_dictionary_says_what_to_do(llama: Any) -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(4))
    with pytest.raises(RuntimeError, match="call calibrate"), sae.ablate(llama, SITE, [1]):
        logits(llama)


def test_a_language_model_and_the_name_of_a_site_will_do(llama: Any) -> None:
    sae = dictionary_for(llama)
    with sae.steer(LanguageModel("tiny", llama, tokenizer=None), "layers.1.residual", {1: 5.0}):
        named = logits(llama)
    with sae.steer(llama, SITE, {1: 5.0}):
        assert torch.equal(logits(llama), named)
