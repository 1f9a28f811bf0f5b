"""Products with a matrix that is mostly zeros and lies packed in memory: ``x @ W.T``, as a linear layer takes them.

| op | ``W`` is packed as | for |
|---|---|---|
| ``bitmap_matmul`` | bits and values (`formats.Bitmap`) | unstructured zeros, and N:M |
| ``tiles_matmul`` | values sorted for a CPU's vectors (`tiles.Tiles`) | the same, a little larger and faster there |
| ``csr_narrow_matmul`` | 16-bit columns and values (`formats.NarrowCSR`) | hardly anything left |
| ``block_matmul`` | whole blocks (`formats.Blocks`) | block-sparse weights |

Sums are taken in float32 (float64 where an operand is), the result has the type of ``x``, and weights are not rounded
to it: each product equals that with the dense, masked matrix but for the order of its sums. What a zero does to an
infinity is the one exception: where ``x`` is not finite, zeros may be skipped (dense: NaN) or not. Without gradient:
packed weights are for inference. On CUDA the bitmap and blocks have kernels; the CSR takes its definition there. Every
call checks types and sizes; that a bitmap has as many bits as values is for whoever packs or reads it (`formats`).
"""

import torch
from torch import Tensor

from apportion.ops.processor import has_lookup
from apportion.ops.spmm import reference
from apportion.ops.spmm.tiles import COLUMNS, ROWS, Tiles
from apportion.ops.triton_support import triton_is_missing

__all__ = ["bitmap_matmul", "block_matmul", "csr_narrow_matmul", "runs_compiled", "tiles_matmul"]


def runs_compiled(x: Tensor, values: Tensor) -> bool:
    """Whether there is a kernel for these types on this device, rather than the reference."""
    if values.dtype not in (torch.float32, torch.bfloat16) or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    return x.device.type == "cpu" or (x.device.type == "cuda" and not triton_is_missing())


def runs_tiles(values: Tensor) -> bool:
    """Whether there is a kernel for tiles of these values here: in the CPU's memory, and with instructions for it."""
    if values.dtype not in (torch.float32, torch.bfloat16) or values.device.type != "cpu":
        return False
    return has_lookup()


