"""A run that is stopped, killed, damaged or interrupted ends as if nothing had happened."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apportion.errors import InputError


class Shrinking(torch.optim.SGD):
    """Counts its steps in a plain number for each parameter, and lets the number decide the step."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1
            parameter.grad.div_(self.state[parameter]["count"])
        return super().step(closure)


def newest(folder: Path) -> Path:
    return max((folder / "checkpoints").iterdir())


def test_paused_run_ends_with_the_weights_and_the_log_of_an_undisturbed_one(run, tmp_path, same_weights, log_of):
    undisturbed, whole = run(tmp_path / "whole")
    # 7 is no multiple of checkpoint_every or log_every: pausing must not leave a trace in the log.
    _, first = run(tmp_path / "parts", stop_after=7)
    resumed, second = run(tmp_path / "parts")

    assert (first.steps_done, first.resumed_from) == (7, None)
    assert (second.steps_done, second.resumed_from) == (20, 7)
    assert same_weights(undisturbed, resumed)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    assert [record["step"] for record in second.history] == [record["step"] for record in whole.history]
    assert second.seconds > first.seconds


@pytest.mark.parametrize(
    "optimizer",
    [
        None,
        functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        functools.partial(torch.optim.AdamW, lr=0.01, amsgrad=True, foreach=True),
        functools.partial(torch.optim.NAdam, lr=0.01),
        functools.partial(torch.optim.Adafactor, lr=0.01),
        functools.partial(Shrinking, lr=0.1),
        lambda parameters: torch.optim.Adam([{"params": [p], "lr": 0.01 * (1 + p.ndim)} for p in parameters]),
    ],
    ids=["default", "sgd", "adamw", "nadam", "adafactor", "plain numbers", "groups"],
)
def test_every_optimizer_resumes_exactly(run, tmp_path, same_weights, optimizer):
    undisturbed, _ = run(None, optimizer=optimizer)
    run(tmp_path, stop_after=9, optimizer=optimizer)
    resumed, _ = run(tmp_path, optimizer=optimizer)
    assert same_weights(undisturbed, resumed)


