import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from apportion.data.files import read_json

# `APPORTION_KILLS=20 pytest tests/cli/test_killed.py` takes some minutes.
KILLS = int(os.environ.get("APPORTION_KILLS", "5"))
# Two shards, and a checkpoint every fifth step.
ARGUMENTS = (
    *("--context", "32", "--tokens", "70000", "--features", "64", "--budget", "4", "--batch-size", "256"),
    *("--steps", "100", "--checkpoint-every", "5"),
)


def _attempts(tmp_path, kills, signal, tiny_llama, text):
    script = Path(__file__).parent / "killed_trainings.py"
    command = [sys.executable, script, tmp_path, kills, signal, tiny_llama, "--text", text, *ARGUMENTS]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "killed" / "stderr.txt").read_text()
    return json.loads(done.stdout.splitlines()[-1])


def _outcome(run):
    return (run / "dictionary" / "model.safetensors").read_bytes(), read_json(run / "evaluation.json")["metrics"]


@pytest.fixture(scope="session")
def more_text(tmp_path_factory):
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("more text")
    for name, content in topics.items():
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
@pytest.mark.parametrize(("signal", "kills", "code"), [("SIGKILL", KILLS, -9), ("SIGINT", 3, 130)])
def test_a_run_stopped_at_random_moments_ends_like_one_that_was_not(
    signal, kills, code, tiny_llama, more_text, tmp_path
):
    found = _attempts(tmp_path, kills, signal, tiny_llama, more_text)

    assert sum(found["landed"].values()) == kills
    assert found["codes"] == [code]
    undisturbed = _outcome(tmp_path / "undisturbed" / "run")
    for folder in found["finished"]:
        assert _outcome(tmp_path / folder / "run") == undisturbed
    if signal == "SIGINT":
        said = (tmp_path / "killed" / "stderr.txt").read_text()
        assert "run the same command again" in said
        assert "Traceback" not in said
