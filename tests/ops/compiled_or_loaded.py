"""Not a test: prints a checksum of what each CPU kernel computes; test_numba_cache.py runs it twice and compares."""

import hashlib
import json

import torch

from apportion.ops.adam import adam_step_, project_rows_
from apportion.ops.csr import csr_matmul
from apportion.ops.encode import encode_select
from apportion.ops.spmm import bitmap_matmul, cpu, csr_narrow_matmul, tile_product, tiles_matmul
from apportion.ops.spmm.formats import Bitmap, NarrowCSR
from apportion.ops.spmm.tiles import Tiles

RULES = {"rows": (4, None), "total": (400, None), "columns": (0, torch.full((64,), 9)), "above": (0, torch.ones(64))}


def checksum(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in tensors)).hexdigest()


def main() -> None:
    found = {}
    for width in (7, 32, 100):
        draw = torch.Generator().manual_seed(width)
        x, weight, decoder = (torch.randn(rows, width, generator=draw) for rows in (100, 64, 64))
        for how, (count, limits) in RULES.items():
            inputs = [each.clone().requires_grad_() for each in (x, weight, torch.zeros(64), decoder)]
            crow, col, values = encode_select(*inputs[:3], how, count, limits, "float32", False)
            output = csr_matmul(crow, col, values, inputs[3])
            output.square().sum().backward()
            found[f"winners by {how}, width {width}"] = checksum(crow, col, output, *(each.grad for each in inputs))
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(1, 20):
            grad = torch.randn(64, width, generator=draw)
            project_rows_(grad, decoder, None)
            adam_step_(decoder, mean, square, grad, None, step, 1e-3, 0.9, 0.999, 1e-8, 0.01, True)
            found[f"Adam, width {width}, step {step}"] = checksum(decoder, mean, square, grad)
        sparse, csr = Bitmap.pack(weight.relu()), NarrowCSR.pack(weight.relu())
        for way in cpu.WAYS:
            output = bitmap_matmul(x[:5], sparse.words(), sparse.starts(), sparse.values, way)
            found[f"bitmap {way}, width {width}"] = checksum(output)
        tiles = Tiles.pack(weight.relu()).tensors()
        for way in tile_product.WAYS:
            output = tiles_matmul(x[:5], **tiles, rows=len(weight), way=way)
            found[f"tiles {way}, width {width}"] = checksum(output)
        output = csr_narrow_matmul(x[:1], csr.starts.long(), csr.columns, csr.values)
        found[f"narrow CSR, width {width}"] = checksum(output)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
