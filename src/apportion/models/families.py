"""How each family of transformers names its parts: the one table that knows.

A layout is recognised by the names of the modules, not by the class of the model, so that the many families that copied
Llama's names (Qwen, Mistral, Gemma, OLMo, StableLM, ...) need no line of their own.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apportion.errors import InputError


@dataclass(frozen=True)
class Layout:
    """Module paths: of the block list and the final norm from the base model, of the rest from a block.

    Attributes:
        blocks: the list of blocks.
        attention_output: the projection whose input is the heads side by side and whose output is the attention's.
        mlp_input: the module whose input is the MLP's input.
        mlp_output: the module whose output is the MLP's output, before it is added to the residual stream.
        neurons: the projection whose input is the MLP's neurons, after the non-linearity (and the gate).
        final_norm: the norm between the last block and the unembedding; empty where there is none.
        projection_out: a map from the residual stream to narrower token embeddings; empty where there is none.
        causal: False for encoders, whose tokens also see those after them.
    """

    families: str
    blocks: str
    attention_output: str
    mlp_input: str
    mlp_output: str
    neurons: str
    final_norm: str = ""
    projection_out: str = ""
    causal: bool = True


LAYOUTS = (
    Layout("Llama, Qwen2, Qwen3, Mistral, Gemma", "layers", "self_attn.o_proj", "mlp", "mlp", "mlp.down_proj", "norm"),
    Layout(
        "Gemma 3 with pictures",
        "language_model.layers",
        "self_attn.o_proj",
        "mlp",
        "mlp",
        "mlp.down_proj",
        "language_model.norm",
    ),
    Layout("Phi", "layers", "self_attn.dense", "mlp", "mlp", "mlp.fc2", "final_layernorm"),
    Layout("GPT-2", "h", "attn.c_proj", "mlp", "mlp", "mlp.c_proj", "ln_f"),
    Layout("GPT-NeoX, Pythia", "layers", "attention.dense", "mlp", "mlp", "mlp.dense_4h_to_h", "final_layer_norm"),
    Layout(
        "OPT",
        "decoder.layers",
        "self_attn.out_proj",
        "fc1",
        "fc2",
        "fc2",
        "decoder.final_layer_norm",
        "decoder.project_out",
    ),
    Layout(
        "BERT",
        "encoder.layer",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "output.dense",
        causal=False,
    ),
)


def transformer_of(model: Any) -> nn.Module:
    """The plain transformers model inside a `LanguageModel`, or the model itself."""
    inner = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(inner, nn.Module):
        raise TypeError(f"model must be a LanguageModel or a torch module, got {type(model).__name__}")
    return inner


def layout_of(model: nn.Module) -> Layout:
    """Recognise a model by the names of its modules.

    Raises:
        InputError: no layout fits; names what was looked for.
    """
    base = base_of(model)
    for layout in LAYOUTS:
        blocks = find_module(base, layout.blocks)
        if not isinstance(blocks, nn.ModuleList) or len(blocks) == 0:
            continue
        parts = (layout.attention_output, layout.mlp_input, layout.mlp_output)
        if all(find_module(blocks[0], part) is not None for part in parts):
            return layout
    looked_for = "; ".join(f"{layout.blocks}.0.{layout.attention_output} ({layout.families})" for layout in LAYOUTS)
    raise InputError(
        f"{type(model).__name__} is built in a way that apportion does not know: looked in {type(base).__name__} for "
        f"{looked_for}. A line in apportion/models/families.py teaches it a new family."
    )


def base_of(model: nn.Module) -> nn.Module:
    """The model without its language-modelling head."""
    base = getattr(model, "base_model", model)
    return base if isinstance(base, nn.Module) else model


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The model's blocks, first to last."""
    blocks = find_module(base_of(model), layout_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)  # layout_of has looked
    return blocks


def stack_of(model: nn.Module) -> nn.Module:
    """The module that holds the list of blocks and runs them: it is what is handed a key-value cache."""
    parent = layout_of(model).blocks.rpartition(".")[0]
    return find_module(base_of(model), parent) or base_of(model)


def attention_of(block: nn.Module) -> nn.Module:
    """The module of a block that transformers hands to its attention functions: it knows which layer it is.

    Raises:
        InputError: there is none.
    """
    for each in block.modules():
        if hasattr(each, "layer_idx") and "attention" in type(each).__name__.lower():
            return each
    raise InputError(f"{type(block).__name__} has no attention module that apportion knows")


def final_norm_of(model: nn.Module) -> nn.Module:
    """What a causal model applies between its last block and its head: a norm, or nothing (OPT-350M)."""
    return find_module(base_of(model), layout_of(model).final_norm) or nn.Identity()


def projection_out_of(model: nn.Module) -> Any:
    """The map from the residual stream to narrower token embeddings, where a model has one (OPT-350M)."""
    return find_module(base_of(model), layout_of(model).projection_out)


def finish_logits(model: Any, logits: Tensor) -> Tensor:
    """What a model does to the output of its head before it calls it logits ``[..., vocab]``."""
    config = model.config.get_text_config()
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        logits = logits * scale
    if (scale := getattr(config, "logits_scaling", None)) is not None:  # Granite
        logits = logits / scale
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2
        logits = cap * torch.tanh(logits / cap)
    return logits


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a dotted path below ``root``, or None (also where a model sets an optional module to None)."""
    found: Any = root
    for name in path.split(".") if path else ():
        found = getattr(found, name, None)
        if not isinstance(found, nn.Module):
            return None
    return found if path else None
