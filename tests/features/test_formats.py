"""Dictionaries of SAELens and sparsify: read, written, and compared with what those libraries compute.

The comparisons need them: in this environment, or in that of the interpreter that APPORTION_PEERS_PYTHON names. All
else works on files written here, tensor by tensor, under the names that the formats document.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, Threshold, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features import LearnedThreshold, SparseAutoencoder
from apportion.features.formats import read_dictionary, read_saelens, read_sparsify, write_saelens, write_sparsify

WIDTH, FEATURES = 12, 40


class Peers:
    """SAELens and sparsify in a process of their own, which imports them once."""

    def __init__(self, interpreter: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [interpreter, str(Path(__file__).with_name("peer_libraries.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __call__(self, action: str, folder: Path, **options: Any) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps({"action": action, "folder": str(folder), **options}), file=self.process.stdin, flush=True)
        reply = self.process.stdout.readline()
        assert reply, f"{self.process.args} ended with exit code {self.process.wait()}"
        assert json.loads(reply) is None, json.loads(reply)

    def apply(self, library: str, folder: Path, x: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Codes and reconstructions that the library computes with what it loads from ``folder``."""
        probe = folder.parent / "probe.safetensors"
        save_file({"x": x}, probe)
        self(f"apply_{library}", folder, x=str(probe), **options)
        answer = load_file(f"{probe}.answer")
        return answer["codes"], answer["output"]


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    interpreter = os.environ.get("APPORTION_PEERS_PYTHON")
    if interpreter is None and all(map(importlib.util.find_spec, ("sae_lens", "sparsify"))):
        interpreter = sys.executable
    if interpreter is None:
        pytest.skip(
            "SAELens and sparsify are not installed: `make peers`, or name an interpreter that has them in "
            "APPORTION_PEERS_PYTHON"
        )
    running = Peers(interpreter)
    yield running
    running.process.communicate(timeout=30)


@pytest.fixture
def x() -> Tensor:
    # Centred elsewhere than in the origin, so that a decoder bias that is wrongly subtracted shows.
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)) + 0.5


