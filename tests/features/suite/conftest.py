"""A model, a site, and dictionaries whose right answers are known."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apportion.allocate import Threshold
from apportion.features import SparseAutoencoder
from apportion.features.suite import Subject
from apportion.models import LanguageModel, Site, load

SITE = Site.parse("layers.1.residual")


@pytest.fixture(scope="session")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def site() -> Site:
    return SITE


def _planted(directions: Tensor, thresholds: Tensor) -> SparseAutoencoder:
    """Features that fire on ``x . direction > threshold``."""
    sae = SparseAutoencoder(directions.shape[1], len(directions), Threshold(0.0))
    with torch.no_grad():
        sae.encoder_weight.copy_(directions)
        sae.decoder_weight.copy_(directions)
        sae.encoder_bias.copy_(-thresholds)
    return sae.eval()


@pytest.fixture
def planted() -> Any:
    return _planted


@pytest.fixture
def subject(lm: LanguageModel) -> Subject:
    torch.manual_seed(0)
    sae = SparseAutoencoder(32, 64, Threshold(0.0))
    with torch.no_grad():
        sae.encoder_bias.fill_(-0.5)
    return Subject(lm, SITE, sae.eval(), torch.randn(200, 32))


class View:
    """Held-out text in memory."""

    def __init__(self, ids: Tensor, activations: Tensor) -> None:
        self.ids, self.activations, self.n_contexts = ids, activations, len(ids)

    def contexts(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = slice(start, stop)
        valid = torch.ones_like(self.ids[part], dtype=torch.bool)
        valid[:, 0] = False
        return self.ids[part], self.activations[part], valid, torch.arange(len(self.ids))[part]


@pytest.fixture
def view(lm: LanguageModel) -> View:
    from apportion.models import capture

    ids = torch.randint(1, 380, (10, 12), generator=torch.Generator().manual_seed(0))
    return View(ids, capture(lm, [SITE], ids)[SITE])
