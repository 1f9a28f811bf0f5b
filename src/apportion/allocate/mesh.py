"""Allocation over many processes: rows and columns are sharded, the rules stay global, and no score leaves its process.

The scores of one batch are a matrix of which every process holds one block: its rows (tokens) are those of its place
along the ``data`` dimension of the mesh, its columns (features) those of its place along ``feature``. A rule over all
of them is decided in three steps.

1. *Candidates*: an entry that wins among all wins on its own block too, so each process chooses among its own scores by
   the ordinary ops and passes on nothing but these winners.
2. *Threshold*: scores become integers of the same order, and the key of the last winner is found digit by digit. For
   each digit the processes add up a histogram of the candidates that can still be it: one histogram in all for
   ``MutualChoice``, one a row for ``TokenChoice``, one a column for ``FeatureChoice``.
3. *Ties*: candidates that equal the last winner win in the order that holds everywhere (lower row, then lower column,
   both counted over the whole mesh). Where there are more of them than places left, the processes exchange how many
   each has, by row or by column.

So every process ends with exactly the entries that the rule, applied to the whole matrix, chooses within its block.

Bytes that a process brings into all-reduces in one call (rows N, columns F: those of its block; ring all-reduces
over n processes move 2 (n - 1) / n times as much):

| rule | along | bytes |
|---|---|---|
| ``TokenChoice`` | feature | 8 rounds x 16 bins x 4 x N = 512 N |
| ``FeatureChoice`` | data | 512 F |
| ``MutualChoice`` | feature, then data | (2048 + 2048 + 1024 bins) x 8 = 40,960 each |
| ``Threshold`` | | 0 |

Float64 scores take twice the rounds. Excess ties add an all-gather of 8 N bytes (``TokenChoice``, ``MutualChoice``) or
8 F bytes (``FeatureChoice``) from each process of a group. The sizes of blocks are 8 bytes along each dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from apportion.allocate.allocation import Allocation
from apportion.allocate.rules import FeatureChoice, MutualChoice, Rule, Selection, Threshold, TokenChoice, check_scores

Dimension = Literal["data", "feature"]

# Bits of the key settled in a round: one histogram can be wide, one a row or column must be narrow.
_BITS_OF_ONE_HISTOGRAM = 11
_BITS_OF_MANY_HISTOGRAMS = 4


@dataclass(frozen=True)
class Mesh:
    """The processes of a job as a grid: ``data`` times ``feature``.

    Args:
        device_mesh: two-dimensional, with dimensions named ``data`` and ``feature``.

    Raises:
        ValueError: other dimensions.
    """

    device_mesh: DeviceMesh

    def __post_init__(self) -> None:
        if self.device_mesh.mesh_dim_names != ("data", "feature"):
            raise ValueError(
                f"the mesh has dimensions {self.device_mesh.mesh_dim_names}: make it with Mesh.of(data, feature)"
            )

    @classmethod
    def of(cls, data: int, feature: int, device_type: str = "cpu") -> "Mesh":
        """A mesh of all processes of the job, which are ``data * feature`` many; torch.distributed must be running.

        Raises:
            ValueError: the numbers do not fit the number of processes.
        """
        if data < 1 or feature < 1 or data * feature != dist.get_world_size():
            raise ValueError(
                f"a mesh of data={data} times feature={feature} does not fit the job: it has {dist.get_world_size()} "
                "processes (torchrun --nproc-per-node times --nnodes)"
            )
        return cls(init_device_mesh(device_type, (data, feature), mesh_dim_names=("data", "feature")))

    def size(self, dimension: Dimension) -> int:
        """How many processes there are along a dimension."""
        return self.device_mesh.size(0 if dimension == "data" else 1)

    def place(self, dimension: Dimension) -> int:
        """Where this process is along a dimension, from 0."""
        return self.device_mesh.get_local_rank(dimension)

    def group(self, dimension: Dimension) -> dist.ProcessGroup:
        """The processes that differ from this one along a dimension only."""
        return self.device_mesh.get_group(dimension)

    def shard(self, total: int, dimension: Dimension) -> slice:
        """Which of ``total`` rows or columns this process holds: blocks of equal size, the last ones smaller or empty.

        The cut is that of ``torch.chunk`` and of DTensor's ``Shard``.
        """
        size = -(-total // self.size(dimension))
        start = min(self.place(dimension) * size, total)
        return slice(start, min(start + size, total))

    def add_up(self, tensor: Tensor, *dimensions: Dimension) -> Tensor:
        """The sum over the processes along the dimensions, in place; every process ends with the same bits."""
        for dimension in dimensions:
            if self.size(dimension) > 1:
                dist.all_reduce(tensor, group=self.group(dimension))
        return tensor

    def smallest(self, tensor: Tensor, *dimensions: Dimension) -> Tensor:
        """The elementwise minimum over the processes along the dimensions, in place."""
        for dimension in dimensions:
            if self.size(dimension) > 1:
                dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self.group(dimension))
        return tensor

    def collect(self, tensor: Tensor, dimension: Dimension) -> Tensor:
        """The tensors of all processes along a dimension, stacked in their order; all of one shape."""
        if self.size(dimension) == 1:
            return tensor.unsqueeze(0)
        parts = [torch.empty_like(tensor) for _ in range(self.size(dimension))]
        dist.all_gather(parts, tensor.contiguous(), group=self.group(dimension))
        return torch.stack(parts)

    def of_all_columns(self, values: Tensor, columns: int) -> Tensor:
        """The values of all columns, of which each process gives those of its `shard`; an all-gather."""
        size = -(-columns // self.size("feature"))
        room = values.new_zeros(size, *values.shape[1:])
        room[: values.shape[0]] = values
        return self.collect(room, "feature").flatten(0, 1)[:columns]


@dataclass(frozen=True)
class Block:
    """Which block of a score matrix this process holds.

    Attributes:
        rows, columns: size of the whole matrix.
        first_row, first_column: where the block begins.
        shape: size of the block.
    """

    rows: int
    columns: int
    first_row: int
    first_column: int
    shape: tuple[int, int]

    @classmethod
    def find(cls, mesh: Mesh, rows: int, columns: int) -> "Block":
        """The block of ``rows`` x ``columns`` that this process holds; blocks may differ in size and be empty.

        All processes of one place along ``data`` must hold the same rows, of one place along ``feature`` the same
        columns.
        """
        device = mesh.device_mesh.device_type
        all_rows = mesh.collect(torch.tensor(rows, device=device), "data").tolist()
        all_columns = mesh.collect(torch.tensor(columns, device=device), "feature").tolist()
        first_row, first_column = sum(all_rows[: mesh.place("data")]), sum(all_columns[: mesh.place("feature")])
        return cls(sum(all_rows), sum(all_columns), first_row, first_column, (rows, columns))

    def of_columns(self, tensor: Tensor) -> Tensor:
        """The part of a tensor over all columns that belongs to the block's."""
        return tensor[self.first_column : self.first_column + self.shape[1]]


