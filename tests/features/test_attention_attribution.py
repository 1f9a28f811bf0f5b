"""Every level of a recursive attribution adds up, and its entries are what the weights say."""

import pytest
import torch

from apportion.errors import InputError
from apportion.features.attention_attribution import Node, RecursiveAttribution, rdfa
from apportion.features.attention_output_sae import Reader
from apportion.features.attention_scores import score_expansion
from apportion.models import Site
from apportion.models.direct_paths import DirectPaths
from biased_models import FAMILIES, biased_model, dictionaries_of, dictionary_of, some_ids

SETS = [
    ("layers.2.heads",),
    ("layers.2.heads", "layers.0.heads", "layers.1.heads"),
    ("layers.2.heads", "layers.1.residual", "layers.0.heads"),
    ("layers.0.heads", "embeddings"),
    ("layers.1.residual", "layers.1.heads"),
    ("layers.1.mlp_in",),
    ("layers.1.attn_out",),
]


def root_of(paths: DirectPaths, *names: str) -> Node:
    attribution = RecursiveAttribution(paths, dictionaries_of(paths, *names))
    site = Site.parse(names[0])
    feature, activation = attribution.features_at(site, 5)[0]
    root = attribution.root(site, feature, 5)
    assert root.value == root.activation == activation
    return root


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_parts_of_every_node_add_up_to_it(family: str, dtype: torch.dtype, limit: float) -> None:
    paths = DirectPaths(biased_model(family, dtype), some_ids())
    for names in SETS:
        root = root_of(paths, *names)
        for tree in rdfa(root, depth=3, top_k=1):
            if tree.branches:
                sizes = sum(abs(child.value) for child in tree.node.children)
                assert abs(tree.node.value - sum(branch.node.value for branch in tree.branches)) <= limit * sizes
                assert tree.node.rounding <= limit


def test_a_tree_shows_biases_and_errors_and_what_it_leaves_out() -> None:
    paths = DirectPaths(biased_model("gpt2"), some_ids())
    root = root_of(paths, "layers.2.heads", "layers.1.residual")
    tree = rdfa(root, depth=2, top_k=2)
    assert [branch.node.kind for branch in tree.branches].count("source") == 2
    (rest,) = (branch.node for branch in tree.branches if branch.node.kind == "remainder")
    assert rest.count == 4
    source = next(branch for branch in tree.branches if branch.branches)
    kinds = [branch.node.kind for branch in source.branches]
    assert {"feature", "dictionary bias", "error", "model bias", "remainder"} == set(kinds)
    assert all(not branch.branches for branch in source.branches), "depth 2"
    assert rdfa(root, depth=0).branches == ()


def test_what_an_upstream_feature_brings_is_what_the_weights_say() -> None:
    """By hand for Llama: pattern x value x (gain d / rms) W_V w, for a feature of the stream; grouped queries."""
    model = biased_model("llama")
    paths = DirectPaths(model, some_ids())
    heads, stream = Site(2, "heads"), Site(1, "residual")
    dictionaries = dictionaries_of(paths, str(heads), str(stream))
    attribution = RecursiveAttribution(paths, dictionaries)
    feature, _ = attribution.features_at(heads, 5)[0]
    weight = Reader.of(dictionaries[heads], feature).weight.double().view(4, 8)
    block, x = model.model.layers[2], paths.stream(2)
    rms = (x.square().mean(-1) + block.input_layernorm.variance_epsilon).sqrt()
    source = next(node for node in attribution.root(heads, feature, 5).children if node.position == 3)
    upstream = [node for node in source.children if node.kind == "feature"]
    assert len(upstream) == 4
    for node in upstream:
        sae = dictionaries[stream]
        reader = Reader.of(sae, node.feature)
        activation = x[3] @ reader.weight.double() + reader.bias.double()
        direction = sae.decoder_weight[node.feature].detach().double() / sae.input_scale
        values = ((block.input_layernorm.weight * direction / rms[3]) @ block.self_attn.v_proj.weight.T).view(2, 8)
        by_head = (values.repeat_interleave(2, dim=0) * weight).sum(dim=1)
        expected = activation * (paths.patterns[2][:, 5, 3] @ by_head)
        assert node.value == pytest.approx(float(expected), rel=1e-5)


