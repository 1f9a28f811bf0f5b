"""The sparse autoencoder: one class; its rule makes it a TopK, BatchTopK, Feature Choice, ReLU, JumpReLU or Gated one.

Symbols of *Adaptive Sparse Allocation with Mutual Choice & Feature Choice Sparse Autoencoders* (Ayonrinde 2024,
arXiv 2411.02124) and the names here:

| paper | here |
|---|---|
| W_enc (d x F), b_enc | ``encoder_weight`` [F, d] (a row per feature), ``encoder_bias`` |
| W_dec (F x d), b_dec | ``decoder_weight`` [F, d] (unit rows), ``decoder_bias`` |
| a, z' = ReLU(a) | scores; the values of an ``Allocation`` |
| S, M | the places of an ``Allocation``; ``int(budget * N)`` |
| z, x-hat | ``encode(x)``, ``decode(codes)`` |
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from apportion.allocate import (
    Allocation,
    FeatureChoice,
    MutualChoice,
    QuotaLedger,
    Rule,
    Selection,
    Threshold,
    ThresholdCalibrator,
    TokenChoice,
    Zipf,
    whole_quotas,
)
from apportion.data.files import read_json, write_atomically, write_json
from apportion.errors import InputError
from apportion.features.jump_relu import LearnedThreshold, jump_relu
from apportion.features.rules import rule_from_dict, rule_to_dict
from apportion.features.statistics import FeatureStatistics
from apportion.models.site import Site
from apportion.ops import project_rows_
from apportion.training.checkpoint import explained

FORMAT = "apportion.dictionary/1"
Mode = Literal["batch", "threshold"]


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What a forward pass gives.

    Attributes:
        output: the reconstruction, in the units of the input, [tokens, d_out].
        codes: the sparse code; positive values only.
    """

    output: Float[Tensor, "tokens d_out"]
    codes: Allocation


