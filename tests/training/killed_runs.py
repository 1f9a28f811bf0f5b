"""Not a test: trains once undisturbed and once killed many times; test_resume.py runs it and compares.

    python killed_runs.py FOLDER KILLS

Every attempt is a process of its own, forked so that torch is imported once, and ended with SIGKILL at a random moment.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

from conftest import run

STEPS = {"steps": 120, "checkpoint_every": 3, "log_every": 1}


def start(folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    try:
        run(folder, **STEPS)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main(folder: Path, kills: int) -> None:
    run(None, steps=2)
    started = time.perf_counter()
    assert os.waitpid(start(folder / "undisturbed"), 0)[1] == 0
    seconds = time.perf_counter() - started

    landed = 0
    moments = random.Random(0)
    for _ in range(kills):
        process = start(folder / "killed")
        time.sleep(moments.uniform(0, 2 * seconds / kills))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        landed += os.WIFSIGNALED(status)
    assert os.waitpid(start(folder / "killed"), 0)[1] == 0
    print(json.dumps({"landed": landed}))


main(Path(sys.argv[1]), int(sys.argv[2]))
