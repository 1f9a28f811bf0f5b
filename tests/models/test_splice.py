from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.errors import InputError
from apportion.models import LanguageModel, Site, splice
from apportion.models.splice import splice_from

KINDS = ("residual", "mlp_out", "mlp_in", "attn_out", "heads", "embeddings")


def site_of(kind: str) -> Site:
    return Site(None if kind == "embeddings" else 1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_replacing_activations_with_themselves_leaves_the_output_bit_equal(
    kind: str, model: Any, outputs: Any, input_ids: Tensor, attention_mask: Tensor
) -> None:
    for mask in (None, attention_mask):
        untouched = outputs(model, input_ids, mask)
        calls: list[tuple[int, ...]] = []

        def identity(activations: Tensor, calls: list[tuple[int, ...]] = calls) -> Tensor:
            calls.append(tuple(activations.shape))
            return activations.clone()

        with splice(model, site_of(kind), identity):
            assert torch.equal(outputs(model, input_ids, mask), untouched)
        assert calls == [(2, 7, site_of(kind).width(model))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_reaches_the_output_and_is_gone_afterwards(
    kind: str, model: Any, outputs: Any, input_ids: Tensor
) -> None:
    untouched = outputs(model, input_ids)
    # Not a constant shift: the norm of a family that norms after adding would undo it.
    with splice(model, site_of(kind), lambda activations: activations.flip(-1)):
        assert not torch.allclose(outputs(model, input_ids), untouched)
    assert torch.equal(outputs(model, input_ids), untouched)


def test_a_replacement_of_one_token_moves_no_earlier_one(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    def change_position_four(activations: Tensor) -> Tensor:
        changed = activations.clone()
        changed[:, 4] = 0
        return changed

    untouched = outputs(llama, input_ids)
    with splice(llama, Site(1, "residual"), change_position_four):
        changed = outputs(llama, input_ids)
    assert torch.equal(changed[:, :4], untouched[:, :4])
    assert not torch.allclose(changed[:, 4:], untouched[:, 4:])


def test_an_error_inside_leaves_the_model_as_it_was(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    untouched = outputs(llama, input_ids)

    def fail(activations: Tensor) -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), splice(llama, Site(1, "mlp_out"), fail):
        outputs(llama, input_ids)
    assert torch.equal(outputs(llama, input_ids), untouched)


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_of_another_shape_is_refused(kind: str, model: Any, outputs: Any, input_ids: Tensor) -> None:
    with (
        splice(model, site_of(kind), lambda activations: activations[:, :-1]),
        pytest.raises(ValueError, match=rf"at {site_of(kind)} has shape \(2, 6, .*instead of \(2, 7, "),
    ):
        outputs(model, input_ids)


def test_a_replacement_in_another_dtype_is_cast_back(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    untouched = outputs(llama, input_ids)
    with splice(llama, Site(1, "residual"), lambda activations: activations.double()):
        assert torch.equal(outputs(llama, input_ids), untouched)


def test_splices_nest(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    def plus_one(activations: Tensor) -> Tensor:
        return activations + 1

    with splice(llama, Site(1, "residual"), lambda activations: activations + 2):
        expected = outputs(llama, input_ids)
    with splice(llama, Site(1, "residual"), plus_one), splice(llama, Site(1, "residual"), plus_one):
        torch.testing.assert_close(outputs(llama, input_ids), expected)


def test_gradients_flow_through_a_replacement(model: Any, input_ids: Tensor) -> None:
    for kind in KINDS:
        direction = torch.zeros(site_of(kind).width(model), requires_grad=True)
        with splice(model, site_of(kind), lambda activations, direction=direction: activations + direction):
            out = model(input_ids=input_ids)
        (out.logits if hasattr(out, "logits") else out.last_hidden_state).square().sum().backward()
        assert direction.grad is not None
        assert direction.grad.abs().sum() > 0


def test_a_language_model_can_be_spliced(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    with splice(LanguageModel("tiny", llama, tokenizer=None), Site(0, "residual"), torch.zeros_like):
        zeroed = outputs(llama, input_ids)
    assert not torch.allclose(zeroed, outputs(llama, input_ids))


def test_a_missing_layer_is_refused_before_any_pass(llama: Any) -> None:
    with pytest.raises(InputError, match="has 3 layers"), splice(llama, Site(3, "residual"), torch.zeros_like):
        pass


def test_an_mlp_is_replaced_by_what_is_made_of_its_input(model: Any, outputs: Any, input_ids: Tensor) -> None:
    untouched = outputs(model, input_ids)
    into, out = Site(1, "mlp_in"), Site(1, "mlp_out")
    seen: list[Tensor] = []

    def keep(x: Tensor, y: Tensor) -> Tensor:
        seen[:] = [x, y]
        return y

    with splice_from(model, into, out, keep):
        assert torch.equal(outputs(model, input_ids), untouched)
    x, y = seen
    assert x.shape == y.shape == (2, 7, 32)
    with splice_from(model, into, out, lambda x, y: x - y):
        replaced = outputs(model, input_ids)
    assert not torch.allclose(replaced, untouched)
    with pytest.raises(KeyError), splice_from(model, into, out, lambda x, y: x):
        raise KeyError
    assert torch.equal(outputs(model, input_ids), untouched)


def test_what_is_computed_later_cannot_be_made_of(llama: Any, outputs: Any, input_ids: Tensor) -> None:
    with (
        splice_from(llama, Site(2, "mlp_in"), Site(1, "mlp_out"), lambda x, y: x),
        pytest.raises(ValueError, match=r"nothing was computed at layers\.2\.mlp_in before layers\.1\.mlp_out"),
    ):
        outputs(llama, input_ids)
