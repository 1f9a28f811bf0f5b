import json
import warnings
from pathlib import Path

import pytest

from apportion import SparseAutoencoder
from apportion.data.files import read_json

SMALL = ("--context", "32", "--tokens", "12000", "--features", "64", "--budget", "4")
SHORT = (*SMALL, "--batch-size", "128", "--steps", "30", "--checkpoint-every", "10")


def _weights(run):
    return (run / "dictionary" / "model.safetensors").read_bytes()


def test_a_run_leaves_a_dictionary_its_evaluation_and_what_decided_it(finished):
    names = {path.name for path in finished.iterdir()}

    assert names >= {"run.json", "dictionary", "evaluation.json", "log.jsonl", "finished.json"}
    sae = SparseAutoencoder.load(finished / "dictionary")
    assert (sae.d_in, sae.n_features) == (32, 64)
    assert sae.metadata["source"]["site"] == "layers.1.residual"
    assert read_json(finished / "run.json")["recipe"]["steps"] == 30


def test_train_answers_in_json_with_rows_and_nothing_else_on_stdout(typed, tiny_llama, text, tmp_path):
    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--rule", "topk", "--out", tmp_path / "run", "--json")

    assert outcome.code == 0
    answer = outcome.json
    rows = {row["metric"]: row for row in answer["rows"]}
    assert set(rows["fvu"]) == {"name", "metric", "mean", "stderr", "n"}
    assert rows["l0"]["mean"] == pytest.approx(4)
    assert "ce_loss_score" in rows
    assert answer["seeds"] == [0]
    assert {"seconds", "machine", "dictionary", "store", "settings"} <= set(answer)
    assert "training: 30 steps" in outcome.err


def test_a_finished_run_is_not_trained_again(typed, tiny_llama, text, finished):
    before = _weights(finished)

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--out", finished)

    assert outcome.code == 0
    assert "is trained already" in outcome.err
    assert "harvested before" in outcome.err
    assert f"apportion evaluate {finished}" in outcome.out
    assert _weights(finished) == before


def test_an_interrupted_run_is_continued_to_the_same_weights(interrupted, typed, tiny_llama, text, finished, tmp_path):
    outcome = interrupted(tmp_path / "run")
    assert outcome.code == 130
    assert "run the same command again" in outcome.err
    assert "Traceback" not in outcome.err

    again = typed("train", tiny_llama, "--text", text, *SHORT, "--out", tmp_path / "run", "--json")

    assert again.json["resumed_from"] == 30
    assert _weights(tmp_path / "run") == _weights(finished)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(
    interrupted, typed, tiny_llama, text, finished, tmp_path
):
    interrupted(tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-00000030" / "module.safetensors").write_bytes(b"damaged")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        again = typed("train", tiny_llama, "--text", text, *SHORT, "--out", tmp_path / "run", "--json")

    assert again.json["resumed_from"] == 20
    assert "warning: " in again.err
    assert _weights(tmp_path / "run") == _weights(finished)


def test_out_has_a_default_that_names_model_site_rule_and_seed(typed, tiny_llama, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, "--site", "layers.2.mlp_out", "--seed", "3", "--json")

    assert outcome.json["run"] == "runs/tiny-llama-layers.2.mlp_out-mutual-3"
    assert (tmp_path / outcome.json["run"] / "evaluation.json").exists()


def test_tensorboard_and_bfloat16_are_passed_on(typed, tiny_llama, text, tmp_path):
    more = ("--tensorboard", "--precision", "bfloat16", "--model-dtype", "bfloat16", "--auxiliary", "none")

    outcome = typed("train", tiny_llama, "--text", text, *SHORT, *more, "--out", tmp_path / "run", "--json")

    assert outcome.code == 0
    assert outcome.json["settings"]["recipe"]["precision"] == "bfloat16"
    assert outcome.json["settings"]["recipe"]["auxiliary"] == "none"
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


def test_the_log_has_a_line_a_record(finished):
    records = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]

    assert records[-1]["step"] == 30
    assert {"loss", "l0", "dead"} <= set(records[-1])


def test_gradients_of_the_loss_help_to_choose_where_asked(typed, tiny_llama, text, tmp_path):
    given = ("train", tiny_llama, "--text", text, *SHORT, "--rule", "topk", "--out", tmp_path / "run")
    outcome = typed(*given, "--gradient-weight", "0.5", "--gradient-target", "sampled", "--json")

    assert outcome.code == 0
    sae = SparseAutoencoder.load(tmp_path / "run" / "dictionary")
    assert sae.metadata["gradient_score"] == {"beta": 0.5, "norm": "mean", "value": "affinity"}
    store = read_json(Path(outcome.json["store"]) / "manifest.json")
    assert store["made_from"]["gradients"] == {"target": "sampled", "seed": 0}
    # Without them it would be another run.
    assert "holds another run" in typed(*given).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gradient-weight", "-1"), "beta=-1.0"),
        (("--gradient-weight", "1", "--gradient-target", "truth"), "--gradient-target truth: one of label, sampled"),
        (("--gradient-weight", "1", "--rule", "relu"), "gradients help to share out a budget"),
    ],
)
def test_gradient_weights_that_cannot_be_are_refused(typed, tiny_llama, text, options, message):
    outcome = typed("train", tiny_llama, "--text", text, *SHORT, *options)

    assert outcome.code == 2
    assert message in outcome.err
