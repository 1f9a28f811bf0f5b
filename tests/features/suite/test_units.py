import pytest
import torch

from apportion.allocate import MutualChoice, Threshold
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.suite import NotApplicable, Subject, random_dictionary
from apportion.features.suite.units import ActivationUnits, DictionaryUnits, pooled
from apportion.models import capture


def test_codes_times_directions_are_the_reconstruction_in_the_units_of_the_activation():
    x = 3 * torch.randn(50, 8) + 1
    sae = SparseAutoencoder(8, 20, MutualChoice(4))
    sae.initialise_from(x)
    sae.calibrate([x], 50)
    units = DictionaryUnits(sae.eval())
    with torch.no_grad():
        expected = sae(x).output

    torch.testing.assert_close(units.encode(x) @ units.directions + units.offset, expected)


def test_pooling_is_the_mean_over_tokens_but_the_first_and_does_not_see_padding(lm, site, subject):
    texts = ["the assignment of a name", "x", "names are bound to objects by the assignment statement"]
    with pytest.raises(InputError, match="text 1 has fewer than 2 tokens"):
        pooled(lm, site, texts, [], 16)
    texts[1] = "x = y"
    units = DictionaryUnits(subject.sae)
    mean, (codes, same) = pooled(lm, site, texts, [units, ActivationUnits(32)], 16, batch=3)
    for row, text in enumerate(texts):
        ids = lm.tokenizer(text, return_tensors="pt")["input_ids"][:, :16]
        x = capture(lm, [site], ids)[site][0, 1:]
        torch.testing.assert_close(mean[row], x.mean(dim=0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(codes[row], units.encode(x).mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean, same)


def test_the_random_dictionary_spends_what_the_dictionary_spends():
    x = torch.randn(400, 8)
    sae = SparseAutoencoder(8, 30, Threshold(0.0))
    with torch.no_grad():
        sae.encoder_bias.fill_(-0.7)
    control = random_dictionary(sae.eval(), x)
    spent = [each.encode(x, "threshold").nnz / 400 for each in (sae, control)]

    assert spent[1] == pytest.approx(spent[0], rel=0.02)
    assert not torch.allclose(control.decoder_weight[0], sae.decoder_weight[0])


def test_a_transcoder_is_no_dictionary_of_what_it_reads():
    with pytest.raises(NotApplicable, match="another space"):
        DictionaryUnits(SparseAutoencoder(8, 20, Threshold(0.0), d_out=6))


def test_a_dictionary_of_another_width_is_refused(lm, site):
    with pytest.raises(InputError, match=r"width 8.*has 32"):
        Subject(lm, site, SparseAutoencoder(8, 20, Threshold(0.0)), torch.randn(4, 8))
