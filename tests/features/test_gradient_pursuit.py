"""Greedy codes against the listing of the paper, token by token, and against what can be known by exhaustion."""

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from apportion.allocate import MutualChoice, TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.gradient_pursuit import GradientPursuit

D, F = 12, 40


def dictionary(d: int = D, n_features: int = F, seed: int = 0) -> SparseAutoencoder:
    sae = SparseAutoencoder(d, n_features, TokenChoice(4), seed=seed).double().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.decoder_bias.copy_(torch.randn(d, generator=generator, dtype=torch.float64))
        sae.input_scale.fill_(0.7)
    return sae


def activations(tokens: int = 30, d: int = D, seed: int = 5) -> Tensor:
    return 3 * torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1


def listing(sae: SparseAutoencoder, x: Tensor, budget: int, method: str, support: str = "monotone") -> Tensor:
    """The paper's listing for one token, as it stands; and its neighbours, as slowly."""
    directions = sae.decoder_weight / sae.decoder_weight.norm(dim=1, keepdim=True)
    target = x * sae.input_scale - sae.decoder_bias
    code = torch.zeros(sae.n_features, dtype=torch.float64)
    chosen: set[int] = set()
    for _ in range(budget):
        residual = target - code @ directions
        best = int((directions @ residual).argmax())
        if directions[best] @ residual <= 0:
            break
        if support == "positive":
            chosen = {each for each in chosen if code[each] > 0}
        chosen.add(best)
        if method == "matching":
            code[best] += directions[best] @ residual
        elif method == "gradient":
            gradient = torch.zeros_like(code)
            for each in chosen:
                gradient[each] = directions[each] @ residual
            moves = gradient @ directions
            if moves @ moves == 0:
                break
            code = (code + (moves @ residual) / (moves @ moves) * gradient).clamp(min=0)
        else:
            kept = sorted(chosen)
            while True:
                solution = torch.linalg.lstsq(directions[kept].T, target.unsqueeze(1)).solution.flatten()
                if bool((solution >= 0).all()):
                    break
                kept = [each for each, value in zip(kept, solution, strict=True) if value >= 0]
            code = torch.zeros_like(code)
            code[kept] = solution
    return code / sae.decoder_weight.norm(dim=1)


def error(sae: SparseAutoencoder, x: Tensor, codes: Tensor) -> Tensor:
    return (x * sae.input_scale - sae.decoder_bias - codes @ sae.decoder_weight).norm(dim=1)


@pytest.mark.parametrize("gram_limit", [0, 8192], ids=["residual", "gram"])
@pytest.mark.parametrize(
    ("method", "support"),
    [("gradient", "monotone"), ("gradient", "positive"), ("matching", "monotone"), ("orthogonal", "monotone")],
)
def test_a_batch_gives_what_the_listing_gives_token_by_token(method, support, gram_limit) -> None:
    sae, x = dictionary(), activations()
    with torch.no_grad():
        sae.decoder_weight.mul_(torch.linspace(0.5, 2, F, dtype=torch.float64).unsqueeze(1))
    budget = torch.arange(30) % 8
    pursuit = GradientPursuit(sae, method=method, support=support, chunk=7, gram_limit=gram_limit)
    codes = pursuit.encode(x, budget).to_dense()
    slow = torch.stack([listing(sae, each, int(k), method, support) for each, k in zip(x, budget, strict=True)])
    torch.testing.assert_close(codes, slow, rtol=1e-4, atol=1e-4)


def test_budgets_are_kept_and_the_default_is_what_the_encoder_uses() -> None:
    sae = SparseAutoencoder(D, F, MutualChoice(4))
    x = activations(200).float()
    sae.initialise_from(x)
    sae.calibrate([x], 200)
    own = sae.eval().encode(x).winners_per_row()
    assert own.min() < own.max()
    codes = GradientPursuit(sae).encode(x)
    assert (codes.winners_per_row() <= own).all()
    assert codes.values.min() > 0
    assert GradientPursuit(sae).encode(x, 0).nnz == 0
    assert GradientPursuit(sae).encode(x[:0]).shape == (0, F)


