"""The format of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, one folder per dictionary.

Checked against SAELens 6.54.12: tests compare codes and reconstructions with what SAELens itself computes from the same
files, both ways. Older layouts (before 6.0: ``hook_point``, ``activation_fn_str``) are understood as SAELens does.

| SAELens | here |
|---|---|
| ``W_enc`` [d, F], ``b_enc`` | ``encoder_weight`` [F, d], ``encoder_bias`` |
| ``W_dec`` [F, d], ``b_dec`` | ``decoder_weight``, ``decoder_bias`` |
| ``standard`` | ``Threshold(0.0)`` |
| ``topk`` | ``TokenChoice(k)`` |
| ``jumprelu`` | ``LearnedThreshold``; with one threshold for all ``Threshold`` |
| ``jumprelu`` that BatchTopK trained; ``batchtopk`` (a checkpoint of training) | ``MutualChoice(k)``, calibrated |
| ``gated`` | ``Threshold(0.0)`` and ``gated=True`` |
| ``b_gate``, ``r_mag``, ``b_mag`` | ``encoder_bias``, ``log_magnitude``, ``magnitude_bias`` |
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apportion.allocate import MutualChoice, Rule, Threshold, TokenChoice
from apportion.data.files import read_json, write_json
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.formats.weights import (
    AffineWeights,
    check_tensors,
    positive_number,
    read_tensors,
    write_tensors,
)
from apportion.features.jump_relu import LearnedThreshold

CONFIG_FILE, WEIGHTS_FILE, SCALER_FILE = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
CHECKED_VERSION = "6.54.12"

_BATCH_TOP_K = ("batchtopk", "matryoshka_batchtopk")
# Tensors beside W_enc, W_dec and b_dec: one value per feature, but for the one threshold of BatchTopK.
_OWN_TENSORS: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "topk": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "batchtopk": ("b_enc", "topk_threshold"),
    "matryoshka_batchtopk": ("b_enc", "topk_threshold"),
    "gated": ("b_gate", "r_mag", "b_mag"),
}
_METADATA_BEFORE_6 = (
    "model_name",
    "hook_name",
    "hook_head_index",
    "context_size",
    "prepend_bos",
    "dataset_path",
    "model_from_pretrained_kwargs",
    "sae_lens_training_version",
)
# Hooks of TransformerLens that are the same place as a site of ours, after "blocks.<layer>.".
_HOOK_OF_KIND = {
    "residual": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "heads": "attn.hook_z",
}
_KIND_OF_HOOK = {hook: kind for kind, hook in _HOOK_OF_KIND.items()}


def read_saelens(folder: Path | str, input_scale: float | None = None) -> SparseAutoencoder:
    """A dictionary that SAELens wrote, in evaluation mode: the same codes and reconstructions.

    They are what SAELens computes in float32, whatever type the file is in. The activations must be those it was
    trained on, too: where ``metadata["saelens"]["model_from_pretrained_kwargs"]`` has ``center_writing_weights: true``,
    TransformerLens took their mean over the width out, which transformers does not.

    Args:
        folder: holds ``cfg.json`` and ``sae_weights.safetensors``.
        input_scale: what activations are multiplied by, for ``normalize_activations="expected_average_only_in"``:
            SAELens keeps that factor elsewhere (the ``activation_scaler.json`` of a checkpoint is found by itself).

    Raises:
        InputError: missing or damaged files, or an architecture or option without an equal here; names it.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG_FILE)
    tensors = _tensors(folder / WEIGHTS_FILE, config)
    gated = config["architecture"] == "gated"
    weights = AffineWeights(
        encoder_weight=tensors["W_enc"].T,
        encoder_bias=tensors["b_gate" if gated else "b_enc"],
        decoder_weight=tensors["W_dec"],
        decoder_bias=tensors["b_dec"],
    )
    raised = torch.zeros(()) if config["apply_b_dec_to_input"] else weights.scores_of_decoder_bias()
    weights = weights.with_encoder_bias_raised(raised)
    if config.get("rescale_acts_by_decoder_norm") and config["architecture"] in ("topk", *_BATCH_TOP_K):
        weights = weights.with_unit_decoder()

    sae = weights.into_dictionary(_rule(config, tensors, folder / CONFIG_FILE), gated=gated)
    with torch.no_grad():
        sae.get_buffer("input_scale").fill_(_input_scale(folder, config, input_scale))
        if isinstance(sae.rule, LearnedThreshold):
            sae.learned_threshold.copy_(tensors["threshold"])
        if isinstance(sae.rule, MutualChoice):
            sae.get_buffer("threshold").copy_(tensors["threshold"])
        if gated:
            sae.log_magnitude.copy_(tensors["r_mag"])
            sae.magnitude_bias.copy_(tensors["b_mag"] + raised * tensors["r_mag"].exp())
    sae.metadata = _provenance(config["metadata"])
    return sae


