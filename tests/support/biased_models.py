"""Tiny random models whose biases are not zero, so that a forgotten bias shows, and dictionaries that fit them."""

import functools
from typing import Any

import torch
import transformers

from apportion.allocate import TokenChoice
from apportion.features import SparseAutoencoder
from apportion.models import Site

VOCABULARY, LAYERS = 97, 3
_SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS}
_LLAMA: dict[str, Any] = {
    **_SHARED,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
_BUILDERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)),
    # Value biases under grouped queries; rotary embeddings.
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_LLAMA)),
    # Heads wider together than the model, norms of queries and keys, a norm of the attention's output.
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**_LLAMA, head_dim=12, sliding_window=4)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, initializer_range=0.2
        )
    ),
    # Attention and MLP side by side.
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            **_SHARED, intermediate_size=48, num_attention_heads=4, initializer_range=0.2, max_position_embeddings=64
        )
    ),
    # Norms after adding.
    "opt_350m": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **_SHARED,
            ffn_dim=48,
            num_attention_heads=4,
            word_embed_proj_dim=20,
            do_layer_norm_before=False,
            max_position_embeddings=64,
            init_std=0.2,
        )
    ),
}
FAMILIES = list(_BUILDERS)


@functools.cache
def biased_model(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A model with 3 layers of width 32; the biases of its linear maps and norms are drawn like its weights."""
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _BUILDERS[family]().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return model.to(dtype)


def some_ids(tokens: int = 7) -> torch.Tensor:
    """A text."""
    return torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))


def dictionary_of(activations: torch.Tensor, n_features: int = 40, budget: int = 4) -> SparseAutoencoder:
    """An untrained dictionary whose scale, centre and biases are none of them trivial."""
    sae = SparseAutoencoder(activations.shape[1], n_features, TokenChoice(budget), seed=1)
    sae.initialise_from(activations.float())
    with torch.no_grad():
        sae.encoder_bias.uniform_(-0.3, 0.3, generator=torch.Generator().manual_seed(2))
    return sae.eval()


def dictionaries_of(paths: Any, *names: str) -> dict[Site, SparseAutoencoder]:
    """One for each of some sites of a `DirectPaths`."""
    sites = [Site.parse(name) for name in names]
    return {site: dictionary_of(paths.activations(site)) for site in sites}
