"""Shared entries on the CPU, compiled by numba: both lists are walked together, once."""

from typing import no_type_check

import numpy as np
from numba import carray  # type: ignore[attr-defined]
from torch import Tensor

from apportion.ops.team import address_of, pointer_to, run_alone

# What the kernel is told, after what it answers (see `run_alone`).
_ROWS, _LISTS, _LENGTH, _OTHERS, _OTHER_LENGTH = range(1, 6)


@no_type_check
def _shared(told):
    length, other_length = told[_LENGTH], told[_OTHER_LENGTH]
    lists = carray(pointer_to(told[_LISTS]), (told[_ROWS], length), np.int64)
    others = carray(pointer_to(told[_OTHERS]), (told[_ROWS], other_length), np.int64)
    found = 0
    for row in range(told[_ROWS]):
        i = j = 0
        while i < length and j < other_length:
            one, other = lists[row, i], others[row, j]
            found += one == other
            # Both ways at once, without a branch: which list is behind cannot be foreseen.
            i, j = i + (one <= other), j + (other <= one)
    told[0] = found


def shared_entries(lists: Tensor, others: Tensor) -> int:
    """See ``apportion.ops.shared_entries.shared_entries``."""
    lists, others = lists.contiguous(), others.contiguous()
    batch, rows, length = lists.shape
    told = (batch * rows, lists.data_ptr(), length, others.data_ptr(), others.shape[2])
    return run_alone(address_of(_shared), *told)
