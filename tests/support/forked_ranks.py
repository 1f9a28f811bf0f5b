"""Processes for the tests of what runs on several: forked from one that has imported torch, joined by gloo.

A script defines ``work(mesh) -> result`` functions, calls `on_mesh` and prints JSON. It runs as a process of its own
(see `run_script`), because a process whose thread pools have started must not be forked, with shapes checked.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Seconds that every process would otherwise spend for itself, at its first custom op and elsewhere.
IMPORTED_ONCE = (
    "torch._dynamo",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint.hf_storage",
    "apportion.allocate.mesh",
    "apportion.ops.csr.cpu",
    "apportion.ops.select.cpu",
)


def run_script(script: Path, *arguments: str, timeout: float = 110) -> Any:
    """Run a script of this kind and read the JSON of its last line; what it says on stderr is shown if it fails."""
    source, support = Path(__file__).parents[2] / "src", Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "forked_ranks", str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{support}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return json.loads(done.stdout.splitlines()[-1])


def on_mesh(data: int, feature: int, work: Callable[[Any], Any], timeout: float = 90) -> list[Any]:
    """Run ``work(mesh)`` on ``data * feature`` processes; returns what each gave, in order of rank."""
    for slow in IMPORTED_ONCE:
        importlib.import_module(slow)

    forked = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(data * feature):
            ours, theirs = forked.Pipe(duplex=False)
            process = forked.Process(target=_rank, args=(rank, data, feature, f"{folder}/store", work, theirs))
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                results.append((False, f"rank {rank} said nothing for {timeout} s"))
                break
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append((False, f"rank {rank} ended without a word"))
            if not results[-1][0]:
                break
        failed = [what for fine, what in results if not fine]
        for process in processes:
            if failed:
                process.kill()
            process.join()
    if failed:
        raise RuntimeError(f"on a mesh of {data} x {feature}: {failed[0]}")
    return [what for _, what in results]


def _rank(rank: int, data: int, feature: int, store: str, work: Callable[[Any], Any], pipe: Any) -> None:
    import torch.distributed as dist

    from apportion.allocate.mesh import Mesh

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(data * feature), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=data * feature)
        result = work(Mesh.of(data, feature))
        dist.barrier()
        dist.destroy_process_group()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    from jaxtyping import install_import_hook

    # Before anything imports the package: every annotated shape and type is checked at every call.
    install_import_hook("apportion", "runtime_types.check")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
