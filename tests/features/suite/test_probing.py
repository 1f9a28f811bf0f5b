"""Sparse probing, SCR and TPP where the right answer is planted."""

import pytest
import torch

from apportion.data.labelled import LabelledTexts
from apportion.features.suite import (
    ACTIVATIONS,
    RANDOM,
    NotApplicable,
    evaluate_scr,
    evaluate_sparse_probing,
    evaluate_tpp,
    scr_tpp,
    sparse_probing,
)
from apportion.features.suite.probes import LinearProbe, balanced_rows, best_by_mean_difference, fit_multi_probe
from apportion.features.suite.scr_tpp import ablated, effects, strongest

CLASSES = ("first", "second", "third")


@pytest.fixture
def texts() -> LabelledTexts:
    """Texts whose content nobody looks at: the activations are planted."""
    part = {name: [f"{name} {number}" for number in range(20)] for name in CLASSES}
    return LabelledTexts("planted", "planted", part, part)


@pytest.fixture
def world(monkeypatch, subject, planted, texts):
    """Class i puts 4 on dimension i of the activation; feature i reads that dimension, and nothing else."""
    sae = planted(torch.eye(32)[:8], torch.full((8,), 1.0))
    object.__setattr__(subject, "sae", sae)
    subject.made.clear()

    def pool(lm, site, flat, units, context, batch=32):
        draw = torch.Generator().manual_seed(len(flat))
        x = 0.1 * torch.randn(len(flat), 32, generator=draw)
        for row, text in enumerate(flat):
            x[row, CLASSES.index(text.split()[0])] += 4
        return x, [each.pool(x, torch.arange(len(x)), len(x)) for each in units]

    monkeypatch.setattr(sparse_probing, "pooled", pool)
    return subject


def test_one_planted_feature_is_enough_for_a_perfect_probe(world, texts):
    result = evaluate_sparse_probing(world, [texts], ks=(1, 2), full_probes=True)

    assert result.figures["sae_top_1_test_accuracy"].value == 1
    assert result.figures["sae_top_1_test_accuracy"].n == 3
    # The class is a dimension here, so the dimensions do as well.
    assert result.figures["llm_top_1_test_accuracy"].value == 1
    assert result.controls[ACTIVATIONS]["sae_top_1_test_accuracy"].value == 1
    assert result.figures["sae_test_accuracy"].value == 1


def test_a_rotated_world_needs_the_dictionary(monkeypatch, world, texts, planted):
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    straight = sparse_probing.pooled

    def pool(lm, site, flat, units, context, batch=32):
        x = (straight(lm, site, flat, [], context)[0] + torch.randn(len(flat), 32)) @ turn
        return x, [each.pool(x, torch.arange(len(x)), len(x)) for each in units]

    monkeypatch.setattr(sparse_probing, "pooled", pool)
    object.__setattr__(world, "sae", planted(turn[:8], torch.full((8,), 1.0)))
    result = evaluate_sparse_probing(world, [texts], ks=(1,), full_probes=False)

    assert result.figures["sae_top_1_test_accuracy"].value > 0.95
    assert result.controls[ACTIVATIONS]["sae_top_1_test_accuracy"].value < 0.9


def test_perfectly_disentangled_features_have_the_tpp_that_can_be_worked_out(monkeypatch, world, texts):
    def probe(train, test, seed):
        values, positive = train
        difference = values[positive].mean(dim=0) - values[~positive].mean(dim=0)
        return LinearProbe(torch.eye(32)[difference.argmax()], -2.0)

    monkeypatch.setattr(scr_tpp, "_probe", probe)
    result = evaluate_tpp(world, [texts], thresholds=(1, 2))
    # Without its feature all of a class's positives look like negatives: its probe falls from 1 to 1/2, no other moves.
    assert result.figures["tpp_threshold_1_intended_diff_only"].value == pytest.approx(0.5)
    assert result.figures["tpp_threshold_1_unintended_diff_only"].value == pytest.approx(0)
    assert result.figures["tpp_threshold_1_total_metric"].value == pytest.approx(0.5)
    assert result.controls[RANDOM]["tpp_threshold_1_total_metric"].value < 0.5


def test_tpp_needs_three_classes(subject):
    two = LabelledTexts("two", "two", {"a": ["x y"], "b": ["x y"]}, {"a": ["x y"], "b": ["x y"]})
    with pytest.raises(NotApplicable, match="3 classes"):
        evaluate_tpp(subject, [two])


