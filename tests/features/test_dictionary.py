"""The sparse autoencoder: what a token's code may depend on, what files keep, and what is refused."""

import pytest
import safetensors.torch
import torch

from apportion.allocate import FeatureChoice, MutualChoice, NofM, Threshold, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features import LearnedThreshold, SparseAutoencoder
from apportion.features.rules import rule_from_dict, rule_to_dict

D, F, BUDGET = 24, 96, 4
KINDS = {
    "TopK": (TokenChoice(BUDGET), False),
    "Mutual Choice": (MutualChoice(BUDGET), False),
    "Feature Choice": (FeatureChoice(BUDGET, profile=Zipf()), False),
    "ReLU": (Threshold(0.0), False),
    "JumpReLU": (LearnedThreshold(initial=0.3, bandwidth=0.1), False),
    "Gated": (Threshold(0.0), True),
}


def activations(tokens: int = 200, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(tokens, D, generator=generator) + 2


def dictionary(kind: str, calibrated: bool = True) -> SparseAutoencoder:
    rule, gated = KINDS[kind]
    sae = SparseAutoencoder(D, F, rule, gated=gated, seed=3)
    sae.initialise_from(activations())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.encoder_bias.copy_(0.1 * torch.randn(F, generator=generator))
        if gated:
            sae.log_magnitude.copy_(0.1 * torch.randn(F, generator=generator))
            sae.magnitude_bias.copy_(0.1 * torch.randn(F, generator=generator))
    if calibrated:
        sae.calibrate(activations(1000, seed=9).split(300), rows=1000)
    return sae.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_tokens_code_is_bit_identical_alone_and_in_any_batch(kind: str, precision: str) -> None:
    sae = dictionary(kind)
    sae.precision = precision
    x = activations(300)
    together = sae(x)
    dense = together.codes.to_dense()
    for token in (0, 17, 299):
        alone = sae(x[token : token + 1])
        assert torch.equal(alone.codes.to_dense()[0], dense[token])
        assert torch.equal(alone.output[0], together.output[token])
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:77]
    assert torch.equal(sae(x[order]).codes.to_dense(), dense[order])


