"""A dictionary trained by many processes: tokens sharded over one dimension of a mesh, features over the other.

Every process holds the encoder and decoder rows, biases and statistics of its features, and sees its share of each
batch's tokens. What one process would compute on the whole batch, all of them compute together:

| what | how |
|---|---|
| who wins | `apportion.allocate.mesh`: exact thresholds from all-reduced histograms |
| reconstruction | each process decodes its own features; summed over ``feature`` |
| loss | each process's part is relative to the variance of the whole batch; summed over ``data`` |
| decoder bias | its gradient through the encoder's input is summed over ``feature`` |
| gradients | summed over ``data``; clipped by the norm of all of them |
| unit rows | local: a row is never cut |
| densities, silence | firings summed over ``data``; thresholds are minima over the mesh |
| underused features, Zipf ranks | from the densities of all features, gathered when they are refreshed |
| Feature Choice quotas | every process draws the same from the same ledger (24 bytes a feature, held by all) |

Bytes that a process brings into collectives in a step, with N tokens and F features here, width d, float32, no excess
ties and no auxiliary loss:

    over feature:  4 N d + 4 d + selection + 36
    over data:     8 F d + 4 F + 8 d + 8 F + selection + 48

in this order the reconstruction and the decoder bias's gradient through the encoder; the gradients of both matrices and
of the encoder bias, of the decoder bias with the mean of the batch, and the firings. ``selection``, whose parts are in
`apportion.allocate.mesh`, is 512 N + 4 over feature and 4 over data (TokenChoice), 40,964 over both (MutualChoice), or
516 F over data (FeatureChoice). The auxiliary loss adds ``4 N d + 512 N + 8`` over feature and ``4 d + 24`` over data.
Every ``refresh_every`` steps 4 F bytes are gathered over feature, once for the densities and once for Feature Choice's
demand. A ring all-reduce over n processes sends ``2 (n - 1) / n`` times these bytes.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from apportion.allocate import (
    Allocation,
    FeatureChoice,
    Mesh,
    MutualChoice,
    QuotaLedger,
    Rule,
    Selection,
    TokenChoice,
    Zipf,
    encode_over_mesh,
)
from apportion.allocate.mesh import Block, Dimension
from apportion.errors import InputError
from apportion.features.dictionary import Mode, SparseAutoencoder
from apportion.features.fitting import (
    DictionaryObjective,
    Recipe,
    UnitDecoder,
    finish_dictionary,
    flat_provenance,
)
from apportion.features.optimizer import dictionary_adam
from apportion.features.statistics import FeatureStatistics
from apportion.models.activations import ShuffledBatches
from apportion.training import TrainingResult, train
from apportion.training.sharded import ShardedProcesses

_SHARDED = (
    "encoder_weight",
    "encoder_bias",
    "decoder_weight",
    "threshold",
    "statistics.tokens_since_fired",
    "statistics.density",
    "statistics.demand",
    "statistics.threshold",
    "statistics.underused",
)
_ROWS_DRAWN_AT_ONCE = 4096

Batches = Callable[[int], Float[Tensor, "tokens d"]]


class ShardedStatistics(FeatureStatistics):
    """The statistics of this process's features, over the tokens of all processes."""

    def __init__(self, n_features: int, mesh: Mesh) -> None:
        place = mesh.shard(n_features, "feature")
        super().__init__(place.stop - place.start)
        self._mesh, self._place, self._n_features = mesh, place, n_features

    def of_all(self, values: Shaped[Tensor, "features"]) -> Shaped[Tensor, "all_features"]:
        """Values of the features here as those of all features; an all-gather."""
        return self._mesh.of_all_columns(values, self._n_features)

    def of_these(self, values: Shaped[Tensor, "all_features"]) -> Shaped[Tensor, "features"]:
        """Of values of all features those of the features here."""
        return values[self._place]

    def _rows(self, codes: Allocation) -> int:
        return int(self._mesh.add_up(torch.tensor(codes.shape[0], device=codes.device), "data"))

    def _counts(self, codes: Allocation) -> Int64[Tensor, "features"]:
        return self._mesh.add_up(codes.winners_per_column(), "data")

    def _smallest(self, codes: Allocation, shared: bool) -> Float[Tensor, "features"]:
        if not shared:
            return self._mesh.smallest(super()._smallest(codes, shared), "data")
        here = codes.values.min() if codes.nnz else codes.values.new_tensor(torch.inf)
        return self._mesh.smallest(here.to(self.threshold.dtype), "feature", "data").expand_as(self.threshold)


