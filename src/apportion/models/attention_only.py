"""Small transformers without MLPs, made on the spot: models whose every mechanism is attention's."""

from typing import Any

import torch


def attention_only(
    *, layers: int = 2, width: int = 64, heads: int = 4, vocabulary: int = 64, context: int = 48, seed: int = 0
) -> Any:
    """A random Llama whose MLPs give zero, for good: rotary positions, RMSNorm, untied unembedding.

    Two layers of it can learn to repeat what came before, which takes a head that looks back by one token and a head
    that looks for what that one found (Olsson et al. 2022, arXiv 2209.11895).

    Args:
        layers: attention layers.
        width: of the residual stream.
        heads: a layer.
        vocabulary: tokens, none of them special.
        context: longest text.
        seed: of the weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=1,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        # Twice transformers' own: at width 64 copying is learned in a few hundred steps from here.
        initializer_range=0.04,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for weight in block.mlp.parameters():
            weight.data.zero_()
            weight.requires_grad_(False)
    return model
