import os
import subprocess
import sys

PROGRAM = """
import torch
from apportion.allocate import TokenChoice

before = torch.get_num_threads()
TokenChoice(2)(torch.randn(64, 16))
print(before, torch.get_num_threads())
"""


def test_the_first_numba_kernel_leaves_torch_the_threads_it_had():
    # In a process of its own, because numba starts its workers once; two of them, whatever this machine has.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}

    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)

    assert done.stdout.split() == ["1", "1"]
