"""Not a test: types `apportion train` once undisturbed and once killed many times; test_killed.py runs it and compares.

    python killed_trainings.py FOLDER KILLS SIGNAL TRAIN-ARGUMENTS...

Every attempt is a process of its own, forked so that torch is imported once, and ended at a random moment.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path


def start(folder: Path, arguments: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    os.environ["APPORTION_CACHE"] = str(folder / "cache")
    log = os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        main(["train", *arguments, "--out", str(folder / "run"), "--json"])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os._exit(code)


def attempts(folder: Path, kills: int, number: int, arguments: list[str]) -> dict[str, object]:
    for name in ("undisturbed", "killed"):
        (folder / name).mkdir()
    started = time.perf_counter()
    assert os.waitpid(start(folder / "undisturbed", arguments), 0)[1] == 0
    seconds = time.perf_counter() - started
    landed, codes = {"harvest": 0, "training": 0, "after": 0}, set()
    moments = random.Random(0)
    while sum(landed.values()) < kills:
        process = start(folder / "killed", arguments)
        time.sleep(moments.uniform(0, seconds))
        os.kill(process, number)
        status = os.waitpid(process, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            # It was faster than the signal: begin again, so that as many as asked for land.
            finished = len(list(folder.glob("killed-*")))
            os.rename(folder / "killed", folder / f"killed-{finished}")
            (folder / "killed").mkdir()
            continue
        codes.add(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        run = folder / "killed" / "run"
        done = (run / "dictionary" / "config.json").exists()
        landed["after" if done else "training" if (run / "run.json").exists() else "harvest"] += 1
    assert os.waitpid(start(folder / "killed", arguments), 0)[1] == 0
    finished = [path.name for path in folder.iterdir() if (path / "run" / "evaluation.json").exists()]
    return {"landed": landed, "codes": sorted(codes), "finished": finished}


if __name__ == "__main__":
    # Imported before the forks, and nothing is computed here: threads would not survive them.
    import transformers.models.llama.modeling_llama  # noqa: F401

    import apportion.features.run
    import apportion.studies  # noqa: F401
    from apportion.cli import main

    found = attempts(Path(sys.argv[1]), int(sys.argv[2]), signal.Signals[sys.argv[3]], sys.argv[4:])
    print(json.dumps(found))