def test_ablating_the_spurious_feature_restores_the_probe(monkeypatch, world, planted):
    def drawn(pair, train, test, seed):
        cells = {(library, kind): [f"{library} {kind}"] * 150 for library in pair for kind in ("code", "prose")}
        return cells, cells

    def pool(lm, site, flat, units, context, batch=32):
        x = torch.randn(len(flat), 32, generator=torch.Generator().manual_seed(len(flat)))
        x[:, :2] *= 0.5
        for row, text in enumerate(flat):
            library, kind = text.split()
            # The kind speaks louder than the library: a probe trained where both go together listens to it more.
            x[row, 0 if library == "numpy" else 1] += 1
            x[row, 2 if kind == "code" else 3] += 3
        return x, [each.pool(x, torch.arange(len(x)), len(x)) for each in units]

    monkeypatch.setattr(scr_tpp, "crossed_texts", drawn)
    monkeypatch.setattr(sparse_probing, "pooled", pool)
    result = evaluate_scr(world, [("numpy", "sklearn")], thresholds=(2,))

    assert result.details["numpy/sklearn"]["biased_on_library"] < 0.8
    assert result.figures["scr_metric_threshold_2"].value > 0.2
    assert result.controls[RANDOM]["scr_metric_threshold_2"].value < 0.1


def test_ablating_the_mean_is_the_mean_of_what_is_ablated(planted):
    sae = planted(torch.nn.functional.normalize(torch.randn(12, 6), dim=1), torch.full((12,), 0.2))
    x = torch.randn(7, 6)
    with torch.no_grad():
        codes = sae.encode(x).to_dense()
        kept = codes.clone()
        kept[:, [2, 5]] = 0
        slow = (kept @ sae.decoder_weight + sae.decoder_bias + (x - sae(x).output)).mean(dim=0)
    fast = ablated(x.mean(dim=0)[None], codes.mean(dim=0)[None], sae.decoder_weight.detach(), torch.tensor([2, 5]))

    torch.testing.assert_close(fast[0], slow)


def test_units_without_effect_are_never_ablated():
    assert strongest(torch.tensor([0.0, 0.3, 0.0]), 2).tolist() == [1]


def test_effects_of_tpp_come_from_positives_alone():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    probe = LinearProbe(torch.tensor([1.0, -1.0]), 0.0)
    positive = torch.tensor([True, False])

    assert effects(codes, positive, torch.eye(2), probe, False).tolist() == [1, 0]
    assert effects(codes, positive, torch.eye(2), probe, True).tolist() == [1, 1]


def test_negatives_are_as_many_as_positives_and_even_over_the_classes():
    rows = balanced_rows({"a": 10, "b": 30, "c": 30}, "a", torch.Generator().manual_seed(0))

    assert {name: len(row) for name, row in rows.items()} == {"a": 10, "b": 5, "c": 5}
    assert len(set(rows["b"].tolist())) == 5


def test_the_largest_difference_of_means_counts_in_either_direction():
    values = torch.tensor([[0.0, 5.0, 1.0], [0.0, 5.0, 1.0], [3.0, 0.0, 1.5]])

    assert best_by_mean_difference(values, torch.tensor([True, True, False]), 2).tolist() == [1, 0]


def test_multi_probes_learn_classes_that_can_be_separated():
    labels = torch.arange(90) % 3
    x = torch.nn.functional.one_hot(labels, 8).float() * 3 + 0.1 * torch.randn(90, 8)
    weight, bias = fit_multi_probe(x, labels, 3)

    assert ((x @ weight.T + bias).argmax(dim=1) == labels).all()


@pytest.mark.slow
def test_scr_and_tpp_run_on_packaged_texts(subject):
    scr = evaluate_scr(subject, [("numpy", "sklearn")], thresholds=(2, 5), train=8, test=4, context=32)
    tpp = evaluate_tpp(subject, thresholds=(2,), train=6, test=4, context=32)

    assert set(scr.controls) == set(tpp.controls) == {RANDOM, ACTIVATIONS}
    assert {"scr_metric_threshold_2", "scr_dir1_threshold_5", "scr_dir2_threshold_5"} <= set(scr.figures)
    assert tpp.figures["tpp_threshold_2_total_metric"].n == 9
    assert set(tpp.details["sizes"]) == {"library", "module"}
