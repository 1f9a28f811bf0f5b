"""Transcoders: sparse dictionaries that imitate an MLP, from what it reads to what it writes.

*Transcoders Find Interpretable LLM Feature Circuits* (Dunefsky, Chlenski, Nanda 2024, arXiv 2406.11944). A token gets
few features, as in a sparse autoencoder, but they read the MLP's input and are decoded to its output: the MLP's
non-linearity lies within the features, and what they write is linear in what they read. The skip path is of Paulo,
Shabalin and Belrose 2025 (arXiv 2501.18823).

| paper | here |
|---|---|
| x, y = MLP(x) | ``x`` [tokens, d_in], ``target`` [tokens, d_out] |
| W_enc, b_enc | ``encoder_weight`` [F, d_in], ``encoder_bias`` |
| b_dec (subtracted from x) | ``centre`` [d_in] |
| W_dec, b_out | ``decoder_weight`` [F, d_out], ``decoder_bias`` [d_out] |
| W_skip | ``skip_weight`` [d_out, d_in], zero at the start; it reads ``x - centre`` (the rest is in ``decoder_bias``) |
| squared error / norm of y_n | ``weighted_reconstruction_loss`` |

Where we differ: by default a budget (TopK, Mutual Choice) decides who fires instead of an L1 price; the auxiliary loss
revives dead features against ``target - output`` (the authors' code takes the input there); the encoder starts at the
directions that a linear map predicts the decoder's from (``start="linear"``, ours), since a tied start makes no sense
between two spaces.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocate import Allocation, Rule
from apportion.errors import InputError
from apportion.features.dictionary import Mode, Reconstruction, SparseAutoencoder, centre_and_scale
from apportion.features.fitting import Batch, Batches, DictionaryObjective, Recipe, fit_dictionary
from apportion.features.jump_relu import LearnedThreshold
from apportion.features.losses import reconstruction_loss
from apportion.features.rules import rule_from_dict
from apportion.training import TrainingResult

Start = Literal["linear", "random"]


@dataclass(frozen=True)
class TranscoderSettings:
    """What a ``Recipe`` does not say of a transcoder.

    Args:
        skip: a linear path from input to output beside the features.
        unit_decoder: hold the decoder's rows at unit norm, as the paper does. If not, they start at zero and are free
            (sparsify's practice).
        start: of the encoder: ``linear`` takes the directions of the input from which the best linear map predicts each
            decoder row's share of the output; ``random`` takes others.
        loss: ``fvu``, the share of variance left unexplained, or ``weighted``, the paper's, which divides the squared
            error of each token by the norm of its target.

    Raises:
        InputError: an unknown start or loss.
    """

    skip: bool = False
    unit_decoder: bool = True
    start: Start = "linear"
    loss: Literal["fvu", "weighted"] = "fvu"

    def __post_init__(self) -> None:
        if self.start not in ("linear", "random"):
            raise InputError(f"start={self.start!r}: one of linear, random")
        if self.loss not in ("fvu", "weighted"):
            raise InputError(f"loss={self.loss!r}: one of fvu, weighted")


class Transcoder(SparseAutoencoder):
    """A dictionary from the input of an MLP to its output; see the module's docstring and ``SparseAutoencoder``.

    Once trained (``fold_scale``) it takes activations and gives outputs as the model has them, and a feature's value is
    in units of the output: with a unit decoder row it is the length of what the feature writes.

    Args:
        d_in: width of the MLP's input.
        n_features: number of features F.
        rule: who gets the budget.
        d_out: width of the MLP's output; default ``d_in``.
        skip: a linear path beside the features.
        unit_decoder: hold the decoder's rows at unit norm; else they start at zero.
        seed: of the initial directions.

    Raises:
        InputError: sizes below 1, or a budget that exceeds ``n_features``.

    Examples:
        >>> import torch
        >>> from apportion import TokenChoice
        >>> from apportion.features import Transcoder
        >>> transcoder = Transcoder(d_in=16, n_features=64, rule=TokenChoice(4), d_out=8)
        >>> transcoder(torch.randn(10, 16)).output.shape
        torch.Size([10, 8])
    """

    kind: ClassVar[str] = "transcoder"

    output_scale: Tensor

    def __init__(
        self,
        d_in: int,
        n_features: int,
        rule: Rule | LearnedThreshold,
        *,
        d_out: int | None = None,
        skip: bool = False,
        unit_decoder: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(d_in, n_features, rule, d_out=d_out, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        torch.randn(n_features, self.d_out, generator=generator)  # what the decoder was drawn from
        directions = torch.randn(n_features, d_in, generator=generator)
        self.encoder_weight = nn.Parameter(directions / directions.norm(dim=1, keepdim=True))
        self.unit_decoder = unit_decoder
        self.centre = nn.Parameter(torch.zeros(d_in))
        self.skip_weight = nn.Parameter(torch.zeros(self.d_out, d_in)) if skip else None
        self.register_buffer("output_scale", torch.ones(()))
        if not unit_decoder:
            nn.init.zeros_(self.decoder_weight)

    # --- from input to code to output -------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "tokens d_in"], mode: Mode | None = None) -> Reconstruction:
        """Encode, decode, and add the skip path; see ``encode`` for ``mode``."""
        centred = self.centred(x)
        codes = self.encode_centred(centred, mode)
        return Reconstruction(self.output_scaled(codes, centred) / self.output_scale, codes)

    def decode(self, codes: Allocation) -> Float[Tensor, "tokens d_out"]:
        """What the features and the bias say of the output, without the skip path."""
        return self.decode_scaled(codes) / self.output_scale

    def centred(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """What the encoder sees: scaled, and without the centre."""
        scaled = super().centred(x)
        # With equal widths the base class has taken the centre away, see `input_bias`.
        return scaled if self.d_in == self.d_out else scaled - self.centre

    def input_bias(self) -> Float[Tensor, "d_in"]:
        """What the encoder's input is freed of: the centre, which is no bias of the output."""
        return self.centre

    def output_scaled(
        self, codes: Allocation, x_centred: Float[Tensor, "tokens d_in"]
    ) -> Float[Tensor, "tokens d_out"]:
        """The whole output, in the scaled units that training works in."""
        output = self.decode_scaled(codes)
        return output if self.skip_weight is None else output + x_centred @ self.skip_weight.T

    # --- preparation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise_from(
        self,
        sample: Float[Tensor, "tokens d_in"],
        iterations: int = 20,
        target: Float[Tensor, "tokens d_out"] | None = None,
        start: Start = "linear",
    ) -> None:
        """Set scales, centre, output bias and the encoder's directions from a sample of inputs and their outputs.

        Args:
            sample: inputs of the MLP.
            iterations: of Weiszfeld's algorithm, see ``SparseAutoencoder.initialise_from``.
            target: what the MLP makes of them.
            start: see ``TranscoderSettings``.

        Raises:
            InputError: no targets, another number or width of them, or too few tokens.
        """
        if target is None or target.shape != (sample.shape[0], self.d_out):
            found = None if target is None else tuple(target.shape)
            raise InputError(f"target has shape {found}: give what the MLP writes, {(sample.shape[0], self.d_out)}")
        centre, scale = centre_and_scale(sample, iterations)
        self.input_scale.copy_(scale)
        self.centre.copy_(centre * scale)
        middle, scale = centre_and_scale(target, iterations)
        self.output_scale.copy_(scale)
        self.decoder_bias.copy_(middle * scale)
        if start == "random":
            return
        x = self.centred(sample)
        y = target * scale - self.decoder_bias
        # A ridge of a tenth of the mean variance: a batch may have fewer tokens than x has dimensions.
        ridge = 0.1 * x.square().mean() * x.shape[0] * torch.eye(self.d_in, device=x.device, dtype=x.dtype)
        linear = torch.linalg.solve(x.T @ x + ridge, x.T @ y)  # x @ linear predicts y
        wanted = self.decoder_weight if self.unit_decoder else torch.randn_like(self.decoder_weight)
        directions = wanted @ linear.T
        norms = directions.norm(dim=1, keepdim=True)
        self.encoder_weight.copy_(torch.where(norms > 0, directions / norms.clamp(min=1e-12), self.encoder_weight))

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Move both scales into weights, biases and thresholds: inputs and outputs are as the model has them."""
        into, out = self.input_scale.clone(), self.output_scale.clone()
        self.centre.div_(into)
        self.encoder_weight.mul_(into / out)
        if self.skip_weight is not None:
            self.skip_weight.mul_(into / out)
        shifts = [self.encoder_bias, self.decoder_bias, self.threshold, self.statistics.threshold]
        if isinstance(self.rule, LearnedThreshold):
            shifts.append(self.learned_threshold)
        for each in shifts:
            each.div_(out)
        self.input_scale.fill_(1.0)
        self.output_scale.fill_(1.0)

    # --- files ------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        own = {"kind": self.kind, "skip": self.skip_weight is not None, "unit_decoder": self.unit_decoder}
        return {**super().config(), **own}

    @classmethod
    def _of(cls, config: dict[str, Any]) -> "Transcoder":
        return cls(
            config["d_in"],
            config["n_features"],
            rule_from_dict(config["rule"]),
            d_out=config["d_out"],
            skip=config["skip"],
            unit_decoder=config["unit_decoder"],
        )


def weighted_reconstruction_loss(
    target: Float[Tensor, "tokens d"], output: Float[Tensor, "tokens d"]
) -> Float[Tensor, ""]:
    """The paper's: mean over all entries of the squared error, each token's divided by the norm of its target.

    Tokens with small outputs count somewhat more than by the squared error. A target of zero, which the paper's would
    divide by, counts as if its norm were a thousandth of the mean one.
    """
    target, output = target.float(), output.float()
    norm = target.norm(dim=1, keepdim=True)
    floor = (1e-3 * norm.mean()).clamp(min=1e-12)
    return ((output - target).square() / torch.maximum(norm, floor)).mean()


class TranscoderObjective(DictionaryObjective):
    """``DictionaryObjective`` for batches ``(x, target)``."""

    def __init__(self, recipe: Recipe, settings: TranscoderSettings) -> None:
        super().__init__(recipe)
        self.settings = settings

    def initialise(self, sae: SparseAutoencoder, batch: Batch) -> None:
        """See ``Transcoder.initialise_from``."""
        x, target = batch
        _transcoder(sae).initialise_from(x, target=target, start=self.settings.start)

    def input_and_target(self, sae: SparseAutoencoder, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both, in their scaled units."""
        x, target = batch
        return sae.centred(x), target * _transcoder(sae).output_scale

    def output(self, sae: SparseAutoencoder, codes: Allocation, x: Tensor) -> Tensor:
        """Decoded, with the skip path."""
        return _transcoder(sae).output_scaled(codes, x)

    def _reconstruction_loss(self, sae: SparseAutoencoder, target: Tensor, output: Tensor) -> Tensor:
        if self.settings.loss == "weighted":
            return weighted_reconstruction_loss(target, output)
        return reconstruction_loss(target, output)


