"""The format of EleutherAI sparsify: ``cfg.json`` and ``sae.safetensors``, one folder per hookpoint.

Checked against eai-sparsify 1.3.3: tests compare codes and reconstructions with what sparsify itself computes from the
same files, both ways.

| sparsify | here |
|---|---|
| ``encoder.weight`` [F, d], ``encoder.bias`` | ``encoder_weight``, ``encoder_bias`` |
| ``W_dec`` [F, d], ``b_dec`` | ``decoder_weight``, ``decoder_bias`` |
| ``activation="topk"``, ``k`` | ``TokenChoice(k)`` |
| ``transcode``: ``b_dec`` is not subtracted from the input | its scores are added to ``encoder_bias`` |
| ``multi_topk``, ``normalize_decoder`` | concern training only: the weights are taken as they are |

With ``multi_topk`` the reconstruction is that of sparsify's ``encode`` and ``decode``, from k features; its ``forward``
returns the one from 4 k, a term of its loss.
"""

import re
from pathlib import Path
from typing import Any

import torch

from apportion.allocate import TokenChoice
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

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"

# Options that change what the coder computes in a way that a dictionary here does not; none is on by default.
_WITHOUT_EQUAL = ("skip_connection", "signed")
# Modules whose output is a site of ours, by the last part of their name.
_KIND_OF_MODULE = {
    None: "residual",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "attention": "attn_out",
}


def read_sparsify(folder: Path | str) -> SparseAutoencoder:
    """A sparse coder that sparsify wrote, in evaluation mode: the same codes and reconstructions.

    They are what sparsify computes in float32, whatever type the file is in. A transcoder without skip connection reads
    like any other; feed it the module's input.

    Args:
        folder: holds ``cfg.json`` and ``sae.safetensors``; named after its hookpoint, such as ``layers.9``.

    Raises:
        InputError: missing or damaged files, or an option without an equal here (``groupmax``, ``skip_connection``);
            names it.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(f"{path} should hold an object, not {config!r:.40}: it is not a configuration of sparsify")
    if config.get("activation", "topk") != "topk":
        raise InputError(f"{path}: activation={config['activation']!r} has no equal here; 'topk' has")
    for option in _WITHOUT_EQUAL:
        if config.get(option):
            raise InputError(f"{path}: {option}={config[option]!r} has no equal here")
    d_in = int(positive_number(path, config, "d_in", whole=True))
    if config.get("num_latents"):
        n_features = int(positive_number(path, config, "num_latents", whole=True))
    else:  # sparsify's own 0 means: by the factor
        n_features = d_in * int(positive_number(path, config, "expansion_factor", whole=True))
    tensors = read_tensors(folder / WEIGHTS_FILE)
    shapes: dict[str, tuple[int, ...]] = {"encoder.weight": (n_features, d_in), "W_dec": (n_features, d_in)}
    shapes |= {"encoder.bias": (n_features,), "b_dec": (d_in,)}
    check_tensors(folder / WEIGHTS_FILE, tensors, shapes)

    weights = AffineWeights(tensors["encoder.weight"], tensors["encoder.bias"], tensors["W_dec"], tensors["b_dec"])
    if config.get("transcode"):
        weights = weights.with_encoder_bias_raised(weights.scores_of_decoder_bias())
    sae = weights.into_dictionary(TokenChoice(positive_number(path, config, "k", whole=True)))
    sae.metadata = _provenance(folder.resolve().name, config)
    return sae


def write_sparsify(sae: SparseAutoencoder, folder: Path | str) -> None:
    """Write a ``TokenChoice`` dictionary so that ``sparsify.SparseCoder.load_from_disk(folder)`` gives the same codes.

    Args:
        sae: the dictionary.
        folder: where to; sparsify finds dictionaries by the hookpoint that names the folder, such as ``layers.9``.

    Raises:
        InputError: another rule than ``TokenChoice``, or the output is another space than the input.
    """
    if not isinstance(sae.rule, TokenChoice):
        raise InputError(
            f"rule={type(sae.rule).__name__}: sparsify knows no thresholds, it keeps the k largest of every token; so "
            "only TokenChoice dictionaries can be written for it. write_saelens takes the others"
        )
    if sae.d_in != sae.d_out:
        raise InputError(f"d_in={sae.d_in}, d_out={sae.d_out}: the coders of sparsify have one width for both")
    folder = Path(folder)
    weights = AffineWeights.of(sae)
    norms = weights.decoder_weight.norm(dim=1)
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.n_features // sae.d_in),
        # True would let sparsify rescale the rows when it trains on, and with them the outputs.
        "normalize_decoder": bool(torch.allclose(norms, torch.ones(()), atol=1e-4)),
        "num_latents": sae.n_features,
        "k": int(sae.rule.mean_budget(sae.n_features)),
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "metadata": sae.metadata,
    }
    tensors = {
        "encoder.weight": weights.encoder_weight,
        "encoder.bias": weights.encoder_bias,
        "W_dec": weights.decoder_weight,
        "b_dec": weights.decoder_bias,
    }
    write_tensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


def _provenance(hookpoint: str, config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("metadata"), dict):
        return dict(config["metadata"])
    match = re.fullmatch(r"(?:.*\.)?(?:layers|layer|h)\.(\d+)(?:\.(\w+))?", hookpoint)
    provenance: dict[str, Any] = {"sparsify": {"hookpoint": hookpoint, **config}}
    # A transcoder listens at its module's input and speaks at its output: that is no one site.
    if match is not None and match[2] in _KIND_OF_MODULE and not config.get("transcode"):
        provenance["site"] = f"layers.{match[1]}.{_KIND_OF_MODULE[match[2]]}"
    return provenance
