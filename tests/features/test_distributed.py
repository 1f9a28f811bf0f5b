"""A dictionary trained by several processes is the one that a single process trains."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from apportion.features.distributed import _directions
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
def test_parameters_are_shown_as_dtensors_of_the_whole_shape_and_rules_without_a_budget_refused(others: dict[str, Any]):
    # 37 features over 4 processes, cut as torch.chunk does.
    placements = "(Replicate(), Shard(dim=0))"
    assert others["shards"] == [[[37, 12], placements, here] for here in (10, 10, 10, 7)]


@pytest.mark.parametrize(("features", "width"), [(8192, 3), (8193, 3), (13_001, 7), (5, 3), (1, 1)])
def test_directions_drawn_in_pieces_are_those_drawn_at_once(features: int, width: int):
    whole = torch.randn(features, width, generator=torch.Generator().manual_seed(3))
    whole /= whole.norm(dim=1, keepdim=True)
    cuts = [0, features // 3, features // 2, features]
    for start, stop in itertools.pairwise(cuts):
        assert torch.equal(_directions(features, width, 3, slice(start, stop)), whole[start:stop])
