import json

import pytest
import torch

from apportion.models import load
from apportion.weights import prunable

SHORT = ("--context", "16", "--held-out", "4", "--steps", "6", "--batch-size", "2", "--learning-rate", "3e-3")


def zeros(folder):
    return {each.name: each.matrix() == 0 for each in prunable(load(folder).model)}


def test_finetune_writes_a_better_model_that_is_as_sparse(typed, pruned, tiny_llama, text, tmp_path):
    out = tmp_path / "out"
    given = ("finetune", pruned, "--teacher", tiny_llama, "--eps", "1e-4", "--text", text, *SHORT, "--out", out)
    outcome = typed(*given, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    assert found["command"] == "finetune"
    assert found["out"] == str(out)
    assert found["perplexity"]["after"] < found["perplexity"]["before"]
    assert found["sparsity"]["before"] == found["sparsity"]["after"] == pytest.approx(0.6, abs=0.02)
    assert found["settings"]["distillation"] == {
        "ce": 1.0,
        "kl": 0.0,
        "squarehead": 1.0,
        "temperature": 1.0,
        "eps": 1e-4,
    }
    assert all(torch.equal(each, zeros(pruned)[name]) for name, each in zeros(out).items())
    assert not (out / "training" / "checkpoints").exists()
    assert (out / "training" / "log.jsonl").exists()

    again = typed(*given)
    assert again.code == 0
    assert "finished" in again.err
    assert "59.38%" in again.out  # 19 of 32 and 38 of 64 in a row
    assert "perplexity" in again.out
    assert f"apportion generate {out}" in again.out
    other = typed(*given, "--seed", "1")
    assert other.code == 2
    assert "seed" in other.errors[0]
    assert typed("generate", out, "--prompt", "An assignment", "--tokens", "3").code == 0


def test_an_interrupted_run_goes_on(typed, pruned, text, tmp_path, monkeypatch):
    from apportion.models import saving

    given = ("finetune", pruned, "--loss", "ce", "--text", text, *SHORT, "--out", tmp_path / "out")
    with monkeypatch.context() as patch:

        def interrupt(*_):
            raise KeyboardInterrupt

        patch.setattr(saving, "save_model", interrupt)
        assert typed(*given).code == 130
    assert not (tmp_path / "out" / "finetune.json").exists()
    outcome = typed(*given, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["resumed_from"] == 6
    assert outcome.json["perplexity"]["teacher"] is None


def test_tokens_are_steps(typed, pruned, text, tmp_path):
    more = ("--context", "16", "--held-out", "2", "--batch-size", "2", "--tokens", "100", "--out", tmp_path / "out")
    found = typed("finetune", pruned, "--loss", "ce", "--text", text, *more, "--json").json
    assert found["settings"]["steps"] == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "needs --teacher"),
        (("--loss", "mse"), "'mse' is no loss"),
        (("--loss", "ce", "--steps", "3", "--tokens", "9"), "give one of them"),
        (("--loss", "ce", "--text", "nowhere"), "nowhere"),
        (("--loss", "ce", "--precision", "float8"), "float8"),
        (("--loss", "ce", "--learning-rate", "0"), "learning_rate"),
        (("--loss", "ce", "--clip-norm", "-1"), "clip_norm"),
        (("--loss", "ce+kl", "--teacher", "gone/"), "--teacher"),
        (("--temperature", "0", "--loss", "ce"), "temperature"),
    ],
)
def test_bad_input_is_named(typed, pruned, tmp_path, text, arguments, named):
    more = ("--out", tmp_path / "out", *(() if "--text" in arguments else ("--text", text)))
    outcome = typed("finetune", pruned, *more, *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert named in outcome.errors[0]


def test_folders_that_cannot_be_are_named(typed, pruned, tiny_llama, text, tmp_path):
    ce = ("--loss", "ce", "--text", text, *SHORT)
    assert "the pruned model itself" in typed("finetune", pruned, *ce, "--out", pruned).errors[0]
    (tmp_path / "notes").write_text("mine")
    assert "is not empty (notes)" in typed("finetune", pruned, *ce, "--out", tmp_path).errors[0]
    dense = typed("finetune", tiny_llama, *ce, "--out", tmp_path / "dense")
    assert dense.code == 2
    assert "apportion prune" in dense.errors[0]
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "finetune.json").write_text(json.dumps({}))
    assert "another finished run" in typed("finetune", pruned, *ce, "--out", tmp_path / "damaged").errors[0]
    missing = typed("finetune", tmp_path / "gone", *ce, "--out", tmp_path / "new")
    assert missing.code == 2
    assert "PRUNED" in missing.errors[0]
