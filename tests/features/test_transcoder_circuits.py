"""Circuits: every share is exact, checked against gradients of a model with frozen patterns and by enumeration."""

import functools
import itertools
from typing import Any

import pytest
import torch
import transformers

from apportion.allocate import Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features import Transcoder
from apportion.features.de_embedding import connections, de_embedding, head_capacity
from apportion.features.frozen_pass import FrozenPass
from apportion.features.transcoder_circuits import Circuit, Node, greedy_circuit, influence_circuit
from apportion.models import Site, capture

IDS = torch.tensor([5, 17, 3, 60, 41])
SIZES = {"vocab_size": 67, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **SIZES,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
PLAIN = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
BUILDERS = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**LLAMA, head_dim=6)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**LLAMA, head_dim=6, sliding_window=3)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SIZES, n_embd=16, n_layer=3, n_head=4, n_positions=32)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**PLAIN)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **SIZES,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=32,
            word_embed_proj_dim=16,
        )
    ),
}


@functools.cache
def model_of(family: str) -> Any:
    """A tiny model in float64 with random weights, biases and gains."""
    model = BUILDERS[family]().double().eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.data = 1 + 0.2 * noise if ("norm" in name and "weight" in name) or "ln" in name else 0.4 * noise
    return model


@functools.cache
def transcoder_of(layer: int, skip: bool = True) -> Transcoder:
    """A random one, of which about four of twenty features fire."""
    transcoder = Transcoder(16, 20, TokenChoice(4), skip=skip, seed=layer).requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(layer)
    for parameter in transcoder.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
    return transcoder


def transcoders(skip: bool = True) -> dict[int, Transcoder]:
    return {layer: transcoder_of(layer, skip) for layer in range(3)}


def firing_root(model: Any, layer: int = 2, token: int = 4) -> Node:
    frozen = FrozenPass(model, IDS, transcoders())
    firing = frozen.firing[layer]
    return Node("feature", token, layer, int(firing.features[firing.tokens == token][0]))


@pytest.fixture(params=list(BUILDERS))
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.fixture
def llama() -> Any:
    return model_of("llama")


LOGIT = Node("logit", 4, None, 33)


def rounding(model: Any) -> float:
    """What float64 leaves; transformers computes RMSNorms in float32 whatever the model is in."""
    has_layer_norms = any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    return 1e-10 if has_layer_norms else 1e-6


# --- nothing is lost -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ln", ["exact", "scalar"])
def test_every_node_is_the_sum_of_its_parts(model: Any, ln: Any) -> None:
    for root in (firing_root(model), LOGIT):
        for find in (greedy_circuit, influence_circuit):
            circuit = find(model, IDS, transcoders(), root, ln=ln)
            assert circuit.imbalance() < rounding(model)
            assert any(figures.expanded for node, figures in circuit.nodes.items() if node != root)


def test_what_is_left_is_exactly_the_biases_on_the_way() -> None:
    """Where norms and projections have no biases, written parts explain a reading to rounding."""
    frozen = FrozenPass(model_of("llama"), IDS, transcoders())
    reading = frozen.of_feature(2, 3, 4)
    assert abs(reading.constant) < 1e-6 * abs(reading.value)
    gpt2 = model_of("gpt2")
    frozen = FrozenPass(gpt2, IDS, transcoders())
    bias = gpt2.transformer.h[2].ln_2.bias @ transcoder_of(2).encoder_weight[3].double()
    assert frozen.of_feature(2, 3, 4).constant == pytest.approx(float(bias), rel=1e-9)


def test_the_root_is_the_models_own_logit(model: Any) -> None:
    circuit = greedy_circuit(model, IDS, transcoders(), LOGIT, iterations=1, against=9)
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS[None]).last_hidden_state[0, 4]
    expected = head(hidden)
    assert circuit.nodes[LOGIT].value == pytest.approx(float(expected[33] - expected[9]), rel=1e-5)


# --- the definitive check ---------------------------------------------------------------------------------------------


FEW = IDS[:3]  # all paths are to be counted, and there are many