class ShardedAutoencoder(SparseAutoencoder):
    """One process's part of a ``SparseAutoencoder`` in training; see the module for what is where.

    It trains and nothing else: ``collect`` gives the whole dictionary, which evaluates, calibrates and saves.

    Args:
        d_in: width of the input.
        n_features: number of features of the whole dictionary.
        rule: ``TokenChoice``, ``MutualChoice`` or ``FeatureChoice``; budgets count all features.
        mesh: the processes; each makes its part in a call of its own.
        seed: of the initial directions, which are those of a dictionary of one process.

    Raises:
        InputError: another rule, or sizes and budgets that a ``SparseAutoencoder`` refuses.
    """

    def __init__(self, d_in: int, n_features: int, rule: Rule, mesh: Mesh, *, seed: int = 0) -> None:
        nn.Module.__init__(self)
        if not isinstance(rule, (TokenChoice, MutualChoice, FeatureChoice)):
            raise InputError(
                f"rule={rule}: over a mesh a dictionary takes TokenChoice, MutualChoice or FeatureChoice; train others "
                "on one process"
            )
        if d_in < 1 or n_features < 1:
            raise InputError(f"d_in={d_in}, n_features={n_features}: both must be at least 1")
        try:
            rule.mean_budget(n_features)
        except ValueError as error:
            raise InputError(f"n_features={n_features}: {error}") from error
        self.mesh = mesh
        self.d_in = self.d_out = d_in
        self.n_features = n_features
        self.rule, self.gated = rule, False
        self.precision = "float32"
        self.metadata: dict[str, Any] = {}
        directions = _directions(n_features, d_in, seed, mesh.shard(n_features, "feature"))
        here = directions.shape[0]
        self.decoder_weight = nn.Parameter(directions)
        self.encoder_weight = nn.Parameter(directions.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(here))
        self.decoder_bias = nn.Parameter(torch.zeros(d_in))
        self.statistics = ShardedStatistics(n_features, mesh)
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("threshold", torch.full((here,), torch.nan))
        if isinstance(rule, FeatureChoice):
            self.register_buffer("share", rule.share(n_features))
            profile = rule.profile if isinstance(rule.profile, Zipf) else Zipf(exponent=0.0)
            self.register_buffer("zipf", torch.tensor([profile.exponent, profile.offset], dtype=torch.float64))
            self.ledger = QuotaLedger(n_features)

    def processes(self) -> ShardedProcesses:
        """What the training loop asks of the mesh."""
        return ShardedProcesses(self.mesh.device_mesh, self, dict.fromkeys(_SHARDED, self.n_features), over="feature")

    def input_bias(self) -> Float[Tensor, "d_in"]:
        """The decoder bias; each process's features contribute to its gradient."""
        return _AddUpGradient.apply(self.decoder_bias, self.mesh, "feature")

    def encode_centred(
        self, x: Float[Tensor, "tokens d_in"], mode: Mode | None = None, rule: Rule | None = None
    ) -> Allocation:
        """The codes of this process's tokens in this process's features; a collective call.

        Raises:
            RuntimeError: threshold mode, which one process serves better.
        """
        if (mode or ("batch" if self.training else "threshold")) == "threshold":
            raise RuntimeError("a sharded dictionary only trains: collect() it, and evaluate what that gives")
        block = Block.find(self.mesh, x.shape[0], self.encoder_weight.shape[0])
        selection = self._batch_selection(block.rows, rule or self.rule)
        return encode_over_mesh(
            selection, x, self.encoder_weight, self.encoder_bias, block, self.mesh, self.precision
        ).active()

    def decode_scaled(self, codes: Allocation) -> Float[Tensor, "tokens d_out"]:
        """The reconstruction by the features of all processes; a collective call."""
        return added_up(codes.matmul(self.decoder_weight), self.mesh, "feature") + self.decoder_bias

    @torch.no_grad()
    def collect(self) -> SparseAutoencoder:
        """The whole dictionary, on the processor of every process; a collective call.

        It takes ``8 * n_features * d_in`` bytes in each, which is why training goes without.
        """
        whole = SparseAutoencoder(self.d_in, self.n_features, self.rule)
        tensors = self.processes().whole(self.state_dict())
        full = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in tensors.items()}
        whole.load_state_dict({name: each.cpu() for name, each in full.items()})
        whole.precision, whole.metadata = self.precision, self.metadata
        return whole.train(self.training)


