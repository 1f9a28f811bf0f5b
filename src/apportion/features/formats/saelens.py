"""The format of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, one folder per dictionary.

Checked against SAELens 6.54.12: tests compare codes and reconstructions with what SAELens itself computes from the same
files, both ways. Older layouts (before 6.0: ``hook_point``, ``activation_fn_str``) are understood as SAELens does.

| SAELens | here |
|---|---|
| ``W_enc`` [d, F], ``b_enc`` | ``encoder_weight`` [F, d], ``encoder_bias`` |
| ``W_dec`` [F, d], ``b_dec`` | ``decoder_weight``, ``decoder_bias`` |
| ``standard`` | ``Threshold(0.0)`` |
| ``topk`` | ``TokenChoice(k)`` |
| ``jumprelu`` | ``LearnedThreshold``; one threshold for all: ``Threshold``, or ``MutualChoice`` if it was trained by BatchTopK |
| ``batchtopk``, ``matryoshka_batchtopk`` (checkpoints of training) | ``MutualChoice(k)`` |
| ``gated``: ``b_gate``, ``r_mag``, ``b_mag`` | ``gated=True``: ``encoder_bias``, ``log_magnitude``, ``magnitude_bias`` |
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import FeatureChoice, MutualChoice, Rule, Threshold, TokenChoice
from apportion.data.files import read_json, write_json
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.formats.weights import AffineWeights, check_tensors, read_tensors, write_tensors
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.rules import rule_to_dict

CONFIG_FILE, WEIGHTS_FILE, SCALER_FILE = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
CHECKED_VERSION = "6.54.12"

_BATCH_TOP_K = ("batchtopk", "matryoshka_batchtopk")
# Tensors beside W_enc, W_dec and b_dec; with their number of dimensions (1: one value per feature).
_OWN_TENSORS: dict[str, dict[str, int]] = {
    "standard": {"b_enc": 1},
    "topk": {"b_enc": 1},
    "jumprelu": {"b_enc": 1, "threshold": 1},
    "batchtopk": {"b_enc": 1, "topk_threshold": 0},
    "matryoshka_batchtopk": {"b_enc": 1, "topk_threshold": 0},
    "gated": {"b_gate": 1, "r_mag": 1, "b_mag": 1},
}
# Hooks of TransformerLens that are the same place under both names.
_HOOK_OF_KIND = {
    "residual": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "heads": "attn.hook_z",
}
_NORMED_ONCE_MORE = re.compile(r"gemma-?[23]", re.IGNORECASE)  # TransformerLens hooks their outputs after that norm


def read_saelens(folder: Path | str, input_scale: float | None = None) -> SparseAutoencoder:
    """A dictionary that SAELens wrote; it gives the same codes, in evaluation mode.

    The codes are SAELens's in float32, whatever type the file is in. Its activations must be, too: SAELens reads those
    of TransformerLens, which by default centres the residual stream of models with LayerNorm (``metadata`` keeps
    ``model_from_pretrained_kwargs``).

    Args:
        folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
        input_scale: for ``normalize_activations: expected_average_only_in``, whose factor SAELens keeps outside of these
            files (``activation_scaler.json`` of a checkpoint is found by itself): what activations are multiplied by.

    Raises:
        InputError: missing or damaged files, or an architecture or option without an equal here; names it.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG_FILE)
    architecture, metadata = config["architecture"], config["metadata"]
    d_in, n_features = _whole(folder, config, "d_in"), _whole(folder, config, "d_sae")
    tensors = _tensors(folder / WEIGHTS_FILE, architecture, d_in, n_features)
    weights = AffineWeights(
        encoder_weight=tensors["W_enc"].T,
        encoder_bias=tensors["b_gate" if architecture == "gated" else "b_enc"],
        decoder_weight=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
    )
    raised = None if config["apply_b_dec_to_input"] else weights.scores_of_decoder_bias()
    if raised is not None:
        weights = weights.for_uncentred_input()
    if config.get("rescale_acts_by_decoder_norm") and architecture in ("topk", *_BATCH_TOP_K):
        weights = weights.with_unit_decoder()

    scale = _input_scale(folder, config, input_scale)
    sae = weights.into_dictionary(_rule(folder, config, tensors), gated=architecture == "gated")
    with torch.no_grad():
        sae.input_scale.fill_(scale)
        if isinstance(sae.rule, LearnedThreshold):
            sae.learned_threshold.copy_(tensors["threshold"])
        if isinstance(sae.rule, MutualChoice):
            sae.threshold.copy_(tensors["topk_threshold" if architecture in _BATCH_TOP_K else "threshold"])
        if sae.gated:
            sae.log_magnitude.copy_(tensors["r_mag"])
            shift = torch.zeros(()) if raised is None else raised * tensors["r_mag"].double().exp()
            sae.magnitude_bias.copy_(tensors["b_mag"] + shift)
    sae.metadata = {"format": "SAELens", **_provenance(metadata), "saelens": metadata}
    return sae


