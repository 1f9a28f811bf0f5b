import subprocess
import sys
import time

import pytest

COMMANDS = (
    *("fetch", "train", "evaluate", "compare", "compare-dictionaries", "report", "steer", "circuit", "explore"),
    *("prune", "finetune", "compress", "explain", "generate", "bench-cache", "study", "doctor"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example_and_json(command, typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    outcome = typed(command, "--help")

    assert outcome.code == 0
    assert f"Example: apportion {command}" in outcome.out
    assert "--json" in outcome.out


def test_help_lists_every_command(typed):
    outcome = typed("--help")

    assert outcome.code == 0
    assert all(f" {command} " in outcome.out for command in COMMANDS)


def test_help_is_quick_because_it_imports_nothing_heavy():
    heavy = "torch", "transformers", "numpy", "numba", "matplotlib"
    program = f"""
import sys
from apportion.cli import main
try:
    main(["train", "--help"])
finally:
    print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    started = time.perf_counter()

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stderr.strip() == "[]"
    # A second on an idle machine would do; tests rarely have one.
    assert time.perf_counter() - started < 10


def test_version(typed):
    import apportion

    assert typed("--version").out.strip() == f"apportion {apportion.__version__}"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("train",), "MODEL"),
        (("train", "m", "--budgte", "4"), "--budgte"),
        (("train", "m", "--budget", "many"), "--budget"),
        (("compare", "m", "--seeds", "0"), "--seeds"),
        (("evaluate",), "RUN"),
        (("traim",), "traim"),
    ],
)
def test_usage_errors_are_bad_input_and_point_to_the_help(arguments, named, typed):
    outcome = typed(*arguments)

    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert named in outcome.errors[0]
    assert "--help" in outcome.errors[0]
    assert "Traceback" not in outcome.err
