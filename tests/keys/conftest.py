"""Tiny decoders and made-up steps for the keys room."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from apportion.models.key_memory import LayerFacts, Rotation, Step
from tiny_families import tiny_model

MakeStep = Callable[..., Step]


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama")


@pytest.fixture
def facts() -> LayerFacts:
    return LayerFacts(layer=0, heads=4, groups=2, width=8, layers=1)


@pytest.fixture
def make_step() -> MakeStep:
    """Random steps of a layer with 4 query heads and 2 key-value heads of width 8; row 0 is padded."""

    def make(tokens: int, *, batch: int = 2, seed: int = 0, padding: int = 0, start: int = 0) -> Step:
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> torch.Tensor:
            return torch.randn(batch, heads, tokens, 8, generator=generator)

        angles = torch.arange(start, start + tokens)[None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
        rotation = Rotation(angles.cos(), angles.sin())
        real = torch.ones(batch, tokens, dtype=torch.bool)
        real[0, :padding] = False
        keys, values, queries = draw(2), draw(2), draw(4)
        hidden = torch.randn(batch, tokens, 32, generator=generator)
        return Step(rotation.apply(queries), rotation.apply(keys), values, real, 8**-0.5, None, rotation, hidden)

    return make
