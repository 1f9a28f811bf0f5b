"""`apportion prune`: a model in, a pruned one out that everybody can read."""

import os

import pytest
import torch

from apportion.data.files import read_json
from apportion.models import load

FEW = ("--samples", "4", "--context", "24", "--evaluation-tokens", "200")


def test_prune_writes_a_model_that_everybody_can_read(tiny_llama, text, typed, tmp_path):
    import transformers

    out = tmp_path / "pruned"
    given = ("prune", tiny_llama, "--calibration", text, *FEW, "--out", out)
    shown = typed(*given, "--method", "sparsegpt", "--pattern", "2:4")

    assert shown.code == 0, shown.err
    assert "50.0% of these weights are 0" in shown.out
    assert str(out) in shown.out
    ours, theirs = load(out), transformers.AutoModelForCausalLM.from_pretrained(out)
    weight = theirs.model.layers[1].mlp.down_proj.weight
    assert ((weight != 0).view(32, -1, 4).sum(dim=2) == 2).all()
    assert torch.equal(ours.model.lm_head.weight, load(tiny_llama).model.lm_head.weight)
    assert ours.tokenizer("some words")["input_ids"] == load(tiny_llama).tokenizer("some words")["input_ids"]
    report = read_json(out / "pruning.json")
    assert report["settings"]["pattern"] == "2:4"
    assert report["text"]["samples"] == 4
    assert report["perplexity"]["tokens"] >= 200
    assert len(report["layers"]) == 21
    assert not (out / "parts").exists()

    again = typed(*given, "--method", "sparsegpt", "--pattern", "2:4", "--json").json
    assert again["resumed_from"] == 3
    assert again["perplexity"] == report["perplexity"]
    other = typed(*given, "--method", "wanda", "--pattern", "2:4")
    assert other.code == 2
    assert "method was 'sparsegpt' and is 'wanda'" in other.errors[0]


def test_perplexity_is_that_of_the_folders_model(tiny_llama, text, typed, tmp_path):
    from apportion.weights.pruned_checkpoint import Text, read_windows

    given = ("--calibration", text, *FEW, "--out", tmp_path / "pruned", "--pattern", "0.7", "--json")
    answer = typed("prune", tiny_llama, "--method", "dsnot", *given).json
    windows = read_windows(load(tiny_llama), Text(str(text), None, 4, 24, 200))
    for name, folder in (("before", tiny_llama), ("after", tmp_path / "pruned")):
        loss = load(folder).loss_per_token(windows.evaluation).double().mean()
        assert answer["perplexity"][name] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert answer["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert answer["layers"][0]["figures"]["swaps"] >= 0
    assert answer["perplexity"]["tokens"] == windows.evaluation.shape[0] * 23


def _interrupting(patch, place, calls):
    left = [calls]
    module, _, name = place.rpartition(".")
    real = getattr(__import__(module, fromlist=[name]), name)

    def maybe(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    patch.setattr(place, maybe)


@pytest.mark.parametrize(
    ("place", "calls", "resumed"),
    [
        ("apportion.weights.one_shot._prune_layer", 10, 1),
        ("apportion.weights.pruned_checkpoint.save_model", 0, 3),
        ("apportion.models.saving.os.replace", 1, 3),
    ],
)
def test_an_interrupted_run_goes_on_and_writes_the_same(
    place, calls, resumed, tiny_llama, text, typed, tmp_path, monkeypatch
):
    def command(name):
        return ("prune", tiny_llama, "--calibration", text, *FEW, "--json", "--out", tmp_path / name)

    whole = typed(*command("whole")).json
    with monkeypatch.context() as patch:
        if place.endswith("os.replace"):
            real, left = os.replace, [calls]

            def replace(source, target):
                if ".unfinished" in str(source):
                    left[0] -= 1
                    if left[0] < 0:
                        raise KeyboardInterrupt
                real(source, target)

            patch.setattr(os, "replace", replace)
        else:
            _interrupting(patch, place, calls)
        stopped = typed(*command("stopped"))
    assert stopped.code == 130
    assert "run the same command again" in stopped.err
    assert not (tmp_path / "stopped" / "config.json").exists()
    again = typed(*command("stopped")).json
    assert again["resumed_from"] == resumed
    assert again["perplexity"] == whole["perplexity"]
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_prune_lists_its_methods(tiny_llama, typed):
    listed = typed("prune", tiny_llama, "--method", "list", "--json").json
    assert {"magnitude", "wanda", "sparsegpt", "dsnot", "dsnot_reference"} <= {
        each["name"] for each in listed["methods"]
    }
    assert "sparsegpt" in typed("prune", tiny_llama, "--method", "list").out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--method", "best"), ("--method", "'best'", "wanda")),
        (("--pattern", "much"), ("--pattern", "'much'", "2:4")),
        (("--pattern", "0"), ("--pattern", "'0'", "nothing would be pruned")),
        (("--pattern", "1"), ("--pattern", "sparsity=1", "below 1")),
        (("--pattern", "4:4"), ("--pattern", "nothing would be pruned")),
        (("--pattern", "2:5"), ("model.layers.0.self_attn.q_proj", "32 inputs", "multiple of 5")),
        (("--pattern", "block:48"), ("model.layers.0.self_attn.q_proj", "multiple of 48")),
        (("--pattern", "block:16", "--method", "dsnot"), ("--pattern", "single weights")),
        (("--scope", "global"), ("--scope global", "row or layer")),
        (("--include", "lm_head"), ("lm_head", "shares its weight with the embedding")),
        (("--include", "*.experts.*"), ("no linear", "model.layers.0")),
        (("--calibration", "nowhere.txt"), ("--calibration", "nowhere.txt")),
        (("--evaluation", "nowhere.txt"), ("--evaluation", "nowhere.txt")),
        (("--context", "999"), ("context=999", "256")),
        (("--samples", "9999"), ("calibration", "9999 are wanted", "fewer samples")),
        (("--evaluation-tokens", "9999999"), ("evaluation", "held out")),
        (("--device", "tpu9"), ("MODEL", "tpu9")),
    ],
)
def test_what_cannot_be_pruned_is_refused(arguments, named, tiny_llama, text, typed, tmp_path):
    outcome = typed("prune", tiny_llama, "--calibration", text, *FEW, "--out", tmp_path / "pruned", *arguments)

    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert all(part in outcome.errors[0] for part in named), outcome.errors
    assert not (tmp_path / "pruned" / "pruning.json").exists()


def test_a_folder_with_something_else_is_left_alone(tiny_llama, text, typed, tmp_path):
    (tmp_path / "letter.txt").write_text("Dear")
    outcome = typed("prune", tiny_llama, "--calibration", text, *FEW, "--out", tmp_path)
    assert outcome.code == 2
    assert "--out" in outcome.errors[0]
    assert "letter.txt" in outcome.errors[0]


def test_biases_that_a_checkpoint_could_not_hold_are_refused(tiny_llama, tmp_path):
    from apportion.errors import InputError
    from apportion.weights import parse_pattern
    from apportion.weights.dsnot import DSnoT
    from apportion.weights.pruned_checkpoint import Windows, prune_to_folder

    ids = torch.ones(2, 8).long()
    with pytest.raises(
        InputError, match=r"correct_mean needs biases, and model\.layers\.0\.self_attn\.q_proj has none"
    ):
        prune_to_folder(
            load(tiny_llama), Windows(ids, ids), DSnoT(correct_mean=True), parse_pattern("0.5"), tmp_path / "pruned"
        )