def test_codes_are_allocations_in_row_and_column_order() -> None:
    sae = dictionary()
    codes = GradientPursuit(sae, chunk=4).encode(activations(10), 5)
    places = codes.row_indices() * F + codes.col_indices
    assert (places.diff() > 0).all()


def test_one_feature_is_the_best_single_one() -> None:
    sae, x = dictionary(), activations()
    target = x * sae.input_scale - sae.decoder_bias
    best = (target @ sae.decoder_weight.T).max(dim=1)
    for method in ("gradient", "matching", "orthogonal"):
        codes = GradientPursuit(sae, method=method).encode(x, 1)
        assert torch.equal(codes.col_indices, best.indices)
        torch.testing.assert_close(codes.values, best.values, rtol=1e-4, atol=1e-4)


def test_with_orthonormal_directions_every_method_is_the_tied_topk_dictionary() -> None:
    sae = SparseAutoencoder(D, D, TokenChoice(4)).double().eval().requires_grad_(False)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
    with torch.no_grad():
        sae.decoder_weight.copy_(basis)
        sae.encoder_weight.copy_(basis)
    x = activations()
    for method in ("gradient", "matching", "orthogonal"):
        codes = GradientPursuit(sae, method=method).encode(x, 4)
        torch.testing.assert_close(codes.to_dense(), sae.encode(x).to_dense(), rtol=1e-5, atol=1e-5)


def test_more_rounds_explain_more_and_no_budget_beats_the_best_support() -> None:
    sae, x = dictionary(3, 9), activations(20, 3)
    target = (x * sae.input_scale - sae.decoder_bias).numpy()
    rows = sae.decoder_weight.detach().numpy()
    best = np.array(
        [
            min(nnls(rows[list(support)].T, each)[1] for support in itertools.combinations(range(9), 2))
            for each in target
        ]
    )
    for method in ("gradient", "matching", "orthogonal"):
        errors = [error(sae, x, GradientPursuit(sae, method=method).encode(x, k).to_dense()) for k in (0, 1, 2)]
        assert (errors[2].numpy() >= best - 1e-6).all()
        assert (errors[1] <= errors[0] + 1e-9).all()
        assert errors[2].mean() < errors[1].mean()


def test_least_squares_on_the_same_support_is_no_worse_and_orthogonal_wins_on_average() -> None:
    sae, x = dictionary(), activations(60)
    target = (x * sae.input_scale - sae.decoder_bias).numpy()
    rows = sae.decoder_weight.detach().numpy()
    codes = {
        method: GradientPursuit(sae, method=method).encode(x, 5) for method in ("gradient", "matching", "orthogonal")
    }
    errors = {method: error(sae, x, each.to_dense()) for method, each in codes.items()}
    for token, used in enumerate(codes["gradient"].to_dense() > 0):
        assert nnls(rows[used.numpy()].T, target[token])[1] <= errors["gradient"][token] + 1e-9
    assert errors["orthogonal"].mean() < errors["gradient"].mean() < errors["matching"].mean()


def test_rows_of_any_length_give_the_same_reconstruction() -> None:
    sae, x = dictionary(), activations()
    plain = sae.decode(GradientPursuit(sae).encode(x, 4))
    with torch.no_grad():
        sae.decoder_weight.mul_(torch.linspace(0.1, 5, F, dtype=torch.float64).unsqueeze(1))
    torch.testing.assert_close(sae.decode(GradientPursuit(sae).encode(x, 4)), plain)


def test_what_cannot_be_pursued_is_refused() -> None:
    sae = dictionary()
    with pytest.raises(InputError, match="budget=-1"):
        GradientPursuit(sae).encode(activations(), -1)
    with pytest.raises(ValueError, match=r"give \[tokens, 12\]"):
        GradientPursuit(sae).encode(activations(d=5), 1)
    with pytest.raises(ValueError, match="one for each of 30"):
        GradientPursuit(sae).encode(activations(), torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="chunk=0"):
        GradientPursuit(sae, chunk=0)
    elsewhere = SparseAutoencoder(D, F, TokenChoice(2), d_out=6)
    with pytest.raises(InputError, match="give each token's budget"):
        GradientPursuit(elsewhere).encode(torch.zeros(3, 6))
