"""Tiny random models of every family, with 3 layers of width 32."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers

VOCABULARY = 97
LAYERS = 3
SIZES = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA_LIKE = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
# Heads that are together wider than the model, as in Qwen3 and Gemma.
WIDE_HEADS = {**LLAMA_LIKE, "head_dim": 12}
SMALL_OPT = {
    **SIZES,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}


BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA_LIKE)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**WIDE_HEADS)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA_LIKE, sliding_window=4)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**WIDE_HEADS)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**WIDE_HEADS, sliding_window=4)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**WIDE_HEADS, sliding_window=4)),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**{**LLAMA_LIKE, "num_key_value_heads": 4})),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **SIZES, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, n_inner=48, initializer_range=0.2
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**{k: v for k, v in LLAMA_LIKE.items() if k != "num_key_value_heads"})
    ),
    "opt": lambda: transformers.OPTForCausalLM(transformers.OPTConfig(**SMALL_OPT)),
    # OPT-350M norms after adding and has token embeddings narrower than its residual stream.
    "opt_350m": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**{**SMALL_OPT, "word_embed_proj_dim": 20}, do_layer_norm_before=False)
    ),
    "bert": lambda: transformers.BertModel(
        transformers.BertConfig(
            **{k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
        )
    ),
}
CAUSAL = [family for family in BUILDERS if family != "bert"]


@functools.cache
def tiny_model(family: str) -> Any:
    """The model of a family of ``BUILDERS``, in eval mode and without gradients; shared, so leave it as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[family]().eval().requires_grad_(False)
