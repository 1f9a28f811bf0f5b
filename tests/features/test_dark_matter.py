"""The parts of an error add up, are told apart where the truth is known, and shrinkage is not taken for dark matter."""

import pytest
import torch
from torch import Tensor

from apportion.allocate import TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.dark_matter import (
    audit_errors,
    explained_elsewhere,
    feature_scales,
    loss_shares,
    noise_grid,
    norm_agreement,
)
from apportion.features.evaluate import SplicedLoss
from apportion.features.linear_fit import LinearMap, Tokens
from apportion.models import Site, capture, load

D, F = 12, 48


def tokens(n: int = 2000, seed: int = 0, first_document: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(99))
    x = torch.randn(n, D, generator=generator) @ mixing + 5
    return Tokens(x, first_document + torch.arange(n) // 50)


FIT, TEST = tokens(), tokens(1000, seed=1, first_document=1000)


def dictionary(k: int = 4, shrink: float = 1.0, n_features: int = F) -> SparseAutoencoder:
    sae = SparseAutoencoder(D, n_features, TokenChoice(k)).eval().requires_grad_(False)
    sae.initialise_from(FIT.x)
    sae.decoder_weight.mul_(shrink)
    return sae


def noise(tokens: Tokens, seed: int) -> Tensor:
    return torch.randn(tokens.x.shape, generator=torch.Generator().manual_seed(seed))


def values(audit, *names: str) -> list[float]:
    return [audit.metrics[name].value for name in names]


def test_the_parts_add_up_and_every_ratio_has_an_error_over_documents() -> None:
    audit = audit_errors(dictionary(), FIT, TEST)
    fvu, linear, nonlinear, r2 = values(audit, "fvu", "fvu_linear", "fvu_nonlinear", "r2_error")
    assert fvu == pytest.approx(linear + nonlinear)
    assert 0 < nonlinear < fvu
    assert 0 < r2 < 1
    x_hat = TEST.x - audit.errors
    torch.testing.assert_close(x_hat + audit.linear(TEST.x) + (audit.errors - audit.linear(TEST.x)), TEST.x)
    distance = (TEST.x - TEST.x.mean(0)).square().sum()
    assert fvu == pytest.approx(float(audit.errors.square().sum() / distance), rel=1e-5)
    for name in ("fvu", "fvu_nonlinear", "r2_error", "r2_squared_norm"):
        assert audit.metrics[name].stderr > 0
        assert audit.metrics[name].n == 20
    assert audit.to_json()["test_tokens"] == 1000


def test_an_error_that_is_shrinkage_is_all_linear_and_told_so() -> None:
    audit = audit_errors(lambda x: 0.9 * x, FIT, TEST)
    r2, mean, left = values(audit, "r2_error", "r2_error_mean_over_dimensions", "linear_error_by_rescaling")
    assert r2 == pytest.approx(1, abs=1e-5)
    assert mean == pytest.approx(1, abs=1e-5)
    assert left > 0.9
    assert any("shrinkage, not missing features" in warning for warning in audit.warnings)


def test_an_error_that_is_independent_noise_is_not_linear() -> None:
    audit = audit_errors(lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(len(x))), FIT, TEST)
    r2, mean, norm = values(audit, "r2_error", "r2_error_mean_over_dimensions", "r2_squared_norm")
    assert abs(r2) < 0.02
    assert abs(mean) < 0.02
    assert abs(norm) < 0.02


def test_a_dead_dictionary_is_called_dead() -> None:
    audit = audit_errors(lambda x: FIT.x.mean(0).expand_as(x), FIT, TEST)
    assert audit.metrics["r2_error"].value == pytest.approx(1, abs=1e-5)
    assert any("the dictionary is dead" in warning for warning in audit.warnings)


def test_r2_is_the_same_after_a_shift_and_an_invertible_map() -> None:
    kept = {len(each): dictionary(2)(each.x).output for each in (FIT, TEST)}
    change = torch.linalg.qr(noise(FIT, 3)[:D]).Q * 3
    r2 = {}
    for name, move in {"plain": lambda x: x, "shifted": lambda x: x + 40, "mapped": lambda x: x @ change}.items():
        moved = [Tokens(move(each.x), each.documents) for each in (FIT, TEST)]
        # The error stays; only what it is predicted from is moved.
        audit = audit_errors(lambda x, move=move: x - (FIT_OR_TEST[len(x)].x - kept[len(x)]), *moved, ridges=(0.0,))
        r2[name] = values(audit, "r2_error")[0]
    assert r2["shifted"] == pytest.approx(r2["plain"], abs=1e-4)
    assert r2["mapped"] == pytest.approx(r2["plain"], abs=1e-4)


FIT_OR_TEST = {len(each): each for each in (FIT, TEST)}