def test_a_full_disk_is_one_clear_error_and_keeps_the_older_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    sae = dictionary("TopK")
    sae.save(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"the disk is full while writing .*model.safetensors: free some space"):
        sae.save(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {each.name for each in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_saved_files_follow_the_users_umask(tmp_path) -> None:
    dictionary("TopK").save(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same_dictionary(kind: str, tmp_path) -> None:
    sae = dictionary(kind)
    sae.metadata = {"model": "tiny"}
    sae.save(tmp_path / "dictionary")
    loaded = SparseAutoencoder.load(tmp_path / "dictionary")
    x = activations(50)
    assert torch.equal(loaded(x).output, sae(x).output)
    assert loaded.rule == sae.rule or isinstance(sae.rule, Threshold)
    assert loaded.metadata == {"model": "tiny"}
    assert {each.name for each in (tmp_path / "dictionary").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("kind", KINDS)
def test_folding_the_scale_changes_units_and_nothing_else(kind: str) -> None:
    sae = dictionary(kind)
    x = activations(80)
    before, scale = sae(x), float(sae.input_scale)
    sae.fold_scale()
    after = sae(x)
    assert float(sae.input_scale) == 1.0
    torch.testing.assert_close(after.output, before.output, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.codes.to_dense() * scale, before.codes.to_dense(), rtol=1e-4, atol=1e-4)


def test_scaled_data_and_scaled_dictionary_choose_the_same_features() -> None:
    x = activations(120)
    one, ten = (SparseAutoencoder(D, F, TokenChoice(BUDGET), seed=3) for _ in range(2))
    one.initialise_from(x)
    ten.initialise_from(8 * x)
    assert torch.equal(one.eval()(x).codes.col_indices, ten.eval()(8 * x).codes.col_indices)


@pytest.mark.parametrize("rule", [MutualChoice(BUDGET), FeatureChoice(BUDGET, profile=Zipf(exponent=0.3))])
def test_calibration_gives_the_budget_exactly_on_the_calibration_set(rule) -> None:
    sae = SparseAutoencoder(D, F, rule, seed=3).eval()
    x = activations(1000, seed=9)
    sae.initialise_from(x)
    sae.calibrate(x.split(128), rows=1000)
    assert abs(sae(x).codes.nnz / 1000 - BUDGET) <= 1 / 1000


def test_training_mode_uses_the_batch_rule_and_spends_at_most_its_budget() -> None:
    sae = dictionary("Mutual Choice").train()
    assert sae(activations(200)).codes.nnz == 200 * BUDGET
    assert sae(activations(1)).codes.nnz == BUDGET


def test_feature_choice_in_training_gives_rare_features_their_turn() -> None:
    rule = FeatureChoice(0.5, profile=Zipf(exponent=1.5))
    sae = SparseAutoencoder(D, F, rule, seed=0).train()
    given = torch.zeros(F, dtype=torch.int64)
    for step in range(400):
        selection = sae._batch_selection(16, rule)
        given += selection.limits
        assert int(selection.limits.sum()) == 8, step
    expected = rule.share(F) * 16 * 400
    assert (given - expected).abs().max() < 1
    assert int(given.min()) >= 1


def test_codes_before_any_threshold_are_refused_with_a_remedy() -> None:
    sae = dictionary("Mutual Choice", calibrated=False)
    with pytest.raises(RuntimeError, match="calibrate"):
        sae(activations(5))


def test_running_estimates_serve_until_calibration() -> None:
    sae = dictionary("Mutual Choice", calibrated=False).train()
    for seed in range(20):
        sae.statistics.update(sae(activations(200, seed)).codes, shared_threshold=True)
    sae.eval()
    l0 = sae(activations(500, seed=77)).codes.nnz / 500
    assert abs(l0 / BUDGET - 1) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_weight(kind: str) -> None:
    sae = dictionary(kind).train()
    x = activations(200)
    (sae(x).output - x).square().mean().backward()
    expected = {"encoder_weight", "decoder_weight", "decoder_bias"}
    expected |= {"log_magnitude", "magnitude_bias"} if KINDS[kind][1] else {"encoder_bias"}
    expected |= {"learned_threshold"} if kind == "JumpReLU" else set()
    got = {name for name, weight in sae.named_parameters() if weight.grad is not None and bool(weight.grad.any())}
    assert expected <= got


def test_gradients_equal_those_of_the_dense_network() -> None:
    sae = dictionary("Mutual Choice").double().train()
    x = activations(60).double()
    scores = (sae.centred(x) @ sae.encoder_weight.T + sae.encoder_bias).relu()
    codes = sae(x).codes
    mask = torch.zeros_like(scores)
    mask[codes.row_indices(), codes.col_indices] = 1
    dense = ((scores * mask) @ sae.decoder_weight + sae.decoder_bias) / sae.input_scale
    sparse_grads = torch.autograd.grad(sae(x).output.square().sum(), list(sae.parameters()))
    dense_grads = torch.autograd.grad(dense.square().sum(), list(sae.parameters()))
    for ours, theirs in zip(sparse_grads, dense_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_decoder_stays_on_the_unit_sphere_and_its_gradient_tangential() -> None:
    sae = dictionary("TopK").train()
    (sae(activations()).output).square().sum().backward()
    sae.project_decoder_gradient()
    along = (sae.decoder_weight.grad * sae.decoder_weight).sum(dim=1)
    assert along.abs().max() < 1e-4 * sae.decoder_weight.grad.norm()
    with torch.no_grad():
        sae.decoder_weight.mul_(3.0)
    sae.normalise_decoder()
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("repeated", [False, True])
def test_a_sparse_gradient_is_projected_like_the_whole_one(repeated: bool) -> None:
    projected = []
    for sparse in (False, True):
        sae = dictionary("TopK").train()
        sae.sparse_gradients = sparse
        loss = sae(activations()).output.square().sum()
        if repeated:
            loss = loss + sae(2 * activations()).output.square().sum()
        loss.backward()
        assert sae.decoder_weight.grad.is_sparse == sae.encoder_weight.grad.is_sparse == sparse
        if sparse and repeated:
            grad = sae.decoder_weight.grad.coalesce()
            places, values = grad.indices().repeat(1, 2), grad.values().repeat(2, 1) / 2
            sae.decoder_weight.grad = torch.sparse_coo_tensor(places, values, grad.shape, check_invariants=True)
        sae.project_decoder_gradient()
        projected.append(sae.decoder_weight.grad.to_dense() if sparse else sae.decoder_weight.grad)
    torch.testing.assert_close(*projected, rtol=1e-5, atol=1e-5 * float(projected[0].abs().max()))


def test_initialisation_centres_and_scales() -> None:
    sae = SparseAutoencoder(D, F, TokenChoice(BUDGET))
    x = activations(5000)
    sae.initialise_from(x)
    centred = sae.centred(x).detach()
    assert abs(float(centred.square().sum(dim=1).mean()) / D - 1) < 0.02
    assert float(centred.mean(dim=0).abs().max()) < 0.1
    assert torch.equal(sae.encoder_weight, sae.decoder_weight)


def test_no_tokens_give_no_codes() -> None:
    for kind in KINDS:
        out = dictionary(kind)(activations(0))
        assert out.output.shape == (0, D)
        assert out.codes.nnz == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_activations_are_refused_by_token(bad: float, training: bool) -> None:
    sae = dictionary("Mutual Choice").train(training)
    x = activations(10)
    x[7, 3] = bad
    with pytest.raises(ValueError, match=r"x\[7\]"):
        sae(x)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rule": TokenChoice(97)}, "97"),
        ({"rule": MutualChoice(500.0)}, "500"),
        ({"rule": TokenChoice(4), "n_features": 0}, "n_features=0"),
        ({"rule": TokenChoice(4), "d_in": 0}, "d_in=0"),
        ({"rule": NofM(2, 4)}, "TokenChoice"),
        ({"rule": TokenChoice(4), "gated": True}, "gated"),
    ],
)
def test_what_cannot_work_is_refused_by_name(arguments: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        SparseAutoencoder(**{"d_in": D, "n_features": F, **arguments})


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=str(D)):
        dictionary("TopK")(torch.zeros(3, D + 1))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "missing weights", "other size", "not ours"])
def test_damaged_dictionaries_are_refused(damage: str, tmp_path) -> None:
    folder = tmp_path / "dictionary"
    dictionary("TopK").save(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "foreign":
        config.write_text('{"format": "somebody.else"}')
    elif damage == "missing weights":
        weights.unlink()
    elif damage == "other size":
        config.write_text(config.read_text().replace(f'"n_features": {F}', '"n_features": 100'))
    else:
        config.write_text("not json")
    with pytest.raises(InputError, match=r"config\.json|model\.safetensors"):
        SparseAutoencoder.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_rules_survive_json(kind: str) -> None:
    rule = KINDS[kind][0]
    assert rule_to_dict(rule_from_dict(rule_to_dict(rule))) == rule_to_dict(rule)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(InputError, match="Lottery"):
        rule_from_dict({"name": "Lottery"})
