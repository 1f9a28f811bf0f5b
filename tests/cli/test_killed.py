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


def _attempts(tmp_path, command, kills, signal="SIGKILL", **plan):
    """See the script; the folders of all runs that were killed and finished are returned too."""
    plan |= {"folder": str(tmp_path), "command": [str(each) for each in command], "kills": kills, "signal": signal}
    script = [sys.executable, str(Path(__file__).parent / "killed_commands.py"), json.dumps(plan)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + (tmp_path / "killed" / "stderr.txt").read_text()
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["landed"].values()) == kills
    return found, [each / "run" for each in tmp_path.glob("killed*")]


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
    command = ("train", tiny_llama, "--text", more_text, *ARGUMENTS)
    stages = {"harvest": "", "training": "run.json", "after": "dictionary/config.json"}
    found, runs = _attempts(tmp_path, command, kills, signal, stages=stages)

    assert found["codes"] == [code]
    undisturbed = _outcome(tmp_path / "undisturbed" / "run")
    for run in runs:
        assert _outcome(run) == undisturbed
    if signal == "SIGINT":
        said = (tmp_path / "killed" / "stderr.txt").read_text()
        assert "run the same command again" in said
        assert "Traceback" not in said


@pytest.mark.slow
def test_prune_killed_after_each_block_writes_the_very_model(tiny_llama, text, tmp_path):
    command = ("prune", tiny_llama, "--method", "sparsegpt", "--calibration", text)
    few = ("--samples", "16", "--context", "64", "--evaluation-tokens", "500")
    blocks = "parts/block-*.safetensors"
    stages = {"before": "", "blocks": blocks, "after": "model.safetensors"}
    found, runs = _attempts(tmp_path, (*command, *few), kills=3, stages=stages, after=blocks)

    assert found["codes"] == [-9]
    assert found["landed"]["blocks"] == 3
    assert _answer(tmp_path / "killed")["resumed_from"] == 3
    assert not _answer(tmp_path / "undisturbed")["resumed_from"]
    _same_models(tmp_path / "undisturbed" / "run", runs, "parts")


@pytest.mark.slow
def test_finetune_killed_after_each_checkpoint_writes_the_very_model(tiny_llama, pruned, text, tmp_path):
    command = ("finetune", pruned, "--teacher", tiny_llama, "--text", text, "--context", "32", "--held-out", "4")
    few = ("--steps", "9", "--checkpoint-every", "2", "--batch-size", "2", "--learning-rate", "3e-3")
    steps = "training/checkpoints/step-*"
    stages = {"before": "", "training": steps, "after": "model.safetensors"}
    found, runs = _attempts(tmp_path, (*command, *few), kills=3, stages=stages, after=steps)

    assert found["codes"] == [-9]
    assert found["landed"]["training"] == 3
    assert _answer(tmp_path / "killed")["resumed_from"] >= 6
    assert not _answer(tmp_path / "undisturbed")["resumed_from"]
    _same_models(tmp_path / "undisturbed" / "run", runs, "training/checkpoints")


def _answer(folder):
    return json.loads((folder / "stdout.txt").read_text())


def _same_models(undisturbed, runs, left_over):
    expected = (undisturbed / "model.safetensors").read_bytes()
    for run in runs:
        assert (run / "model.safetensors").read_bytes() == expected
        assert not (run / left_over).exists()
