"""Tiny random models of every family, and where a person who reads their source would put a hook."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
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


def _llama(block: Any) -> dict[str, Any]:
    return {"attention": block.self_attn.o_proj, "mlp_in": block.mlp, "mlp_out": block.mlp}


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
BLOCKS: dict[str, Callable[[Any], Any]] = {
    "gpt2": lambda model: model.transformer.h,
    "gpt_neox": lambda model: model.gpt_neox.layers,
    "opt": lambda model: model.model.decoder.layers,
    "opt_350m": lambda model: model.model.decoder.layers,
    "bert": lambda model: model.encoder.layer,
}
PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "phi": lambda block: {"attention": block.self_attn.dense, "mlp_in": block.mlp, "mlp_out": block.mlp},
    "gpt2": lambda block: {"attention": block.attn.c_proj, "mlp_in": block.mlp, "mlp_out": block.mlp},
    "gpt_neox": lambda block: {"attention": block.attention.dense, "mlp_in": block.mlp, "mlp_out": block.mlp},
    "opt": lambda block: {"attention": block.self_attn.out_proj, "mlp_in": block.fc1, "mlp_out": block.fc2},
    "opt_350m": lambda block: {"attention": block.self_attn.out_proj, "mlp_in": block.fc1, "mlp_out": block.fc2},
    "bert": lambda block: {
        "attention": block.attention.output.dense,
        "mlp_in": block.intermediate,
        "mlp_out": block.output.dense,
    },
}
CAUSAL = [family for family in BUILDERS if family != "bert"]


@functools.cache
def _built(family: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BUILDERS[family]().eval().requires_grad_(False)


def _outputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits, or the last hidden states of an encoder."""
    with torch.no_grad():
        out = model(input_ids=input_ids, attention_mask=attention_mask)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.fixture(params=list(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    """A tiny random model of the family, with 3 layers of width 32."""
    return _built(family)


@pytest.fixture(params=CAUSAL)
def causal_model(request: pytest.FixtureRequest) -> Any:
    return _built(request.param)


@pytest.fixture
def llama() -> Any:
    return _built("llama")


@pytest.fixture
def bert() -> Any:
    return _built("bert")


@pytest.fixture
def blocks(family: str, model: Any) -> Any:
    return BLOCKS.get(family, lambda model: model.model.layers)(model)


@pytest.fixture
def parts(family: str) -> Callable[[Any], dict[str, Any]]:
    """The modules of a block by hand: ``attention`` (the output projection), ``mlp_in``, ``mlp_out``."""
    return PARTS.get(family, _llama)


@pytest.fixture
def outputs() -> Callable[..., torch.Tensor]:
    return _outputs


@pytest.fixture
def input_ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def attention_mask() -> torch.Tensor:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return mask
