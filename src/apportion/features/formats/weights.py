"""What a sparse autoencoder comes down to in whoever's file: two matrices and two biases."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from apportion.allocate import Rule
from apportion.data.files import write_atomically
from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.features.jump_relu import LearnedThreshold

_ROWS_AT_ONCE = 8192  # bounds the float64 copies


@dataclass(frozen=True, eq=False)
class AffineWeights:
    """The scores are ``(x - decoder_bias) @ encoder_weight.T + encoder_bias``; the output follows from the codes.

    ``output = codes @ decoder_weight + decoder_bias``. What a library does besides (scales, norms, a bias that is not
    subtracted) is folded into these four.
    """

    encoder_weight: Float[Tensor, "features d_in"]
    encoder_bias: Float[Tensor, "features"]
    decoder_weight: Float[Tensor, "features d_in"]
    decoder_bias: Float[Tensor, "d_in"]

    @classmethod
    def of(cls, sae: SparseAutoencoder) -> "AffineWeights":
        """Of a dictionary, with its input scale folded so that the codes keep their values; on the CPU, in float32."""
        scale = float(sae.get_buffer("input_scale"))
        return cls(
            encoder_weight=_plain(sae.encoder_weight * scale),
            encoder_bias=_plain(sae.encoder_bias),
            decoder_weight=_plain(sae.decoder_weight / scale),
            decoder_bias=_plain(sae.decoder_bias / scale),
        )

    def scores_of_decoder_bias(self) -> Float[Tensor, "features"]:
        """By how much subtracting the decoder bias from the input lowers each score."""
        bias = self.decoder_bias.double()
        return torch.cat([rows.double() @ bias for rows in self.encoder_weight.split(_ROWS_AT_ONCE)])

    def with_encoder_bias_raised(self, by: Float[Tensor, "*features"]) -> "AffineWeights":
        """For an encoder that was given ``x`` itself: raise its bias by ``scores_of_decoder_bias``."""
        return replace(self, encoder_bias=(self.encoder_bias + by).to(self.encoder_bias.dtype))

    def with_unit_decoder(self) -> "AffineWeights":
        """Move the norms of the decoder's rows into the encoder: same output, codes multiplied by the norms."""
        norm = self.decoder_weight.norm(dim=1).clamp(min=1e-8)  # rows of zeros stay so
        return replace(
            self,
            encoder_weight=self.encoder_weight * norm.unsqueeze(1),
            encoder_bias=self.encoder_bias * norm,
            decoder_weight=self.decoder_weight / norm.unsqueeze(1),
        )

    def into_dictionary(self, rule: Rule | LearnedThreshold, gated: bool = False) -> SparseAutoencoder:
        """A dictionary of these weights in evaluation mode; what belongs to its rule is left to the caller."""
        n_features, d_in = self.encoder_weight.shape
        sae = SparseAutoencoder(d_in, n_features, rule, gated=gated)
        with torch.no_grad():
            sae.encoder_weight.copy_(self.encoder_weight)
            sae.encoder_bias.copy_(self.encoder_bias)
            sae.decoder_weight.copy_(self.decoder_weight)
            sae.decoder_bias.copy_(self.decoder_bias)
        return sae.eval()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file in float32, on the CPU.

    Raises:
        InputError: missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return {name: tensor.float() for name, tensor in load_file(path).items()}
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist: the dictionary is incomplete") from error
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): it is damaged, fetch or copy it again") from error


def check_tensors(path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors other than ``shapes`` says: what is not known could change what the dictionary computes.

    Raises:
        InputError: a tensor is missing, unknown, of another shape, or has NaN somewhere; names it.
    """
    missing, unknown = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or unknown:
        raise InputError(
            f"{path} does not fit its cfg.json, which asks for {sorted(shapes)}: it lacks {missing or 'nothing'} "
            f"and has {unknown or 'nothing'} besides"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, but cfg.json says {shape}")
        if bool(tensors[name].isnan().any()):
            raise InputError(f"{path}: {name} has NaN values: the dictionary diverged in training or is damaged")


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors.torch import save

    with write_atomically(path) as temporary:
        temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def positive_number(path: Path, config: Mapping[str, Any], name: str, whole: bool = False) -> float:
    """A number above 0 that ``config``, read from ``path``, must have.

    Raises:
        InputError: it is missing or something else.
    """
    value = config.get(name)
    if isinstance(value, (int, float)) and 0 < value < math.inf and (not whole or value == int(value)):
        return value
    raise InputError(f"{path}: {name} is {value!r}: it should be {'a whole' if whole else 'a'} number above 0")


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().float()
