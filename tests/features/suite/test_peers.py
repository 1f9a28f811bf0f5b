"""The suite's figures beside those that SAELens' and SAEBench's own functions compute of the same inputs.

SAELens is found as in ``test_formats.py``. SAEBench pins numpy below 2 and datasets below 4, so it cannot share an
environment with apportion: install it beside, with ``pip install --no-deps --target DIR sae-bench tabulate seaborn
plotly openai sae-probes collectibles``, and name DIR in APPORTION_SAE_BENCH.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from apportion.allocate import Threshold
from apportion.data.files import read_json
from apportion.features import SparseAutoencoder
from apportion.features.formats import write_saelens
from apportion.features.suite.absorption import main_features, word_absorption
from apportion.features.suite.core import evaluate_core, weight_figures
from apportion.features.suite.probes import LinearProbe, best_by_mean_difference, logistic_accuracy
from apportion.features.suite.ravel import Pair, answers_with, interchanged, temperatures
from apportion.features.suite.scr_tpp import ablated, effects, scr_score, strongest, tpp_scores
from apportion.features.suite.units import ActivationUnits, Subject
from apportion.features.suite.unlearning import chosen_features, unlearning_score
from apportion.models import Site, capture, load

# Importing the peers takes half a minute, and much more on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

D, F = 6, 20
SITE = Site.parse("layers.1.residual")
SCORES: dict[str, Any] = {
    "tpp_clean": {"a": 0.9, "b": 0.8, "c": 0.95},
    "tpp_after": {
        "a": {"a": 0.6, "b": 0.8, "c": 0.9},
        "b": {"a": 0.9, "b": 0.5, "c": 0.95},
        "c": {"a": 0.7, "b": 0.75, "c": 0.65},
    },
    "scr": [[0.9, 0.6, 0.8], [0.9, 0.6, 0.5], [0.9, 0.8995, 0.95]],
    "f1s": [0.5, 0.6, 0.61, 0.9],
    "unlearning": [[0.4, 0.95], [0.7, 0.99], [0.8, 1.0], [0.1, 0.98]],
}


class View:
    """Held-out text in memory, each token of which counts."""

    def __init__(self, lm: Any, ids: Tensor) -> None:
        self.ids, self.n_contexts = ids, len(ids)
        self.activations = capture(lm, [SITE], ids)[SITE]

    def contexts(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = slice(start, stop)
        valid = torch.ones_like(self.ids[part], dtype=torch.bool)
        return self.ids[part], self.activations[part], valid, torch.arange(len(self.ids))[part]


def random_inputs() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    given = {
        "encoder": torch.randn(D, F, generator=draw),
        "decoder": torch.nn.functional.normalize(torch.randn(F, D, generator=draw), dim=1),
        "bias": torch.randn(F, generator=draw) * 0.5 - 0.3,
        "probe_weight": torch.randn(D, generator=draw),
        "positives": torch.randn(8, 5, D, generator=draw) + 0.5,
        "negatives": torch.randn(8, 5, D, generator=draw),
        "probe_train": torch.randn(80, F, generator=draw),
        "probe_test": torch.randn(60, F, generator=draw),
        "words": torch.randn(40, D, generator=draw),
        "main": torch.tensor([3, 7]),
        "theta": torch.randn(F, generator=draw),
        "bases": torch.randn(4, D, generator=draw),
        "sources": torch.randn(4, D, generator=draw),
        "forget_rate": torch.rand(F, generator=draw),
        "retain_rate": torch.rand(F, generator=draw) * 0.02,
    }
    for name, values in (("probe_labels", "probe_train"), ("probe_test_labels", "probe_test")):
        noise = torch.randn(len(given[values]), generator=draw)
        given[name] = (given[values][:, 4] + given[values][:, 9] + noise > 0).long()
    # Words that the probe is on for, as true positives are.
    given["words"] *= (given["words"] @ given["probe_weight"]).sign().unsqueeze(1)
    return given


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    return random_inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, given: dict[str, Tensor]) -> Path:
    """What the peers answered, and what they were asked."""
    interpreter = os.environ.get("APPORTION_PEERS_PYTHON")
    if interpreter is None and importlib.util.find_spec("sae_lens"):
        interpreter = sys.executable
    if interpreter is None:
        pytest.skip("SAELens is not installed: `make peers`, or name an interpreter in APPORTION_PEERS_PYTHON")
    place = tmp_path_factory.mktemp("peers")
    (place / "model").symlink_to(tiny_llama)
    torch.manual_seed(0)
    sae = SparseAutoencoder(32, 96, Threshold(0.0))
    with torch.no_grad():
        sae.encoder_bias.copy_(torch.randn(96) * 0.3 - 0.5)
        sae.decoder_bias.copy_(torch.randn(32) * 0.3)
        sae.encoder_weight.add_(torch.randn_like(sae.encoder_weight) * 0.05)
    write_saelens(sae, place / "sae")
    sae.save(place / "ours")
    ids = torch.randint(1, 380, (12, 20), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids}, place / "core.safetensors")
    save_file(given, place / "bench.safetensors")
    (place / "scores.json").write_text(json.dumps(SCORES))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("peer_evaluations.py")
    done = subprocess.run([interpreter, str(script), str(place)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place


@pytest.fixture
def bench(folder: Path) -> dict[str, Any]:
    if not (folder / "saebench.json").exists():
        pytest.skip("SAEBench is not here: see the docstring of this file")
    return dict(read_json(folder / "saebench.json"))


@pytest.fixture
def core(folder: Path, tiny_llama: Path) -> dict[str, float]:
    from safetensors.torch import load_file

    lm = load(tiny_llama)
    view = View(lm, load_file(folder / "core.safetensors")["ids"])
    sae = SparseAutoencoder.load(folder / "ours")
    result = evaluate_core(Subject(lm, SITE, sae, view.activations.flatten(0, 1)), view, contexts=None)
    return {name: metric.value for name, metric in result.figures.items()}


SHARED = (
    "kl_div_score", "kl_div_with_sae", "kl_div_with_ablation", "ce_loss_score", "ce_loss_with_sae",
    "ce_loss_without_sae", "ce_loss_with_ablation", "explained_variance_legacy", "cossim", "l0",
    "l1", "l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "consistent_activation_heuristic",
)  # fmt: skip


def test_core_gives_what_saelens_gives_of_the_same_dictionary_and_tokens(core, folder):
    theirs = read_json(folder / "saelens.json")

    assert 0.1 < theirs["l0"] < 90
    for name in (*SHARED, "explained_variance", "mse"):
        assert core[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), name


def test_core_gives_what_saebench_gives_but_for_its_two_known_errors(core, bench, folder):
    theirs = bench["core"]

    for name in SHARED:
        assert core[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-3), name
    tokens = 12 * 20
    assert theirs["mse"] * tokens == pytest.approx(core["mse"], rel=1e-3)
    # Centred with the mean of squares.
    assert abs(theirs["explained_variance"] - core["explained_variance"]) > 1e-3
    weights = {name: metric.value for name, metric in weight_figures(SparseAutoencoder.load(folder / "ours")).items()}
    assert weights == pytest.approx(bench["weights"], rel=1e-3, abs=1e-3)


def test_sparse_probes_choose_and_score_as_saebench_does(given, bench):
    train = given["probe_train"], given["probe_labels"].bool()
    test = given["probe_test"], given["probe_test_labels"].bool()
    for k in (1, 2, 5):
        best = best_by_mean_difference(*train, k)
        accuracy = logistic_accuracy((train[0][:, best], train[1]), (test[0][:, best], test[1]))
        assert accuracy == pytest.approx(bench["sparse_probing"][str(k)], abs=1e-6)


def test_effects_and_ablations_are_those_of_saebench(given, bench):
    def codes(x: Tensor) -> Tensor:
        return torch.relu(x @ given["encoder"] + given["bias"])

    theirs = bench["scr_tpp"]
    values = torch.cat([codes(given[name]).mean(dim=1) for name in ("positives", "negatives")])
    positive = torch.arange(16) < 8
    probe = LinearProbe(given["probe_weight"], 0.0)
    for name, spurious in (("tpp", False), ("scr", True)):
        found = effects(values, positive, given["decoder"], probe, spurious)
        np.testing.assert_allclose(found, theirs[f"{name}_effects"], atol=1e-5)
        chosen = strongest(found, 3)
        assert sorted(chosen.tolist()) == theirs[f"{name}_chosen"]
        changed = ablated(given["positives"].mean(dim=1), values[:8], given["decoder"], chosen)
        np.testing.assert_allclose(changed, theirs[f"{name}_ablated"], atol=1e-5)


def test_tpp_and_scr_scores_are_those_of_saebench(bench):
    theirs = bench["scr_tpp"]
    for name, (total, intended, unintended) in tpp_scores(SCORES["tpp_clean"], SCORES["tpp_after"]).items():
        assert total == pytest.approx(theirs["tpp_scores"][name]["tpp_threshold_2_total_metric"])
        assert intended == pytest.approx(theirs["tpp_scores"][name]["tpp_threshold_2_intended_diff_only"])
        assert unintended == pytest.approx(theirs["tpp_scores"][name]["tpp_threshold_2_unintended_diff_only"])
    assert [scr_score(*row) for row in SCORES["scr"]] == pytest.approx(theirs["scr_scores"])


def test_absorption_of_words_is_that_of_saebench(given, bench):
    theirs = bench["absorption"]
    codes = torch.relu(given["words"] @ given["encoder"] + given["bias"])
    found = [
        word_absorption(x, code, given["decoder"], given["probe_weight"], given["main"].tolist())
        for x, code in zip(given["words"], codes, strict=True)
    ]
    assert len({round(fraction, 3) for fraction in theirs["fractions"]}) > 3
    assert {*theirs["full"]} == {True, False}
    assert [fraction for fraction, _ in found] == pytest.approx(theirs["fractions"], abs=1e-4)
    assert [full for _, full in found] == theirs["full"]
    assert main_features(SCORES["f1s"], range(4)) == theirs["main"] == [0, 1]


def test_masks_exchange_features_as_saebench_does(given, bench):
    units = ActivationUnits(D)
    units.directions = given["decoder"]
    theirs = bench["ravel"]
    x = torch.cat([given["bases"], given["sources"]])
    codes = torch.relu(x @ given["encoder"] + given["bias"])
    pairs = [Pair(row, row + 4, True) for row in range(4)]
    for name, mask in (("trained", (given["theta"] > 0).float()), ("training", torch.sigmoid(given["theta"] / 0.3))):
        np.testing.assert_allclose(interchanged(codes, pairs, mask, units), theirs[name], atol=1e-5)
    assert temperatures(7) == pytest.approx(theirs["temperatures"], rel=1e-4)
    said = (("France", " France. It"), ("France", " Fr"), ("France", " Germany"), ("France", ""), ("Asia", "asia"))
    assert [answers_with(text, label) for label, text in said] == theirs["answers"]


def test_unlearning_chooses_and_scores_as_saebench_does(given, bench):
    assert chosen_features(given["forget_rate"], given["retain_rate"], 0.01).tolist() == bench["unlearning"]["chosen"]
    rows = [{"forget_accuracy": forget, "side_effect_accuracy": side} for forget, side in SCORES["unlearning"]]
    assert unlearning_score(rows) == pytest.approx(bench["unlearning"]["score"])