def frozen_llama(model: Any, root: Node) -> tuple[torch.Tensor, torch.Tensor]:
    """Root and embeddings of a Llama written out by hand; patterns, scales, gates and errors are held fixed."""
    names = [Site(None, "embeddings"), *(Site(layer, kind) for layer in range(3) for kind in ("mlp_in", "mlp_out"))]
    seen = capture(model, names, FEW[None])
    with torch.no_grad():
        patterns = model_with_patterns(model)
    embedding = seen[names[0]][0].clone().requires_grad_()
    stream = embedding
    for layer, block in enumerate(model.model.layers):
        eps = block.input_layernorm.variance_epsilon
        scale = (stream.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
        values = block.self_attn.v_proj(stream * scale * block.input_layernorm.weight).view(3, 2, 4)
        heads = torch.einsum("hts,shw->thw", patterns[layer], values.repeat_interleave(2, dim=1))
        stream = stream + block.self_attn.o_proj(heads.reshape(3, 16))
        scale = (stream.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
        x = stream * scale * block.post_attention_layernorm.weight
        torch.testing.assert_close(x.detach(), seen[Site(layer, "mlp_in")][0], rtol=1e-5, atol=1e-6)
        target = seen[Site(layer, "mlp_out")][0]
        transcoder = transcoder_of(layer).double()
        scores = (x - transcoder.centre) @ transcoder.encoder_weight.T + transcoder.encoder_bias
        if root.layer == layer:
            return scores[root.token, root.index], embedding
        top = scores.detach().topk(4)
        gate = torch.zeros_like(scores).scatter_(1, top.indices, (top.values > 0).double())
        skip = (x - transcoder.centre) @ transcoder.skip_weight.T
        output = (scores * gate) @ transcoder.decoder_weight + transcoder.decoder_bias + skip
        output = output + (target - output).detach()
        stream = stream + torch.cat([target[:1], output[1:]])
    raise AssertionError(root)


def model_with_patterns(model: Any) -> tuple[torch.Tensor, ...]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return tuple(each[0] for each in model(input_ids=FEW[None], output_attentions=True).attentions)
    finally:
        model.set_attn_implementation(before)


def lower(skip: bool) -> dict[int, Transcoder]:
    return {layer: transcoder_of(layer, skip) for layer in (0, 1)}


def root_among(model: Any, found: dict[int, Transcoder]) -> Node:
    firing = FrozenPass(model, FEW, found).firing[1]
    return Node("feature", 2, 1, int(firing.features[firing.tokens == 2][0]))


def owed_to_embeddings(circuit: Circuit) -> torch.Tensor:
    nodes = circuit.nodes
    return torch.tensor([nodes[Node("embedding", token)].value for token in range(3)], dtype=torch.float64)


def test_all_paths_together_are_the_gradient_of_the_frozen_model(llama: Any) -> None:
    found = {layer: transcoder.double() for layer, transcoder in lower(skip=True).items()}
    root = root_among(llama, found)
    value, embedding = frozen_llama(llama, root)
    (gradient,) = torch.autograd.grad(value, embedding)
    circuit = greedy_circuit(llama, FEW, found, root, iterations=6, branches=10**6)
    assert circuit.nodes[root].value == pytest.approx(float(value.detach()), rel=1e-5)
    expected = (gradient * embedding.detach()).sum(-1)
    torch.testing.assert_close(owed_to_embeddings(circuit), expected, rtol=1e-5, atol=1e-6)
    assert all(abs(figures.pruned) < 1e-9 for figures in circuit.nodes.values())
    assert {"head", "feature", "skip"} <= {node.kind for node in circuit.nodes}
    for transcoder in found.values():
        transcoder.float()


def test_influence_edges_add_up_to_the_same_over_all_paths(llama: Any) -> None:
    """Features and attention taken one by one, and features with attention run through: two ways to one number."""
    found = lower(skip=False)
    root = root_among(llama, found)
    graph = influence_circuit(llama, FEW, found, root, node_share=1.0, edge_share=1.0)

    @functools.cache
    def owed(node: Node, token: int) -> float:
        """What share of a node's value is owed to an embedding over all paths that features make."""
        if node == Node("embedding", token):
            return 1.0
        value = graph.nodes[node].value
        return sum(share / value * owed(child, token) for child, share in graph.into(node).items())

    value = graph.nodes[root].value
    shares = torch.tensor([value * owed(root, token) for token in range(3)], dtype=torch.float64)
    greedy = greedy_circuit(llama, FEW, found, root, iterations=6, branches=10**6)
    torch.testing.assert_close(shares, owed_to_embeddings(greedy), rtol=1e-4, atol=1e-5)


def test_a_transcoder_that_is_the_mlp_has_no_error_and_explains_by_neurons() -> None:
    model = model_of("opt")
    exact = {}
    for layer, block in enumerate(model.model.decoder.layers):
        transcoder = Transcoder(16, 24, Threshold(0.0)).double().requires_grad_(False).eval()
        # Unit rows of the decoder: the norm goes into the encoder.
        rows = block.fc2.weight.T
        norms = rows.norm(dim=1, keepdim=True)
        transcoder.encoder_weight.copy_(block.fc1.weight * norms)
        transcoder.encoder_bias.copy_(block.fc1.bias * norms[:, 0])
        transcoder.decoder_weight.copy_(rows / norms)
        transcoder.decoder_bias.copy_(block.fc2.bias)
        exact[layer] = transcoder
    frozen = FrozenPass(model, IDS, exact, first_is_whole=False)
    assert max(float(error.abs().max()) for error in frozen.errors.values()) < 1e-12
    circuit = greedy_circuit(model, IDS, exact, LOGIT, branches=10**6, iterations=1, first_is_whole=False)
    neurons = capture(model, [Site(2, "mlp_in")], IDS[None])[Site(2, "mlp_in")][0, 4]
    block = model.model.decoder.layers[2]
    active = (neurons @ block.fc1.weight.T + block.fc1.bias).relu()
    reading = frozen.of_final(
        model.get_output_embeddings().weight[33] - model.get_output_embeddings().weight.mean(dim=0), 4
    )
    expected = active * (block.fc2.weight.T @ reading.mlps[2, 4])
    for feature in active.nonzero().flatten().tolist():
        found = circuit.edges[Node("feature", 4, 2, feature), LOGIT]
        # Softmax is computed in float32 here, and by the model itself in float64.
        assert found == pytest.approx(float(expected[feature]), rel=1e-5)


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_best_paths_are_those_of_an_exhaustive_search(llama: Any) -> None:
    """With a large B every part is kept; with a small one the largest of them."""
    root = firing_root(llama)
    everything = greedy_circuit(llama, IDS, transcoders(), root, iterations=1, branches=10**6)
    unexplained = ("error", "mlp", "bias")
    first = {child: value for child, value in everything.into(root).items() if child.kind not in unexplained}
    best = sorted(first, key=lambda node: -abs(first[node]))[:3]
    small = greedy_circuit(llama, IDS, transcoders(), root, iterations=1, branches=3)
    kept = {node for node in small.nodes if node.kind not in unexplained} - {root}
    assert kept == set(best)
    for node in best:
        assert small.edges[node, root] == pytest.approx(first[node], rel=1e-12)
    rest = sum(value for node, value in first.items() if node not in kept)
    assert small.nodes[root].pruned == pytest.approx(rest, rel=1e-9)


def test_the_same_search_gives_the_same_circuit(llama: Any) -> None:
    circuits = [greedy_circuit(llama, IDS, transcoders(), LOGIT, iterations=3, branches=8).to_json() for _ in range(2)]
    assert circuits[0] == circuits[1]


def test_a_prefix_that_paths_share_counts_once(llama: Any) -> None:
    circuit = greedy_circuit(llama, IDS, transcoders(), LOGIT, iterations=3, branches=40)
    direct = greedy_circuit(llama, IDS, transcoders(), LOGIT, iterations=1, branches=40)
    shared = [edge for edge in direct.edges if edge in circuit.edges and edge[0].kind in ("feature", "head")]
    assert len(shared) > 5
    for edge in shared:
        assert circuit.edges[edge] == pytest.approx(direct.edges[edge], rel=1e-12)
    assert len({child for child, _ in circuit.edges}) < len(circuit.edges)


def test_influence_keeps_no_more_than_it_takes(llama: Any) -> None:
    whole = influence_circuit(llama, IDS, transcoders(), LOGIT, node_share=1.0, edge_share=1.0)
    part = influence_circuit(llama, IDS, transcoders(), LOGIT)
    assert len(part.nodes) < len(whole.nodes)
    assert len(part.edges) < len(whole.edges)
    ranked = sorted((f.influence for n, f in whole.nodes.items() if f.influence and n != LOGIT), reverse=True)
    lowest = min(f.influence for n, f in part.nodes.items() if f.influence and n != LOGIT)
    smaller = list(itertools.accumulate(ranked))
    assert smaller[sum(value >= lowest for value in ranked) - 1] >= 0.75 * smaller[-1]


def test_json_round_trip(llama: Any) -> None:
    circuit = greedy_circuit(llama, IDS, transcoders(), LOGIT)
    again = Circuit.from_json(circuit.to_json())
    assert (again.root, again.nodes, again.edges) == (circuit.root, circuit.nodes, circuit.edges)
    with pytest.raises(InputError, match="not a circuit"):
        Circuit.from_json({"format": "other"})


# --- bad input -------------------------------------------------------------------------------------------------------


def test_a_feature_that_does_not_fire_is_refused_with_its_score(llama: Any) -> None:
    firing = FrozenPass(llama, IDS, transcoders()).firing[2]
    silent = next(iter(set(range(20)) - set(firing.features[firing.tokens == 4].tolist())))
    with pytest.raises(InputError, match=rf"feature {silent} of layer 2 does not fire at token 4 \(its score"):
        greedy_circuit(llama, IDS, transcoders(), Node("feature", 4, 2, silent))


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (Node("feature", 4, 2, 20), "has 20 features"),
        (Node("feature", 9, 2, 0), "token 9: the prompt has 5 tokens"),
        (Node("feature", 4, 5, 0), "layer 5 has no transcoder"),
        (Node("logit", 4, None, 999), "vocabulary entry 999"),
        (Node("bias", 4), "only a feature or a logit"),
    ],
)
def test_roots_that_do_not_exist_are_refused(llama: Any, root: Node, message: str) -> None:
    with pytest.raises(InputError, match=message):
        greedy_circuit(llama, IDS, transcoders(), root)


