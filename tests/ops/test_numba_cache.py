"""The process that compiles a kernel and those that find it compiled compute the same bits, or no run could resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_kernel_computes_the_same_bits_compiled_and_loaded(tmp_path: Path) -> None:
    script, source = Path(__file__).with_name("compiled_or_loaded.py"), Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert list(tmp_path.rglob("*.nbc"))
        found.append(json.loads(done.stdout))
    compiled, loaded = found
    assert [name for name in compiled if compiled[name] != loaded[name]] == []
