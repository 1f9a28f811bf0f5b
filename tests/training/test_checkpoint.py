"""Checkpoints are whole or absent, and a failed one harms no other."""

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch

from apportion.errors import InputError
from apportion.training import Hook
from apportion.training import checkpoint as checkpoint_file
from apportion.training.checkpoint import Checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def save(checkpoints: Checkpoints, step: int, size: int = 3) -> None:
    checkpoints.save(step, {"module": {"weight": torch.full((size,), float(step))}}, {"seconds": 1.5})


def test_checkpoint_gives_back_what_it_was_given(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest_intact() is None
    save(checkpoints, 7)
    found = checkpoints.newest_intact()
    assert (found.step, found.state) == (7, {"seconds": 1.5})
    assert torch.equal(found.tensors("module")["weight"], torch.full((3,), 7.0))


def test_only_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (99_999_998, 99_999_999, 100_000_000):
        save(checkpoints, step)
    assert names(tmp_path) == ["step-100000000", "step-99999999"]
    assert checkpoints.newest_intact().step == 100_000_000


def test_damaged_checkpoint_of_a_later_step_goes_once_an_earlier_one_is_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (4, 9):
        save(checkpoints, step)
    (tmp_path / "step-00000009" / "state.json").unlink()
    with pytest.warns(UserWarning, match="resuming from step 4"):
        checkpoints.newest_intact()
    save(checkpoints, 8)
    assert names(tmp_path) == ["step-00000004", "step-00000008"]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save(Checkpoints(tmp_path, keep=1), 1)
    finally:
        os.umask(before)
    folder = tmp_path / "step-00000001"
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


def test_tensors_that_share_memory_or_have_gaps_are_saved_whole(tmp_path):
    weight = torch.arange(12.0).reshape(3, 4)
    tensors = {"weight": weight, "same": weight, "transposed": weight.t(), "row": weight[1], "one": torch.tensor(5)}
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"module": tensors}, {})
    found = checkpoints.newest_intact().tensors("module")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("failing", ["safetensors", "sync", "replace"])
def test_full_disk_is_one_clear_error_and_keeps_the_older_checkpoint(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_in_rust(*_: object) -> None:
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if failing == "safetensors":
        monkeypatch.setattr(checkpoint_file.safetensors.torch, "save_file", full_in_rust)
    elif failing == "sync":
        monkeypatch.setattr(checkpoint_file, "sync", full)
    else:
        monkeypatch.setattr(checkpoint_file.os, "replace", full)
    with pytest.raises(InputError, match=r"the disk is full while writing .*step-00000002: free some space"):
        save(checkpoints, 2)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoints.newest_intact().step == 1


def test_what_a_killed_save_left_behind_is_cleaned_up(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    left = tmp_path / ".step-00000003.partial"
    left.mkdir()
    (left / "module.safetensors").write_bytes(b"half")
    assert checkpoints.newest_intact() is None
    save(checkpoints, 5)
    assert names(tmp_path) == ["step-00000005"]


def test_renamed_checkpoint_is_not_taken_for_another_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    save(checkpoints, 1)
    save(checkpoints, 2)
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match="it is of step 2"):
        assert checkpoints.newest_intact().step == 1


def test_state_is_readable_json_with_the_checksum_of_every_file(tmp_path):
    save(Checkpoints(tmp_path, keep=1), 1)
    content = json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert content["step"] == 1
    assert list(content["files"]) == ["module.safetensors"]
    assert len(content["files"]["module.safetensors"]) == 64


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB that can really be full."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this machine lets the tests mount nothing")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_run_on_a_disk_that_fills_up_loses_nothing_and_goes_on_once_there_is_room(
    run, small_disk, same_weights, log_of
):
    rest = small_disk / "somebody else's"

    class Fill(Hook):
        def before_step(self, module: torch.nn.Module, step: int) -> None:
            if step == 13 and not rest.exists():
                with contextlib.suppress(OSError), rest.open("wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass

    with pytest.raises(InputError, match=r"the disk is full while writing .*free some space"):
        run(small_disk / "run", hooks=[Fill()])
    assert names(small_disk / "run" / "checkpoints") == ["step-00000008", "step-00000012"]
    with pytest.raises(InputError, match=r"the disk is full while writing .*free some space"):
        run(small_disk / "run")

    rest.unlink()
    resumed, result = run(small_disk / "run")
    undisturbed, _ = run(small_disk / "whole")
    assert result.resumed_from == 12
    assert same_weights(resumed, undisturbed)
    assert log_of(small_disk / "run") == log_of(small_disk / "whole")
