"""Independent pieces of work in processes of their own, so many at a time."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch

from apportion.errors import InputError

Task = tuple[Callable[..., None], tuple[Any, ...]]


def in_processes(tasks: Mapping[str, Task], processes: int, threads: int | None = None) -> None:
    """Run every task, each in a fresh process that ends with it; results come back in files.

    A process outlives nobody: if this one is killed, those that run finish their task and go. If a task fails, the
    others that have begun are finished, and no new ones are begun.

    Args:
        tasks: functions with arguments, by name; both must be importable in another process.
        processes: at a time.
        threads: of torch in each; the cores are shared out evenly if None.

    Raises:
        InputError: something cannot travel to another process.
        RuntimeError: tasks failed; names them. What went wrong is on stderr.
    """
    own = threads or max(1, (os.cpu_count() or 1) // processes)
    for name, task in tasks.items():
        try:
            ForkingPickler.dumps(task)
        except Exception as error:
            raise InputError(
                f"{name} cannot be sent to another process ({error}): define what it needs at the top of a module that "
                "can be imported, or use processes=1"
            ) from error
    context = multiprocessing.get_context("spawn")
    waiting = dict(tasks)
    running: dict[str, BaseProcess] = {}
    failed: dict[str, int | None] = {}
    try:
        while running or (waiting and not failed):
            while waiting and not failed and len(running) < processes:
                name = next(iter(waiting))
                running[name] = context.Process(target=_work, args=(own, *waiting.pop(name)), name=name)
                running[name].start()
            wait([each.sentinel for each in running.values()])
            for name, process in list(running.items()):
                if process.is_alive():
                    continue
                process.join()
                if process.exitcode != 0:
                    failed[name] = process.exitcode
                running.pop(name).close()
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    if failed:
        what = ", ".join(f"{name} ({_reason(code)})" for name, code in failed.items())
        raise RuntimeError(f"failed in a process of its own: {what}; what finished is kept, so run the same again")


def _work(threads: int, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    run(*arguments)


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}, 9 if there was too little memory"
    return f"exit code {code}; the traceback is on stderr"
