import pytest

from apportion import SparseAutoencoder, TokenChoice
from apportion.data.files import read_json

SMALL = (
    "--context",
    "32",
    "--tokens",
    "12000",
    "--features",
    "64",
    "--budget",
    "4",
    "--batch-size",
    "128",
    "--steps",
    "20",
)


def test_rules_are_compared_on_the_same_data_at_the_same_budget(typed, tiny_llama, text, tmp_path):
    out = tmp_path / "rules"

    answer = typed(
        "compare",
        tiny_llama,
        "--text",
        text,
        *SMALL,
        "--rules",
        "topk,batchtopk",
        "--seeds",
        "2",
        "--out",
        out,
        "--json",
    ).json

    rows = {(row["name"], row["metric"]): row for row in answer["rows"]}
    assert {name for name, _ in rows} == {"topk", "mutual"}
    assert rows["mutual", "fvu"]["n"] == 2
    assert rows["mutual", "fvu"]["stderr"] > 0
    assert answer["seeds"] == [0, 1]
    folders = [out / rule / "budget-4" / f"seed-{seed}" for rule in ("topk", "mutual") for seed in (0, 1)]
    runs = [read_json(folder / "run.json") for folder in folders]
    assert len({run["store_folder"] for run in runs}) == 1
    without_rule = [{**run["recipe"], "rule": None, "seed": None} for run in runs]
    assert all(recipe == without_rule[0] for recipe in without_rule)
    assert read_json(out / "compare.json") == answer
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "comparison.svg").read_text()
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "MutualChoice" in page
    assert "fvu, topk" in page


def test_a_comparison_is_extended_by_what_is_missing(typed, tiny_llama, text, tmp_path):
    common = ("compare", tiny_llama, "--text", text, *SMALL, "--out", tmp_path / "rules", "--report", "none")
    typed(*common, "--rules", "mutual")

    outcome = typed(*common, "--rules", "mutual,feature-uniform")

    assert outcome.code == 0
    assert outcome.err.count("is trained already") == 1
    assert "feature-uniform" in outcome.out
    assert not (tmp_path / "rules" / "report.html").exists()


def test_several_budgets_draw_the_trade_off_and_find_what_one_has_trained(typed, tiny_llama, text, tmp_path):
    out = tmp_path / "sweep"
    small = [each for each in SMALL if each not in ("--budget", "4")]
    common = ("compare", tiny_llama, "--text", text, *small, "--rules", "topk", "--report", "none", "--out", out)
    typed(*common, "--budget", "4")
    assert not (out / "tradeoff.png").exists()

    outcome = typed(*common, "--budget", "4,8", "--json", "--also", out / "topk" / "budget-4" / "seed-0")

    assert outcome.err.count("is trained already") == 1
    rows = {(row["name"], row["metric"]): row["mean"] for row in outcome.json["rows"]}
    assert rows["topk at 4", "l0"] == 4
    assert rows["topk at 8", "l0"] == 8
    assert rows["topk at 8", "fvu"] < rows["topk at 4", "fvu"]
    # What was brought along is measured like what was trained here.
    assert rows["seed-0", "fvu"] == rows["topk at 4", "fvu"]
    assert [run["budget"] for run in outcome.json["runs"]] == [4, 8]
    picture = (out / "tradeoff.svg").read_text()
    for words in ("loss recovered", "FVU (normalised MSE)", "dead features", "topk", "seed-0", "features used a token"):
        assert words in picture


def test_a_dictionary_of_another_width_is_refused_before_training(typed, tiny_llama, text, tmp_path):
    SparseAutoencoder(5, 8, TokenChoice(1)).save(tmp_path / "other")

    outcome = typed(
        "compare", tiny_llama, "--text", text, *SMALL, "--also", tmp_path / "other", "--out", tmp_path / "rules"
    )

    assert outcome.code == 2
    assert outcome.errors == [
        "error: --also: the dictionary other takes activations of width 5, layers.1.residual has 32: give one of the "
        "same model and site"
    ]
    assert not (tmp_path / "rules" / "topk").exists()


def test_rules_that_miss_the_budget_are_pointed_out(typed, tiny_llama, text, tmp_path):
    outcome = typed(
        "compare",
        tiny_llama,
        "--text",
        text,
        *SMALL,
        "--rules",
        "relu",
        "--report",
        "none",
        "--out",
        tmp_path / "rules",
    )

    assert outcome.code == 0
    assert "warning: relu uses" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--rules", "topk,besttopk"), "'besttopk'"),
        (("--rules", ","), "names no rule"),
        (("--rules", "mutual,batchtopk"), "mutual is there twice"),
        (("--rules", "topk", "--report", "mutual"), "mutual is not among the rules compared"),
        (("--rules", "topk", "--budget", "4.5"), "budget=4.5"),
        (("--budget", "4,many"), "--budget '4,many': give a number, or several"),
        (("--budget", "4,8,4"), "a budget is there twice"),
        (("--also", "nowhere"), "nowhere is not a folder"),
    ],
)
def test_comparisons_that_cannot_work_are_refused_before_anything_is_loaded(arguments, named, typed, tmp_path):
    outcome = typed("compare", "no-such-model", *arguments, "--out", tmp_path / "rules")

    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert named in outcome.errors[0]