def allocate_over_mesh(rule: Rule, scores: Float[Tensor, "rows columns"], mesh: Mesh) -> Allocation:
    """Apply a rule to a score matrix that is spread over the mesh; a collective call.

    Args:
        rule: ``TokenChoice``, ``MutualChoice``, ``FeatureChoice`` or ``Threshold``; budgets count the columns and rows
            of the whole matrix. A threshold for each column is one for each of *all* columns.
        scores: this process's block, finite; see `Block.find`.
        mesh: the processes.

    Returns:
        The winners within the block, exactly those of ``rule`` on the whole matrix; differentiable in ``values``.

    Raises:
        TypeError: a rule that regroups scores (NofM, Blocks), or scores that are not floats.
        ValueError: as the rule itself raises, or scores that are not finite.
    """
    if not isinstance(rule, (TokenChoice, MutualChoice, FeatureChoice, Threshold)):
        raise TypeError(f"{rule} is not allocated over a mesh: use TokenChoice, MutualChoice, FeatureChoice, Threshold")
    check_scores(scores)
    block = Block.find(mesh, *scores.shape)
    over_all = rule.selection(block.rows, block.columns)
    crow, col = of_block(over_all, block).places(scores.detach())
    rows = torch.repeat_interleave(crow.diff(), output_size=col.numel())
    candidates = Allocation(crow, col, scores[rows, col], (scores.shape[0], scores.shape[1]))
    return winners_over_mesh(candidates, over_all, block, mesh)


