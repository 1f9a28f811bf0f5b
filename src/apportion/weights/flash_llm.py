"""Flash-LLM: weights travel from memory as sparse and are multiplied as dense (Xia et al. 2023, arXiv 2309.10285).

What is allocated is memory bandwidth: when a model writes text, each layer is a product of a weight ``[M, K]`` with few
columns ``[K, N]``, and reading the weight takes longer than multiplying by it. Only nonzeros are read (LSCD: load as
sparse, compute as dense); multiplications by zeros are made all the same, so that no *compute* is saved and the gain
ends where a product is limited by compute. Who is kept is not decided here: any pruner's zeros do.

| paper | here |
|---|---|
| ``M``, ``K``, ``N`` | ``rows``, ``columns``, ``batch`` |
| beta | ``sparsity``, the share of zeros |
| Tiled-CSL | `apportion.ops.spmm.formats.TiledCSL` |
| LSCD kernel | ``expand`` of `apportion.ops.spmm.cpu`, ``_bitmap`` of `apportion.ops.spmm.cuda` |

Departures: kernels read bitmaps, which take fewer bytes than Tiled-CSL below 93.75 % zeros; the dense tile lies in
registers (CPU) or is looked up (Triton), not in shared memory; for a dozen columns or more the CPU skips zeros after
all (``nonzeros``), which is faster there.

The formulas below are for deciding, `recommend` puts them together, and what is measured on a machine overrules them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from apportion.errors import InputError
from apportion.ops.spmm.formats import FORMATS, TiledCSL
from apportion.ops.spmm.formats.tiled_csl import CAPACITY, TILE_COLUMNS, TILE_ROWS


def dense_intensity(rows: int, batch: int) -> float:
    """``M N / (M + N)``: multiply-adds for each number that a dense product loads, for each column of the weight."""
    return rows * batch / (rows + batch)


def lscd_intensity(rows: int, batch: int, sparsity: float, overhead: float = 0.0) -> float:
    """``M N / (M (1 - beta) + N)``: the same where zeros are not loaded.

    Args:
        rows: of the weight.
        batch: columns of the other operand.
        sparsity: share of zeros.
        overhead: numbers' worth of index for each place of the weight, which the paper's formula leaves out: 1/16 for a
            bitmap beside 16-bit values, ``1 - sparsity`` for Tiled-CSL.
    """
    _check(sparsity)
    return rows * batch / (rows * (1 - sparsity + overhead) + batch)


def weight_bytes(rows: int, columns: int, sparsity: float, size: int, format: str) -> int:
    """Bytes of a weight with zeros spread evenly.

    Args:
        rows: of the weight.
        columns: of the weight.
        sparsity: share of zeros.
        size: bytes of a value.
        format: ``dense``, ``bitmap``, ``csr`` or ``tiled_csl`` (2 bytes a value, as the paper's).

    Raises:
        InputError: an unknown format, or a share that is none.
    """
    _check(sparsity)
    nonzeros = round(rows * columns * (1 - sparsity))
    if format == "tiled_csl":
        return TiledCSL.formula((rows, columns), nonzeros)
    if format not in ("dense", "bitmap", "csr"):
        raise InputError(f"format {format!r}: dense, bitmap, csr or tiled_csl")
    return FORMATS[format].formula((rows, columns), nonzeros, size)  # type: ignore[call-arg]


def byte_break_even(size: int, format: str) -> float:
    """The share of zeros from which a format is smaller than dense, on large matrices.

    Args:
        size: bytes of a value.
        format: ``bitmap``, ``csr`` or ``tiled_csl``.

    Raises:
        InputError: an unknown format.
    """
    if format == "bitmap":
        return 1 / (8 * size)  # a bit for each place
    if format in ("csr", "tiled_csl"):
        return 2 / (size + 2)  # 16 bits for each value
    raise InputError(f"format {format!r}: bitmap, csr or tiled_csl")


def tile_density_limit() -> float:
    """The share of a tile of Tiled-CSL that may be nonzero: beyond it the paper's kernel overflows."""
    return CAPACITY / (TILE_ROWS * TILE_COLUMNS)


@dataclass(frozen=True)
class Recommendation:
    """Whether to pack a weight, and how.

    Attributes:
        format: to keep it in: ``dense``, ``bitmap`` or ``csr``.
        speedup: that memory traffic promises over dense, at most; or that was measured.
        reason: in a sentence.
    """

    format: str
    speedup: float
    reason: str


def recommend(
    shape: tuple[int, int],
    sparsity: float,
    batch: int = 1,
    *,
    size: int = 4,
    balance: float = 10.0,
    measured: Mapping[str, float] | None = None,
) -> Recommendation:
    """Whether packing a weight is worth it.

    Args:
        shape: rows and columns.
        sparsity: share of zeros.
        batch: columns of the other operand.
        size: bytes of a value.
        balance: multiply-adds that the machine makes while it loads one number; above it, compute is the limit and
            nothing is gained. 10 for one core with AVX-512, 100 and more for a GPU's tensor cores.
        measured: seconds by way, such as ``crossover.seconds[batch]`` of a measured `SparseLinear`; overrules the rest.

    Raises:
        InputError: a share, shape or batch that makes no sense.
    """
    rows, columns = shape
    if min(rows, columns, batch) < 1:
        raise InputError(f"shape={shape}, batch={batch}: at least 1 each")
    dense, bitmap, csr = (weight_bytes(rows, columns, sparsity, size, each) for each in ("dense", "bitmap", "csr"))
    if measured is not None:
        return _by_measure(measured)
    format, fewest = ("bitmap", bitmap) if bitmap <= csr else ("csr", csr)
    if fewest >= dense:
        return Recommendation("dense", 1.0, f"{format} takes {fewest:,} bytes, dense {dense:,}")
    if dense_intensity(rows, batch) >= balance:
        return Recommendation(
            "dense", 1.0, f"{dense_intensity(rows, batch):.1f} multiply-adds for a number loaded: compute is the limit"
        )
    # What is loaded beside the weight, and made of it, is the same for both.
    other = (columns + rows) * batch * size
    most = min((dense + other) / (fewest + other), balance / dense_intensity(rows, batch))
    return Recommendation(format, most, f"{fewest:,} bytes instead of {dense:,}, and memory is the limit")


def _by_measure(measured: Mapping[str, float]) -> Recommendation:
    if "dense" not in measured or len(measured) < 2:
        raise InputError(f"measured has {', '.join(measured) or 'nothing'}: give seconds of dense and of another way")
    best = min((way for way in measured if way != "dense"), key=measured.__getitem__)
    gain = measured["dense"] / measured[best]
    format = "dense" if gain <= 1 else "csr" if best == "csr" else "bitmap"
    return Recommendation(format, max(gain, 1.0), f"measured: {best} takes {1 / gain:.2f} of dense's time")


def _check(sparsity: float) -> None:
    if not 0 <= sparsity <= 1:
        raise InputError(f"sparsity={sparsity}: a share between 0 and 1")
