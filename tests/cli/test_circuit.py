"""Transcoders from the command line: trained, resumed, measured, and taken apart on a prompt."""

import json

import pytest

from apportion.data.files import read_json
from apportion.features import SparseAutoencoder, Transcoder

SMALL = ("--context", "32", "--tokens", "12000", "--features", "64", "--budget", "4", "--rule", "topk")
SHORT = (*SMALL, "--batch-size", "128", "--steps", "30", "--checkpoint-every", "10")
SITES = ("--site", "layers.1.mlp_in", "--target", "layers.1.mlp_out")


@pytest.fixture(scope="module")
def transcoded(tmp_path_factory, tiny_llama, text, shared_cache):
    """Folders of two finished runs, of layers 0 and 1."""
    from apportion.cli import main

    folders = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(shared_cache))
        for layer in (0, 1):
            folder = tmp_path_factory.mktemp("transcoders") / str(layer)
            sites = ("--site", f"layers.{layer}.mlp_in", "--target", f"layers.{layer}.mlp_out")
            with pytest.raises(SystemExit) as left:
                main(["train", str(tiny_llama), "--text", str(text), *SHORT, *sites, "--skip", "--out", str(folder)])
            assert left.value.code == 0
            folders.append(folder)
    return folders


def test_a_transcoder_run_is_a_run(transcoded, typed):
    found = SparseAutoencoder.load(transcoded[1] / "dictionary")
    assert isinstance(found, Transcoder)
    assert found.skip_weight is not None
    settings = read_json(transcoded[1] / "run.json")
    assert settings["provenance"]["target"] == "layers.1.mlp_out"
    assert settings["provenance"]["transcoder"]["skip"]
    metrics = read_json(transcoded[1] / "evaluation.json")["metrics"]
    assert metrics["fvu"]["value"] < 1
    assert metrics["ce_loss_with_sae"]["value"] < metrics["ce_loss_with_ablation"]["value"]

    outcome = typed("evaluate", transcoded[1], "--contexts", "8", "--json")
    assert outcome.code == 0
    rows = {row["metric"]: row["mean"] for row in outcome.json["rows"]}
    assert rows["fvu"] == pytest.approx(metrics["fvu"]["value"], rel=1e-5)


def test_a_killed_transcoder_run_goes_on_to_the_same_weights(
    typed, interrupted, tiny_llama, text, tmp_path, monkeypatch
):
    def weights(folder):
        return (folder / "dictionary" / "model.safetensors").read_bytes()

    more = ("--rule", "topk", *SITES)
    assert interrupted(tmp_path / "run", *more).code == 130
    for folder in (tmp_path / "run", tmp_path / "whole"):
        outcome = typed("train", tiny_llama, "--text", text, *SHORT, *SITES, "--out", folder, "--json")
        assert outcome.code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert typed("train", tiny_llama, "--text", text, *SHORT, *SITES, "--skip", "--out", folder).code == 2


@pytest.mark.parametrize("search", ["greedy", "influence"])
@pytest.mark.parametrize("ln", ["exact", "scalar"])
def test_a_circuit_is_written_as_a_picture_and_as_json(transcoded, typed, tmp_path, search, ln):
    outcome = typed(
        "circuit", *transcoded, "--prompt", "a <b> & assignment", "--out", tmp_path, "--search", search, "--ln", ln
    )
    assert outcome.code == 0, outcome.err
    assert "pruned" in outcome.out
    content = read_json(tmp_path / "circuit.json")
    assert content["format"] == "apportion.circuit/1"
    assert {node["kind"] for node in content["nodes"]} >= {"logit", "feature", "mlp"}
    page = (tmp_path / "circuit.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<b>" not in page


def test_a_feature_can_be_the_root(transcoded, typed, tmp_path):
    first = typed("circuit", *transcoded, "--prompt", "the name of an assignment", "--out", tmp_path, "--json")
    assert first.code == 0, first.err
    nodes = first.json["circuit"]["nodes"]
    feature = next(node for node in nodes if node["kind"] == "feature" and node["layer"] == 1)
    outcome = typed(
        "circuit",
        *transcoded,
        "--prompt",
        "the name of an assignment",
        "--out",
        tmp_path,
        "--json",
        "--feature",
        feature["index"],
        "--at",
        feature["token"],
    )
    assert outcome.code == 0, outcome.err
    root = outcome.json["circuit"]["nodes"][0]
    assert (root["kind"], root["layer"], root["index"]) == ("feature", 1, feature["index"])
    assert root["value"] == pytest.approx(feature["activation"], rel=1e-4)
    children = [edge["value"] for edge in outcome.json["circuit"]["edges"] if edge["parent"] == 0]
    assert sum(children) + root["pruned"] == pytest.approx(root["value"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--feature", "3", "--logit", "a"), "choose one thing"),
        (("--search", "best"), "--search best: one of greedy, influence"),
        (("--at", "99"), "--at 99: the prompt has"),
        (("--logit", "assignment statement"), "give one"),
        (("--feature", "3", "--layer", "2"), "layer 2 has no transcoder"),
    ],
)
def test_what_cannot_be_explained_is_refused(transcoded, typed, tmp_path, more, said):
    outcome = typed("circuit", *transcoded, "--prompt", "an assignment", "--out", tmp_path, *more)
    assert outcome.code == 2
    assert said in outcome.err.replace("\n", " ")


def test_other_runs_are_refused(transcoded, finished, typed, tmp_path):
    outcome = typed("circuit", finished, "--prompt", "an assignment", "--out", tmp_path)
    assert outcome.code == 2
    assert "no run of a transcoder" in outcome.err
    twice = typed("circuit", transcoded[0], transcoded[0], "--prompt", "an assignment", "--out", tmp_path)
    assert twice.code == 2
    assert "which another run has already" in twice.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--skip",), "--skip is for transcoders"),
        (("--target", "layers.1.mlp_out"), "needs --site"),
        (("--site", "layers.1.mlp_out", "--target", "layers.1.mlp_in"), "must be computed after"),
        ((*SITES, "--rule", "gated"), "no separate gate"),
    ],
)
def test_transcoders_that_cannot_be_are_refused(typed, tiny_llama, text, tmp_path, more, said):
    outcome = typed("train", tiny_llama, "--text", text, "--out", tmp_path / "run", *more)
    assert outcome.code == 2
    assert said in outcome.err.replace("\n", " ")
    assert not list(tmp_path.iterdir()) or not (tmp_path / "run" / "run.json").exists()


def test_a_report_of_a_transcoder_says_what_its_features_promote(transcoded, typed, tmp_path):
    outcome = typed("report", transcoded[1], "--out", tmp_path / "report.html", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["features"] == 64
