"""Judging: figures against their definitions written out, and standard errors over documents."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from apportion.allocate import MutualChoice, TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.evaluate import SplicedLoss, evaluate_reconstruction
from apportion.models import Site, load

D, F = 10, 40


class Text:
    """Contexts in memory, with the interface of a store."""

    def __init__(self, contexts: int = 9, time: int = 7, documents: int = 4) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 300, (contexts, time), generator=generator)
        self.activations = 2 * torch.randn(contexts, time, D, generator=generator) + 1
        self.valid = torch.rand(contexts, time, generator=generator) > 0.2
        self.valid[:, 0] = False
        self.documents = torch.arange(contexts) % documents
        self.n_contexts = contexts

    def contexts(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = slice(start, stop)
        return self.ids[part], self.activations[part], self.valid[part], self.documents[part]


@pytest.fixture
def sae() -> SparseAutoencoder:
    text = Text()
    module = SparseAutoencoder(D, F, MutualChoice(3))
    x = text.activations[text.valid]
    module.initialise_from(x)
    module.calibrate([x], x.shape[0])
    return module.eval()


def test_every_figure_is_its_definition(sae: SparseAutoencoder) -> None:
    text = Text()
    x = text.activations[text.valid]
    with torch.no_grad():
        out = sae(x)
    y, codes = out.output, out.codes.to_dense()
    found = evaluate_reconstruction(sae, text)
    figures = {name: metric.value for name, metric in found.metrics.items()}
    error = (x - y).square().sum(dim=1)
    fvu = float(error.sum() / (x - x.mean(dim=0)).square().sum())
    expected = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "mse": float(error.mean()),
        "cossim": float(torch.cosine_similarity(x, y).mean()),
        "l2_ratio": float((y.norm(dim=1) / x.norm(dim=1)).mean()),
        "relative_reconstruction_bias": float(y.square().sum() / (x * y).sum()),
        "l0": float((codes > 0).sum(dim=1).float().mean()),
        "l1": float(codes.sum(dim=1).mean()),
        "dead": float((codes.sum(dim=0) == 0).float().mean()),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, rel=1e-5), name
    assert found.tokens == int(text.valid.sum())
    torch.testing.assert_close(found.density, (codes > 0).float().mean(dim=0))
    assert int(found.l0_histogram.sum()) == found.tokens
    weighted = sum(group["l0"] for group in found.difficulty) / len(found.difficulty)
    assert weighted == pytest.approx(expected["l0"], rel=0.05)


def test_standard_errors_are_those_of_a_ratio_over_documents(sae: SparseAutoencoder) -> None:
    text = Text()
    found = evaluate_reconstruction(sae, text).metrics["l0"]
    sums, counts = np.zeros(4), np.zeros(4)
    for context in range(text.n_contexts):
        x = text.activations[context][text.valid[context]]
        sums[text.documents[context]] += sae(x).codes.nnz
        counts[text.documents[context]] += x.shape[0]
    ratio = sums.sum() / counts.sum()
    stderr = math.sqrt(4 / 3 * ((sums - ratio * counts) ** 2).sum()) / counts.sum()
    assert found.n == 4
    assert found.stderr == pytest.approx(stderr)


def test_the_standard_error_covers_what_varies_between_documents() -> None:
    """By simulation: 95 % intervals of a mean over unequal documents hold it about that often."""
    from apportion.features.evaluate import RatioOfSums

    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(200):
        ratio = RatioOfSums()
        for document in range(40):
            tokens = int(torch.randint(5, 50, (), generator=generator))
            level = torch.randn((), generator=generator)
            ratio.add(torch.full((tokens,), document), level + torch.randn(tokens, generator=generator))
        metric = ratio.metric("mean", "")
        inside += abs(metric.value) < 1.96 * metric.stderr
    assert 175 <= inside <= 199


def test_one_document_has_no_standard_error(sae: SparseAutoencoder) -> None:
    assert evaluate_reconstruction(sae, Text(documents=1)).metrics["fvu"].stderr is None


def test_evaluation_is_in_inference_mode_and_leaves_the_mode_alone(sae: SparseAutoencoder) -> None:
    sae.train()
    training = evaluate_reconstruction(sae, Text())
    assert sae.training
    sae.eval()
    assert evaluate_reconstruction(sae, Text()).to_json() == training.to_json()


def test_nothing_to_evaluate_on_is_refused(sae: SparseAutoencoder) -> None:
    text = Text()
    text.valid[:] = False
    with pytest.raises(InputError, match="held-out"):
        evaluate_reconstruction(sae, text)


class Perfect(SparseAutoencoder):
    """Reconstructs exactly."""

    def forward(self, x, mode=None):
        out = super().forward(x, mode)
        return type(out)(x, out.codes)


def test_a_perfect_reconstruction_recovers_all_loss_and_the_mean_recovers_what_mean_ablation_does(tiny_llama) -> None:
    lm = load(tiny_llama)
    text = Text(contexts=6, time=12)
    site = Site.parse("layers.1.residual")
    text.activations = _activations(lm, site, text.ids)
    spliced = SplicedLoss(lm, site, text, contexts=6)
    perfect = spliced.evaluate(Perfect(32, 64, TokenChoice(4)))
    assert perfect["ce_loss_score"].value == pytest.approx(1.0, abs=1e-6)
    assert perfect["ce_loss_score_mean"].value == pytest.approx(1.0, abs=1e-6)
    assert perfect["ce_increase"].value == pytest.approx(0.0, abs=1e-6)

    silent = SparseAutoencoder(32, 64, TokenChoice(4))
    with torch.no_grad():
        silent.decoder_weight.zero_()
        silent.decoder_bias.copy_(spliced.mean)
    mean = spliced.evaluate(silent)
    assert mean["ce_loss_score_mean"].value == pytest.approx(0.0, abs=1e-5)
    assert mean["ce_loss_with_sae"].value == pytest.approx(mean["ce_loss_with_mean_ablation"].value, abs=1e-5)


def test_the_clean_loss_is_the_models_own_over_the_tokens_that_count(tiny_llama) -> None:
    lm = load(tiny_llama)
    text = Text(contexts=4, time=12)
    site = Site.parse("layers.0.residual")
    text.activations = _activations(lm, site, text.ids)
    found = SplicedLoss(lm, site, text, contexts=4).evaluate(Perfect(32, 64, TokenChoice(4)))
    own = lm.loss_per_token(text.ids)[text.valid[:, :-1]].double().mean()
    assert found["ce_loss_without_sae"].value == pytest.approx(float(own), rel=1e-6)


def _activations(lm, site: Site, ids: Tensor) -> Tensor:
    from apportion.models import capture

    return capture(lm, [site], ids)[site].float()


def test_a_giant_token_counts_in_fvu_but_not_without_sinks(sae: SparseAutoencoder) -> None:
    text = Text()
    text.activations[tuple(text.valid.nonzero()[0])] *= 100
    x = text.activations[text.valid]
    with torch.no_grad():
        error = (x - sae(x).output).square().sum(dim=1)
    distance = (x - x.mean(dim=0)).square().sum(dim=1)
    found = evaluate_reconstruction(sae, text).metrics
    assert found["fvu"].value == pytest.approx(float(error.sum() / distance.sum()), rel=1e-5)
    assert found["fvu_without_sinks"].value == pytest.approx(float(error[1:].sum() / distance[1:].sum()), rel=1e-5)
    assert found["fvu_without_sinks"].value != pytest.approx(found["fvu"].value, rel=0.1)
    assert "the 1 tokens" in found["fvu_without_sinks"].definition
