"""The benchmarks run at their smoke size and say what they promise; nothing here is about how fast anything is."""

import itertools
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.all  # noqa: F401  fills the registry
from apportion.errors import InputError
from benchmarks import contenders, harvest, keys, memory, million, page, peers, runner, step_parts
from benchmarks.command import RESULTS, main
from benchmarks.machine import ROOT
from benchmarks.problem import SMOKE, Problem
from benchmarks.registry import BENCHMARKS, Case, Race, RacePlan, Unavailable, benchmark, chosen
from benchmarks.tables import cells, overview, shown

NEVER = time.monotonic() + 1e6


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no other library is installed; importing those that are would take longer than all tests here."""

    def absent(name: str) -> Any:
        raise ImportError(f"{name.partition('.')[0]} cannot be imported (made up)")

    monkeypatch.setattr(peers, "imported", absent)
    monkeypatch.setattr(peers, "_bare_package", lambda name: None)


@pytest.fixture
def smoke(no_peers: None, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path) -> None:
    """Everything that a smoke run of every benchmark needs."""
    monkeypatch.setattr(harvest, "_MODEL", str(tiny_llama))
    monkeypatch.setattr(keys, "_MODEL", str(tiny_llama))


def run_smoke(name: str) -> dict[str, Any]:
    (result,) = runner.run(chosen([name]), smoke=True, rounds=1, minutes=1, say=lambda line: None)
    return json.loads(json.dumps(result, allow_nan=False))


@pytest.mark.slow
@pytest.mark.usefixtures("smoke")
@pytest.mark.parametrize(
    "name",
    [
        "step",
        "step_parts",
        "scaling",
        "memory",
        "million",
        "harvest",
        "report",
        "keys",
        "generation",
        "prefill",
        "monarch",
        "spmm",
        "sparse_decode",
    ],
)
def test_smoke_run_gives_the_promised_json(name: str) -> None:
    result = run_smoke(name)
    assert result["skipped"] is None
    for promised in ("name", "date", "machine", "commit", "versions", "threads", "shape", "seconds", "ratios", "races"):
        assert promised in result
    assert result["name"] == name
    for race in result["races"]:
        assert race["rounds"] == 1
        labels = [case["label"] for case in race["cases"]]
        assert race["baseline"] in labels
        for case in race["cases"]:
            assert len(case["samples"][race["quantity"]]) == 1
            low, high = case["quartiles"][race["quantity"]]
            assert low <= case["median"][race["quantity"]] <= high
        table = cells(race)
        assert len({len(row) for row in table}) == 1
        assert {label for row in table for label in row} >= set(labels)


@pytest.mark.usefixtures("no_peers")
def test_peers_that_are_absent_are_left_out_with_a_reason() -> None:
    (race,) = run_smoke("step")["races"]
    labels = {case["label"] for case in race["cases"]}
    assert {"bare product", "apportion TokenChoice", "apportion MutualChoice bf16"} <= labels
    assert "sparsify cannot be imported" in race["skipped"]["sparsify"]
    assert not labels & set(race["skipped"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", peers.peers(), ids=lambda peer: peer.label)
def test_peers_that_are_present_learn(peer: contenders.Contender) -> None:
    problem = Problem(SMOKE)
    try:
        step = peer.build(problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    before = [parameter.detach().clone() for parameter in step.parameters]
    step.take(problem.batch(0))
    moved = [bool((was != now).any()) for was, now in zip(before, step.parameters, strict=True)]
    weights = [place for place, parameter in enumerate(step.parameters) if parameter.ndim == 2]
    assert len(weights) == 2
    assert all(moved[place] for place in weights)
    assert torch.Tensor.backward.__code__.co_filename.endswith("_tensor.py"), "its import changed torch for all"


def test_a_peer_whose_step_fails_is_left_out_with_a_reason() -> None:
    def broken(problem: Problem) -> contenders.TrainingStep:
        def take(x: object) -> None:
            raise RuntimeError("no such kernel\nand much more")

        return contenders.TrainingStep(take)

    with pytest.raises(Unavailable, match=r"its step fails here \(RuntimeError: no such kernel\)"):
        peers._tried(broken)(Problem(SMOKE))


def test_cases_take_turns_after_the_warm_up() -> None:
    order: list[str] = []

    def case(label: str) -> Case:
        def measure(turn: int) -> dict[str, float]:
            order.append(f"{label}{turn}")
            return {"seconds": float(turn)}

        return Case(label, measure)

    race = Race([case(label) for label in "ABC"], baseline="A")
    samples = runner.interleaved(race, rounds=2, warm_ups=1, until=NEVER)
    assert order == ["A0", "B0", "C0", "A1", "B1", "C1", "A2", "B2", "C2"]
    assert samples["B"] == [{"seconds": 1.0}, {"seconds": 2.0}]


def test_a_race_whose_time_is_spent_ends_after_a_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_ALWAYS_SECONDS", 0.0)
    taken = itertools.count()
    race = Race([Case(label, lambda turn: {"seconds": float(next(taken))}) for label in "AB"], baseline="A")
    samples = runner.interleaved(race, rounds=50, warm_ups=0, until=time.monotonic() - 1)
    assert [len(each) for each in samples.values()] == [1, 1]


def test_a_short_race_is_not_cut_by_what_took_long_before_it() -> None:
    race = Race([Case(label, lambda turn: {"seconds": 0.0}) for label in "AB"], baseline="A")
    samples = runner.interleaved(race, rounds=7, warm_ups=0, until=time.monotonic() - 1)
    assert [len(each) for each in samples.values()] == [7, 7]


def test_a_million_features_are_not_tried_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(million, "_available_memory", lambda: 17 * 1024**3 - 1)
    with pytest.raises(Unavailable, match=r"17 GiB .* 17\.0 GiB"):
        million.plans(smoke=False)
    (plan,) = million.plans(smoke=True)
    assert plan.shape["features"] < 1000
    monkeypatch.setattr(million, "_available_memory", lambda: 17 * 1024**3)
    (plan,) = million.plans(smoke=False)
    assert plan.shape == {"tokens": 1024, "width": 576, "features": 1048576, "budget": 32}


def test_a_measurement_that_fails_in_its_own_process_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)benchmarks\.million failed:.*KeyError: 'shape'"):
        memory.in_fresh_process("benchmarks.million", {})


def test_ratios_are_of_medians() -> None:
    made_up = {"A": [1.0, 2.0, 100.0], "B": [3.0, 5.0, 4.0]}
    race = Race([Case(label, lambda turn: {}) for label in made_up], baseline="A")
    samples = {label: [{"seconds": value} for value in values] for label, values in made_up.items()}
    a, b = runner.summaries(race, samples)
    assert (a["ratio"], b["ratio"]) == (1.0, 2.0)
    assert b["quartiles"]["seconds"] == [3.5, 4.5]
    assert a["samples"]["seconds"] == made_up["A"]


def test_every_function_that_the_profile_labels_is_there() -> None:
    for owner, name, part in step_parts._LABELLED:
        assert callable(getattr(owner, name, None)), f"{name} is gone: say in step_parts what the part {part!r} is now"


def test_the_profile_sees_the_parts_of_a_step() -> None:
    (race,) = run_smoke("step_parts")["races"]
    for case in race["cases"][1:]:
        parts = {part: case["median"][f"{part} seconds"] for part in step_parts.PARTS}
        assert math.isclose(sum(parts.values()), case["median"]["seconds"], rel_tol=0.5)
        there = ("product", "selection", "decode", "weight gradients", "projection", "Adam and normalisation")
        assert not [part for part in there if parts[part] <= 0]


def test_apportion_step_is_the_step_of_fit_dictionary() -> None:
    problem = Problem(SMOKE)
    run, steps = contenders.training_run(problem, contenders.TokenChoice(SMOKE.budget), "float32")
    assert bool((run.module.encoder_weight == problem.directions).all())
    steps.take(problem.batch(0))
    assert run.steps_done == 1
    assert bool((run.module.encoder_weight != problem.directions).any())
    assert run.module.decoder_weight.norm(dim=1).allclose(problem.directions.norm(dim=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stepp"], "no benchmark is called 'stepp': choose from step, "),
        (["step", "--rounds", "0"], "--rounds 0: must be above 0"),
        (["plot", "--out", "nowhere", "--budget-minutes", "-1"], "--budget-minutes -1.0: must be above 0"),
    ],
)
def test_bad_input_is_explained_with_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_list_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHMARKS)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a benchmark that takes no time."""

    def plans(smoke: bool) -> list[RacePlan]:
        cases = [Case("slow", lambda turn: {"seconds": 3.0}), Case("quick", lambda turn: {"seconds": 2.0})]
        return [RacePlan("quick", {"size": 1}, lambda: Race(cases, "quick"))]

    # Registered by the line after it; monkeypatch takes it out again when the test is over.
    monkeypatch.setitem(BENCHMARKS, "quick", None)
    benchmark("quick", "is it quick?", rounds=3, share=1)(plans)
    return "quick"