def test_transcoders_that_do_not_fit_are_refused(llama: Any) -> None:
    wide = Transcoder(8, 20, TokenChoice(4), d_out=16)
    with pytest.raises(InputError, match="maps 8 to 16 dimensions, the model's MLPs 16 to 16"):
        FrozenPass(llama, IDS, {1: wide})
    with pytest.raises(InputError, match="layer 3: the model has 3 layers"):
        FrozenPass(llama, IDS, {3: transcoder_of(0)})
    unfolded = Transcoder(16, 20, TokenChoice(4))
    unfolded.input_scale.fill_(2.0)
    with pytest.raises(InputError, match="fold_scale"):
        FrozenPass(llama, IDS, {1: unfolded})
    with pytest.raises(InputError, match="branches=0"):
        greedy_circuit(llama, IDS, {}, LOGIT, branches=0)
    with pytest.raises(InputError, match="no tokens"):
        FrozenPass(llama, IDS[:0], {})


def test_the_model_is_as_before(llama: Any) -> None:
    before = llama(input_ids=IDS[None]).logits
    greedy_circuit(llama, IDS, transcoders(), LOGIT)
    assert llama(input_ids=IDS[None]).logits.equal(before)


# --- by the weights alone --------------------------------------------------------------------------------------------


def test_a_feature_that_reads_a_tokens_embedding_is_de_embedded_to_it(llama: Any) -> None:
    table = llama.get_input_embeddings().weight
    unit = table / table.norm(dim=1, keepdim=True)
    transcoder = Transcoder(16, 3, TokenChoice(1)).double().requires_grad_(False)
    gain = llama.model.layers[0].post_attention_layernorm.weight
    transcoder.encoder_weight.copy_(unit[[7, 20, 41]] / gain)
    scores = de_embedding(llama, 0, transcoder, [0, 1, 2]) / table.norm(dim=1)
    assert scores.argmax(dim=1).tolist() == [7, 20, 41]


