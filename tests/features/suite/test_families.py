"""What the suite asks of a model, in every family."""

import pytest
import torch

import tiny_families
from apportion.allocate import Threshold
from apportion.features import SparseAutoencoder
from apportion.features.suite import NotApplicable, Subject, evaluate_absorption, evaluate_core, evaluate_ravel
from apportion.features.suite.absorption import word_activations
from apportion.features.suite.ravel import _answers, _put
from apportion.models import LanguageModel, Site, capture, splice

SITE = Site.parse("layers.1.residual")


@pytest.fixture(params=tiny_families.CAUSAL)
def model(request, lm):
    return LanguageModel(request.param, tiny_families.tiny_model(request.param), lm.tokenizer)


def test_a_word_after_a_cached_prefix_has_the_activation_of_the_whole_text(model):
    prefix, words = [5, 9, 11, 40, 23, 8], [7, 8, 60]
    whole = [capture(model, [SITE], torch.tensor([[*prefix, word]]))[SITE][0, -1] for word in words]

    torch.testing.assert_close(word_activations(model, SITE, prefix, words), torch.stack(whole), rtol=1e-4, atol=1e-4)


def test_answers_are_greedy_and_an_exchange_lasts_while_they_are_given(model):
    ids, changed = torch.tensor([[5, 9, 11, 40], [6, 9, 11, 41]]), torch.randn(2, 32)
    with splice(model, SITE, _put(changed, [1, 2])):
        said = _answers(model, ids, 3)
    slow = ids
    for _ in range(3):

        def replace(x):
            out = x.clone()
            out[[0, 1], [1, 2]] = changed
            return out

        with torch.no_grad(), splice(model, SITE, replace):
            logits = model.model(input_ids=slow, use_cache=False).logits[:, -1]
        slow = torch.cat([slow, logits.argmax(dim=1, keepdim=True)], dim=1)

    assert said == [model.tokenizer.decode(row) for row in slow[:, 4:].tolist()]


def test_an_encoder_has_reconstruction_and_no_behaviour(view, lm):
    bert = LanguageModel("bert", tiny_families.tiny_model("bert"), lm.tokenizer)
    sae = SparseAutoencoder(32, 64, Threshold(0.3)).eval()
    subject = Subject(bert, SITE, sae, torch.randn(100, 32))
    result = evaluate_core(subject, view)

    assert "kl_div_score" not in result.figures
    assert "explained_variance" in result.figures
    assert "predicts no next token" in result.details["left_out"]
    for evaluation in (evaluate_ravel, evaluate_absorption):
        with pytest.raises(NotApplicable, match="predicts no next token"):
            evaluation(subject)