def _transcoder(sae: SparseAutoencoder) -> Transcoder:
    assert isinstance(sae, Transcoder)
    return sae


def fit_transcoder(
    recipe: Recipe,
    batches: Batches,
    d_in: int,
    d_out: int,
    *,
    transcoder: TranscoderSettings | None = None,
    calibration: Callable[[], Iterable[Float[Tensor, "tokens d_in"]]] | None = None,
    folder: Path | str | None = None,
    provenance: dict[str, Any] | None = None,
    **more: Any,
) -> tuple[Transcoder, TrainingResult]:
    """``fit_dictionary`` for a transcoder.

    Args:
        recipe: as for a dictionary; a gated one is refused.
        batches: inputs and outputs of the MLP at a step, as ``StoreView.joint_batches`` gives them.
        d_in: width of the input.
        d_out: width of the output.
        transcoder: what the recipe does not say; default ``TranscoderSettings()``.
        calibration: batches of held-out inputs.
        folder: see ``fit_dictionary``.
        provenance: see ``fit_dictionary``.
        more: what else ``fit_dictionary`` takes.

    Raises:
        InputError: a gated recipe; see also ``fit_dictionary``.
    """
    settings = transcoder or TranscoderSettings()
    if recipe.gated:
        raise InputError("gated=True: a transcoder has no separate gate; take rule=Threshold(0.0) with a target_l0")
    module = Transcoder(
        d_in,
        recipe.n_features,
        recipe.rule,
        d_out=d_out,
        skip=settings.skip,
        unit_decoder=settings.unit_decoder,
        seed=recipe.seed,
    )
    _, result = fit_dictionary(
        recipe,
        batches,
        d_in,
        sae=module,
        objective=TranscoderObjective(recipe, settings),
        calibration=calibration,
        folder=folder,
        provenance={**(provenance or {}), "transcoder": asdict(settings)},
        **more,
    )
    return module, result
