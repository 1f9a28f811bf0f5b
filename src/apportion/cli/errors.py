"""What went wrong, as an exit code and one message: the only place that knows how exceptions map to either."""

import contextlib
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import typer

from apportion.errors import InputError

SUCCESS, FAILURE, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def exit_code(app: typer.Typer, arguments: list[str]) -> int:
    """Run ``app``; print what went wrong, if anything did, on stderr, and return the code to leave with."""
    with _plain_warnings():
        try:
            _check_processes(arguments)
            code = app(arguments, prog_name="apportion", standalone_mode=False)
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception as error:
            code = _code_of(error)
            if _wants_traceback(arguments):
                traceback.print_exc()
            if code != INTERRUPTED and _speaks():
                _say("error", _message_of(error))
    code = code if isinstance(code, int) else SUCCESS
    if code == INTERRUPTED and _speaks():
        _say("interrupted", "everything finished so far is kept; to go on, run the same command again")
    return code


def _processes() -> int:
    """How many processes run this command: those that torchrun started, or one."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _check_processes(arguments: list[str]) -> None:
    command = next((each for each in arguments if not each.startswith("-")), "train")
    if _processes() > 1 and command != "train":
        raise InputError(f"`apportion {command}` is for one process: run it without torchrun")


@contextlib.contextmanager
def about(option: str) -> Iterator[None]:
    """Begin the message of bad input with the option that it came from."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _speaks() -> bool:
    """Of several processes that fail only the first one says why."""
    if _processes() == 1:
        return True
    from apportion.features.job import first_to_fail

    return first_to_fail()


def _code_of(error: Exception) -> int:
    if _is_usage_error(error) or _is_bad_input(error):
        return BAD_INPUT
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    return FAILURE


def _is_usage_error(error: Exception) -> bool:
    # Of click, or of the copy of click that newer versions of typer bring along.
    return hasattr(error, "format_message")


def _is_bad_input(error: Exception) -> bool:
    # Subclasses of ValueError that Python and its libraries raise are nobody's input, but ours are plain.
    return isinstance(error, InputError) or type(error) is ValueError


def _message_of(error: Any) -> str:
    if _is_usage_error(error):
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "apportion"
        return f"{str(error.format_message()).rstrip('.')}. See `{where} --help`"
    if isinstance(error, InputError | FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error}: free some space and run the same command again; what was finished is kept"
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({error}): try fewer --features or a smaller --batch-size"
    if type(error) is ValueError:
        return str(error)
    return f"{type(error).__name__}: {error} (APPORTION_DEBUG=1 shows where)"


def _wants_traceback(arguments: list[str]) -> bool:
    before_command = [each for each in arguments[:2] if each == "--debug"]
    return bool(before_command) or os.environ.get("APPORTION_DEBUG", "") not in ("", "0", "false")


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings of Python and of loggers as a line on stderr, without file names and source lines.

    Of several processes only the first one prints them.
    """
    silent = _processes() > 1 and os.environ["RANK"] != "0"
    handler = logging.NullHandler() if silent else logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    ours = logging.getLogger("apportion")
    ours.addHandler(handler)
    propagated, ours.propagate = ours.propagate, False
    shown = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: None if silent else _say("warning", str(message))
    try:
        yield
    finally:
        warnings.showwarning = shown
        ours.removeHandler(handler)
        ours.propagate = propagated


def _say(kind: str, message: str) -> None:
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