class ShardedObjective(DictionaryObjective):
    """``DictionaryObjective`` over a mesh: its value is that of the whole batch, its gradient this process's part."""

    def _reconstruction_loss(self, sae: SparseAutoencoder, target: Tensor, output: Tensor) -> Tensor:
        mesh = _mesh_of(sae)
        target, output = target.float(), output.float()
        return added_up((target - output).square().sum() / _spread(target, mesh), mesh, "data")

    def _auxiliary_loss(self, sae: SparseAutoencoder, x: Tensor, residual: Tensor, revive: Tensor) -> Tensor:
        return aux_k_loss_over_mesh(sae, x, residual, revive, _mesh_of(sae), self.recipe.auxiliary_size)

    def _counts(self, sae: SparseAutoencoder, codes: Allocation) -> dict[str, float | Tensor]:
        mesh, statistics = _mesh_of(sae), sae.statistics
        of_features = torch.stack([statistics.dead(self.recipe.silence).sum(), statistics.underused.sum()])
        mesh.add_up(of_features, "feature")
        entries = mesh.add_up(torch.tensor([codes.nnz], device=codes.device), "feature", "data")
        rows = mesh.add_up(torch.tensor([codes.shape[0]], device=codes.device), "data")
        dead, underused = of_features.float() / sae.n_features
        return {"l0": entries[0] / rows[0].clamp(min=1), "dead": dead, "underused": underused}


class UnitDecoderOverMesh(UnitDecoder):
    """``UnitDecoder``, after the gradients of the processes that see other tokens have been added up."""

    def before_step(self, module: SparseAutoencoder, step: int) -> None:
        """Sum, and project."""
        for parameter in module.parameters():
            if parameter.grad is not None:
                _mesh_of(module).add_up(parameter.grad, "data")
        super().before_step(module, step)


