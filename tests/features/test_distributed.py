"""A dictionary trained by several processes is the one that a single process trains."""

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from apportion.allocate import FeatureChoice, Mesh, MutualChoice, Rule, Threshold, TokenChoice
from apportion.errors import InputError
from apportion.features import Phases, Recipe, fit_dictionary
from apportion.features.distributed import _directions, fit_dictionary_over_mesh
from forked_ranks import run_script

SCRIPT = Path(__file__).parent / "mesh_training.py"
# Adam divides by the size of the gradient: where that is nothing but rounding, a step is nothing but rounding too.
TOLERANCE = 2e-4


@functools.cache
def trained() -> dict[str, dict[str, float]]:
    return run_script(SCRIPT, "equal")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_script(SCRIPT, "others", str(tmp_path_factory.mktemp("runs")))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["2x1", "1x2", "2x2"])
@pytest.mark.parametrize("rule", ["TokenChoice", "MutualChoice", "FeatureChoice"])
def test_losses_weights_statistics_and_thresholds_equal_those_of_one_process(mesh: str, rule: str):
    runs = {name: found for name, found in trained().items() if name.startswith(mesh) and rule in name}
    processes = int(mesh[0]) * int(mesh[2])
    # With and without the auxiliary loss, on every process.
    assert len(runs) == 2 * processes
    for name, distances in runs.items():
        assert distances.pop("auxiliary") > 1e-3 or "none" in name
        assert {key: far for key, far in distances.items() if far > TOLERANCE} == {}, name
        assert distances["log"] < 1e-5


@pytest.mark.slow
def test_a_step_moves_the_bytes_that_the_formula_says(others: dict[str, Any]):
    tokens, features, width = 24, 20, 12  # of each process, on a mesh of 2 x 2
    over_feature = 4 * tokens * width + 4 * width + 36
    over_data = 8 * features * width + 12 * features + 8 * width + 48
    selection = {
        "TokenChoice": (512 * tokens + 4, 4),
        "MutualChoice": (40_960 + 4, 40_960 + 4),
        "FeatureChoice": (0, 512 * features + 4 * features),
    }
    auxiliary = (4 * tokens * width + 512 * tokens + 8, 4 * width + 24)
    expected = {}
    for rule, (along_feature, along_data) in selection.items():
        bare = [over_feature + along_feature, over_data + along_data]
        expected[f"{rule} none"] = bare
        expected[f"{rule} dead"] = [bare[0] + auxiliary[0], bare[1] + auxiliary[1]]
    assert others["bytes"] == [expected] * 4


@pytest.mark.slow
def test_what_four_processes_saved_four_two_and_one_go_on_with(others: dict[str, Any]):
    report = others["checkpoints"]
    files = [name for name in report.pop("files") if Path(name).suffix]
    assert {Path(name).suffix for name in files} == {".safetensors", ".json", ".jsonl"}
    assert len([name for name in files if name.endswith(".safetensors")]) == 8
    assert [each.pop("resumed_from") for each in report.values()] == [4] * 3
    assert set(report.pop("2x2").values()) == {0.0}
    for distances in report.values():
        assert max(distances.values()) < TOLERANCE


@pytest.mark.slow
def test_a_rank_that_is_killed_is_started_again_and_the_run_ends_as_if_undisturbed(tmp_path: Path):
    report = run_script(SCRIPT, "killed", str(tmp_path))
    # One restart from step 4, unless gloo aborts another process meanwhile, as one in fifty runs of this test has seen.
    assert report.pop("restarts") >= 1
    assert report.pop("resumed_from") >= 4
    assert set(report.values()) == {0.0}


@pytest.mark.slow
def test_in_bfloat16_the_losses_of_two_processes_are_nearly_those_of_one(others: dict[str, Any]):
    for rule, (alone, *together, in_float32) in others["bfloat16"].items():
        assert len(alone) == 6
        assert together[-1] != in_float32
        for losses in together:
            # Winners next to the last one may differ: bfloat16 decides on one process, full precision over a mesh.
            assert losses == pytest.approx(alone, rel=0.02), rule


