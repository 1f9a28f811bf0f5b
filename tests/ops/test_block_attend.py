"""Attention over kept blocks equals dense attention under the same mask; CUDA's kernel under Triton's interpreter."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apportion.ops.attend import attend
from apportion.ops.block_attend import block_attend, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (batch, heads, groups, new, tokens, size): a last block that is shorter, fewer tokens than a block, several heads of a
# group, and chunks that begin within a block.
SHAPES = [
    (1, 1, 1, 16, 16, 4),
    (2, 4, 2, 19, 19, 4),
    (1, 3, 1, 3, 3, 8),
    (1, 9, 3, 40, 40, 16),
    (2, 4, 2, 9, 23, 4),
    (1, 2, 2, 1, 7, 3),
    (1, 2, 1, 1, 1, 4),
]
Attend = Callable[..., Tensor]


def triton_kernel(*arguments: object) -> Tensor:
    from apportion.ops.block_attend import cuda

    return cuda.block_attend(*arguments)  # type: ignore[arg-type]


BACKENDS: dict[str, Attend] = {
    "dispatched": block_attend,
    "triton": pytest.param(  # type: ignore[dict-item]
        triton_kernel,
        marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
    ),
}


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Attend:
    return request.param


def inputs(
    batch: int, heads: int, groups: int, new: int, tokens: int, size: int, *, width: int = 8, value_width: int = 8
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kept = torch.rand(batch, heads, -(-new // size), -(-tokens // size), generator=generator) < 0.5
    drawn = draw(batch, heads, new, width), draw(batch, groups, tokens, width), draw(batch, groups, tokens, value_width)
    return *(each.to(DEVICE) for each in drawn), kept.to(DEVICE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("padding", [0, 5])
def test_backends_equal_the_reference(
    backend: Attend, shape: tuple[int, ...], softcap: float | None, padding: int
) -> None:
    queries, keys, values, kept = inputs(*shape)
    real = None
    if padding:
        real = torch.ones(shape[0], shape[4], dtype=torch.bool, device=DEVICE)
        real[0, :padding] = False
    exact = reference.block_attend(queries, keys, values, kept, shape[5], 0.4, softcap, real)
    single = (each.float() for each in (queries, keys, values))
    found = backend(*single, kept, shape[5], 0.4, softcap, real)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_values_may_be_wider_than_keys_and_rows_may_be_empty(backend: Attend) -> None:
    queries, keys, values, kept = inputs(1, 4, 2, 20, 20, 4, width=12, value_width=20)
    kept[:, 1] = False
    found = backend(queries, keys, values, kept, 4, 0.3, None, None)
    torch.testing.assert_close(found, reference.block_attend(queries, keys, values, kept, 4, 0.3, None, None))
    assert found[:, 1].abs().max() == 0
    assert found.shape == (1, 4, 20, 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_single(backend: Attend, dtype: torch.dtype) -> None:
    queries, keys, values, kept = inputs(1, 4, 2, 40, 40, 16, width=16)
    kept[:] = True
    half = [each.to(dtype) for each in (queries, keys, values)]
    found = backend(*half, kept, 16, 0.25, None, None)
    assert found.dtype == dtype
    exact = reference.block_attend(*(each.double() for each in half), kept, 16, 0.25, None, None)
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)


def test_all_blocks_are_dense_attention_and_later_blocks_do_not_matter(backend: Attend) -> None:
    queries, keys, values, kept = inputs(2, 4, 2, 19, 19, 4)
    dense = attend(queries, keys, values, 0.4)
    torch.testing.assert_close(backend(queries, keys, values, torch.ones_like(kept), 4, 0.4, None, None), dense)
    causal = torch.ones_like(kept).tril()
    torch.testing.assert_close(backend(queries, keys, values, causal, 4, 0.4, None, None), dense)


def test_torch_checks_the_op() -> None:
    queries, keys, values, kept = inputs(1, 2, 1, 9, 9, 4)
    torch.library.opcheck(block_attend, (queries, keys, values, kept, 4, 0.4, 2.0, None), test_utils="test_schema")
    torch.library.opcheck(block_attend, (queries, keys, values, kept, 4, 0.4), test_utils="test_faketensor")