def computed(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        result = sae(x)
    return result.codes.to_dense(), result.output


def agree(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    codes, output = ours
    # Something fires, and not everything: else equality would say little.
    assert 0.02 < (theirs[0] > 0).float().mean() < 0.9
    assert torch.equal(codes > 0, theirs[0] > 0)
    torch.testing.assert_close(codes, theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output, theirs[1], rtol=1e-4, atol=2e-5)


def dictionary(rule: Any, x: Tensor, gated: bool = False, input_scale: float = 1.7) -> SparseAutoencoder:
    """A calibrated dictionary none of whose parameters is at its start."""
    sae = SparseAutoencoder(WIDTH, FEATURES, rule, gated=gated)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name == "learned_threshold":
                parameter.copy_(torch.rand(FEATURES, generator=generator))
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.input_scale.fill_(input_scale)
    sae.eval()
    sae.calibrate([x], len(x))
    return sae


RULES = {
    "token choice": TokenChoice(5),
    "mutual choice": MutualChoice(4.5),
    "feature choice": FeatureChoice(4, profile=Zipf(exponent=1.0)),
    "relu": Threshold(0.0),
    "one threshold": Threshold(0.8),
    "learned thresholds": LearnedThreshold(),
}


def saelens_tensors(**changes: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.5

    weights = {"W_enc": draw(WIDTH, FEATURES), "W_dec": draw(FEATURES, WIDTH), "b_dec": draw(WIDTH)}
    return {**weights, "b_enc": draw(FEATURES), **changes}


def saelens_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    content = {"architecture": "standard", "d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", **config}
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def sparsify_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    ours = saelens_tensors()
    names = {"encoder.weight": ours["W_enc"].T.contiguous(), "encoder.bias": ours["b_enc"]}
    save_file(tensors or {**names, "W_dec": ours["W_dec"], "b_dec": ours["b_dec"]}, folder / "sae.safetensors")
    content = {"activation": "topk", "k": 5, "num_latents": FEATURES, "d_in": WIDTH, "transcode": False, **config}
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


# --- what SAELens wrote ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("standard", {"dtype": "bfloat16"}),
        ("topk", {"k": 5, "dtype": "float16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(f"{key}={each}" for key, each in value.items()),
)
def test_a_dictionary_of_saelens_gives_the_codes_that_saelens_gives(
    peers: Peers, tmp_path: Path, x: Tensor, architecture: str, options: dict[str, Any], apply_b_dec_to_input: bool
) -> None:
    options = {**options, "apply_b_dec_to_input": apply_b_dec_to_input}
    peers("write_saelens", tmp_path / "theirs", architecture=architecture, options=options)
    agree(computed(read_dictionary(tmp_path / "theirs"), x), peers.apply("saelens", tmp_path / "theirs", x))


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_batchtopk_as_exported_by_saelens_is_mutual_choice_with_its_threshold(
    peers: Peers, tmp_path: Path, x: Tensor, architecture: str
) -> None:
    options: dict[str, Any] = {"k": 4.0}
    if architecture.startswith("matryoshka"):
        options["matryoshka_widths"] = [10, FEATURES]
    peers("write_saelens", tmp_path / "exported", architecture=architecture, options=options, training=True)
    sae = read_saelens(tmp_path / "exported")
    assert sae.rule == MutualChoice(4.0)
    agree(computed(sae, x), peers.apply("saelens", tmp_path / "exported", x))

    # The checkpoint of the same weights has the decoder's norms unfolded and the threshold under another name.
    peers(
        "write_saelens",
        tmp_path / "checkpoint",
        architecture=architecture,
        options=options,
        training=True,
        inference=False,
    )
    agree(computed(read_saelens(tmp_path / "checkpoint"), x), peers.apply("saelens", tmp_path / "exported", x))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_the_input_scale_of_saelens_is_ours(peers: Peers, tmp_path: Path, x: Tensor, architecture: str) -> None:
    options = {"normalize_activations": "expected_average_only_in"}
    peers("write_saelens", tmp_path / "theirs", architecture=architecture, options=options)
    theirs = peers.apply("saelens", tmp_path / "theirs", x, fold=0.6)
    agree(computed(read_saelens(tmp_path / "theirs", input_scale=0.6), x), theirs)


def test_heads_lie_side_by_side_as_saelens_lays_them(peers: Peers, tmp_path: Path, x: Tensor) -> None:
    sae = dictionary(TokenChoice(5), x)
    sae.metadata = {"model": "smollm2", "site": "layers.3.heads"}
    write_saelens(sae, tmp_path / "ours")
    codes, output = peers.apply("saelens", tmp_path / "ours", x.reshape(len(x), 3, WIDTH // 3))
    assert output.shape == (len(x), 3, WIDTH // 3)
    agree(computed(sae, x), (codes, output.flatten(1)))


# --- what we write for SAELens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_saelens_gives_the_codes_that_we_give(peers: Peers, tmp_path: Path, x: Tensor, rule: Any) -> None:
    sae = dictionary(rule, x)
    write_saelens(sae, tmp_path / "ours")
    agree(computed(sae, x), peers.apply("saelens", tmp_path / "ours", x))


@pytest.mark.parametrize("threshold", [0.0, 0.3])
def test_saelens_gives_the_codes_of_our_gated_dictionary(
    peers: Peers, tmp_path: Path, x: Tensor, threshold: float
) -> None:
    sae = dictionary(Threshold(threshold), x, gated=True)
    write_saelens(sae, tmp_path / "ours")
    agree(computed(sae, x), peers.apply("saelens", tmp_path / "ours", x))


@pytest.mark.parametrize(
    ("rule", "gated"), [*((rule, False) for rule in RULES.values()), (Threshold(0.3), True)], ids=[*RULES, "gated"]
)
def test_a_dictionary_survives_the_way_to_saelens_and_back(tmp_path: Path, x: Tensor, rule: Any, gated: bool) -> None:
    sae = dictionary(rule, x, gated)
    sae.metadata = {"model": "smollm2", "site": "layers.9.residual", "tokens_seen": 64}
    write_saelens(sae, tmp_path)
    again = read_dictionary(tmp_path)
    agree(computed(again, x), computed(sae, x))
    assert {key: again.metadata[key] for key in sae.metadata} == sae.metadata
    assert again.metadata["saelens"]["hook_name"] == "blocks.9.hook_resid_post"
    write_saelens(again, tmp_path / "again")
    agree(computed(read_dictionary(tmp_path / "again"), x), computed(sae, x))
    again.save(tmp_path / "native")
    agree(computed(read_dictionary(tmp_path / "native"), x), computed(sae, x))


def test_mutual_choice_keeps_its_budget_on_the_way_to_saelens_and_back(tmp_path: Path, x: Tensor) -> None:
    write_saelens(dictionary(MutualChoice(4.5), x), tmp_path)
    sae = read_saelens(tmp_path)
    assert sae.rule == MutualChoice(4.5)
    sae.calibrate([x[:32]], 32)
    assert sae.encode(x[:32]).nnz == int(4.5 * 32)


def test_a_batch_rule_without_threshold_is_not_written(tmp_path: Path) -> None:
    sae = SparseAutoencoder(WIDTH, FEATURES, MutualChoice(4)).eval()
    with pytest.raises(InputError, match=r"call calibrate"):
        write_saelens(sae, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_another_space_is_not_written(tmp_path: Path) -> None:
    sae = SparseAutoencoder(WIDTH, FEATURES, TokenChoice(4), d_out=7)
    for write in (write_saelens, write_sparsify):
        with pytest.raises(InputError, match="d_in=12, d_out=7"):
            write(sae, tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- SAELens, by the definitions, on files written here -------------------------------------------------------------


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_standard_is_relu_of_the_scores(tmp_path: Path, x: Tensor, apply_b_dec_to_input: bool) -> None:
    tensors = saelens_tensors()
    folder = saelens_folder(tmp_path / "sae", tensors, apply_b_dec_to_input=apply_b_dec_to_input)
    codes = ((x - tensors["b_dec"] * apply_b_dec_to_input) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    agree(computed(read_saelens(folder), x), (codes, codes @ tensors["W_dec"] + tensors["b_dec"]))


@pytest.mark.parametrize("rescale", [True, False])
def test_topk_scores_count_with_the_decoder_norm_if_the_option_says_so(
    tmp_path: Path, x: Tensor, rescale: bool
) -> None:
    tensors = saelens_tensors()
    folder = saelens_folder(tmp_path / "sae", tensors, architecture="topk", k=5, rescale_acts_by_decoder_norm=rescale)
    norm = tensors["W_dec"].norm(dim=1) if rescale else torch.ones(FEATURES)
    scores = ((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]) * norm
    kept = scores.topk(5).values[:, -1:]
    codes = scores.relu() * (scores >= kept)
    sae = read_saelens(folder)
    agree(computed(sae, x), (codes, (codes / norm) @ tensors["W_dec"] + tensors["b_dec"]))
    assert sae.rule == TokenChoice(5)
    if rescale:
        torch.testing.assert_close(sae.decoder_weight.norm(dim=1), torch.ones(FEATURES))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_gated_has_a_gate_and_a_magnitude(tmp_path: Path, x: Tensor, apply_b_dec_to_input: bool) -> None:
    tensors = saelens_tensors()
    tensors |= {"b_gate": tensors.pop("b_enc"), "b_mag": torch.full((FEATURES,), 0.2), "r_mag": torch.randn(FEATURES)}
    folder = saelens_folder(tmp_path / "sae", tensors, architecture="gated", apply_b_dec_to_input=apply_b_dec_to_input)
    product = (x - tensors["b_dec"] * apply_b_dec_to_input) @ tensors["W_enc"]
    magnitude = (product * tensors["r_mag"].exp() + tensors["b_mag"]).relu()
    codes = magnitude * (product + tensors["b_gate"] > 0)
    agree(computed(read_saelens(folder), x), (codes, codes @ tensors["W_dec"] + tensors["b_dec"]))


def jumprelu_by_definition(tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    scores = (x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]
    codes = scores.relu() * (scores > tensors["threshold"])
    return codes, codes @ tensors["W_dec"] + tensors["b_dec"]


def test_jumprelu_has_a_threshold_per_feature_even_an_infinite_or_negative_one(tmp_path: Path, x: Tensor) -> None:
    threshold = torch.linspace(-0.5, 2.0, FEATURES)
    threshold[-1] = torch.inf
    tensors = saelens_tensors(threshold=threshold)
    sae = read_saelens(saelens_folder(tmp_path / "sae", tensors, architecture="jumprelu"))
    assert sae.rule == LearnedThreshold()
    agree(computed(sae, x), jumprelu_by_definition(tensors, x))


def test_the_logarithm_of_older_jumprelu_checkpoints_is_understood(tmp_path: Path, x: Tensor) -> None:
    tensors = saelens_tensors(threshold=torch.linspace(0.1, 2.0, FEATURES))
    stored = {name: value for name, value in tensors.items() if name != "threshold"}
    folder = saelens_folder(
        tmp_path / "sae", {**stored, "log_threshold": tensors["threshold"].log()}, architecture="jumprelu"
    )
    agree(computed(read_saelens(folder), x), jumprelu_by_definition(tensors, x))


def test_one_threshold_for_all_is_a_threshold_or_mutual_choice(tmp_path: Path, x: Tensor) -> None:
    tensors = saelens_tensors(threshold=torch.full((FEATURES,), 0.9))
    folder = saelens_folder(tmp_path / "sae", tensors, architecture="jumprelu")
    sae = read_saelens(folder)
    assert isinstance(sae.rule, Threshold)
    agree(computed(sae, x), jumprelu_by_definition(tensors, x))

    trained_by = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 4.0}}
    sae = read_saelens(saelens_folder(tmp_path / "sae", tensors, architecture="jumprelu", metadata=trained_by))
    assert sae.rule == MutualChoice(4.0)
    agree(computed(sae, x), jumprelu_by_definition(tensors, x))
    with torch.no_grad():
        assert sae.encode(x, mode="batch").nnz == 4 * len(x)


def test_a_layout_from_before_version_6_is_understood(tmp_path: Path, x: Tensor) -> None:
    tensors = saelens_tensors(scaling_factor=torch.ones(FEATURES))
    folder = saelens_folder(
        tmp_path / "sae",
        tensors,
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 5},
        normalize_activations=False,
        hook_point="blocks.4.hook_resid_pre",
        model_name="gpt2-small",
    )
    sae = read_saelens(folder)
    assert sae.rule == TokenChoice(5)
    assert (sae.metadata["model"], sae.metadata["site"]) == ("gpt2-small", "layers.3.residual")


@pytest.mark.parametrize(
    ("metadata", "site"),
    [
        ({"hook_name": "blocks.0.hook_resid_pre"}, "embeddings"),
        ({"hook_name": "blocks.7.hook_mlp_out", "model_name": "gpt2-small"}, "layers.7.mlp_out"),
        ({"hook_name": "blocks.7.attn.hook_z"}, "layers.7.heads"),
        ({"hook_name": "blocks.7.attn.hook_z", "hook_head_index": 3}, None),
        ({"hook_name": "blocks.7.hook_mlp_out", "model_name": "gemma-2-2b"}, None),
        ({"hook_name": "blocks.7.mlp.hook_pre"}, None),
        ({}, None),
    ],
)
def test_hooks_are_sites_where_the_place_is_the_same(
    tmp_path: Path, metadata: dict[str, Any], site: str | None
) -> None:
    sae = read_saelens(saelens_folder(tmp_path / "sae", saelens_tensors(), metadata=metadata))
    assert sae.metadata.get("site") == site
    assert sae.metadata["saelens"] == metadata


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        ("layers.9.attn_out", "blocks.9.hook_attn_out"),
        ("embeddings", "blocks.0.hook_resid_pre"),
        ("layers.9.mlp_in", None),
        (None, None),
    ],
)
def test_sites_are_hooks_where_the_place_is_the_same(
    tmp_path: Path, x: Tensor, site: str | None, hook: str | None
) -> None:
    sae = dictionary(TokenChoice(5), x)
    sae.metadata = {"site": site}
    write_saelens(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["hook_name"] == hook
    assert read_saelens(tmp_path).metadata["site"] == site


def test_the_scale_of_a_checkpoint_is_found_beside_it(tmp_path: Path, x: Tensor) -> None:
    tensors = saelens_tensors()
    folder = saelens_folder(tmp_path / "sae", tensors, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 0.6, "has_whitening": false}')
    codes = ((x * 0.6 - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    agree(computed(read_saelens(folder), x), (codes, (codes @ tensors["W_dec"] + tensors["b_dec"]) / 0.6))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm' has no equal"),
        ({"normalize_activations": "constant_norm_rescale"}, "normalize_activations='constant_norm_rescale' has no"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' has no"),
        ({"normalize_activations": "expected_average_only_in"}, "give it to read_saelens as input_scale"),
        ({"architecture": "temporal"}, "architecture='temporal' has no equal here; standard, topk, jumprelu"),
        ({"activation_fn": "tanh-relu"}, "activation_fn='tanh-relu' has no equal"),
        ({"architecture": "topk"}, "k is None: it should be a whole number above 0"),
        ({"architecture": "topk", "k": 41}, "more than the 40 candidates"),
        ({"architecture": "jumprelu"}, r"asks for .* it lacks \['threshold'\]"),
        ({"d_sae": 41}, r"W_enc has shape \(12, 40\), but cfg.json says \(12, 41\)"),
        ({"d_in": "wide"}, "d_in is 'wide': it should be a whole number above 0"),
    ],
)
def test_what_has_no_equal_here_is_refused_by_name(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_saelens(saelens_folder(tmp_path / "sae", saelens_tensors(), **config))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"scaling_factor": torch.full((FEATURES,), 1.1)}, "finetuning_scaling_factor"),
        ({"W_skip": torch.zeros(WIDTH, WIDTH)}, r"has \['W_skip'\] besides"),
        ({"b_enc": torch.full((FEATURES,), torch.nan)}, "b_enc has NaN"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_saelens(saelens_folder(tmp_path / "sae", saelens_tensors(**tensors)))


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_an_input_scale_that_is_none_is_refused(tmp_path: Path, scale: float) -> None:
    folder = saelens_folder(tmp_path / "sae", saelens_tensors(), normalize_activations=True)
    with pytest.raises(InputError, match="must be a number above 0"):
        read_saelens(folder, input_scale=scale)


def test_an_input_scale_where_none_belongs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"input_scale=2.0: .* leave it out"):
        read_saelens(saelens_folder(tmp_path / "sae", saelens_tensors()), input_scale=2.0)


# --- sparsify -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"num_latents": FEATURES, "k": 5},
        {"expansion_factor": 4, "k": 5, "normalize_decoder": False},
        {"num_latents": FEATURES, "k": 5, "multi_topk": True},
        {"num_latents": FEATURES, "k": 5, "transcode": True},
    ],
    ids=lambda options: ",".join(f"{key}={each}" for key, each in options.items()),
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_coder_of_sparsify_gives_the_codes_that_sparsify_gives(
    peers: Peers, tmp_path: Path, x: Tensor, options: dict[str, Any], dtype: str
) -> None:
    peers("write_sparsify", tmp_path / "theirs", options=options, dtype=dtype)
    agree(computed(read_dictionary(tmp_path / "theirs"), x), peers.apply("sparsify", tmp_path / "theirs", x))


@pytest.mark.parametrize("input_scale", [1.0, 1.7])
def test_sparsify_gives_the_codes_that_we_give(peers: Peers, tmp_path: Path, x: Tensor, input_scale: float) -> None:
    sae = dictionary(TokenChoice(5), x, input_scale=input_scale)
    sae.metadata = {"model": "smollm2", "site": "layers.9.residual"}
    write_sparsify(sae, tmp_path / "layers.9")
    agree(computed(sae, x), peers.apply("sparsify", tmp_path / "layers.9", x))
    again = read_dictionary(tmp_path / "layers.9")
    agree(computed(again, x), computed(sae, x))
    assert again.metadata == sae.metadata


@pytest.mark.parametrize("transcode", [False, True])
def test_a_coder_keeps_the_k_largest_scores(tmp_path: Path, x: Tensor, transcode: bool) -> None:
    folder = sparsify_folder(tmp_path / "layers.9.mlp", transcode=transcode)
    tensors = saelens_tensors()
    scores = (x - tensors["b_dec"] * (not transcode)) @ tensors["W_enc"] + tensors["b_enc"]
    codes = scores.relu() * (scores >= scores.topk(5).values[:, -1:])
    sae = read_sparsify(folder)
    agree(computed(sae, x), (codes, codes @ tensors["W_dec"] + tensors["b_dec"]))
    assert sae.rule == TokenChoice(5)
    assert sae.metadata.get("site") == (None if transcode else "layers.9.mlp_out")
    assert sae.metadata["sparsify"]["hookpoint"] == "layers.9.mlp"


def test_zero_latents_mean_as_many_as_the_factor_says(tmp_path: Path) -> None:
    folder = sparsify_folder(tmp_path / "layers.9", num_latents=0, expansion_factor=3)
    with pytest.raises(InputError, match=r"encoder.weight has shape \(40, 12\), but cfg.json says \(36, 12\)"):
        read_sparsify(folder)


@pytest.mark.parametrize(
    ("unit_rows", "input_scale", "normalised"), [(True, 1.0, True), (True, 1.7, False), (False, 1.0, False)]
)
def test_sparsify_is_told_whether_the_decoder_has_unit_rows(
    tmp_path: Path, x: Tensor, unit_rows: bool, input_scale: float, normalised: bool
) -> None:
    sae = dictionary(TokenChoice(5), x, input_scale=input_scale)
    if unit_rows:
        sae.normalise_decoder()
    write_sparsify(sae, tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["normalize_decoder"] is normalised
    agree(computed(read_sparsify(tmp_path), x), computed(sae, x))


@pytest.mark.parametrize("rule", [rule for rule in RULES.values() if not isinstance(rule, TokenChoice)])
def test_sparsify_takes_token_choice_alone(tmp_path: Path, x: Tensor, rule: Any) -> None:
    with pytest.raises(InputError, match=f"rule={type(rule).__name__}: sparsify knows no thresholds"):
        write_sparsify(dictionary(rule, x), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"activation": "groupmax"}, "activation='groupmax' has no equal here; 'topk' has"),
        ({"skip_connection": True, "transcode": True}, "skip_connection=True has no equal"),
        ({"signed": True}, "signed=True has no equal"),
        ({"k": None}, "k is None"),
        ({"num_latents": 0}, "expansion_factor is None"),
    ],
)
def test_options_of_sparsify_without_equal_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        read_sparsify(sparsify_folder(tmp_path / "layers.9", **config))


# --- which format is it? --------------------------------------------------------------------------------------------


def test_a_native_dictionary_is_recognised(tmp_path: Path, x: Tensor) -> None:
    sae = dictionary(MutualChoice(4), x)
    sae.save(tmp_path)
    agree(computed(read_dictionary(tmp_path), x), computed(sae, x))


def test_a_folder_without_dictionary_is_told_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "ae.pt").touch()
    with pytest.raises(InputError, match=r"sparsify: cfg.json and sae.safetensors. It has: ae.pt."):
        read_dictionary(tmp_path)
    with pytest.raises(InputError, match="nowhere is not a folder"):
        read_dictionary(tmp_path / "nowhere")


def test_a_folder_of_dictionaries_is_told_to_choose_one(tmp_path: Path) -> None:
    sparsify_folder(tmp_path / "layers.8")
    sparsify_folder(tmp_path / "layers.9")
    with pytest.raises(InputError, match=r"Its folder 'layers.8' does hold one \(2 of its folders do\)"):
        read_dictionary(tmp_path)


def test_two_formats_in_one_folder_are_refused(tmp_path: Path) -> None:
    sparsify_folder(tmp_path)
    saelens_folder(tmp_path, saelens_tensors())
    with pytest.raises(InputError, match=r"2 formats \(SAELens, sparsify\)"):
        read_dictionary(tmp_path)


@pytest.mark.parametrize("read", [read_saelens, read_sparsify])
def test_damaged_files_are_named(tmp_path: Path, read: Any) -> None:
    weights = "sae_weights.safetensors" if read is read_saelens else "sae.safetensors"
    with pytest.raises(InputError, match=r"cfg.json does not exist"):
        read(tmp_path)
    (tmp_path / "cfg.json").write_text("[]")
    with pytest.raises(InputError, match=r"cfg.json should hold an object"):
        read(tmp_path)
    sparsify_folder(tmp_path, d_sae=FEATURES)
    (tmp_path / "sae.safetensors").unlink()
    with pytest.raises(InputError, match=rf"{weights} does not exist"):
        read(tmp_path)
    (tmp_path / weights).write_bytes(b"cut")
    with pytest.raises(InputError, match=rf"{weights} cannot be read"):
        read(tmp_path)
