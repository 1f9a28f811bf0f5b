"""Ways to write down a matrix that is mostly zeros. Each is a frozen dataclass with the same five things.

``pack(weight)`` and ``unpack()`` are inverse to each other, bit for bit, but that ``-0.0`` counts as zero and comes
back as ``0.0`` (a masked weight ``mask * weight`` is full of them). NaN, infinities and denormals are values like any
other.
``tensors()`` and ``settings()`` are what a file holds, ``restore(shape, tensors, settings)`` reads them, and ``nbytes``
is what the tensors take; ``formula(...)`` says so without packing. With ``b`` bytes a value:

| format | bytes | wins |
|---|---|---|
| ``dense`` | ``numel * b`` | hardly ever: below 1 zero in 8b |
| ``bitmap`` | ``rows * ceil(columns / 8) + nnz * b`` | unstructured zeros up to 15/16 |
| ``csr`` | ``(rows + 1) * 4 + nnz * (b + 2)``; 4 for 2 above 65,536 columns | above 15/16 |
| ``nm`` | ``rows * (groups * keep * b + ceil(groups * keep * bits / 8))`` | 1:4, 1:8, 2:16; 2:4 ties with the bitmap |
| ``block`` | ``(block rows + 1) * 4 + blocks * (height * width * b + 4)`` | whole blocks of zeros |

``groups`` are those of a row and ``bits = ceil(log2(of))``; 4:8 takes more than the bitmap does. Tiled-CSL, Flash-LLM's
own, takes ``4 * words + 4 * (tiles + 2)`` bytes; it is kept for comparison.
"""

from apportion.ops.spmm.formats.bitmap import Bitmap
from apportion.ops.spmm.formats.blocks import Blocks
from apportion.ops.spmm.formats.dense import Dense
from apportion.ops.spmm.formats.n_of_m import NOfM
from apportion.ops.spmm.formats.narrow_csr import NarrowCSR
from apportion.ops.spmm.formats.tiled_csl import TiledCSL

__all__ = ["FORMATS", "Bitmap", "Blocks", "Dense", "NOfM", "NarrowCSR", "Packed", "TiledCSL"]

Packed = Dense | Bitmap | NarrowCSR | NOfM | Blocks

FORMATS: dict[str, type[Packed]] = {"dense": Dense, "bitmap": Bitmap, "csr": NarrowCSR, "nm": NOfM, "block": Blocks}
"""What a checkpoint may hold, by the name in its manifest."""
