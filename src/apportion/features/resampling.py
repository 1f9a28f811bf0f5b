"""A new start for dead features, by what the dictionary reconstructs worst: the training of the L1 dictionaries.

Source: the "anthropic" resampling of Kissane et al. 2024 (arXiv 2406.17759), read from the configurations of their
runs; the idea is that of Bricken et al. 2023 (Towards Monosemanticity). Every now and then features that do not fire
are turned to inputs drawn in proportion to the square of their reconstruction loss, with a small encoder so that they
fire rarely at first, and the optimiser forgets them: with the paper's second-moment decay of 0.9999 stale moments would
freeze them. The learning rate then starts low again. TopK and Mutual Choice dictionaries need none of this: they have
auxiliary losses.

The paper's own dictionary of a layer's heads is ``Recipe(Threshold(0.0), ...)`` with ``penalty=l1_penalty(...)``,
``auxiliary="none"``, ``learning_rate=1.2e-3``, and ``fit_dictionary(...)`` with ``resampling=Resampling()`` and
``betas=(0.0, 0.9999)``. (Their decoder rows are of unit norm up to a step, ours after every step; their inputs are not
scaled, ours are, which ``l1_penalty`` allows for.)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.features.dictionary import SparseAutoencoder
from apportion.training import Hook
from apportion.training.optimizer import OptimizerFactory

Batches = Callable[[int], Float[Tensor, "tokens d"]]


@dataclass(frozen=True)
class Resampling:
    """When and how dead features get a new start; the defaults are those of the paper's runs.

    Args:
        every: steps between one time and the next.
        times: how often at most.
        look_back: batches of the steps before, over which firing is counted.
        cutoff: share of tokens below which a feature counts as dead.
        encoder_scale: length of a new encoder row relative to the mean of those alive.
        learning_rate_factor: on the learning rate right afterwards.
        warmup: steps until the learning rate is what it was (linear; theirs is a cosine).
    """

    every: int = 25_000
    times: int = 4
    look_back: int = 100
    cutoff: float = 1e-6
    encoder_scale: float = 0.2
    learning_rate_factor: float = 0.1
    warmup: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "times", "look_back"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 < self.cutoff < 1:
            raise InputError(f"cutoff={self.cutoff}: a share of tokens between 0 and 1, such as 1e-6")
        if self.encoder_scale <= 0 or not 0 < self.learning_rate_factor <= 1 or self.warmup < 0:
            raise InputError(
                f"{self}: encoder_scale must be above 0, learning_rate_factor in (0, 1], warmup at least 0"
            )

    def happens(self, step: int) -> bool:
        """Whether features are resampled before the step of that number (from 0)."""
        return step > 0 and step % self.every == 0 and step // self.every <= self.times

    def learning_rate(self, step: int) -> float:
        """Factor on the learning rate of a step."""
        last = min(step // self.every, self.times) * self.every
        if last == 0 or step - last >= self.warmup:
            return 1.0
        return self.learning_rate_factor + (1 - self.learning_rate_factor) * (step - last) / self.warmup


class ResampleDead(Hook[SparseAutoencoder]):
    """Resamples while a dictionary trains, on `fit_dictionary`'s behalf; a pure function of the step and the weights.

    Args:
        settings: see ``Resampling``.
        batches: of the run.
        seed: of the draws.
    """

    def __init__(self, settings: Resampling, batches: Batches, seed: int) -> None:
        self.settings, self._batches, self._seed = settings, batches, seed
        self._optimizer: torch.optim.Optimizer | None = None

    def watching(self, build: OptimizerFactory) -> OptimizerFactory:
        """The same optimiser, whose moments this hook may forget."""

        def built(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            self._optimizer = build(parameters)
            return self._optimizer

        return built

    def before_step(self, module: SparseAutoencoder, step: int) -> None:
        """Hold the learning rate down after features were resampled."""
        assert self._optimizer is not None
        for group in self._optimizer.param_groups:
            group["lr"] *= self.settings.learning_rate(step)

    def after_step(self, module: SparseAutoencoder, step: int, metrics: dict[str, int | float | Tensor]) -> None:
        """Resample, if it is time; the number of features that got a new start is logged as ``resampled``."""
        done = step + 1
        if not self.settings.happens(done):
            return
        looked_at = [self._batches(each) for each in range(max(0, done - self.settings.look_back), done)]
        dead = rarely_firing(module, looked_at, self.settings.cutoff)
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + done)
        metrics["resampled"] = resample(
            module, dead, torch.cat(looked_at), self._optimizer, generator, self.settings.encoder_scale
        )


@torch.no_grad()
def rarely_firing(
    sae: SparseAutoencoder, batches: Iterable[Float[Tensor, "_ d_in"]], cutoff: float
) -> Bool[Tensor, "features"]:
    """Features that fire on less than ``cutoff`` of the tokens."""
    fired, tokens = torch.zeros(sae.n_features, dtype=torch.int64, device=sae.encoder_weight.device), 0
    for x in batches:
        fired += sae.encode(x, "batch").winners_per_column()
        tokens += x.shape[0]
    return fired < cutoff * tokens


@torch.no_grad()
def resample(
    sae: SparseAutoencoder,
    dead: Bool[Tensor, "features"],
    inputs: Float[Tensor, "tokens d_in"],
    optimizer: torch.optim.Optimizer | None,
    generator: torch.Generator,
    encoder_scale: float = 0.2,
) -> int:
    """Turn dead features to inputs that the dictionary reconstructs badly; nothing else changes.

    Inputs are drawn without replacement, with probability in proportion to their squared reconstruction loss. A dead
    feature's decoder row becomes the centred input at unit norm, its encoder row the same direction at
    ``encoder_scale`` times the mean norm of those alive, its bias 0; the optimiser's moments of these rows become 0.

    Args:
        sae: changed in place.
        dead: which features.
        inputs: to draw from.
        optimizer: whose moments are forgotten; None if there is none.
        generator: on the CPU, of the draws.
        encoder_scale: see above.

    Returns:
        How many features got a new start: none if there are none, or if every input is reconstructed perfectly.

    Raises:
        InputError: fewer inputs with a loss than dead features.
    """
    chosen = dead.nonzero().flatten()
    if len(chosen) == 0:
        return 0
    losses = torch.cat([_losses(sae, part) for part in inputs.split(8192)])
    if not bool(losses.any()):
        return 0
    probability = losses.double().cpu().square()
    there = int((probability > 0).sum())
    if there < len(chosen):
        raise InputError(
            f"{len(chosen)} features are dead, but only {there} of {len(inputs)} inputs can be drawn for them: give "
            "more inputs (a larger batch_size or look_back), or fewer features"
        )
    # With exponential clocks, as multinomial takes no more than 2**24 inputs.
    clocks = torch.empty_like(probability).exponential_(generator=generator) / probability
    drawn = inputs[clocks.topk(len(chosen), largest=False).indices.to(inputs.device)]
    centred = sae.centred(drawn)
    directions = centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)
    alive = ~dead
    norms = sae.encoder_weight.norm(dim=1)
    length = norms[alive].mean() if bool(alive.any()) else norms.mean()
    sae.decoder_weight[chosen] = directions
    sae.encoder_weight[chosen] = directions * length * encoder_scale
    sae.encoder_bias[chosen] = 0
    sae.statistics.tokens_since_fired[chosen] = 0
    for parameter in (sae.decoder_weight, sae.encoder_weight, sae.encoder_bias):
        state = {} if optimizer is None else optimizer.state[parameter]
        for name in ("exp_avg", "exp_avg_sq"):
            if name in state:
                state[name][chosen] = 0
    return len(chosen)


def _losses(sae: SparseAutoencoder, x: Tensor) -> Float[Tensor, "tokens"]:
    target = x * sae.input_scale
    output = sae.decode_scaled(sae.encode(x, "batch"))
    return (target - output).square().sum(dim=1)


def l1_penalty(coefficient: float, sample: Float[Tensor, "tokens d"]) -> float:
    """The paper's L1 coefficient as ``Recipe.penalty``, for activations like a sample's.

    The paper minimises the squared error of a token plus ``coefficient`` times the sum of its code, in the units of the
    activations; a `Recipe` minimises the error as a share of the variance, and codes in units in which the mean squared
    distance from the centre is the width. Their coefficients lie between 0.8 and 3 for the layers of GPT-2 small; do
    not copy them to other layers or models, whose outputs of heads have other sizes.

    Raises:
        InputError: a negative coefficient, or a sample that does not vary.
    """
    if coefficient < 0:
        raise InputError(f"coefficient={coefficient}: must not be negative")
    distance = float((sample - sample.mean(dim=0)).square().sum(dim=1).mean())
    if not distance > 0:
        raise InputError("all activations of the sample are the same: there is no variance to relate a penalty to")
    scale = (sample.shape[1] / distance) ** 0.5
    return coefficient / (distance * scale)
