"""The log of a run is plain JSON lines, and TensorBoard only on request."""

import json
import sys

import pytest

from apportion.errors import InputError
from apportion.training.log import TrainingLog


def test_records_are_json_lines_in_the_folder_and_in_the_result(run, tmp_path):
    _, result = run(tmp_path, steps=5, log_every=2)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records == result.history
    assert [record["step"] for record in records] == [1, 2, 4, 5]
    assert list(records[0]) == ["step", "loss", "learning_rate", "gradient_norm", "seconds", "size"]


def test_without_a_folder_records_are_in_the_result_only(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, result = run(None, steps=5)
    assert [record["step"] for record in result.history] == [1, 2, 4, 5]
    assert list(tmp_path.iterdir()) == []


def test_values_that_json_lacks_become_null(tmp_path):
    log = TrainingLog(tmp_path, 0)
    log.write({"step": 1, "dead": float("nan"), "ratio": float("inf")})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "dead": null, "ratio": null}\n'


def test_records_after_the_checkpoint_and_half_written_ones_are_dropped(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"step": 8, "lo')
    log = TrainingLog(tmp_path, 4)
    log.write({"step": 5})
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n{"step": 5}\n'
    assert log.history == [{"step": 2}, {"step": 4}, {"step": 5}]


def test_file_that_is_not_a_log_is_not_overwritten(tmp_path):
    (tmp_path / "log.jsonl").write_text('["mine"]\n')
    with pytest.raises(InputError, match=r"log.jsonl has a line without a step .*move it away"):
        TrainingLog(tmp_path, 0)
    assert (tmp_path / "log.jsonl").read_text() == '["mine"]\n'


def test_log_that_cannot_be_written_says_so(tmp_path):
    log = TrainingLog(tmp_path / "run", 0)
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").write_text("a file in the place of the folder")
    with pytest.raises(InputError, match=r"cannot write .*log.jsonl .*choose a folder"):
        log.write({"step": 1})


def test_tensorboard_has_every_record_once_after_a_resume(run, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    run(tmp_path, tensorboard=True, stop_after=6)
    _, result = run(tmp_path, tensorboard=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(record["step"], pytest.approx(record["loss"])) for record in result.history]


def test_missing_tensorboard_is_named_with_its_remedy(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        run(tmp_path, tensorboard=True)


def test_tensorboard_without_a_folder_is_refused(run):
    with pytest.raises(InputError, match="tensorboard=True needs a folder"):
        run(None, tensorboard=True)


def test_tensorboard_is_not_imported_unless_asked_for(run, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    run(tmp_path)
    assert "torch.utils.tensorboard" not in sys.modules
