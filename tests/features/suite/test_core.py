import pytest
import torch

from apportion.features.suite import RANDOM, evaluate_core
from apportion.models import splice


def test_kl_and_cross_entropy_are_those_of_the_whole_logits(subject, view, lm, site):
    result = evaluate_core(subject, view, contexts=None)
    ids, valid = view.ids, torch.ones_like(view.ids, dtype=torch.bool)
    valid[:, 0] = False

    def replaced(x):
        out = x.clone()
        with torch.no_grad():
            out[valid] = subject.sae(x[valid]).output
        return out

    with torch.no_grad():
        clean = lm.model(input_ids=ids).logits.log_softmax(-1)
        with splice(lm, site, replaced):
            spliced = lm.model(input_ids=ids).logits.log_softmax(-1)
    kl = (clean.exp() * (clean - spliced)).sum(-1)[valid].mean()
    loss = -spliced[:, :-1].gather(2, ids[:, 1:, None])[..., 0][valid[:, :-1]].mean()

    assert result.figures["kl_div_with_sae"].value == pytest.approx(float(kl), rel=1e-4)
    assert result.figures["ce_loss_with_sae"].value == pytest.approx(float(loss), rel=1e-4)
    assert set(result.controls) == {RANDOM}
    assert result.controls[RANDOM]["l0"].value == pytest.approx(result.figures["l0"].value, rel=0.5)


def test_a_perfect_dictionary_scores_one(subject, view, planted):
    axes = torch.cat([torch.eye(32), -torch.eye(32)])
    object.__setattr__(subject, "sae", planted(axes, torch.zeros(64)))
    figures = evaluate_core(subject, view, contexts=None).figures

    for name in (
        "kl_div_score",
        "ce_loss_score",
        "explained_variance",
        "explained_variance_legacy",
        "cossim",
        "l2_ratio",
    ):
        assert figures[name].value == pytest.approx(1, abs=1e-4), name


def test_legacy_explained_variance_is_a_mean_over_tokens(subject, view):
    x = view.activations[:, 1:].flatten(0, 1)
    with torch.no_grad():
        y = subject.sae(x).output
    error, distance = (x - y).square().sum(1), (x - x.mean(0)).square().sum(1)
    figures = evaluate_core(subject, view, contexts=None).figures

    assert figures["explained_variance_legacy"].value == pytest.approx(float((1 - error / distance).mean()), rel=1e-4)
    assert figures["explained_variance"].value == pytest.approx(float(1 - error.sum() / distance.sum()), rel=1e-4)
