"""A change of nothing changes nothing; other changes are measured as their definitions say."""

from typing import Any

import pytest
import torch

from apportion.errors import InputError
from apportion.features.predictions import CleanPredictions
from apportion.models import Site, load, splice

SITE = Site(1, "residual")


@pytest.fixture(scope="module")
def lm(tiny_llama: Any) -> Any:
    return load(str(tiny_llama))


@pytest.fixture
def ids(lm: Any) -> torch.Tensor:
    size = lm.model.config.vocab_size
    return torch.randint(3, size, (20, 6), generator=torch.Generator().manual_seed(0))


def test_an_unchanged_model_has_not_changed(lm: Any, ids: torch.Tensor) -> None:
    change = CleanPredictions(lm, ids, torch.ones(20, 5, dtype=torch.bool)).change()
    assert abs(change.ce_increase) < 1e-6
    assert abs(change.kl) < 1e-6


def test_changes_are_what_full_logits_say(lm: Any, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apportion.features.predictions.LOGITS_AT_ONCE", 14 * lm.model.config.vocab_size)
    counted = torch.rand(20, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    clean = CleanPredictions(lm, ids, counted)
    before = lm.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    with splice(lm, SITE, lambda x: 0.3 * x):
        change = clean.change()
        after = lm.model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    wanted = ids[:, 1:].unsqueeze(-1)
    increase = (before.gather(-1, wanted) - after.gather(-1, wanted)).squeeze(-1)[counted].mean()
    kl = (before.exp() * (before - after)).sum(-1)[counted].mean()
    assert change.ce_increase == pytest.approx(float(increase), rel=1e-4, abs=1e-6)
    assert change.kl == pytest.approx(float(kl), rel=1e-4)
    assert change.kl > 0


def test_nothing_to_compare_is_refused(lm: Any, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="counted is False everywhere"):
        CleanPredictions(lm, ids, torch.zeros(20, 5, dtype=torch.bool))
