"""Not a test: types a command once undisturbed and once killed many times; test_killed.py runs it and compares.

    python killed_commands.py PLAN

A plan is JSON: see `Plan`. Every attempt is a process of its own, forked so that torch is imported once. It leaves
``FOLDER/undisturbed`` and ``FOLDER/killed`` (and ``FOLDER/killed-0`` ... of attempts that were faster than the signal),
each with ``run/``, what was said in ``stderr.txt``, and the last answer in ``stdout.txt``.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What to type, and when to kill it.

    Attributes:
        folder: for everything.
        command: without ``--out`` and ``--json``.
        kills: as many must land.
        signal: by name.
        stages: files of the run by the name of the stage that they begin, in order; counts of kills are by stage.
        after: kill each attempt as soon as one more such file (a glob pattern) is there; at random moments if None.
    """

    folder: str
    command: list[str]
    kills: int
    signal: str
    stages: dict[str, str]
    after: str | None = None


def start(folder: Path, command: list[str]) -> int:
    process = os.fork()
    if process:
        return process
    os.environ["APPORTION_CACHE"] = str(folder / "cache")
    os.dup2(os.open(folder / "stdout.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(folder / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    code = 1
    try:
        main([*command, "--out", str(folder / "run"), "--json"])
    except SystemExit as left:
        code = int(left.code or 0)
    finally:
        os._exit(code)


def wait_for_another(run: Path, pattern: str, before: set[Path], process: int) -> None:
    """Until there is a file that was not there before, or the process has ended (it is left to be waited for)."""
    while not set(run.glob(pattern)) - before:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.0005)


def stage_of(run: Path, stages: dict[str, str]) -> str:
    return [name for name, file in stages.items() if not file or any(run.glob(file))][-1]


def attempts(plan: Plan) -> dict[str, object]:
    folder = Path(plan.folder)
    killed = folder / "killed"
    for each in (folder / "undisturbed", killed):
        each.mkdir()
    started = time.perf_counter()
    assert os.waitpid(start(folder / "undisturbed", plan.command), 0)[1] == 0
    seconds = time.perf_counter() - started
    landed, codes = dict.fromkeys(plan.stages, 0), set()
    moments = random.Random(0)
    while sum(landed.values()) < plan.kills:
        before = set() if plan.after is None else set((killed / "run").glob(plan.after))
        process = start(killed, plan.command)
        if plan.after is None:
            time.sleep(moments.uniform(0, seconds))
        else:
            wait_for_another(killed / "run", plan.after, before, process)
        os.kill(process, signal.Signals[plan.signal])
        status = os.waitpid(process, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            # It was faster than the signal: begin again, so that as many as asked for land.
            os.rename(killed, folder / f"killed-{len(list(folder.glob('killed-*')))}")
            killed.mkdir()
            continue
        codes.add(-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
        landed[stage_of(killed / "run", plan.stages)] += 1
    assert os.waitpid(start(killed, plan.command), 0)[1] == 0
    return {"landed": landed, "codes": sorted(codes)}


if __name__ == "__main__":
    # Imported before the forks, and nothing is computed here: threads would not survive them.
    import transformers.models.llama.modeling_llama  # noqa: F401

    import apportion.features.run
    import apportion.studies  # noqa: F401
    from apportion.cli import main

    print(json.dumps(attempts(Plan(**json.loads(sys.argv[1])))))