def test_through_a_head_tokens_are_seen_as_its_weights_say(llama: Any) -> None:
    transcoder = transcoder_of(1)
    block, own = llama.model.layers[0], llama.model.layers[1]
    found = de_embedding(llama, 1, transcoder, [4], through=(0, 3))[0]
    direction = transcoder.encoder_weight[4].double() * own.post_attention_layernorm.weight
    # Query head 3 shares the values of the second group.
    value, out = block.self_attn.v_proj.weight[4:8], block.self_attn.o_proj.weight[:, 12:16]
    pulled = block.input_layernorm.weight * (value.T @ (out.T @ direction))
    expected = llama.get_input_embeddings().weight @ pulled
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    capacity = head_capacity(llama, 1, transcoder, 4)
    assert capacity[2].eq(0).all()
    assert capacity[:2].gt(0).all()
    with pytest.raises(InputError, match="head 4"):
        de_embedding(llama, 1, transcoder, [4], through=(0, 4))


def test_connections_are_decoder_times_encoder_through_the_gain(llama: Any) -> None:
    lower, upper = transcoder_of(0), transcoder_of(2)
    gain = llama.model.layers[2].post_attention_layernorm.weight
    expected = (upper.encoder_weight.double() * gain) @ lower.decoder_weight.double().T
    found = connections(llama, (0, lower), (2, upper))
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())
    few = connections(llama, (0, lower), (2, upper), [3, 5])
    torch.testing.assert_close(few, found[[3, 5]])
    with pytest.raises(InputError, match="must be below"):
        connections(llama, (2, upper), (0, lower))
