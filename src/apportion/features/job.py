"""The processes of one command: who this one is, what all wait for, and which of them speaks.

``torchrun`` starts the same command several times. All of them harvest and train together; files that belong to the
run as a whole are written, and messages printed, by the first process alone.
"""

import functools
import os
import re
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from apportion.allocate import Mesh
from apportion.errors import InputError

# How long one may wait for another to harvest or to measure. Who dies meanwhile is noticed by torchrun, not by this.
_PATIENCE = timedelta(days=30)
# To find each other at the start.
_START = timedelta(minutes=10)


class Job:
    """Those who run a command. This class stands for a process alone; a subclass for several.

    Each calls every method, and all at the same point.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.
        device: where this one computes.
        mesh: what they train over, or None for a process alone.
    """

    rank, size = 0, 1
    mesh: Mesh | None = None

    def __init__(self, device: str = "cpu") -> None:
        self.device = device

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and that writes what there is one of."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when all have come here."""

    def as_first_says(self, answer: bool) -> bool:
        """The answer of the first process: what is on a disk can look different to the others for a while."""
        return answer

    def leave(self) -> None:
        """End the job, at its end."""


class TorchrunJob(Job):
    """The processes that torchrun started; see `join_job`."""

    def __init__(self, device: str, mesh: Mesh) -> None:
        super().__init__(device)
        self.rank, self.size, self.mesh = dist.get_rank(), dist.get_world_size(), mesh
        # A group of its own, since collectives within a step should not be so patient.
        self._patient = dist.new_group(backend="gloo", timeout=_PATIENCE)

    def wait(self) -> None:
        """Return when all have come here."""
        dist.barrier(group=self._patient)

    def as_first_says(self, answer: bool) -> bool:
        """The answer of the first process."""
        said = torch.tensor(int(answer))
        dist.broadcast(said, src=0, group=self._patient)
        return bool(said)

    def leave(self) -> None:
        """Wait for all, as nobody may go while another listens to it; then end what connects them."""
        self.wait()
        dist.destroy_process_group()


def join_job(mesh: str | None, device: str) -> Job:
    """Join the other processes that torchrun started, if it did; start what connects them (NCCL on GPUs, else gloo).

    Args:
        mesh: ``DATAxFEATURE``, such as ``4x16``: how many share the tokens of a batch and how many the features; None
            lets all share the tokens.
        device: where to compute; of ``cuda`` every process takes the GPU of its number on the machine.

    Raises:
        InputError: a mesh without torchrun, or one that is not of as many processes; a GPU for each is not there.
    """
    started = started_by_torchrun()
    if mesh is not None and not started:
        raise InputError(
            f"mesh={mesh}: a mesh is for several processes; start the command with "
            "`torchrun --nproc-per-node N -m apportion`, or leave the mesh out"
        )
    size = int(os.environ["WORLD_SIZE"]) if started else 1
    if mesh is None and size == 1:
        return Job(device)
    data, feature = _shape(mesh, size)
    device = _own_device(device)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=PrefixStore("job", _meeting_place()),
        rank=int(os.environ["RANK"]),
        world_size=size,
    )
    return TorchrunJob(device, Mesh.of(data, feature, "cuda" if on_gpu else "cpu"))


def started_by_torchrun() -> bool:
    """Whether torchrun started this process; alone, if its ``WORLD_SIZE`` is 1."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def first_to_fail() -> bool:
    """Whether this process is the first of the job to fail, which should say why; the others hear of it by asking.

    It needs no process group, and no word from the others.
    """
    try:
        # Where torchrun keeps one place for all its attempts, the one before may have failed too.
        return int(_meeting_place().add(f"failures of attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", 1)) == 1
    except dist.DistError:
        # The first process kept the place. It failed before this one did, and has spoken; or it was killed, and then
        # torchrun says so.
        return False


@functools.cache
def _meeting_place() -> dist.Store:
    store, _, _ = next(rendezvous("env://", timeout=_START))
    return store


def _shape(mesh: str | None, size: int) -> tuple[int, int]:
    if mesh is None:
        return size, 1
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", mesh)
    if found is None:
        raise InputError(f"mesh={mesh!r} is not of the form DATAxFEATURE: give two numbers, such as {size}x1")
    data, feature = int(found[1]), int(found[2])
    if data * feature != size:
        raise InputError(
            f"mesh={mesh}: that is {data * feature} processes, but torchrun started {size} (--nnodes times "
            f"--nproc-per-node): give two numbers whose product is {size}, such as {size}x1 or 1x{size}"
        )
    return data, feature


def _own_device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    number, here, gpus = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device != "cuda" and here > 1:
        raise InputError(f"device={device} is one GPU for {here} processes: give cuda, and each takes its own")
    if here > gpus:
        raise InputError(f"device={device}: torchrun started {here} processes on a machine that has {gpus} GPUs")
    return f"cuda:{number}" if device == "cuda" else device