def aux_k_loss_over_mesh(
    sae: SparseAutoencoder,
    x_centred: Float[Tensor, "tokens d"],
    residual: Float[Tensor, "tokens d"],
    revive: Bool[Tensor, "features"],
    mesh: Mesh,
    k_aux: int | None = None,
) -> Float[Tensor, ""]:
    """``aux_k_loss`` where tokens and features are sharded; its value is that of the whole batch. A collective call."""
    chosen = revive.nonzero().flatten()
    block = Block.find(mesh, x_centred.shape[0], chosen.numel())
    if block.columns == 0 or block.rows == 0:
        return x_centred.new_zeros(())
    codes = encode_over_mesh(
        Selection("rows", min(k_aux or max(sae.d_in // 2, 1), block.columns)),
        x_centred.detach(),
        sae.encoder_weight[chosen],
        sae.encoder_bias[chosen],
        block,
        mesh,
        sae.precision,
    )
    explained = added_up(codes.active().matmul(sae.decoder_weight[chosen]), mesh, "feature")
    residual = residual.detach()
    return added_up((residual - explained).square().sum() / _spread(residual, mesh), mesh, "data")


def check_over_mesh(recipe: Recipe) -> None:
    """Make sure that a recipe can be trained over a mesh, before anything expensive begins.

    Raises:
        InputError: a rule without a budget or a gated dictionary.
    """
    if recipe.nested:
        raise InputError(
            f"nested={recipe.nested}: over a mesh a prefix of the features is on some processes only: train Matryoshka "
            "dictionaries on one process"
        )
    if recipe.gated or not recipe.has_budget:
        raise InputError(
            f"rule={recipe.rule}, gated={recipe.gated}: over a mesh only TokenChoice, MutualChoice and FeatureChoice "
            "are trained; train others with fit_dictionary, on one process"
        )


def fit_dictionary_over_mesh(
    recipe: Recipe,
    batches: Batches,
    d_in: int,
    mesh: Mesh,
    *,
    calibration: Callable[[], Iterable[Float[Tensor, "tokens d"]]] | None = None,
    folder: Path | str | None = None,
    provenance: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    stop_after: int | None = None,
    **settings: Any,
) -> tuple[SparseAutoencoder, TrainingResult]:
    """``fit_dictionary`` by all processes of a mesh; each calls it alike.

    Losses and weights are those of one process, up to the rounding of sums in another order. A run is resumed from its
    folder by a mesh of the same size exactly, by another one up to rounding.

    Args:
        recipe: see ``Recipe``; the batch size is that of all processes together.
        batches: activations of a step, [batch_size, d_in], the same in every process, of which each takes its rows. Of
            ``ShuffledBatches`` each reads only its own, but for step 0, which sets scale and bias.
        d_in: their width.
        mesh: see ``Mesh.of``.
        calibration: as for ``fit_dictionary``; every process calibrates the whole dictionary alike.
        folder: for checkpoints and logs, on a disk that all processes see.
        provenance: as for ``fit_dictionary``.
        device: of this process, such as ``cuda:0``.
        progress: show it, on the first process.
        stop_after: as for ``fit_dictionary``.
        settings: overrides of ``TrainingSettings``.

    Returns:
        The whole dictionary, collected in the memory of every process, in evaluation mode and in the units of the
        activations, and how training ended. If training was paused before its end it is neither calibrated nor folded.

    Raises:
        InputError: a rule without a budget or a gated dictionary, which are trained on one process.
    """
    check_over_mesh(recipe)
    assert isinstance(recipe.rule, (TokenChoice, MutualChoice, FeatureChoice))
    sae = ShardedAutoencoder(d_in, recipe.n_features, recipe.rule, mesh, seed=recipe.seed)
    sae.precision = recipe.precision
    sae.initialise_from(batches(0))
    sae.to(device)
    planned = recipe.settings(**settings)
    result = train(
        sae,
        ShardedObjective(recipe),
        lambda step: _rows_of_this_process(batches, step, mesh).to(device),
        planned,
        folder,
        hooks=[UnitDecoderOverMesh()],
        optimizer=dictionary_adam(sae, planned),
        provenance=flat_provenance(recipe, d_in, provenance),
        progress=progress,
        stop_after=stop_after,
        processes=sae.processes(),
    )
    whole = sae.collect()
    if result.steps_done == recipe.steps:
        finish_dictionary(whole, recipe, calibration, provenance, "cpu")
    return whole, result


def added_up(tensor: Float[Tensor, "..."], mesh: Mesh, *along: Dimension) -> Float[Tensor, "..."]:
    """The sum over the processes along some dimensions, of which each gets the gradient of its own part.

    For what all of them go on to use in the same way: the gradient of the sum is the same in each, and so is that of
    every part.
    """
    return _AddUp.apply(tensor, mesh, *along)


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, *along: Dimension) -> Tensor:
        ctx.n_dimensions = len(along)
        return mesh.add_up(tensor.detach().clone(), *along)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (grads[0], None, *[None] * ctx.n_dimensions)


class _AddUpGradient(torch.autograd.Function):
    """Passes a replicated tensor on; its gradient is the sum of what each process makes of it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mesh: Mesh, *along: Dimension) -> Tensor:
        ctx.mesh, ctx.along = mesh, along
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (ctx.mesh.add_up(grads[0].clone(), *ctx.along), None, *[None] * len(ctx.along))


def _spread(rows: Float[Tensor, "tokens d"], mesh: Mesh) -> Float[Tensor, ""]:
    """Squared distance of the rows of all processes from their mean."""
    total = mesh.add_up(rows.sum(dim=0), "data")
    count = mesh.add_up(torch.tensor(rows.shape[0], device=rows.device), "data")
    return mesh.add_up((rows - total / count).square().sum(), "data").clamp(min=1e-12)


def _mesh_of(sae: SparseAutoencoder) -> Mesh:
    assert isinstance(sae, ShardedAutoencoder)
    return sae.mesh


def _rows_of_this_process(batches: Batches, step: int, mesh: Mesh) -> Float[Tensor, "tokens d"]:
    if isinstance(batches, ShuffledBatches):
        indices = batches.indices(step)
        return batches.view.read(indices[mesh.shard(len(indices), "data")], batches.site)
    batch = batches(step)
    return batch[mesh.shard(batch.shape[0], "data")]


def _directions(n_features: int, width: int, seed: int, place: slice) -> Float[Tensor, "here width"]:
    """Some rows of the unit directions that a dictionary of one process starts from, without holding the others.

    Torch draws normal numbers in blocks of sixteen and treats the last sixteen of a tensor in their own way, so pieces
    must be whole blocks and the last one must not be short: then they are, bit for bit, those of one large draw.
    """
    generator = torch.Generator().manual_seed(seed)
    kept, first = [torch.empty(0, width)], 0
    while first < n_features:
        left = n_features - first
        count = _ROWS_DRAWN_AT_ONCE if left >= 2 * _ROWS_DRAWN_AT_ONCE else left
        drawn = torch.randn(count, width, generator=generator)
        kept.append(drawn[max(place.start - first, 0) : max(place.stop - first, 0)])
        first += count
    rows = torch.cat(kept)
    return rows / rows.norm(dim=1, keepdim=True)
