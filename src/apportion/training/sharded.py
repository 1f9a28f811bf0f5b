"""A module spread over several processes: gradient norm, agreement, and checkpoints that any number of them can load.

Checkpoints are written by ``torch.distributed.checkpoint``. Its own file format is a pickle (``.metadata`` and the
tensors of every ``.distcp`` file), so its safetensors format is used: one safetensors file a process, whose headers say
in JSON which part of which tensor it holds. No index is needed to read them, and no pickle is on the disk. (Between the
processes of a job, which trust each other, ``torch.distributed.checkpoint`` exchanges its plans as objects.)
"""

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from apportion.errors import InputError
from apportion.training.checkpoint import Checkpoint, Checkpoints, digests, explained, state_of, write_state
from apportion.training.processes import Processes, gradient_values


class ShardedProcesses(Processes):
    """The processes of a mesh, each with a part of the module's rows.

    Tensors named in ``sharded`` are cut along their first dimension, over the mesh dimension ``over`` and as DTensor's
    ``Shard(0)`` cuts them (``torch.chunk``), and are equal along the others; all other tensors are equal everywhere. So
    are the gradients when the loop asks for their norm: who made them has added them up.

    Args:
        device_mesh: all processes of the job.
        module: as this process has it.
        sharded: names of its parameters and buffers that are parts, with the number of rows of the whole.
        over: the dimension of the mesh.
    """

    def __init__(self, device_mesh: DeviceMesh, module: nn.Module, sharded: Mapping[str, int], over: str) -> None:
        self.writes = dist.get_rank() == 0
        self.device_mesh = device_mesh
        self._rows = dict(sharded)
        self._over = over
        self._parts = {id(each) for name, each in module.named_parameters() if name in self._rows}

    def gradient_norm(self, parameters: Sequence[nn.Parameter]) -> Float[Tensor, ""]:
        """The norm of all gradients together, each part counted once; all-reduces one number."""
        with_gradient = [each for each in parameters if each.grad is not None]
        total = self._squares([each for each in with_gradient if id(each) in self._parts])
        dist.all_reduce(total, group=self.device_mesh.get_group(self._over))
        return (total + self._squares([each for each in with_gradient if id(each) not in self._parts])).sqrt()

    def any_of(self, here: bool) -> bool:
        """Whether it holds in at least one process; all-reduces one number."""
        flag = torch.tensor(int(here), device=self.device_mesh.device_type)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parts as DTensors, ``Shard(0)`` over one dimension of the mesh and ``Replicate()`` over the others."""
        from torch.distributed.tensor import DTensor

        shown = {}
        for name, tensor in tensors.items():
            rows = self._rows_of(name, tensor)
            if rows is not None:
                tensor = DTensor.from_local(
                    tensor,
                    self.device_mesh,
                    self._placements(),
                    run_check=False,
                    shape=torch.Size([rows, *tensor.shape[1:]]),
                    stride=tensor.stride(),
                )
            shown[name] = tensor
        return shown

    def checkpoints(self, folder: Path, keep: int) -> Checkpoints:
        """Checkpoints that all processes write together, in a folder that all of them see."""
        if self.writes:
            checkpoints = ShardedCheckpoints(folder, keep, self)
        dist.barrier()
        return checkpoints if self.writes else ShardedCheckpoints(folder, keep, self)

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Room for this process's part of a tensor of that name and whole shape."""
        whole = torch.empty(tuple(shape), dtype=dtype, device="meta")
        if self._rows_of(name, whole) is not None:
            size = -(-shape[0] // self.device_mesh[self._over].size())
            start = min(size * self.device_mesh.get_local_rank(self._over), shape[0])
            return torch.empty((min(start + size, shape[0]) - start, *shape[1:]), dtype=dtype)
        return torch.empty(tuple(shape), dtype=dtype)

    def _rows_of(self, name: str, tensor: Tensor) -> int | None:
        """Rows of the whole, if this is a part; state of the optimiser is cut like the parameter that it belongs to."""
        if tensor.ndim == 0:
            return None
        return self._rows.get(name, self._rows.get(name.rpartition(".")[0]))

    def _placements(self) -> list[Any]:
        from torch.distributed.tensor import Replicate, Shard

        names = self.device_mesh.mesh_dim_names or ()
        return [Shard(0) if name == self._over else Replicate() for name in names]

    def _squares(self, parameters: Collection[nn.Parameter]) -> Float[Tensor, ""]:
        device = self.device_mesh.device_type
        # By the norm, since squares would be another matrix.
        norms = [torch.linalg.vector_norm(each, dtype=torch.float32) for each in gradient_values(parameters)]
        return torch.stack([torch.zeros((), device=device), *norms]).square().sum()


class ShardedCheckpoints(Checkpoints):
    """Checkpoints of a module that is spread over processes; every method is a collective call.

    A folder ``module`` and a folder ``optimizer`` take the place of the two files; ``state.json`` is the same. The
    first process verifies the checksums of all files before a run resumes.
    """

    def __init__(self, folder: Path, keep: int, processes: ShardedProcesses) -> None:
        super().__init__(folder, keep)
        self._processes = processes

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``, each process its part; the first puts it in place once all parts are there.

        Raises:
            InputError: the disk is full or the folder cannot be written; older checkpoints are untouched.
        """
        path = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{path.name}.partial"
        with self._together(path):
            if self._processes.writes:
                self._remove_partial()
                partial.mkdir()
        for name, group in tensors.items():
            with self._together(path):
                _write_parts(partial / name, self._processes.whole(group))
        with self._together(path):
            if self._processes.writes:
                files = [each for name in tensors for each in sorted((partial / name).glob("*.safetensors"))]
                write_state(partial, step, digests(partial, files), state)
                self._put_in_place(partial, path)
                self._prune(step)

    def newest_intact(self) -> Checkpoint | None:
        """The newest checkpoint whose checksums hold, as the first process finds; see `Checkpoints.newest_intact`."""
        found: Checkpoint | None = None
        with self._together(self.folder):
            if self._processes.writes:
                found = super().newest_intact()
        step = torch.tensor(-1 if found is None else found.step, device=self._processes.device_mesh.device_type)
        dist.broadcast(step, src=0)
        if int(step) < 0:
            return None
        path = self.folder / f"step-{int(step):08d}"
        return ShardedCheckpoint(path, int(step), state_of(path)["state"], self._processes)

    @contextlib.contextmanager
    def _together(self, path: Path) -> Any:
        """What fails in one process fails in all, instead of leaving the others waiting for it."""
        error: BaseException | None = None
        try:
            with explained(path):
                yield
        except Exception as raised:
            error = raised
        if self._processes.any_of(error is not None):
            raise error or InputError(f"another process could not write or read {path}: its own message says why")


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """A checkpoint that a module spread over processes can be restored from, whatever number of them wrote it."""

    processes: ShardedProcesses

    def tensors(self, name: str) -> dict[str, Tensor]:
        """This process's part of the tensors in the folder ``name``; a collective call."""
        from torch.distributed.checkpoint.state_dict_loader import load

        if not (self.path / name).is_dir():
            raise InputError(
                f"{self.path} was written by a process alone: go on with it on one process, without a mesh"
            )
        reader = _reader(self.path / name)
        wanted = reader.read_metadata().state_dict_metadata
        parts = {
            key: self.processes.empty(key, found.size, found.properties.dtype) for key, found in sorted(wanted.items())
        }
        load(self.processes.whole(parts), storage_reader=_reader(self.path / name))
        return parts


def _write_parts(folder: Path, tensors: dict[str, Tensor]) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        # It is no Exception, and wraps what really happened, which may be a full disk.
        first, _ = next(iter(error.failures.values()))
        raise first from error


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))