def test_an_earlier_layers_feature_goes_on_to_its_own_sources() -> None:
    paths = DirectPaths(biased_model("opt_350m"), some_ids())
    root = root_of(paths, "layers.2.heads", "layers.1.heads")
    source = next(node for node in root.children if node.kind == "source" and node.position == 4)
    feature = next(node for node in source.children if node.kind == "feature")
    assert (feature.layer, feature.position, feature.site) == (1, 4, Site(1, "heads"))
    assert max(node.position for node in feature.children if node.kind == "source") == 4
    assert feature.table is not None
    bias = next(node for node in feature.children if node.kind == "dictionary bias")
    assert float(feature.table.sum()) + bias.value == pytest.approx(feature.value, rel=1e-10)


def test_what_cannot_be_followed_is_refused() -> None:
    paths = DirectPaths(biased_model("llama"), some_ids())
    sae = dictionary_of(paths.stream(1))
    with pytest.raises(InputError, match=r"layers.0.mlp_out: an MLP's output is no linear function"):
        RecursiveAttribution(paths, {Site(0, "mlp_out"): sae})
    wide = DirectPaths(biased_model("gemma3"), some_ids())
    with pytest.raises(InputError, match="maps width 32 to 32, but the site has width 48"):
        RecursiveAttribution(wide, {Site(0, "heads"): sae})
    attribution = RecursiveAttribution(paths, {Site(0, "residual"): sae})
    with pytest.raises(InputError, match="feature=40"):
        attribution.root(Site(0, "residual"), 40, 0)
    with pytest.raises(InputError, match="position=7"):
        attribution.root(Site(0, "residual"), 0, 7)
    with pytest.raises(InputError, match=r"there is no dictionary for it; given: layers\.0\.residual"):
        attribution.root(Site(1, "residual"), 0, 0)
    with pytest.raises(InputError, match="top_k=0"):
        rdfa(attribution.root(Site(0, "residual"), 0, 0), top_k=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_heads_score_is_a_sum_over_pairs_of_features(family: str) -> None:
    paths = DirectPaths(biased_model(family), some_ids())
    sae = dictionary_of(paths.stream(2))
    found = score_expansion(paths, sae, layer=2, head=3, destination=5, source=2)
    assert float(found.table.sum()) == pytest.approx(found.score, abs=1e-9)
    assert found.by_features.shape == (4, 4)
    queries, keys = paths.attention(2, "queries")[3], paths.attention(2, "keys")[3]
    scores = (queries[5] @ keys.T * paths.scaling(2))[:6]
    assert float(scores[2]) == pytest.approx(found.score, abs=1e-12)
    if family != "gemma3":  # which looks back by four tokens only
        torch.testing.assert_close(scores.softmax(0), paths.patterns[2][3, 5, :6], rtol=1e-5, atol=1e-6)


def test_a_pair_of_features_meets_under_the_rotation_by_its_offset() -> None:
    """By hand for Llama, whose rotary embedding pairs coordinate j with j + half."""
    model = biased_model("llama")
    paths = DirectPaths(model, some_ids())
    sae = dictionary_of(paths.stream(1))
    found = score_expansion(paths, sae, layer=1, head=3, destination=6, source=2)
    block, x = model.model.layers[1], paths.stream(1)
    rms = (x.square().mean(-1) + block.input_layernorm.variance_epsilon).sqrt()

    def projected(feature: int, position: int, weight: torch.Tensor) -> torch.Tensor:
        reader = Reader.of(sae, feature)
        value = x[position] @ reader.weight.double() + reader.bias.double()
        direction = sae.decoder_weight[feature].detach().double() / sae.input_scale
        return weight @ (block.input_layernorm.weight * direction * value / rms[position])

    query = projected(found.destination_features[0], 6, block.self_attn.q_proj.weight[24:])
    key = projected(found.source_features[1], 2, block.self_attn.k_proj.weight[8:])
    angle = (6 - 2) * 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8)
    one, other = query[:4] + 1j * query[4:], key[:4] + 1j * key[4:]
    expected = (one.conj() * other * torch.exp(-1j * angle).conj().conj()).real.sum() / 8**0.5
    assert float(found.by_features[0, 1]) == pytest.approx(float(expected), rel=1e-5)


def test_scores_ahead_and_of_heads_that_are_not_there_are_refused() -> None:
    paths = DirectPaths(biased_model("llama"), some_ids())
    sae = dictionary_of(paths.stream(1))
    with pytest.raises(InputError, match="source=4 comes after destination=2"):
        score_expansion(paths, sae, 1, 0, 2, 4)
    with pytest.raises(InputError, match="head=4"):
        score_expansion(paths, sae, 1, 4, 4, 2)
    with pytest.raises(InputError, match="layer=3"):
        score_expansion(paths, sae, 3, 0, 4, 2)