class SparseAutoencoder(nn.Module):
    """A dictionary of ``n_features`` directions, of which each input uses few.

    ``rule`` decides which: ``TokenChoice(k)`` is a TopK dictionary, ``MutualChoice(budget)`` a Mutual Choice
    (BatchTopK) one, ``FeatureChoice(budget, profile)`` a Feature Choice one, ``Threshold(0.0)`` a ReLU one (train it
    with an L1 penalty), ``LearnedThreshold()`` a JumpReLU one; ``gated=True`` with ``Threshold(0.0)`` is a Gated one.

    In training mode the rule looks at the batch. In evaluation mode a token's code depends on the token alone, bit for
    bit on the CPU: batch rules use thresholds, which ``calibrate`` sets exactly (until then a running estimate serves).

    Args:
        d_in: width of the input.
        n_features: number of features F.
        rule: who gets the budget.
        d_out: width of the output, if it is not the input's.
        gated: a separate gate decides who fires (Rajamanoharan et al. 2024, arXiv 2404.16014).
        seed: of the initial directions.

    Raises:
        InputError: sizes below 1, or a budget that exceeds ``n_features``.

    Examples:
        >>> import torch
        >>> from apportion import MutualChoice, SparseAutoencoder
        >>> sae = SparseAutoencoder(d_in=16, n_features=64, rule=MutualChoice(budget=4))
        >>> sae(torch.randn(10, 16)).codes.nnz <= 40
        True
    """

    # What a config.json calls a subclass that has a name of its own here; the classes by that name.
    kind: ClassVar[str] = "dictionary"
    _kinds: ClassVar[dict[str, type["SparseAutoencoder"]]] = {}

    # Whether the rows of the decoder are held at unit norm.
    unit_decoder = True

    # Whether the gradients of both matrices are sparse tensors, which hold only the rows of the features that won: less
    # memory and time where few did. What takes the step must know such gradients, as `DictionaryAdam` does.
    sparse_gradients = False

    input_scale: Tensor
    threshold: Tensor
    share: Tensor
    zipf: Tensor

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        if "kind" in cls.__dict__:
            SparseAutoencoder._kinds[cls.kind] = cls

    def __init__(
        self,
        d_in: int,
        n_features: int,
        rule: Rule | LearnedThreshold,
        *,
        d_out: int | None = None,
        gated: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        for name, size in (("d_in", d_in), ("n_features", n_features), ("d_out", d_out)):
            if size < 1:
                raise InputError(f"{name}={size}: must be at least 1")
        _check_rule(rule, n_features, gated)
        self.d_in, self.d_out, self.n_features = d_in, d_out, n_features
        self.rule, self.gated = rule, gated
        self.precision: Literal["float32", "bfloat16"] = "float32"
        self.metadata: dict[str, Any] = {}

        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(n_features, d_out, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        self.decoder_weight = nn.Parameter(directions)
        # Tied start (encoder = decoder transposed): prevents most dead features (Gao et al. 2024, arXiv 2406.04093).
        tied = directions.clone()
        if d_in != d_out:
            tied = torch.randn(n_features, d_in, generator=generator)
            tied /= tied.norm(dim=1, keepdim=True)
        self.encoder_weight = nn.Parameter(tied)
        self.encoder_bias = nn.Parameter(torch.zeros(n_features))
        self.decoder_bias = nn.Parameter(torch.zeros(d_out))
        if isinstance(rule, LearnedThreshold):
            self.learned_threshold = nn.Parameter(torch.full((n_features,), rule.initial))
        if gated:
            self.log_magnitude = nn.Parameter(torch.zeros(n_features))
            self.magnitude_bias = nn.Parameter(torch.zeros(n_features))

        self.statistics = FeatureStatistics(n_features)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((n_features,), torch.nan))
        if isinstance(rule, FeatureChoice):
            self.register_buffer("share", rule.share(n_features))
            profile = rule.profile if isinstance(rule.profile, Zipf) else Zipf(exponent=0.0)
            self.register_buffer("zipf", torch.tensor([profile.exponent, profile.offset], dtype=torch.float64))
            self.ledger = QuotaLedger(n_features)

    # --- from input to code to output -------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "tokens d_in"], mode: Mode | None = None) -> Reconstruction:
        """Encode and decode; see ``encode`` for ``mode``."""
        codes = self.encode(x, mode)
        return Reconstruction(self.decode(codes), codes)

    def encode(self, x: Float[Tensor, "tokens d_in"], mode: Mode | None = None, rule: Rule | None = None) -> Allocation:
        """The sparse code of every token; only positive values.

        Args:
            x: activations as the model gives them.
            mode: ``batch`` (the rule looks at the whole batch) or ``threshold`` (each token alone). Default: ``batch``
                in training mode, ``threshold`` in evaluation mode.
            rule: allocate by this rule instead, in batch mode (training phases anneal the budget this way).

        Raises:
            ValueError: wrong width, or NaN or infinite activations.
            RuntimeError: threshold mode before anything was trained or calibrated.
        """
        return self.encode_centred(self.centred(x), mode, rule)

    def decode(self, codes: Allocation) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction from codes, in the units of the input."""
        return self.decode_scaled(codes) / self.input_scale

    def centred(self, x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, "tokens d_in"]:
        """What the encoder sees: scaled, and without the decoder bias where input and output are the same space."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise ValueError(f"x has shape {tuple(x.shape)}: give [tokens, {self.d_in}]")
        scaled = x * self.input_scale
        if not bool(scaled.detach().sum().isfinite()) and not bool(x.isfinite().all()):
            wrong = int((~x.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(
                f"x[{wrong}] has NaN or infinite activations: drop such tokens, or use a wider model dtype"
            )
        return scaled - self.input_bias() if self.d_in == self.d_out else scaled

    def input_bias(self) -> Float[Tensor, "d_in"]:
        """What the encoder's input is freed of: the decoder bias."""
        return self.decoder_bias

    def encode_centred(
        self, x: Float[Tensor, "tokens d_in"], mode: Mode | None = None, rule: Rule | None = None
    ) -> Allocation:
        """``encode`` for input that ``centred`` has prepared; trainers use it to prepare once."""
        mode = mode or ("batch" if self.training else "threshold")
        if isinstance(self.rule, LearnedThreshold):
            return self._learned(x, exact=mode == "threshold")
        if mode == "threshold":
            codes = self._selected(x, self._inference_selection(), exact=True)
        else:
            codes = self._selected(x, self._batch_selection(x.shape[0], rule or self.rule), exact=False)
        return self._magnitudes(codes.active()) if self.gated else codes.active()

    def decode_scaled(self, codes: Allocation) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction in the scaled units that training works in."""
        # In place: nobody asks for the product alone.
        return codes.matmul(self.decoder_weight, self.sparse_gradients).add_(self.decoder_bias)

    def _selected(self, x: Tensor, selection: Selection, exact: bool) -> Allocation:
        return selection.encode(x, self.encoder_weight, self.encoder_bias, self.precision, exact, self.sparse_gradients)

    def _batch_selection(self, rows: int, rule: Rule | LearnedThreshold) -> Selection:
        if isinstance(rule, FeatureChoice):
            total = int(rule.mean_budget(self.n_features) * rows + 1e-6)
            if self.training and rows:
                quotas = self.ledger.draw(self.share, rows, total)
            else:
                quotas = whole_quotas(self.share * rows, total, rows)
            return rule.selection(rows, self.n_features, quotas)
        return rule.selection(rows, self.n_features)  # type: ignore[union-attr]

    def _inference_selection(self) -> Selection:
        if isinstance(self.rule, (TokenChoice, Threshold)):
            return self.rule.selection(1, self.n_features)
        return Threshold(self.inference_threshold()).selection(1, self.n_features)

    def inference_threshold(self) -> Float[Tensor, "features"]:
        """The threshold of every feature in evaluation mode: calibrated, or else the running estimate of training.

        Raises:
            RuntimeError: there is neither.
        """
        if isinstance(self.rule, LearnedThreshold):
            return self.learned_threshold.detach()
        if isinstance(self.rule, Threshold):
            return torch.as_tensor(self.rule.theta, dtype=self.threshold.dtype).expand(self.n_features)
        if not bool(self.threshold.isnan().any()):
            return self.threshold
        running = self.statistics.threshold
        if bool(running.isnan().all()):
            raise RuntimeError(
                f"{type(self.rule).__name__} has no inference threshold yet: call calibrate(batches, rows) on held-out "
                "activations, or encode(x, mode='batch') to let the batch decide"
            )
        # A feature that never fired in training has no estimate of its own: it stays silent until calibration.
        return running.nan_to_num(nan=torch.inf)

    def _learned(self, x: Tensor, exact: bool) -> Allocation:
        rule = self.rule
        assert isinstance(rule, LearnedThreshold)
        window = 0.0 if exact else rule.bandwidth / 2
        near = self._selected(x, Selection("above", limits=self.learned_threshold.detach() - window), exact)
        thresholds = self.learned_threshold[near.col_indices]
        return near.with_values(jump_relu(near.values, thresholds, rule.bandwidth)).active()

    def _magnitudes(self, gates: Allocation) -> Allocation:
        """Gated: open gates pass ``exp(r) * (gate - gate bias) + magnitude bias`` (shared weights), rectified."""
        column = gates.col_indices
        product = gates.values - self.encoder_bias[column]
        return gates.with_values(product * self.log_magnitude[column].exp() + self.magnitude_bias[column]).active()

    # --- preparation, constraints, calibration -------------------------------------------------------------------

    @torch.no_grad()
    def initialise_from(self, sample: Float[Tensor, "tokens d_in"], iterations: int = 20) -> None:
        """Set the input scale and the decoder bias from a sample of activations, before training.

        The bias is the sample's geometric median (Weiszfeld's algorithm), so that outliers do not pull it; the scale
        makes the mean squared distance from it equal ``d_in``, so that learning rates and penalties mean the same for
        every model. (Centred rather than raw norms: the bias takes the mean away before the encoder sees it.)
        """
        centre, scale = centre_and_scale(sample, iterations)
        self.input_scale.copy_(scale)
        if self.d_in == self.d_out:
            self.decoder_bias.copy_(centre * self.input_scale)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Remove the part of the decoder's gradient along each row, which normalising would undo; before a step."""
        grad = self.decoder_weight.grad
        if grad is None or not self.unit_decoder:
            return
        if grad.is_sparse:
            # A row that it holds in several parts may be projected part by part.
            project_rows_(grad._values(), self.decoder_weight, grad._indices()[0])
        else:
            project_rows_(grad, self.decoder_weight, None)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Bring the decoder's rows back to unit norm, after a step that did not (`DictionaryAdam`'s does).

        Rules that compare scores across features need it: a feature could otherwise buy matches by shrinking its row.
        """
        self.decoder_weight.div_(self.decoder_weight.norm(dim=1, keepdim=True).clamp(min=1e-12))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Float[Tensor, "_ d_in"]], rows: int) -> None:
        """Set the inference thresholds so that held-out activations get the budget exactly.

        Args:
            batches: activations of ``rows`` tokens in all, in any batch sizes.
            rows: number of tokens.

        Rules without a batch form (``TokenChoice``, ``Threshold``, ``LearnedThreshold``) need none and are left alone.
        """
        if not isinstance(self.rule, (MutualChoice, FeatureChoice)):
            return
        share = self.share if isinstance(self.rule, FeatureChoice) else None
        calibrator = ThresholdCalibrator(self.rule, self.n_features, rows, share)
        for x in batches:
            above = Selection("above", limits=calibrator.cut())
            codes = self._selected(self.centred(x), above, exact=True)
            calibrator.update_entries(codes.col_indices, codes.values, x.shape[0])
        self.threshold.copy_(torch.as_tensor(calibrator.finish()).expand(self.n_features))

    @torch.no_grad()
    def fold_scale(self) -> None:
        """Move the input scale into biases and thresholds, so that codes are in the units of the activations."""
        scale = self.input_scale.clone()
        shifts = [self.encoder_bias, self.decoder_bias, self.threshold, self.statistics.threshold]
        if isinstance(self.rule, LearnedThreshold):
            shifts.append(self.learned_threshold)
        if self.gated:
            shifts.append(self.magnitude_bias)
        for each in shifts:
            each.div_(scale)
        self.input_scale.fill_(1.0)

    # --- in a running model; see apportion.features.steering ---------------------------------------------------------

    def steer(
        self, model: Any, site: Site | str, strengths: Mapping[int, float], **options: Any
    ) -> AbstractContextManager[None]:
        """In a ``with`` block, add ``{feature: strength}`` to the codes of a running model, also while it generates.

        ::

            with dictionary.steer(model, "layers.9.residual", {2301: 8.0}):
                print(model.generate("I went home and"))

        Strengths are in the units of the code. See ``steering.edit_codes`` for ``options`` and errors.
        """
        from apportion.features import steering

        return steering.steer(model, site, self, strengths, **options)

    def clamp(
        self, model: Any, site: Site | str, values: Mapping[int, float], **options: Any
    ) -> AbstractContextManager[None]:
        """In a ``with`` block, set the codes of some features to ``{feature: value}``; see ``steer``."""
        from apportion.features import steering

        edit = steering.setting(steering.checked_values(self, values, "value"))
        return steering.edit_codes(model, site, self, edit, **options)

    def ablate(
        self, model: Any, site: Site | str, features: Iterable[int], **options: Any
    ) -> AbstractContextManager[None]:
        """In a ``with`` block, set the codes of some features to 0; see ``steer``."""
        from apportion.features import steering

        edit = steering.setting(dict.fromkeys(steering.checked_features(self, features), 0.0))
        return steering.edit_codes(model, site, self, edit, **options)

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``; each file is whole or absent."""
        from safetensors.torch import save_file

        folder = Path(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        whole = folder / "model.safetensors"
        with explained(whole), write_atomically(whole) as path:
            # Straight from the tensors, which may be most of what the memory holds.
            save_file(tensors, path)
        write_json(folder / "config.json", self.config())

    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds: enough to build the module that the weights fit."""
        return {
            "format": FORMAT,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "n_features": self.n_features,
            "rule": rule_to_dict(self.rule),
            "gated": self.gated,
            "metadata": self.metadata,
        }

    @classmethod
    def load(cls, folder: Path | str, device: str | torch.device = "cpu") -> "SparseAutoencoder":
        """Read what ``save`` wrote, in evaluation mode.

        Raises:
            InputError: missing, foreign or damaged files; says which and why.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise InputError(
                f"{folder / 'config.json'} is not a dictionary of apportion (format {FORMAT!r}): for those of SAELens "
                "or sparsify use apportion.features.formats"
            )
        try:
            module = cls._kinds.get(config.get("kind", cls.kind), cls)._of(config)
            module.load_state_dict(load_file(folder / "model.safetensors"))
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / 'config.json'} lacks or misstates {error}: the file is damaged") from error
        except FileNotFoundError as error:
            raise InputError(f"{folder / 'model.safetensors'} does not exist: the dictionary is incomplete") from error
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{folder / 'model.safetensors'} does not fit its config.json: {error}") from error
        module.metadata = config["metadata"]
        return module.to(device).eval()

    @classmethod
    def _of(cls, config: dict[str, Any]) -> "SparseAutoencoder":
        """A module that weights of this configuration fit."""
        return cls(
            config["d_in"],
            config["n_features"],
            rule_from_dict(config["rule"]),
            d_out=config["d_out"],
            gated=config["gated"],
        )


def centre_and_scale(
    sample: Float[Tensor, "tokens d"], iterations: int = 20
) -> tuple[Float[Tensor, "d"], Float[Tensor, ""]]:
    """Geometric median of a sample, and the factor that makes the mean squared distance from it equal ``d``.

    Raises:
        InputError: fewer than two tokens, or all alike.
    """
    if sample.shape[0] < 2:
        raise InputError(f"the sample has {sample.shape[0]} tokens: initialising needs at least 2")
    centre = sample.mean(dim=0)
    for _ in range(iterations):
        weight = 1 / (sample - centre).norm(dim=1, keepdim=True).clamp(min=1e-6)
        centre = (sample * weight).sum(dim=0) / weight.sum()
    spread = (sample - centre).square().sum(dim=1).mean()
    if not bool(spread > 0):
        raise InputError("all activations of the sample are the same: nothing can be learned from them")
    return centre, (sample.shape[1] / spread).sqrt()


def _check_rule(rule: Rule | LearnedThreshold, n_features: int, gated: bool) -> None:
    if gated and not isinstance(rule, Threshold):
        raise InputError(f"gated=True goes with rule=Threshold(0.0), not with {rule}: the gate is the threshold")
    if not isinstance(rule, (TokenChoice, MutualChoice, FeatureChoice, Threshold, LearnedThreshold)):
        raise InputError(
            f"rule={rule}: a dictionary takes TokenChoice, MutualChoice, FeatureChoice, Threshold or LearnedThreshold"
        )
    try:
        rule.mean_budget(n_features)
    except ValueError as error:
        raise InputError(f"n_features={n_features}: {error}") from error