def encode_over_mesh(
    selection: Selection,
    x: Float[Tensor, "rows d"],
    weight: Float[Tensor, "columns d"],
    bias: Float[Tensor, "columns"],
    block: Block,
    mesh: Mesh,
    precision: str = "float32",
) -> Allocation:
    """``Selection.encode`` over a mesh: this process's winners of ``x @ weight.T + bias``; a collective call.

    Args:
        selection: over the whole batch and all columns.
        x: this process's rows.
        weight: this process's columns.
        bias: likewise.
        block: which part of the whole they make.
        mesh: the processes.
        precision: see ``apportion.ops.encode_select``. With ``bfloat16`` the product nominates the candidates and their
            full-precision values decide, so that a few winners next to the last one can differ from one process's.

    Gradients reach ``x``, ``weight`` and ``bias`` through this process's winners only: what other processes hold of the
    gradient of replicated tensors is the caller's to add.
    """
    candidates = of_block(selection, block).encode(x, weight, bias, precision)
    return winners_over_mesh(candidates, selection, block, mesh)


def of_block(selection: Selection, block: Block) -> Selection:
    """The selection by which a block finds every entry that can win over the whole matrix."""
    rows, columns = block.shape
    if selection.how == "rows":
        return replace(selection, count=min(selection.count, columns))
    if selection.how == "total":
        return replace(selection, count=min(selection.count, rows * columns))
    assert selection.limits is not None
    limits = block.of_columns(selection.limits)
    return replace(selection, limits=limits.clamp(max=rows) if selection.how == "columns" else limits)


def winners_over_mesh(candidates: Allocation, selection: Selection, block: Block, mesh: Mesh) -> Allocation:
    """Of the candidates of every block those that win over the whole matrix; see the module for how.

    Args:
        candidates: what ``of_block(selection, block)`` has chosen.
        selection: over the whole matrix.
        block: this process's.
        mesh: the processes.
    """
    along: Sequence[Dimension]
    if selection.how == "above":
        return candidates
    device = candidates.device
    if selection.how == "total":
        groups, along = torch.zeros_like(candidates.col_indices), ("feature", "data")
        wanted, bits = torch.tensor([selection.count], device=device), _BITS_OF_ONE_HISTOGRAM
    elif selection.how == "rows":
        groups, along = candidates.row_indices(), ("feature",)
        wanted, bits = torch.full((block.shape[0],), selection.count, device=device), _BITS_OF_MANY_HISTOGRAMS
    else:
        assert selection.limits is not None
        groups, along = candidates.col_indices, ("data",)
        wanted, bits = block.of_columns(selection.limits).to(device), _BITS_OF_MANY_HISTOGRAMS
    keys = ordered_keys(candidates.values.detach())
    last, places_left, ties = _last_winners(keys, groups, wanted, bits, mesh, along)
    wins, tied = keys > last[groups], keys == last[groups]
    # The same answer on every process of a group: the three tensors are sums over it.
    if bool((ties > places_left).any()):
        tied &= _earlier_ties(candidates, groups, tied, selection.how, mesh) < places_left[groups]
    return candidates.keep(wins | tied)