@torch.library.custom_op("apportion::bitmap_matmul", mutates_args=())
def bitmap_matmul(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    """``x @ W.T`` with a bitmap.

    Args:
        x: [count, columns].
        bits: `formats.Bitmap.words`, int64 [rows, ceil(columns / 64)].
        starts: `formats.Bitmap.starts`, int64 [rows + 1].
        values: [nnz].
        way: on the CPU, one of ``cpu.WAYS`` instead of what is usually fastest.

    Returns:
        [count, rows] in the type of ``x``.

    Raises:
        ValueError: tensors that do not belong together.
    """
    return reference.bitmap_matmul(x, bits, starts, values)


@torch.library.custom_op("apportion::csr_narrow_matmul", mutates_args=())
def csr_narrow_matmul(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """``x @ W.T`` with a narrow CSR.

    Args:
        x: [count, columns].
        starts: int64 [rows + 1].
        columns: uint16 or int32 [nnz].
        values: [nnz].

    Returns:
        [count, rows] in the type of ``x``.

    Raises:
        ValueError: tensors that do not belong together.
    """
    return reference.csr_narrow_matmul(x, starts, columns, values)


@torch.library.custom_op("apportion::block_matmul", mutates_args=())
def block_matmul(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    """``x @ W.T`` with blocks.

    Args:
        x: [count, columns], filled up to whole blocks.
        starts: int64 [rows of blocks + 1].
        columns: int64 [blocks].
        blocks: [blocks, height, width].

    Returns:
        [count, rows of blocks * height] in the type of ``x``.

    Raises:
        ValueError: tensors that do not belong together.
    """
    return reference.block_matmul(x, starts, columns, blocks)


@torch.library.custom_op("apportion::tiles_matmul", mutates_args=())
def tiles_matmul(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    counts: Tensor,
    fours: Tensor,
    lanes: Tensor,
    starts: Tensor,
    rows: int,
    way: str | None = None,
) -> Tensor:
    """``x @ W.T`` with tiles.

    Args:
        x: [count, columns].
        values: those of `tiles.Tiles`, as are the next five.
        places: uint8.
        counts: uint8.
        fours: uint8.
        lanes: uint8.
        starts: int64.
        rows: of ``W``.
        way: ``tiles`` or ``panels`` instead of what is usually faster.

    Returns:
        [count, rows] in the type of ``x``.

    Raises:
        ValueError: tensors that do not belong together.
    """
    tiles = Tiles((rows, x.shape[1]), values, places, counts, fours, lanes, starts)
    return reference.tiles_matmul(x, tiles)


def _check(x: Tensor, starts: Tensor, rows: int, values: Tensor, *others: Tensor) -> None:
    """What kernels take for granted, since they read memory by its address."""
    if starts.dtype != torch.int64 or starts.shape != (rows + 1,):
        raise ValueError(
            f"starts is {starts.dtype} {tuple(starts.shape)}: int64 [{rows + 1}] for {rows} rows is needed"
        )
    for each in (starts, values, *others):
        if not each.is_contiguous() or each.device != x.device:
            raise ValueError(f"every part of the packed weight must lie in one piece on {x.device}, as x does")


def _check_bitmap(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None) -> None:
    _check(x, starts, bits.shape[0], values, bits)
    if bits.dtype != torch.int64 or bits.shape[1] != -(-x.shape[1] // 64):
        raise ValueError(
            f"x has {x.shape[1]} columns and bits is {bits.dtype} {tuple(bits.shape)}: int64 [rows, "
            f"{-(-x.shape[1] // 64)}] is needed"
        )
    if way not in (None, "expand", "nonzeros", "panels"):
        raise ValueError(f"way {way!r}: expand, nonzeros or panels")


def _check_csr(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> None:
    _check(x, starts, starts.shape[0] - 1, values, columns)
    if columns.dtype not in (torch.uint16, torch.int32) or columns.shape != values.shape:
        raise ValueError(
            f"columns is {columns.dtype} {tuple(columns.shape)}: uint16 or int32, one for each of {len(values)} values"
        )


def _check_blocks(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> None:
    _check(x, starts, starts.shape[0] - 1, blocks, columns)
    if columns.dtype != torch.int64 or len(columns) != len(blocks) or x.shape[1] % blocks.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)}, columns {columns.dtype} {tuple(columns.shape)} and blocks {tuple(blocks.shape)} do "
            "not belong together: x is filled up to whole blocks, and each block has a column, int64"
        )


@bitmap_matmul.register_kernel("cpu")
def _(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    _check_bitmap(x, bits, starts, values, way)
    if not runs_compiled(x, values):
        return reference.bitmap_matmul(x, bits, starts, values)
    from apportion.ops.spmm import cpu

    return cpu.bitmap_matmul(x, bits, starts, values, way)


@csr_narrow_matmul.register_kernel("cpu")
def _(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    _check_csr(x, starts, columns, values)
    if not runs_compiled(x, values):
        return reference.csr_narrow_matmul(x, starts, columns, values)
    from apportion.ops.spmm import cpu

    return cpu.csr_narrow_matmul(x, starts, columns, values)


@block_matmul.register_kernel("cpu")
def _(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    _check_blocks(x, starts, columns, blocks)
    if not runs_compiled(x, blocks):
        return reference.block_matmul(x, starts, columns, blocks)
    from apportion.ops.spmm import cpu

    return cpu.block_matmul(x, starts, columns, blocks)


def check_tiles(tiles: Tiles) -> None:
    """What kernels take for granted of the parts, since they read memory by its address.

    Raises:
        ValueError: a part has another type or size.
    """
    down, across = -(-tiles.shape[0] // ROWS), -(-tiles.shape[1] // COLUMNS)
    wanted: dict[str, tuple[int, ...]] = {
        "places": (len(tiles.values),),
        "counts": (tiles.counts.numel(),),
        "fours": (down * across,),
    }
    wanted |= {"lanes": (down * across, ROWS), "starts": (down + 1, 2), "values": (len(tiles.values),)}
    for name, each in tiles.tensors().items():
        dtype = {"values": tiles.values.dtype, "starts": torch.int64}.get(name, torch.uint8)
        if each.dtype != dtype or tuple(each.shape) != wanted[name]:
            raise ValueError(
                f"{name} is {each.dtype} {tuple(each.shape)}: {dtype} {wanted[name]} is needed for a matrix "
                f"{tiles.shape}"
            )
        if not each.is_contiguous() or each.device != tiles.values.device:
            raise ValueError("every part of the packed weight must lie in one piece on one device")


@tiles_matmul.register_kernel("cpu")
def _(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    counts: Tensor,
    fours: Tensor,
    lanes: Tensor,
    starts: Tensor,
    rows: int,
    way: str | None = None,
) -> Tensor:
    tiles = Tiles((rows, x.shape[1]), values, places, counts, fours, lanes, starts)
    check_tiles(tiles)
    if way not in (None, "tiles", "panels"):
        raise ValueError(f"way {way!r}: tiles or panels")
    if not runs_tiles(values) or x.dtype not in (torch.float32, torch.bfloat16) or not x.shape[1]:
        return reference.tiles_matmul(x, tiles)
    from apportion.ops.spmm.tile_product import TileProduct

    product = TileProduct(tiles)
    return product.half(x, way) if x.dtype == torch.bfloat16 else product(x.contiguous(), way)


@bitmap_matmul.register_kernel("cuda")
def _(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    _check_bitmap(x, bits, starts, values, way)
    if not runs_compiled(x, values):
        return reference.bitmap_matmul(x, bits, starts, values)
    from apportion.ops.spmm import cuda

    return cuda.bitmap_matmul(x, bits, starts, values)


@block_matmul.register_kernel("cuda")
def _(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    _check_blocks(x, starts, columns, blocks)
    if not runs_compiled(x, blocks):
        return reference.block_matmul(x, starts, columns, blocks)
    from apportion.ops.spmm import cuda

    return cuda.block_matmul(x, starts, columns, blocks)


@bitmap_matmul.register_fake
def _(x: Tensor, bits: Tensor, starts: Tensor, values: Tensor, way: str | None = None) -> Tensor:
    return x.new_empty(x.shape[0], bits.shape[0])


@tiles_matmul.register_fake
def _(
    x: Tensor,
    values: Tensor,
    places: Tensor,
    counts: Tensor,
    fours: Tensor,
    lanes: Tensor,
    starts: Tensor,
    rows: int,
    way: str | None = None,
) -> Tensor:
    return x.new_empty(x.shape[0], rows)


@csr_narrow_matmul.register_fake
def _(x: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], starts.shape[0] - 1)


@block_matmul.register_fake
def _(x: Tensor, starts: Tensor, columns: Tensor, blocks: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], (starts.shape[0] - 1) * blocks.shape[1])
