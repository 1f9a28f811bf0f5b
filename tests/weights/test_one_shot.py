"""Pruning a model block by block."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.weights import BlockPattern, NofMPattern, Unstructured
from apportion.weights.dsnot import DSnoT
from apportion.weights.one_shot import layers_by_block, prune_model
from apportion.weights.one_shot_catalogue import CATALOGUE, one_shot_method
from apportion.weights.one_shot_method import OneShotMethod, Pruned
from apportion.weights.patterns import parse_pattern
from apportion.weights.pruned_checkpoint import Text
from apportion.weights.sparsegpt import SparseGPT
from apportion.weights.wanda import Magnitude, Wanda
from straightforward_pruning import compared, prune_in_place, sparsegpt, table, wanda
from tiny_families import CAUSAL, VOCABULARY, tiny_model

HALF = Unstructured(0.5, "row")


def model_of(family: str = "llama") -> LanguageModel:
    return LanguageModel(family, copy.deepcopy(tiny_model(family)), None)


def texts(rows=6, time=12, seed=0):
    return torch.randint(3, VOCABULARY, (rows, time), generator=torch.Generator().manual_seed(seed))


def prune(lm, method=None, pattern=HALF, ids=None, **options):
    return prune_model(lm, texts() if ids is None else ids, method or Wanda(), pattern, progress=False, **options)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_family_is_pruned_where_it_should_be(family):
    lm = model_of(family)
    dense = {name: each.clone() for name, each in lm.model.state_dict().items()}
    report = prune(lm)
    pruned = {f"{each.name}.weight" for each in report.layers}
    assert {each.block for each in report.layers} == {0, 1, 2}
    for name, weight in lm.model.state_dict().items():
        assert torch.equal(weight, dense[name]) != (name in pruned)
    for layer in report.layers:
        module = lm.model.get_submodule(layer.name)
        zeros = float((module.weight == 0).float().mean())
        assert layer.sparsity == pytest.approx(0.5) == pytest.approx(zeros)
        assert 0 < layer.error < 1
    assert report.sparsity == pytest.approx(0.5)
    assert torch.isfinite(lm.loss_per_token(texts(seed=1))).all()


@pytest.mark.parametrize(("method", "straightforward"), [(Wanda(), wanda), (SparseGPT(), sparsegpt)])
def test_a_model_is_pruned_like_the_straightforward_way_does(method, straightforward):
    own, other = model_of(), model_of()
    prune(own, method, batch_size=4)
    prune_in_place(other.model, other.model.model, texts(), lambda w, x: straightforward(w, x, 0.5))
    held_out = texts(20, seed=3)
    ours, theirs = (float(each.loss_per_token(held_out).mean()) for each in (own, other))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours != pytest.approx(float(model_of().loss_per_token(held_out).mean()), rel=1e-3)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_both_ways_are_compared_over_calibration_seeds(method, tiny_llama):
    lm = load(tiny_llama)
    before = {name: each.clone() for name, each in lm.model.state_dict().items()}
    found = [compared(lm, Text("code", None, 4, 24, 200, seed), method, 0.5) for seed in (0, 1, 2)]
    assert all(torch.equal(each, before[name]) for name, each in lm.model.state_dict().items())
    assert len({each.dense for each in found}) == 1
    assert len({each.ours for each in found}) == 3
    for each in found:
        assert abs(each.difference) < 0.02
        assert each.ours != pytest.approx(each.dense, rel=1e-3)
        assert each.same_first == 1
        assert each.same_all > 0.95
    rows = list(table(found))
    assert rows[0].startswith(f"| {method} | 0 | {found[0].ours:.4f} | {found[0].straightforward:.4f} |")
    assert "standard error" in rows[3]


def test_each_block_sees_what_the_pruned_ones_before_it_put_out():
    lm = model_of()
    seen = []

    class Watching(Wanda):
        def prune(self, weight, seen_inputs, pattern):
            seen.append((seen_inputs.name, seen_inputs.statistics, seen_inputs.in_attention))
            return super().prune(weight, seen_inputs, pattern)

    prune(lm, Watching())
    # The second block's first layer reads the normed output of the first block, which is pruned by now.
    (_, statistics, attention) = next(each for each in seen if each[0] == "model.layers.1.self_attn.q_proj")
    inner = lm.model.model
    stream = inner(input_ids=texts(), output_hidden_states=True).hidden_states[1]
    expected = inner.layers[1].input_layernorm(stream).double().flatten(0, 1).mean(0)
    torch.testing.assert_close(statistics.mean, expected, rtol=1e-4, atol=1e-6)
    assert attention
    assert not next(each[2] for each in seen if "mlp" in each[0])


def test_the_error_is_that_of_the_layers_outputs():
    lm = model_of()
    before = lm.model.model.layers[0].self_attn.q_proj.weight.clone()
    report = prune(lm)
    layer = next(each for each in report.layers if each.name == "model.layers.0.self_attn.q_proj")
    block = lm.model.model.layers[0]
    inputs = block.input_layernorm(lm.model.model.embed_tokens(texts())).flatten(0, 1)
    change = (inputs @ (before - block.self_attn.q_proj.weight).T).square().sum() / (inputs @ before.T).square().sum()
    assert layer.error == pytest.approx(float(change), rel=1e-3)
    assert layer.mean_error > 0


def test_padding_does_not_count():
    ids = texts()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[::2, 8:], mask[::2, 8:] = 77, 0
    other = padded.clone()
    other[::2, 8:] = 5
    first, second = model_of(), model_of()
    prune(first, ids=padded, attention_mask=mask)
    prune(second, ids=other, attention_mask=mask)
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", CATALOGUE)
@pytest.mark.parametrize("pattern", ["0.6", "2:4"])
def test_every_method_keeps_to_the_pattern(name, pattern):
    lm = model_of("gpt2")
    report = prune(lm, one_shot_method(name), parse_pattern(pattern))
    for layer in report.layers:
        module = lm.model.get_submodule(layer.name)
        assert float((module.weight == 0).float().mean()) == pytest.approx(layer.sparsity)
        if pattern == "2:4":
            assert layer.sparsity == 0.5
            assert ((module.weight.T != 0).reshape(-1, 4).sum(1) == 2).all()
        else:
            assert layer.sparsity == pytest.approx(0.6, abs=0.02)


def test_a_method_that_makes_up_with_a_bias_gives_layers_one():
    lm, plain = model_of(), model_of()
    report = prune(lm, DSnoT(cycles=0, correct_mean=True))
    prune(plain)
    assert max(each.mean_error for each in report.layers) < 1e-5
    bias = lm.model.model.layers[0].mlp.down_proj.bias
    assert bias is not None
    assert not bias.requires_grad
    held_out = texts(seed=4)
    assert not torch.equal(lm.loss_per_token(held_out), plain.loss_per_token(held_out))
    gpt2 = model_of("gpt2")
    before = gpt2.model.transformer.h[0].attn.c_attn.bias.clone()
    prune(gpt2, DSnoT(cycles=0, correct_mean=True))
    assert not torch.equal(gpt2.model.transformer.h[0].attn.c_attn.bias, before)


def test_errors_can_be_measured_in_some_blocks_only():
    report = prune(model_of(), error_every=2)
    assert [each.error is not None for each in report.layers] == [each.block != 1 for each in report.layers]
    assert report.error is not None
    assert prune(model_of(), error_every=0).error is None


def test_layers_are_chosen_by_name():
    report = prune(model_of(), include=["*.mlp.*"], exclude=["*.layers.0.*"])
    assert len(report.layers) == 6
    assert all(".mlp." in each.name and each.block > 0 for each in report.layers)


class _Stops(Exception):
    pass


class Stopping(OneShotMethod):
    """Wanda that is killed in its so many-th layer."""

    slug = "wanda"

    def __init__(self, after):
        object.__setattr__(self, "left", [after])

    def settings(self):
        return Wanda().settings()

    def prune(self, weight, seen, pattern):
        self.left[0] -= 1
        if self.left[0] < 0:
            raise _Stops
        return Wanda().prune(weight, seen, pattern)


@pytest.mark.parametrize("after", [0, 7, 10, 20])
def test_a_run_that_was_stopped_goes_on_and_ends_the_same(after, tmp_path):
    whole, stopped, again = model_of(), model_of(), model_of()
    expected = prune(whole)
    with pytest.raises(_Stops):
        prune(stopped, Stopping(after), folder=tmp_path)
    report = prune(again, folder=tmp_path)
    assert report.resumed_from == after // 7
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    strip = [(each.name, each.sparsity, each.error, each.mean_error) for each in report.layers]
    assert strip == [(each.name, each.sparsity, each.error, each.mean_error) for each in expected.layers]


def test_biases_that_were_given_to_layers_are_kept_too(tmp_path):
    method = DSnoT(cycles=0, correct_mean=True)
    first, again = model_of(), model_of()
    prune(first, method, folder=tmp_path)
    (tmp_path / "block-002.safetensors").unlink()
    assert prune(again, method, folder=tmp_path).resumed_from == 2
    for name, each in first.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], each)
    gpt2, other = model_of("gpt2"), model_of("gpt2")
    prune(gpt2, method, folder=tmp_path / "gpt2")
    prune(other, method, folder=tmp_path / "gpt2")
    for name, each in gpt2.model.state_dict().items():
        torch.testing.assert_close(other.model.state_dict()[name], each)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": Magnitude()}, "method was 'wanda' and is 'magnitude'"),
        ({"pattern": Unstructured(0.6, "row")}, "pattern was '0.5' and is '0.6'"),
        ({"pattern": Unstructured(0.5, "layer")}, "scope was 'row' and is 'layer'"),
        ({"ids": texts(seed=9)}, "calibration was"),
        ({"exclude": ["*.mlp.*"]}, "exclude was"),
        ({"lm": "other"}, "model was"),
    ],
)
def test_going_on_with_other_settings_is_refused(options, named, tmp_path):
    prune(model_of(), folder=tmp_path)
    lm = model_of()
    if options.pop("lm", None):
        lm.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(InputError, match=rf"begun with other settings \({named}.*or another folder"):
        prune(lm, folder=tmp_path, **options)


def test_a_damaged_part_is_named(tmp_path):
    prune(model_of(), folder=tmp_path)
    part = tmp_path / "block-001.safetensors"
    tensors = {name: each.clone() for name, each in load_file(part).items()}  # the file is overwritten below
    part.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"block-001\.safetensors is damaged.*remove it"):
        prune(model_of(), folder=tmp_path)
    save_file(tensors, part)
    with pytest.raises(InputError, match=r"block-001\.safetensors is damaged"):
        prune(model_of(), folder=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "method", "named"),
    [
        (Unstructured(0.0), Wanda(), "keeps every weight"),
        (NofMPattern(4, 4), Wanda(), "keeps every weight"),
        (Unstructured(0.5, "global"), Wanda(), "use row or layer"),
        (NofMPattern(1, 5), Wanda(), r"layers\.0\.self_attn\.q_proj has 32 inputs, which is not a multiple of 5"),
        (BlockPattern(7, 8), Wanda(), "which is not a multiple of 7"),
        (BlockPattern(8, 8), DSnoT(), "single weights"),
        (NofMPattern(2, 5), SparseGPT(), "block=128 is not a multiple of 5"),
    ],
)
def test_patterns_that_do_not_fit_are_refused_before_anything_begins(pattern, method, named, monkeypatch):
    monkeypatch.setattr("apportion.weights.one_shot.BlockWalk", None)
    with pytest.raises(InputError, match=named):
        prune(model_of(), method, pattern)


def test_heads_are_refused_tied_or_not():
    with pytest.raises(InputError, match="none of the model's blocks"):
        prune(model_of("phi"), include=["*", "lm_head"])
    tied = model_of("gpt2")
    with pytest.raises(InputError, match="shares its weight with the embedding"):
        prune(tied, include=["*", "lm_head"])


def test_weights_that_are_not_finite_are_named():
    lm = model_of()
    lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj has weights that are not finite"):
        prune(lm)


def test_a_method_of_ones_own_is_a_small_class():
    class First(OneShotMethod):
        slug = "first"

        def prune(self, weight, seen, pattern):
            mask = pattern.keep(-torch.arange(weight.shape[1]).float().expand_as(weight))
            return Pruned(weight * mask, mask, figures={"kept": float(mask.sum())})

    report = prune(model_of(), First(), NofMPattern(2, 4))
    assert report.settings["method"] == "first"
    assert report.figure("kept") > 0
    with pytest.raises(KeyError):
        report.figure("swaps")


def test_a_method_that_is_not_there():
    with pytest.raises(InputError, match="method 'wandb': one of magnitude, wanda"):
        one_shot_method("wandb")


def test_bfloat16_models_are_pruned_in_float32(tiny_llama):
    lm = load(tiny_llama, "bfloat16")
    report = prune(lm, SparseGPT(), ids=torch.randint(0, 300, (4, 16)))
    assert lm.model.dtype == torch.bfloat16
    assert report.sparsity == pytest.approx(0.5)


def test_layers_by_block_come_in_order():
    by_block = layers_by_block(model_of())
    assert list(by_block) == [0, 1, 2]
    assert [each.name.rpartition(".")[2] for each in by_block[1]] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