def write_saelens(sae: SparseAutoencoder, folder: Path | str) -> None:
    """Write a dictionary so that ``sae_lens.SAE.load_from_disk(folder)`` gives the same codes and reconstructions.

    ``TokenChoice`` becomes ``topk``, ``Threshold(0.0)`` ``standard`` or ``gated``; the other rules become ``jumprelu``
    with the thresholds of evaluation mode. The budget of ``MutualChoice`` survives in the metadata, the quotas of
    ``FeatureChoice`` do not.

    Raises:
        InputError: the output is another space than the input, or a batch rule was neither trained nor calibrated.
    """
    if sae.d_in != sae.d_out:
        raise InputError(
            f"d_in={sae.d_in}, d_out={sae.d_out}: only dictionaries that reconstruct their own input are written for "
            "SAELens; use save() for this one"
        )
    folder = Path(folder)
    weights = AffineWeights.of(sae)
    architecture, own_options, own_tensors = _own_part(sae, weights)
    metadata = _metadata_to_write(sae)
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        # With hook_z SAELens takes [..., heads, width] from the hook and lays the heads side by side, as our site does.
        "reshape_activations": "hook_z" if (metadata["hook_name"] or "").endswith("hook_z") else "none",
        **own_options,
        "metadata": metadata,
    }
    tensors = {
        "W_enc": weights.encoder_weight.T,
        "W_dec": weights.decoder_weight,
        "b_dec": weights.decoder_bias,
        **own_tensors,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


# --- reading --------------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    """``cfg.json`` in the terms of SAELens 6, defaults filled in, checked as far as it can be without the weights."""
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} should hold an object, not {config!r:.40}: it is not a configuration of SAELens")
    config = {"architecture": "standard", "apply_b_dec_to_input": True, **config}
    activation = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if activation not in ("relu", "topk"):
        raise InputError(f"{path}: activation_fn={activation!r} has no equal here; relu and topk have")
    if activation == "topk":
        config |= {"architecture": "topk", "k": (config.get("activation_fn_kwargs") or {}).get("k")}
    if config["architecture"] not in _OWN_TENSORS:
        raise InputError(
            f"{path}: architecture={config['architecture']!r} has no equal here; {', '.join(_OWN_TENSORS)} have"
        )
    if not isinstance(config.get("metadata"), dict):
        before_6 = {"hook_name": config.get("hook_point"), **config}
        config["metadata"] = {key: before_6[key] for key in _METADATA_BEFORE_6 if key in before_6}
    for name in ("d_in", "d_sae"):
        config[name] = int(positive_number(path, config, name, whole=True))
    return config


def _tensors(path: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    architecture, d_in, n_features = config["architecture"], config["d_in"], config["d_sae"]
    tensors = read_tensors(path)
    if "log_threshold" in tensors:  # how older versions kept the threshold of a JumpReLU in training
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    if bool((tensors.pop("scaling_factor", torch.ones(())) != 1).any()):
        raise InputError(f"{path}: finetuning_scaling_factor (scaling_factor other than 1) has no equal here")
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, n_features), "W_dec": (n_features, d_in), "b_dec": (d_in,)}
    shapes |= {name: () if name == "topk_threshold" else (n_features,) for name in _OWN_TENSORS[architecture]}
    check_tensors(path, tensors, shapes)
    if "topk_threshold" in tensors:
        tensors["threshold"] = tensors["topk_threshold"].expand(n_features)
    return tensors


