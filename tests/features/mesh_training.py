"""Not a test: trains small dictionaries over meshes and on one process; test_distributed.py runs it and compares.

mesh_training.py equal | killed FOLDER | others FOLDER
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apportion.allocate import FeatureChoice, Mesh, MutualChoice, Rule, Threshold, TokenChoice, Zipf
from apportion.errors import InputError
from apportion.features import Phases, Recipe, SparseAutoencoder, fit_dictionary
from apportion.features.distributed import ShardedAutoencoder, fit_dictionary_over_mesh
from forked_ranks import on_mesh

WIDTH, FEATURES, TOKENS = 12, 37, 51
RULES: dict[str, Rule] = {
    "TokenChoice": TokenChoice(3),
    "MutualChoice": MutualChoice(3),
    "FeatureChoice": FeatureChoice(3, profile=Zipf()),
}


def batches(step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    directions = torch.randn(60, WIDTH, generator=torch.Generator().manual_seed(99))
    weights = torch.rand(TOKENS, 60, generator=generator)
    active = torch.rand(TOKENS, 60, generator=generator) < 0.08
    return (weights * active) @ directions + 0.1 * torch.randn(TOKENS, WIDTH, generator=generator) + 0.5


def recipe(rule: str, auxiliary: str = "zipf", steps: int = 6, precision: str = "float32") -> Recipe:
    return Recipe(
        RULES[rule],
        n_features=FEATURES,
        steps=steps,
        batch_size=TOKENS,
        learning_rate=3e-3,
        auxiliary=auxiliary,
        # From the second step on nearly every batch leaves some feature silent, so the auxiliary loss has work.
        dead_after=TOKENS,
        phases=Phases(mutual_fraction=0.5, refresh_every=2),
        precision=precision,
    )


def outcome(sae: SparseAutoencoder, result: Any) -> dict[str, Any]:
    shown = ("loss", "gradient_norm", "fvu", "l0", "dead", "underused")
    return {
        "log": [[record[name] for name in shown] for record in result.history],
        "state": {name: tensor.tolist() for name, tensor in sae.state_dict().items()},
    }


def alone(_mesh: Mesh) -> dict[str, Any]:
    def calibration() -> list[Tensor]:
        return [batches(1000), batches(1001)]

    return {
        f"{rule} {auxiliary}": outcome(
            *fit_dictionary(
                recipe(rule, auxiliary), batches, WIDTH, calibration=calibration, progress=False, log_every=1
            )
        )
        for rule in RULES
        for auxiliary in ("none", "zipf")
    }


def together(mesh: Mesh) -> dict[str, Any]:
    def calibration() -> list[Tensor]:
        return [batches(1000), batches(1001)]

    return {
        f"{rule} {auxiliary}": outcome(
            *fit_dictionary_over_mesh(
                recipe(rule, auxiliary), batches, WIDTH, mesh, calibration=calibration, progress=False, log_every=1
            )
        )
        for rule in RULES
        for auxiliary in ("none", "zipf")
    }


def far(expected: Any, found: Any) -> float:
    """The largest difference, relative to 1 or to the number if that is larger."""
    one, other = (torch.tensor(each, dtype=torch.float64) for each in (expected, found))
    if one.shape != other.shape or not torch.equal(one.isnan(), other.isnan()):
        return float("inf")
    difference = (one - other).abs() / one.abs().clamp(min=1)
    return float(difference.nan_to_num(posinf=0).max()) if one.numel() else 0.0


def compare(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    distances = {"log": far(expected["log"], found["log"])}
    return distances | {name: far(expected["state"][name], value) for name, value in found["state"].items()}


def equal() -> dict[str, dict[str, float]]:
    (reference,) = on_mesh(1, 1, alone)
    report = {}
    for data, feature in ((2, 1), (1, 2), (2, 2)):
        for rank, found in enumerate(on_mesh(data, feature, together)):
            for name, expected in reference.items():
                # How much of the loss was auxiliary: what is compared should not be nothing.
                extra = max(record[0] - record[2] for record in expected["log"])
                report[f"{data}x{feature} rank {rank} {name}"] = compare(expected, found[name]) | {"auxiliary": extra}
    return report


def count_bytes(mesh: Mesh) -> dict[str, list[int]]:
    """Bytes brought into collectives by each group in the last step of a run without checkpoints."""
    counted = {"feature": 0, "data": 0}
    names = {id(mesh.group(name)): name for name in ("feature", "data")}
    all_reduce, all_gather = dist.all_reduce, dist.all_gather

    def counting(tensor: Tensor, group: Any) -> None:
        counted[names[id(group)]] += tensor.nbytes

    def reduce_and_count(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None) -> None:
        counting(tensor, group)
        all_reduce(tensor, op, group=group)

    def gather_and_count(parts: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        counting(tensor, group)
        all_gather(parts, tensor, group=group)

    dist.all_reduce, dist.all_gather = reduce_and_count, gather_and_count
    found = {}
    # So few winners that the auxiliary loss always has features to revive.
    rules = {**RULES, "TokenChoice": TokenChoice(1)}
    for rule in rules:
        for auxiliary in ("none", "dead"):
            totals = []
            # The difference between four steps and three is a step of the final phase, without a refresh and, in the
            # batches of this test, with features that have been silent for a batch.
            for stop_after in (4, 3):
                counted.update(feature=0, data=0)
                planned = Recipe(
                    rules[rule],
                    n_features=40,
                    steps=8,
                    batch_size=48,
                    auxiliary=auxiliary,
                    dead_after=1,
                    phases=Phases(mutual_fraction=0.0, refresh_every=100),
                )
                fit_dictionary_over_mesh(
                    planned, lambda step: batches(step)[:48], WIDTH, mesh, progress=False, stop_after=stop_after
                )
                totals.append(dict(counted))
            found[f"{rule} {auxiliary}"] = [totals[0][name] - totals[1][name] for name in ("feature", "data")]
    return found


def in_bfloat16() -> dict[str, list[list[float]]]:
    """The losses of one process and of two, and those of two in float32."""

    def losses(mesh: Mesh) -> dict[str, list[float]]:
        found = {}
        for rule in RULES:
            planned = recipe(rule, precision=precision)
            options = {"progress": False, "log_every": 1}
            if mesh.device_mesh.size() == 1:
                _, result = fit_dictionary(planned, batches, WIDTH, **options)
            else:
                _, result = fit_dictionary_over_mesh(planned, batches, WIDTH, mesh, **options)
            found[rule] = [record["loss"] for record in result.history]
        return found

    runs, precision = [], "bfloat16"
    for data, feature in ((1, 1), (1, 2), (2, 1)):
        runs.append(on_mesh(data, feature, losses)[0])
    precision = "float32"
    runs.append(on_mesh(2, 1, losses)[0])
    return {rule: [run[rule] for run in runs] for rule in RULES}


def checkpoints(folder: Path) -> dict[str, Any]:
    """Four processes pause after three steps; four, two and one go on, and so does a run that never paused."""

    def run(name: str, stop_after: int | None = None) -> Any:
        def work(mesh: Mesh) -> dict[str, Any]:
            sae, result = fit_dictionary_over_mesh(
                recipe("FeatureChoice"),
                batches,
                WIDTH,
                mesh,
                folder=folder / name,
                progress=False,
                log_every=1,
                stop_after=stop_after,
            )
            return outcome(sae, result) | {"resumed_from": result.resumed_from}

        return work

    undisturbed = on_mesh(2, 2, run("undisturbed"))[0]
    on_mesh(2, 2, run("paused", stop_after=4))
    written = sorted(str(each.relative_to(folder / "paused")) for each in (folder / "paused").rglob("*"))
    report: dict[str, Any] = {"files": written}
    for data, feature in ((2, 2), (1, 2), (1, 1)):
        name = f"{data}x{feature}"
        shutil.copytree(folder / "paused", folder / name)
        found = on_mesh(data, feature, run(name))[0]
        report[name] = compare(undisturbed, found) | {"resumed_from": found["resumed_from"]}
    return report


def killed(folder: Path) -> dict[str, Any]:
    """A run whose rank 1 is killed after five of eight steps and that torchrun starts again, beside one that is not."""

    def undisturbed(mesh: Mesh) -> dict[str, Any]:
        return outcome(
            *fit_dictionary_over_mesh(
                recipe("MutualChoice", steps=8), batches, WIDTH, mesh, progress=False, log_every=1
            )
        )

    expected = on_mesh(1, 2, undisturbed)[0]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    script = Path(__file__).parent / "torchrun_killed.py"
    # Without it restarted processes may find the addresses of the dead ones (pytorch issue 135712).
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*launcher, str(script), str(folder)], capture_output=True, text=True, timeout=90, env=environment
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    found = json.loads((folder / "outcome.json").read_text())
    return compare(expected, found) | {name: found[name] for name in ("restarts", "resumed_from")}


def shards(mesh: Mesh) -> list[Any]:
    with contextlib.suppress(InputError):
        fit_dictionary_over_mesh(Recipe(Threshold(0.0), FEATURES, 1), batches, WIDTH, mesh)
        raise AssertionError("a rule without a budget was not refused")
    with contextlib.suppress(InputError):
        ShardedAutoencoder(WIDTH, 2, TokenChoice(3), mesh)
        raise AssertionError("a budget larger than the dictionary was not refused")
    sae = ShardedAutoencoder(WIDTH, FEATURES, TokenChoice(3), mesh)
    whole = sae.processes().whole(dict(sae.named_parameters()))
    return [list(whole["encoder_weight"].shape), str(whole["encoder_weight"].placements), sae.encoder_weight.shape[0]]


if __name__ == "__main__":
    kind, folder = sys.argv[1], Path(sys.argv[-1])
    if kind == "equal":
        print(json.dumps(equal()))
    elif kind == "killed":
        print(json.dumps(killed(folder)))
    else:
        mesh_of_four = {"bytes": on_mesh(2, 2, count_bytes), "shards": on_mesh(1, 4, shards)}
        print(json.dumps(mesh_of_four | {"bfloat16": in_bfloat16(), "checkpoints": checkpoints(folder)}))
