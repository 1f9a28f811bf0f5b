"""Tiny random models of every family (tests/support), and where a person who reads their source would put a hook."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tiny_families import BUILDERS, CAUSAL, VOCABULARY, tiny_model


def _llama(block: Any) -> dict[str, Any]:
    return {
        "attention": block.self_attn.o_proj,
        "mlp_in": block.mlp,
        "mlp_out": block.mlp,
        "neurons": block.mlp.down_proj,
    }


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "gpt2": lambda model: model.transformer.h,
    "gpt_neox": lambda model: model.gpt_neox.layers,
    "opt": lambda model: model.model.decoder.layers,
    "opt_350m": lambda model: model.model.decoder.layers,
    "bert": lambda model: model.encoder.layer,
}
PARTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "phi": lambda block: {
        "attention": block.self_attn.dense,
        "mlp_in": block.mlp,
        "mlp_out": block.mlp,
        "neurons": block.mlp.fc2,
    },
    "gpt2": lambda block: {
        "attention": block.attn.c_proj,
        "mlp_in": block.mlp,
        "mlp_out": block.mlp,
        "neurons": block.mlp.c_proj,
    },
    "gpt_neox": lambda block: {
        "attention": block.attention.dense,
        "mlp_in": block.mlp,
        "mlp_out": block.mlp,
        "neurons": block.mlp.dense_4h_to_h,
    },
    "opt": lambda block: {
        "attention": block.self_attn.out_proj,
        "mlp_in": block.fc1,
        "mlp_out": block.fc2,
        "neurons": block.fc2,
    },
    "opt_350m": lambda block: {
        "attention": block.self_attn.out_proj,
        "mlp_in": block.fc1,
        "mlp_out": block.fc2,
        "neurons": block.fc2,
    },
    "bert": lambda block: {
        "attention": block.attention.output.dense,
        "mlp_in": block.intermediate,
        "mlp_out": block.output.dense,
        "neurons": block.output.dense,
    },
}


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
    return tiny_model(family)


@pytest.fixture(params=CAUSAL)
def causal_model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def bert() -> Any:
    return tiny_model("bert")


@pytest.fixture
def blocks(family: str, model: Any) -> Any:
    return BLOCKS.get(family, lambda model: model.model.layers)(model)


@pytest.fixture
def parts(family: str) -> Callable[[Any], dict[str, Any]]:
    """The modules of a block by hand: ``attention`` (the output projection), ``mlp_in``, ``mlp_out``, ``neurons``."""
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
