"""One thread budget for torch and numba, so that the two never fight over the cores."""

import contextlib
from collections.abc import Iterator

import numba
import torch


@contextlib.contextmanager
def matching_threads() -> Iterator[None]:
    """Run numba kernels on as many threads as torch has been given (``torch.set_num_threads``)."""
    # Asked first: numba starts its workers when it is first asked anything.
    torch_threads = torch.get_num_threads()
    before = numba.get_num_threads()
    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(torch_threads, most))
    try:
        yield
    finally:
        numba.set_num_threads(before)
        # When numba starts its workers it sets the OpenMP team size for everybody, which torch's threads obey.
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)
