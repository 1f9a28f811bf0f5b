"""`torchrun -m apportion train`: several processes make the run that one makes, with one voice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apportion.data.files import read_json
from apportion.models import ActivationStore

ARGUMENTS = ("--context", "32", "--tokens", "12000", "--features", "64", "--budget", "4", "--batch-size", "128")
STEPS = ("--steps", "200", "--checkpoint-every", "10")

pytestmark = pytest.mark.slow


def start(*arguments, restarts=0):
    source = Path(__file__).parents[2] / "src"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "--max-restarts", str(restarts), "-m", "apportion", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            # Without it restarted processes may find the addresses of the dead ones (pytorch issue 135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("stores") / "store"


@pytest.fixture(scope="module")
def command(tiny_llama, text, store):
    return ("train", tiny_llama, "--text", text, *ARGUMENTS, "--store", store, "--json")


@pytest.fixture(scope="module")
def together(command, tmp_path_factory, shared_cache):
    """A run of two processes, and what they said."""
    folder = tmp_path_factory.mktemp("runs") / "together"
    out, err = start(*command, *STEPS, "--out", folder, "--mesh", "1x2").communicate(timeout=100)
    assert (folder / "evaluation.json").exists(), err
    return folder, out, err


def test_two_processes_make_the_run_that_one_makes_of_the_same_store(together, command, store, typed, tmp_path):
    folder, out, err = together
    # One answer, and every message once.
    assert json.loads(out)["run"] == str(folder)
    lines = [line for line in err.splitlines() if not line.startswith("harvest ")]
    assert [line.partition(":")[0] for line in lines if "torch" not in line] == [
        "activations",
        "training",
        *(line.partition(":")[0] for line in lines if line.startswith("step")),
        "evaluating on 899 held-out tokens",
    ]
    assert "2 parts by 2 processes" in err
    assert "over 1 x 2 processes" in err
    opened = ActivationStore.open(store)
    opened.verify()
    assert opened.parts == 2

    alone = typed(*command, *STEPS, "--out", tmp_path / "alone")

    assert alone.code == 0, alone.err
    assert ActivationStore.open(store).parts == 2
    expected, found = (load_file(each / "dictionary" / "model.safetensors") for each in (tmp_path / "alone", folder))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3, equal_nan=True)
    ours, theirs = (read_json(each / "evaluation.json")["metrics"] for each in (folder, tmp_path / "alone"))
    assert ours["fvu"]["value"] == pytest.approx(theirs["fvu"]["value"], rel=1e-3)
    assert ours["ce_loss_with_sae"]["value"] == pytest.approx(theirs["ce_loss_with_sae"]["value"], rel=1e-3)
    # What several have finished one finds finished.
    again = typed(*command, *STEPS, "--out", folder)
    assert "is trained already" in again.err


def rank(number, of):
    """The process of a rank among the children of torchrun."""
    for child in Path(f"/proc/{of}/task/{of}/children").read_text().split():
        if f"RANK={number}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("torchrun has no such child")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_with_the_same_weights(together, command, tmp_path):
    folder = tmp_path / "killed"
    process = start(*command, *STEPS, "--out", folder, "--mesh", "1x2", restarts=3)
    try:
        while not (folder / "checkpoints" / "step-00000020").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(rank(1, process.pid), signal.SIGKILL)
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()

    assert process.returncode == 0, err
    answer = json.loads(out)
    assert 20 <= answer["resumed_from"] < 200
    for name in ("dictionary/model.safetensors", "evaluation.json"):
        assert (folder / name).read_bytes() == (together[0] / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--mesh", "4x1"), "mesh=4x1: that is 4 processes, but torchrun started 2"),
        (("--rule", "relu"), "over a mesh only TokenChoice"),
        (("--text", "none.txt"), "--text: corpus 'none.txt' is not there"),
        (("--bogus",), "No such option: --bogus"),
    ],
)
def test_bad_input_is_reported_once(arguments, named, command, tmp_path):
    process = start(*command, *STEPS, *arguments, "--out", tmp_path / "run")
    out, err = process.communicate(timeout=100)

    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert named in errors[0]
    assert out == ""
    # torchrun itself leaves with 1 and a report.
    assert "exitcode  : 2" in err
    assert "exitcode  : 1" not in err
    assert not (tmp_path / "run" / "run.json").exists()


def test_what_fails_in_another_process_than_the_first_is_reported_once_too(command, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "part-00001-of-00002").write_text("a file in the way")

    process = start(*command, *STEPS, "--store", tmp_path / "store", "--out", tmp_path / "run")
    out, err = process.communicate(timeout=100)

    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "part-00001-of-00002" in errors[0]
    assert "exitcode  : 2" in err
    assert out == ""


def test_other_commands_are_for_one_process(tmp_path):
    _, err = start("evaluate", tmp_path).communicate(timeout=100)

    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: `apportion evaluate` is for one process: run it without torchrun"
    ]
