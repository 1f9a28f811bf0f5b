"""A feature of a layer's heads is the sum of its shares: by head, by source, by both."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from apportion.allocate import Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features import SparseAutoencoder
from apportion.features.attention_output_sae import (
    Reader,
    active_subspace_start,
    connections,
    direct_feature_attribution,
    head_shares,
    localisation,
    output_directions,
    random_attribution,
    with_error_kept,
)
from apportion.models import Site, capture, splice
from apportion.models.linear import AttentionAtWork, watch_attention
from biased_models import FAMILIES, biased_model, dictionary_of, some_ids

HEADS = Site(1, "heads")


def at_work(model: Any) -> tuple[AttentionAtWork, torch.Tensor]:
    """Two texts, the second of them padded from its fifth token on."""
    ids = torch.stack([some_ids(), some_ids().flip(0)])
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with watch_attention(model) as seen:
        z = capture(model, [HEADS], ids, mask)[HEADS]
    return seen[1], z


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_add_up_to_what_the_dictionary_computes(family: str) -> None:
    work, z = at_work(biased_model(family, torch.float32))
    sae = dictionary_of(z.flatten(0, 1))
    codes = sae.encode(z[:, 4], mode="threshold")
    for row, feature, value in zip(
        codes.row_indices().tolist(), codes.col_indices.tolist(), codes.values.tolist(), strict=True
    ):
        found = direct_feature_attribution(sae, work, feature, 4, row)
        assert found.pre_activation == pytest.approx(value, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(found.by_head.sum(), found.by_source.sum())
        assert found.table[:, 5:].eq(0).all(), "what comes later"


def test_shares_add_up_in_float64_and_padding_has_none() -> None:
    work, z = at_work(biased_model("qwen2"))
    sae = dictionary_of(z.flatten(0, 1)).double()
    found = direct_feature_attribution(sae, work, 7, 6, row=1)
    reader = Reader.of(sae, 7)
    assert found.pre_activation == pytest.approx(float(z[1, 6] @ reader.weight + reader.bias), rel=1e-10)
    assert found.table[:, 5:].eq(0).all()
    assert found.table[:, :5].ne(0).all()


def test_a_share_by_head_and_source_is_pattern_times_value_times_weight() -> None:
    """Slowly, for a model whose query heads share keys and values, from the weights themselves."""
    model = biased_model("qwen2")
    work, z = at_work(model)
    sae = dictionary_of(z.flatten(0, 1)).double()
    ids = some_ids()[None]
    block = model.model.layers[1]
    stream = capture(model, [Site(0, "residual")], ids)[Site(0, "residual")][0]
    values = block.self_attn.v_proj(block.input_layernorm(stream)).view(7, 2, 8)
    weight = (sae.encoder_weight[3] * sae.input_scale).detach()
    table = direct_feature_attribution(sae, work, 3, 5).table
    for head in range(4):
        for source in range(7):
            own = values[source, head // 2] @ weight[8 * head : 8 * head + 8]
            assert float(table[head, source]) == pytest.approx(float(work.pattern[0, head, 5, source] * own), rel=1e-5)


def test_a_gated_feature_is_read_as_what_it_gives() -> None:
    sae = SparseAutoencoder(16, 8, Threshold(0.0), gated=True, seed=0)
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    sae.initialise_from(x)
    with torch.no_grad():
        sae.log_magnitude.uniform_(-0.5, 0.5)
        sae.magnitude_bias.uniform_(0, 0.5)
        sae.encoder_bias.uniform_(-0.5, 0.5)
    codes = sae.eval().encode(x)
    for row, feature, value in zip(codes.row_indices(), codes.col_indices.tolist(), codes.values, strict=True):
        reader = Reader.of(sae, feature)
        torch.testing.assert_close(x[row] @ reader.weight + reader.bias, value, rtol=1e-4, atol=1e-5)


def test_head_shares_are_shares_of_the_heads() -> None:
    sae = SparseAutoencoder(12, 5, TokenChoice(2), seed=0)
    shares = head_shares(sae, 3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(5))
    with torch.no_grad():
        sae.decoder_weight[0, 4:] = 0
        blocks = sae.decoder_weight[1].view(3, 4)
        sae.decoder_weight[2] = blocks[[2, 0, 1]].flatten()
    shares = head_shares(sae, 3)
    assert shares[0].tolist() == [1, 0, 0]
    torch.testing.assert_close(shares[2], shares[1][[2, 0, 1]])
    with pytest.raises(InputError, match="heads=5"):
        head_shares(sae, 5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_output_directions_are_what_the_output_projection_makes_of_the_decoder(family: str) -> None:
    model = biased_model(family, torch.float32)
    _, z = at_work(model)
    sae = dictionary_of(z.flatten(0, 1))
    ids = some_ids()[None]
    attention = capture(model, [HEADS, Site(1, "attn_out")], ids)
    codes = sae.encode(attention[HEADS][0], mode="threshold")
    missed = attention[HEADS][0] - sae.decode(codes)
    project, _ = HEADS.resolve(model)
    rebuilt = codes.to_dense() @ output_directions(sae, model, HEADS)
    constant = project(missed + sae.decoder_bias / sae.input_scale)
    torch.testing.assert_close(rebuilt + constant, attention[Site(1, "attn_out")][0], rtol=1e-4, atol=1e-5)


def test_a_connection_is_what_a_unit_of_one_feature_adds_to_another() -> None:
    draw = torch.Generator().manual_seed(0)
    reader = dictionary_of(torch.randn(50, 16, generator=draw))
    directions = torch.randn(3, 16, generator=draw)
    x = torch.randn(16, generator=draw)
    strengths = connections(directions, reader)
    for feature in (0, 7):
        read = Reader.of(reader, feature)
        moved = (x + directions[1]) @ read.weight - x @ read.weight
        torch.testing.assert_close(strengths[1, feature], moved, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(connections(directions, reader, [7]), strengths[:, [7]])
    with pytest.raises(InputError, match="width"):
        connections(directions[:, :8], reader)


def test_splicing_unedited_codes_with_the_error_kept_changes_nothing() -> None:
    model = biased_model("llama", torch.float32)
    _, z = at_work(model)
    sae = dictionary_of(z.flatten(0, 1))
    ids = some_ids()[None]
    before = model(input_ids=ids).logits
    with splice(model, HEADS, with_error_kept(sae, lambda codes: codes)):
        assert model(input_ids=ids).logits.equal(before)
    silent = next(f for f in range(40) if f not in sae.encode(capture(model, [HEADS], ids)[HEADS][0]).col_indices)
    with splice(model, HEADS, with_error_kept(sae, lambda codes: codes.keep(codes.col_indices != silent))):
        assert model(input_ids=ids).logits.equal(before)
    with splice(model, HEADS, with_error_kept(sae, lambda codes: codes.keep(codes.values < 0))):
        assert not model(input_ids=ids).logits.allclose(before)


def test_random_directions_read_positive_values_and_localise() -> None:
    work, _ = at_work(biased_model("llama"))
    tables = random_attribution(work, 0, 5, directions=16)
    assert tables.shape == (16, 4, 7)
    assert tables.sum(dim=(1, 2)).gt(0).all()
    assert localisation(torch.tensor([[3.0, -5.0, 1.0], [0.0, -1.0, 0.0]])).tolist() == [0.75, 0.0]


def test_a_start_in_the_active_subspace_lies_in_it() -> None:
    draw = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=draw)).Q[:, :5]
    sample = torch.randn(400, 5, generator=draw) @ basis.T + 2
    sae = SparseAutoencoder(24, 30, TokenChoice(3))
    norms = sae.encoder_weight.norm(dim=1)
    active_subspace_start(sample, variance=0.999)(sae)
    torch.testing.assert_close(sae.decoder_weight @ basis @ basis.T, sae.decoder_weight.detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(30))
    torch.testing.assert_close(sae.encoder_weight.norm(dim=1), norms)
    with pytest.raises(InputError, match="variance=0"):
        active_subspace_start(sample, variance=0)
    with pytest.raises(InputError, match="no variance"):
        active_subspace_start(torch.ones(5, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature": 40}, "feature=40: the dictionary has features 0 to 39"),
        ({"destination": 7}, "destination=7"),
        ({"row": 2}, "row=2"),
    ],
)
def test_what_is_not_there_is_named(arguments: dict[str, int], message: str) -> None:
    work, z = at_work(biased_model("llama", torch.float32))
    sae = dictionary_of(z.flatten(0, 1))
    with pytest.raises(InputError, match=message):
        direct_feature_attribution(sae, work, **{"feature": 0, "destination": 3, **arguments})


def test_a_dictionary_of_another_width_and_a_look_ahead_are_refused() -> None:
    work, z = at_work(biased_model("gemma3", torch.float32))
    sae = dictionary_of(z.flatten(0, 1))
    found = direct_feature_attribution(sae, work, 0, 3)
    assert found.of(2) == pytest.approx(sum(found.of(2, head) for head in range(4)), rel=1e-5)
    with pytest.raises(InputError, match="source=5 comes after destination=3"):
        found.of(5)
    with pytest.raises(InputError, match="head=4"):
        found.of(2, 4)
    with pytest.raises(InputError, match=r"give a dictionary of the site layers\.L\.heads"):
        direct_feature_attribution(SparseAutoencoder(32, 8, TokenChoice(2)), work, 0, 3)
    with pytest.raises(InputError, match="only features of a layer's heads"):
        output_directions(sae, biased_model("gemma3", torch.float32), replace(HEADS, kind="attn_out"))