def write_saelens(sae: SparseAutoencoder, folder: Path | str) -> None:
    """Write a dictionary so that SAELens computes the same codes and reconstructions (``SAE.load_from_disk(folder)``).

    ``TokenChoice`` becomes ``topk``, ``Threshold(0.0)`` ``standard`` or ``gated``; the other rules become ``jumprelu`` with
    the thresholds of evaluation mode. The budget of ``MutualChoice`` survives in the metadata, the quotas of
    ``FeatureChoice`` do not.

    Raises:
        InputError: the output is another space than the input, or a batch rule was neither trained nor calibrated.
    """
    if sae.d_in != sae.d_out:
        raise InputError(
            f"d_in={sae.d_in}, d_out={sae.d_out}: only dictionaries whose output is their input's space are written "
            "for SAELens; save it in the format of apportion"
        )
    folder = Path(folder)
    weights = AffineWeights.of(sae)
    architecture, own_config, own_tensors = _own_part(sae, weights)
    write_tensors(
        folder / WEIGHTS_FILE,
        {
            "W_enc": weights.encoder_weight.T,
            "W_dec": weights.decoder_weight,
            "b_dec": weights.decoder_bias,
            **own_tensors,
        },
    )
    metadata = _saelens_metadata(sae)
    write_json(
        folder / CONFIG_FILE,
        {
            "architecture": architecture,
            "d_in": sae.d_in,
            "d_sae": sae.n_features,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            # With this, SAELens takes [..., heads, width] from the hook and lays the heads side by side.
            "reshape_activations": "hook_z" if str(metadata.get("hook_name")).endswith("hook_z") else "none",
            **own_config,
            "metadata": metadata,
        },
    )


# --- reading --------------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """``cfg.json`` in today's terms, with SAELens's defaults filled in."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a configuration of SAELens: it should hold an object, not {config!r:.40}")
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation == "topk":
        config = {**config, "architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    elif activation != "relu":
        raise InputError(f"{path}: activation_fn={activation!r} has no equal here: only relu and topk do")
    if config.setdefault("architecture", "standard") not in _OWN_TENSORS:
        raise InputError(
            f"{path}: architecture={config['architecture']!r} has no equal here: one of {', '.join(_OWN_TENSORS)} does"
        )
    config.setdefault("apply_b_dec_to_input", True)
    if not isinstance(config.get("metadata"), dict):
        names = {"hook_point": "hook_name"}
        config["metadata"] = {names.get(key, key): value for key, value in config.items() if key != "metadata"}
    return config


def _tensors(path: Path, architecture: str, d_in: int, n_features: int) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    if "log_threshold" in tensors:  # JumpReLU checkpoints before SAELens 6.30
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if "scaling_factor" in tensors and not bool((tensors.pop("scaling_factor") != 1).any()):
        raise_for_scaling = False
    else:
        raise_for_scaling = "scaling_factor" in tensors
    if raise_for_scaling:
        raise InputError(f"{path}: finetuning_scaling_factor has no equal here")
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_in, n_features),
        "W_dec": (n_features, d_in),
        "b_dec": (d_in,),
    }
    shapes.update({name: (n_features,) * dimensions for name, dimensions in _OWN_TENSORS[architecture].items()})
    check_tensors(path, tensors, shapes)
    return tensors
