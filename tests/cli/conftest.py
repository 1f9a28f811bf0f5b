"""A command line to type into, a small text, and one finished run that nobody changes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from apportion.cli import main


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Typed = Callable[..., Outcome]

SMALL = ("--context", "32", "--tokens", "12000", "--features", "64", "--budget", "4")
SHORT = (*SMALL, "--batch-size", "128", "--steps", "30", "--checkpoint-every", "10")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the same data share their activations, here as anywhere."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPORTION_CACHE", str(shared_cache))
    monkeypatch.delenv("APPORTION_DEBUG", raising=False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents."""
    folder = tmp_path_factory.mktemp("text")
    for name, content in sorted(topics.items(), key=lambda item: len(item[1]))[:60]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder such as ``apportion prune`` leaves behind."""
    from apportion.models import load
    from apportion.models.saving import save_model
    from apportion.weights import Unstructured, choose_masks, prunable

    lm = load(tiny_llama)
    layers = prunable(lm.model)
    masks = choose_masks({each.name: each.matrix().abs() for each in layers}, Unstructured(0.6, "row"))
    for each in layers:
        each.set_matrix(each.matrix() * masks[each.name])
    folder = tmp_path_factory.mktemp("pruned") / "model"
    save_model(lm, folder)
    return folder


@pytest.fixture
def typed(capfd: pytest.CaptureFixture[str]) -> Typed:
    """Type a command: ``typed("train", model, ...)``."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text: Path, shared_cache: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(shared_cache))
        with pytest.raises(SystemExit) as left:
            main(["train", str(tiny_llama), "--text", str(text), *SHORT, "--out", str(folder), "--json"])
        assert left.value.code == 0
    return folder


@pytest.fixture
def interrupted(typed: Typed, tiny_llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Train in a folder, and interrupt it after the last step, when all its checkpoints are there."""

    def run(folder: Path, *more: object) -> Outcome:
        from apportion.features import SparseAutoencoder

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(SparseAutoencoder, "save", interrupt)
            return typed("train", tiny_llama, "--text", text, *SHORT, "--out", folder, *more)

    return run