@pytest.mark.slow
def test_parameters_are_shown_as_dtensors_of_the_whole_shape_and_rules_without_a_budget_refused(others: dict[str, Any]):
    # 37 features over 4 processes, cut as torch.chunk does.
    placements = "(Replicate(), Shard(dim=0))"
    assert others["shards"] == [[[37, 12], placements, here] for here in (10, 10, 10, 7)]


@pytest.fixture
def mesh_of_one() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Mesh.of(data=1, feature=1)
    dist.destroy_process_group()


def batches(step: int) -> Tensor:
    return torch.randn(40, 8, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("rule", [TokenChoice(2), MutualChoice(2), FeatureChoice(2)], ids=lambda rule: str(rule)[:12])
def test_a_mesh_of_one_process_trains_the_same_and_resumes_exactly(rule: Rule, mesh_of_one: Mesh, tmp_path: Path):
    recipe = Recipe(rule, n_features=30, steps=6, batch_size=40, dead_after=1, phases=Phases(refresh_every=2))
    options = {"calibration": lambda: [batches(9)], "progress": False, "folder": tmp_path}
    alone, expected = fit_dictionary(recipe, batches, 8, **{**options, "folder": None})
    fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, **options, stop_after=4)
    found, result = fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, **options)
    assert result.resumed_from == 4
    for record, other in zip(expected.history, result.history, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-4, atol=TOLERANCE, equal_nan=True)


def test_what_several_processes_wrote_is_not_mistaken_for_what_one_did(mesh_of_one: Mesh, tmp_path: Path):
    recipe = Recipe(TokenChoice(2), n_features=30, steps=4, batch_size=40)
    fit_dictionary(recipe, batches, 8, progress=False, folder=tmp_path / "alone", stop_after=2)
    fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, progress=False, folder=tmp_path / "mesh", stop_after=2)
    with pytest.raises(InputError, match="without a mesh"):
        fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, progress=False, folder=tmp_path / "alone")
    with pytest.raises(InputError, match="go on over a mesh"):
        fit_dictionary(recipe, batches, 8, progress=False, folder=tmp_path / "mesh")


def test_a_damaged_part_is_noticed_and_the_checkpoint_before_it_used(mesh_of_one: Mesh, tmp_path: Path):
    recipe = Recipe(TokenChoice(2), n_features=30, steps=6, batch_size=40)
    options = {"progress": False, "folder": tmp_path, "checkpoint_every": 2}
    fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, **options, stop_after=4)
    (part,) = (tmp_path / "checkpoints" / "step-00000004" / "module").iterdir()
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        _, result = fit_dictionary_over_mesh(recipe, batches, 8, mesh_of_one, **options)
    assert result.resumed_from == 2


def test_a_mesh_must_fit_the_job(mesh_of_one: Mesh):
    with pytest.raises(ValueError, match="does not fit the job"):
        Mesh.of(data=2, feature=1)


def test_rules_without_a_budget_are_refused_over_a_mesh(mesh_of_one: Mesh):
    with pytest.raises(InputError, match="train others with fit_dictionary"):
        fit_dictionary_over_mesh(Recipe(Threshold(0.0), 8, 1), batches, 8, mesh_of_one)


@pytest.mark.parametrize(("features", "width"), [(8192, 3), (8193, 3), (13_001, 7), (5, 3), (1, 1)])
def test_directions_drawn_in_pieces_are_those_drawn_at_once(features: int, width: int):
    whole = torch.randn(features, width, generator=torch.Generator().manual_seed(3))
    whole /= whole.norm(dim=1, keepdim=True)
    cuts = [0, features // 3, features // 2, features]
    for start, stop in itertools.pairwise(cuts):
        assert torch.equal(_directions(features, width, 3, slice(start, stop)), whole[start:stop])