def test_shrunken_features_are_found_each_by_itself() -> None:
    sae = dictionary()
    truth = torch.linspace(0.5, 2, F)
    codes = sae.encode(FIT.x)
    x = sae.decode(codes.with_values(codes.values * truth[codes.col_indices]))
    shrunken = _Fixed(sae, codes)
    scales = feature_scales(shrunken, Tokens(x, FIT.documents), ridge=1e-9)
    used = codes.winners_per_column() > 5
    torch.testing.assert_close(scales[used], truth[used], rtol=1e-2, atol=1e-2)


class _Fixed(SparseAutoencoder):
    """A dictionary whose codes are given, part by part."""

    def __init__(self, sae: SparseAutoencoder, codes) -> None:
        super().__init__(D, F, TokenChoice(4))
        self.load_state_dict(sae.state_dict())
        self.codes = codes

    def encode(self, x, mode=None, rule=None):
        assert len(x) == self.codes.shape[0]
        return self.codes


def test_the_two_noises_are_told_apart_where_the_truth_is_known() -> None:
    # Features at right angles in half of the space: the dictionary reconstructs what it has made without error.
    d, n_features = 32, 16
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(4))).Q[:n_features]
    sae = SparseAutoencoder(d, n_features, TokenChoice(3)).eval().requires_grad_(False)
    sae.decoder_weight.copy_(basis)
    sae.encoder_weight.copy_(basis)
    drawn = torch.randn(3000, n_features, generator=torch.Generator().manual_seed(5)).abs() @ basis
    documents = torch.arange(3000) // 50
    grid = noise_grid(sae, Tokens(drawn[:2000], documents[:2000]), Tokens(drawn[2000:], documents[2000:]))
    assert len(grid.linear) == 25
    found = grid.correlations()
    assert found["linear error with dense noise"] > 0.9
    assert found["nonlinear error with reconstruction noise"] > 0.9
    assert abs(found["linear error with reconstruction noise"]) < 0.3


def test_what_another_source_knows_of_the_error() -> None:
    sae = dictionary(2)
    errors = [each.x - sae(each.x).output for each in (FIT, TEST)]
    sources = {
        "the error itself": (errors[0], errors[1]),
        "noise": (noise(FIT, 5), noise(TEST, 6)),
        "the activation": (FIT.x, TEST.x),
    }
    found = explained_elsewhere(FIT, errors[0], TEST, errors[1], sources)
    assert found["the error itself"]["r2_error"] == pytest.approx(1, abs=1e-4)
    assert found["the error itself"]["fvu_left"] == pytest.approx(0, abs=1e-4)
    assert abs(found["noise"]["r2_error"]) < 0.02
    assert found["noise"]["fvu_left"] == pytest.approx(found[""]["fvu_left"], rel=0.02)
    assert found["the activation"]["r2_error"] == pytest.approx(found[""]["r2_error"], abs=1e-3)
    audit = audit_errors(sae, FIT, TEST)
    assert found[""]["fvu_left"] == pytest.approx(audit.metrics["fvu_nonlinear"].value, rel=1e-4)


def test_norms_of_errors_agree_with_themselves_scaled() -> None:
    errors = noise(TEST, 1) * torch.linspace(0.1, 3, 1000).unsqueeze(1)
    assert norm_agreement(errors, 3 * errors) == pytest.approx(1)
    assert norm_agreement(noise(TEST, 2), noise(TEST, 3)) < 0.05
    with pytest.raises(InputError, match="at least 3"):
        norm_agreement(errors[:2], errors[:2])


def test_an_error_that_is_all_linear_repairs_all_of_the_loss_and_the_rest_none(tiny_llama) -> None:
    lm, site = load(tiny_llama), Site(1, "residual")
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    valid = torch.ones(4, 12, dtype=torch.bool)
    valid[:, 0] = False

    class Text:
        n_contexts = 4

        def contexts(self, start, stop):
            part = slice(start, stop)
            return ids[part], capture(lm, [site], ids[part])[site], valid[part], torch.arange(4)[part]

    # It reconstructs nothing but its bias, so its error is x minus that: linear to the last bit.
    silent = SparseAutoencoder(32, 64, TokenChoice(4)).eval().requires_grad_(False)
    silent.decoder_weight.zero_()
    shares = loss_shares(
        SplicedLoss(lm, site, Text(), contexts=4), silent, LinearMap(torch.eye(32), torch.zeros(32), 0.0)
    )
    assert shares["ce_share_linear"].value == pytest.approx(1, abs=1e-4)
    assert shares["ce_share_nonlinear"].value == pytest.approx(0, abs=1e-4)
    assert shares["ce_share_linear"].n == 4


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(InputError, match="share 40 documents"):
        audit_errors(dictionary(), FIT, FIT)
    with pytest.raises(InputError, match="fit has width 12, test 3"):
        audit_errors(dictionary(), FIT, Tokens(TEST.x[:, :3], TEST.documents))
    elsewhere = SparseAutoencoder(D, F, TokenChoice(2), d_out=6)
    with pytest.raises(InputError, match="give a function"):
        audit_errors(elsewhere, FIT, TEST)
    few = Tokens(FIT.x[:100], FIT.documents[:100])
    assert any("underrated" in warning for warning in audit_errors(dictionary(), few, TEST).warnings)