def ordered_keys(scores: Float[Tensor, "entries"]) -> Int[Tensor, "entries"]:
    """Integers in the order of the scores; equal scores, also 0.0 and -0.0, get equal keys."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    # Adding zero turns -0.0 into 0.0 and changes nothing else.
    bits = (wide + 0.0).view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    # Among negative floats more magnitude means less.
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _last_winners(
    keys: Int[Tensor, "entries"],
    groups: Int64[Tensor, "entries"],
    wanted: Int64[Tensor, "groups"],
    bits: int,
    mesh: Mesh,
    along: Sequence[Dimension],
) -> tuple[Int[Tensor, "groups"], Int64[Tensor, "groups"], Int64[Tensor, "groups"]]:
    """For each group the key of its last winner, the places left for its equals, and how many of those there are.

    A group that wants none gets the largest key there is, which no finite score has.
    """
    width = torch.iinfo(keys.dtype).bits
    # Digits are read as those of unsigned numbers, whose order that of the signed ones becomes with the top bit turned.
    codes, top = keys.long(), -(1 << 63) if width == 64 else 1 << 31
    codes = codes ^ top
    found = torch.zeros_like(wanted)
    left, ties = wanted.clone(), torch.zeros_like(wanted)
    # Counts of a row or a column fit 32 bits; those of all entries need not.
    counted_in = torch.int64 if wanted.numel() == 1 else torch.int32
    settled = 0
    while settled < width:
        step = min(bits, width - settled)
        shift = width - settled - step
        digits = (codes >> shift) & ((1 << step) - 1)
        histogram = torch.bincount((groups << step) + digits, minlength=wanted.numel() << step)
        histogram = mesh.add_up(histogram.to(counted_in), *along).long().view(wanted.numel(), 1 << step)
        reaching = histogram.flip(1).cumsum(1).flip(1)
        # The largest digit that enough candidates reach.
        digit = ((reaching >= left.unsqueeze(1)).sum(dim=1) - 1).clamp(min=0)
        ties = histogram.gather(1, digit.unsqueeze(1)).squeeze(1)
        left = left - (reaching.gather(1, digit.unsqueeze(1)).squeeze(1) - ties)
        found |= digit << shift
        still = digits == digit[groups]
        codes, groups = codes[still], groups[still]
        settled += step
    return (found ^ top).to(keys.dtype), left, ties


def _earlier_ties(
    candidates: Allocation, groups: Int64[Tensor, "entries"], tied: Bool[Tensor, "entries"], how: str, mesh: Mesh
) -> Int64[Tensor, "entries"]:
    """How many ties of its group, over all processes, come before each tied candidate (other entries: meaningless)."""
    rows, columns = candidates.shape
    if how == "columns":
        by_column = torch.bincount(candidates.col_indices[tied], minlength=columns)
        return _earlier_here(groups, tied, columns) + _before(mesh, by_column, "data")[groups]
    by_row = torch.bincount(candidates.row_indices()[tied], minlength=rows)
    earlier = _earlier_here(candidates.row_indices(), tied, rows)
    collected = mesh.collect(by_row, "feature")
    earlier = earlier + collected[: mesh.place("feature")].sum(dim=0)[candidates.row_indices()]
    if how == "rows":
        return earlier
    of_row = collected.sum(dim=0)
    rows_above = of_row.cumsum(0) - of_row
    return earlier + rows_above[candidates.row_indices()] + _before(mesh, of_row.sum().view(1), "data")


def _before(mesh: Mesh, counts: Int64[Tensor, "n"], dimension: Dimension) -> Int64[Tensor, "n"]:
    """The sum of the counts of the processes before this one."""
    return mesh.collect(counts, dimension)[: mesh.place(dimension)].sum(dim=0)


def _earlier_here(
    groups: Int64[Tensor, "entries"], tied: Bool[Tensor, "entries"], n_groups: int
) -> Int64[Tensor, "entries"]:
    """How many tied candidates of the same group, on this process, come before each; entries are in row order."""
    places = tied.nonzero().flatten()
    of_tie = groups[places]
    order = of_tie.sort(stable=True).indices
    counts = torch.bincount(of_tie, minlength=n_groups)
    starts = counts.cumsum(0) - counts
    earlier = torch.zeros_like(groups)
    earlier[places[order]] = torch.arange(places.numel(), device=groups.device) - starts[of_tie[order]]
    return earlier
