"""Kernels. One folder an op: ``reference.py`` is its definition in plain torch, its siblings are the fast ways.

Every op is a ``torch.library`` custom op (``torch.ops.apportion.<name>``) with a fake implementation for tracing and,
where it is differentiable, a registered gradient; packing labels and counting entries are plain functions. On devices
without a kernel of their own the reference runs. Ops of which decoding needs several a token are called past torch's
dispatcher where nobody traces or differentiates (`apportion.ops.direct`).
"""

from apportion.ops.adam import adam_step_, project_rows_
from apportion.ops.attend import attend_selected
from apportion.ops.chunk_attend import attend_chunks
from apportion.ops.csr import csr_matmul, csr_sampled_product, csr_transposed_matmul
from apportion.ops.encode import encode_select
from apportion.ops.key_choice import choose_by_labels, choose_chunks
from apportion.ops.label_scores import label_scores, pack_labels, packed_label_scores, unpack_labels
from apportion.ops.low_rank_keys import low_rank_keys
from apportion.ops.select import select_above, select_columns, select_rows, select_total
from apportion.ops.spmm import bitmap_matmul, block_matmul, csr_narrow_matmul, tiles_matmul

__all__ = [
    "adam_step_",
    "attend_chunks",
    "attend_selected",
    "bitmap_matmul",
    "block_matmul",
    "choose_by_labels",
    "choose_chunks",
    "csr_matmul",
    "csr_narrow_matmul",
    "csr_sampled_product",
    "csr_transposed_matmul",
    "encode_select",
    "label_scores",
    "low_rank_keys",
    "pack_labels",
    "packed_label_scores",
    "project_rows_",
    "select_above",
    "select_columns",
    "select_rows",
    "select_total",
    "tiles_matmul",
    "unpack_labels",
]