def _rule(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> Rule | LearnedThreshold:
    architecture = config["architecture"]
    if architecture == "topk":
        return TokenChoice(positive_number(path, config, "k", whole=True))
    if architecture in ("standard", "gated"):
        return Threshold(0.0)
    if architecture in _BATCH_TOP_K:
        return MutualChoice(positive_number(path, config, "k"))
    threshold = tensors["threshold"]
    if not bool((threshold == threshold[0]).all() and threshold[0].isfinite()):
        return LearnedThreshold()
    details = config["metadata"].get("training_architecture_details")
    if config["metadata"].get("training_architecture") in _BATCH_TOP_K and isinstance(details, dict) and "k" in details:
        # Knowing the budget, it can be calibrated again on other activations.
        return MutualChoice(positive_number(path, details, "k"))
    return Threshold(float(threshold[0]))


def _input_scale(folder: Path, config: dict[str, Any], given: float | None) -> float:
    option = config.get("normalize_activations") or "none"
    option = "expected_average_only_in" if option is True else option
    if option == "none" and given is None:
        return 1.0
    if option == "none":
        raise InputError(
            f"input_scale={given}: {folder / CONFIG_FILE} says that activations are not scaled; leave it out"
        )
    if option != "expected_average_only_in":
        raise InputError(
            f"{folder / CONFIG_FILE}: normalize_activations={option!r} has no equal here; 'none' has, and "
            "'expected_average_only_in', since it is one factor for all tokens"
        )
    if given is None and (folder / SCALER_FILE).is_file():
        given = read_json(folder / SCALER_FILE).get("scaling_factor")
    if given is None:
        raise InputError(
            f"{folder / CONFIG_FILE}: normalize_activations='expected_average_only_in' needs a factor that is not in "
            "this folder: give it to read_saelens as input_scale (1.0 for what SAE.load_from_disk computes)"
        )
    if not (given > 0 and math.isfinite(given)):
        raise InputError(f"input_scale={given}: the factor of {folder} must be a number above 0")
    return float(given)


def _provenance(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata in our words, with the original beside it."""
    original = {key: value for key, value in metadata.items() if key != "apportion"}
    if isinstance(metadata.get("apportion"), dict):
        return {**metadata["apportion"], "saelens": original}
    known = {"model": metadata.get("model_name"), "site": _site_of(metadata)}
    return {**{name: value for name, value in known.items() if value is not None}, "saelens": original}


def _site_of(metadata: dict[str, Any]) -> str | None:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", str(metadata.get("hook_name")))
    if match is None or metadata.get("hook_head_index") is not None:
        return None
    layer, hook = int(match[1]), match[2]
    if hook == "hook_resid_pre":
        return f"layers.{layer - 1}.residual" if layer > 0 else "embeddings"
    kind = _KIND_OF_HOOK.get(hook)
    if kind in ("mlp_out", "attn_out") and re.search(r"gemma-?[23]", str(metadata.get("model_name"))):
        return None  # hooked after one more norm, where no site of ours is
    return None if kind is None else f"layers.{layer}.{kind}"


# --- writing --------------------------------------------------------------------------------------------------------


def _own_part(sae: SparseAutoencoder, weights: AffineWeights) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Architecture, and the options and tensors that only it has."""
    bias = weights.encoder_bias
    if isinstance(sae.rule, TokenChoice):
        k = int(sae.rule.mean_budget(sae.n_features))
        return "topk", {"k": k, "rescale_acts_by_decoder_norm": False}, {"b_enc": bias}
    try:
        threshold = sae.inference_threshold().detach().cpu().float()
    except RuntimeError as error:
        raise InputError(f"SAELens needs a threshold per feature: {error}") from error
    if sae.gated:
        magnitude = {"r_mag": sae.log_magnitude, "b_mag": sae.magnitude_bias}
        return (
            "gated",
            {},
            {"b_gate": bias - threshold, **{name: each.detach().cpu() for name, each in magnitude.items()}},
        )
    if isinstance(sae.rule, Threshold) and bool((threshold <= 0).all()):
        return "standard", {}, {"b_enc": bias}
    return "jumprelu", {}, {"b_enc": bias, "threshold": threshold}


def _metadata_to_write(sae: SparseAutoencoder) -> dict[str, Any]:
    own = {key: value for key, value in sae.metadata.items() if key != "saelens"}
    original = sae.metadata.get("saelens", {})
    metadata = {
        # Without a version SAELens takes the file for one from before 6.0 and drops what it does not know.
        "sae_lens_version": CHECKED_VERSION,
        "sae_lens_training_version": None,
        "model_name": own.get("model"),
        **original,
        "hook_name": original.get("hook_name") or _hook_of(own.get("site")),
        "apportion": own,
    }
    if isinstance(sae.rule, MutualChoice):
        metadata["training_architecture"] = "batchtopk"
        metadata["training_architecture_details"] = {"k": sae.rule.mean_budget(sae.n_features)}
    return metadata


def _hook_of(site: str | None) -> str | None:
    if site == "embeddings":
        return "blocks.0.hook_resid_pre"
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", site or "")
    if match is None or match[2] not in _HOOK_OF_KIND:
        return None
    return f"blocks.{match[1]}.{_HOOK_OF_KIND[match[2]]}"