@pytest.mark.slow
def test_run_killed_twenty_times_ends_equal_to_an_undisturbed_one(tmp_path, log_of):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(tmp_path), "20"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["landed"] >= 5

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert newest(undisturbed).name == newest(killed).name == "step-00000120"
    for name in ("module.safetensors", "optimizer.safetensors"):
        assert (newest(undisturbed) / name).read_bytes() == (newest(killed) / name).read_bytes()
    assert log_of(killed) == log_of(undisturbed)
    assert {path.name for path in killed.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert len(list((killed / "checkpoints").iterdir())) == 2


def test_files_that_a_killed_process_left_half_written_are_cleaned_up(run, tmp_path):
    left = [tmp_path / name for name in (".settings.json.abc.partial", ".log.jsonl.abc.partial")]
    for path in left:
        path.write_text("{")
    run(tmp_path)
    assert not any(path.exists() for path in left)


def test_finished_run_gives_its_result_again_without_a_step(run, tmp_path, same_weights):
    module, result = run(tmp_path)
    assert json.loads((tmp_path / "finished.json").read_text())["steps"] == 20

    def no_batch(step: int) -> torch.Tensor:
        raise AssertionError("a finished run takes no batch")

    again, same_result = run(tmp_path, batches=no_batch)
    assert same_weights(module, again)
    assert same_result.history == result.history
    assert same_result.resumed_from == same_result.steps_done == 20


@pytest.mark.parametrize("name", ["module.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_damaged_checkpoint_falls_back_to_the_one_before(run, tmp_path, same_weights, name, damage):
    undisturbed, whole = run(None)
    run(tmp_path, stop_after=9)
    file = newest(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if damage == "flipped" else content[:-5])
    if damage == "missing":
        file.unlink()

    with pytest.warns(UserWarning, match=r"step-00000009 is damaged .* resuming from step 8 instead"):
        resumed, result = run(tmp_path, checkpoint_every=20)
    assert result.resumed_from == 8
    assert same_weights(undisturbed, resumed)
    assert [record["loss"] for record in result.history] == [record["loss"] for record in whole.history]


def test_damaged_checkpoint_is_replaced_when_its_step_comes_again(run, tmp_path):
    run(tmp_path, stop_after=8)
    (newest(tmp_path) / "module.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="damaged"):
        run(tmp_path, stop_after=8)
    _, result = run(tmp_path, stop_after=9)
    assert result.resumed_from == 8


def test_run_whose_checkpoints_are_all_damaged_is_left_alone(run, tmp_path):
    run(tmp_path, stop_after=8)
    log = (tmp_path / "log.jsonl").read_text()
    for folder in (tmp_path / "checkpoints").iterdir():
        (folder / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"step-00000008 is damaged.*step-00000004 is damaged.*delete"):
        run(tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == log


def test_checkpoint_of_a_newer_format_is_refused(run, tmp_path):
    from apportion.training import checkpoint

    run(tmp_path, stop_after=4)
    file = newest(tmp_path) / "state.json"
    content = json.loads(file.read_text()) | {"format": 2}
    del content["sha256"]
    file.write_text(json.dumps(content | {"sha256": checkpoint._digest_of_json(content)}))
    with pytest.raises(InputError, match="has format 2, this apportion reads 1: upgrade"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"learning_rate": 0.5}, r"settings.learning_rate \(checkpoint: 0.01, this run: 0.5\)"),
        ({"steps": 40}, r"settings.steps \(checkpoint: 20, this run: 40\)"),
        ({"provenance": {"store": "other"}}, r'provenance.store \(checkpoint: "one", this run: "other"\)'),
        (
            {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
            r'optimizer.class \(checkpoint: "Adam", this run: "SGD"\)',
        ),
    ],
)
def test_foreign_checkpoint_is_refused_and_the_difference_named(run, tmp_path, changes, named):
    run(tmp_path, stop_after=4, provenance={"store": "one"})
    before = sorted(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(InputError, match=named):
        run(tmp_path, **{"provenance": {"store": "one"}} | changes)
    assert sorted(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) == before


def test_checkpoint_of_another_module_is_refused(run, regressor, tmp_path):
    run(tmp_path, stop_after=4)
    expected = r'tensors.layers.0.weight \(checkpoint: "float32 \[8, 4\]", this run: "float32 \[9, 4\]"\)'
    with pytest.raises(InputError, match=expected):
        run(tmp_path, module=regressor(9))
    with pytest.raises(
        InputError, match=r'tensors.mean \(checkpoint: "float32 \[4\]", this run: "absent"\).*and 3 more'
    ):
        run(tmp_path, module=torch.nn.Linear(4, 1))


def test_what_does_not_decide_the_weights_may_change_on_resume(run, tmp_path, same_weights):
    undisturbed, _ = run(None)
    run(tmp_path, stop_after=7)
    resumed, _ = run(tmp_path, checkpoint_every=6, log_every=5, keep_checkpoints=1)
    assert same_weights(undisturbed, resumed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_the_end_of_the_step_and_the_run_goes_on_from_there(
    run, tmp_path, same_weights, log_of, number
):
    undisturbed, _ = run(tmp_path / "whole")
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    class Interrupt:
        def before_step(self, module: torch.nn.Module, step: int) -> None:
            if step == 6:
                os.kill(os.getpid(), number)

        def after_step(self, module: torch.nn.Module, step: int, metrics: dict) -> None:
            pass

    with pytest.raises(KeyboardInterrupt, match="paused after step 7"):
        run(tmp_path / "parts", hooks=[Interrupt()])
    assert newest(tmp_path / "parts").name == "step-00000007"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    resumed, result = run(tmp_path / "parts")
    assert result.resumed_from == 7
    assert same_weights(undisturbed, resumed)
    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")


def test_second_interrupt_does_not_wait(run, tmp_path, objective):
    def hangs(module, batch, step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second Ctrl-C must not come here")
        return objective(module, batch, step)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, objective=hangs)
    assert newest(tmp_path).name == "step-00000004"


def test_ignored_signals_stay_ignored(run, tmp_path, objective):
    def hangs_up(module, batch, step):
        signal.raise_signal(signal.SIGINT)
        return objective(module, batch, step)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _, result = run(tmp_path, objective=hangs_up)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.steps_done == 20