def test_results_are_written_and_printed(quick: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([quick, "--out", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ratios"] == {"slow/quick": 1.5, "quick/quick": 1.0}
    assert printed["seconds"] == {"slow": 3.0, "quick": 2.0}
    (file,) = tmp_path.iterdir()
    assert file.name.startswith(f"quick-{printed['date'][:10]}-")
    assert json.loads(file.read_text()) == printed


def test_a_smoke_run_leaves_no_file(quick: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.command.RESULTS", tmp_path)
    assert main([quick, "--smoke"]) == 0
    assert not list(tmp_path.iterdir())


def test_what_cannot_run_here_is_skipped_with_its_reason(
    quick: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def impossible(smoke: bool) -> list[RacePlan]:
        raise Unavailable("there is no model")

    benchmark(quick, "?", rounds=1, share=1)(impossible)
    assert main([quick, "--out", str(tmp_path)]) == 0
    assert "skipped: there is no model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the page."""
    folder = tmp_path / "docs"
    (folder / "images").mkdir(parents=True)
    shutil.copy(ROOT / "docs" / page.PAGE, folder)
    return folder


@pytest.mark.slow
def test_the_page_is_what_the_newest_results_say(docs: Path) -> None:
    written = page.write_page(RESULTS, docs)
    assert written.read_text() == (ROOT / "docs" / page.PAGE).read_text()
    in_docs = {path.name for path in (ROOT / "docs" / "images").glob("performance-*.svg")}
    assert {path.name for path in (docs / "images").iterdir()} == in_docs


@pytest.mark.slow
@pytest.mark.usefixtures("smoke")
def test_the_page_shows_newest_results_and_says_what_is_missing(docs: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for name in ("step", "step_parts", "scaling"):
        older = run_smoke(name) | {"smoke": False, "date": "2001-01-01T00:00:00+00:00", "commit": "older"}
        newer = older | {"date": "2002-02-02T00:00:00+00:00", "commit": "newer"}
        tried = older | {"date": "2003-03-03T00:00:00+00:00", "commit": "tried", "smoke": True}
        for number, result in enumerate((newer, tried, older)):
            (results / f"{name}-{number}.json").write_text(json.dumps(result))
    text = page.write_page(results, docs).read_text()
    assert text.count("2002-02-02, commit newer") == 3
    assert "older" not in text
    assert "tried" not in text
    assert "Not measured yet: run `python -m benchmarks memory`" in text
    assert "sparsify: not measured, sparsify cannot be imported" in text
    assert "| apportion MutualChoice bf16 |" in text
    assert "- apportion TokenChoice; apportion MutualChoice;" in text
    pictures = {path.name for path in (docs / "images").iterdir()}
    assert pictures == {"performance-step.svg", "performance-step-parts.svg", "performance-scaling-features.svg"}
    assert all(f"(images/{name})" in text for name in pictures)
    assert page.write_page(tmp_path / "none", docs).read_text().count("Not measured yet") == len(BENCHMARKS)
    assert not list((docs / "images").iterdir())


def test_a_page_without_its_marks_is_refused(docs: Path) -> None:
    (docs / page.PAGE).write_text("# Performance\n")
    with pytest.raises(InputError, match="must have <!-- results: step --> and <!-- end: step --> once"):
        page.write_page(docs, docs)


def test_values_are_shown_with_their_unit() -> None:
    assert shown("seconds", 0.2213) == "221.3 ms"
    assert shown("seconds", 2.21e-5) == "22.1 µs"
    assert shown("product seconds", 12.0) == "12.00 s"
    assert shown("extra bytes", 67_108_864) == "67.1 MB"
    assert shown("tokens per second", 1234.5) == "1,234"


def test_many_races_make_one_table_of_ratios():
    def race(title, ratio):
        cases = [
            {"label": "dense", "ratio": 1.0, "median": {"seconds": 0.002}},
            {"label": "packed", "ratio": ratio, "median": {"seconds": 0.002 * ratio}},
        ]
        return {"title": title, "baseline": "dense", "quantity": "seconds", "cases": cases}

    lacking = race("third", 1.0)
    del lacking["cases"][1]
    table = overview([race("first", 0.5), race("second", 2.0), lacking]).splitlines()
    assert table[0] == "| | dense | packed, × |"
    assert table[2:] == ["| first | 2.0 ms | 0.50 |", "| second | 2.0 ms | 2.00 |", "| third | 2.0 ms | – |"]
