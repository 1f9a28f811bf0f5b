"""What every block of a transformer leaves behind, with gradients, for those who train one model by another."""

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.models.families import base_of, blocks_of, finish_logits, transformer_of


def hidden_states(
    model: Any,
    input_ids: Int[Tensor, "batch time"],
    attention_mask: Int[Tensor, "batch time"] | Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time _"], ...]:
    """The hidden states after each block, first to last: transformers' ``hidden_states[1:]``.

    The last one is *after* the model's final norm (and OPT-350M's narrowing projection): it is what the head reads.
    Gradients flow wherever the parameters want them, and none where the caller says ``torch.no_grad``.

    Args:
        model: a `LanguageModel` or a transformers model.
        input_ids: token ids, on the model's device.
        attention_mask: 1 for tokens, 0 for padding; None where nothing is padded.

    Raises:
        InputError: the model gives no hidden states, or not one a block.
    """
    inner = transformer_of(model)
    output = base_of(inner)(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, output_hidden_states=True
    )
    states = getattr(output, "hidden_states", None)
    blocks = len(blocks_of(inner))
    if not states or len(states) != blocks + 1:
        found = f"{len(states)} hidden states" if states else "no hidden states"
        raise InputError(
            f"{type(inner).__name__} returns {found} for {blocks} blocks, where its input and one after each block are "
            "expected: use a model of a family that transformers gives hidden states for"
        )
    return tuple(states[1:])


def logits_of(model: Any, last: Float[Tensor, "*places width"]) -> Float[Tensor, "*places vocab"]:
    """The logits that a model makes of its last hidden states (those after the final norm), with gradients.

    Raises:
        InputError: the model does not predict tokens.
    """
    inner: Any = transformer_of(model)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None:
        raise InputError(f"{type(inner).__name__} has no head: use a causal language model, such as smollm2")
    return finish_logits(inner, head(last))
