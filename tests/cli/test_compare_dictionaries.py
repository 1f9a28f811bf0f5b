import shutil

import pytest

from apportion.cli import main

SHORT = (
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
    "30",
)


@pytest.fixture(scope="module")
def another(tmp_path_factory, tiny_llama, text, shared_cache):
    """A run of another seed."""
    folder = tmp_path_factory.mktemp("runs") / "another"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPORTION_CACHE", str(shared_cache))
        with pytest.raises(SystemExit) as left:
            main(["train", str(tiny_llama), "--text", str(text), *SHORT, "--seed", "1", "--out", str(folder), "--json"])
        assert left.value.code == 0
    return folder


def test_two_seeds_are_compared_on_a_page(finished, another, typed, tmp_path):
    page = tmp_path / "page.html"
    outcome = typed("compare-dictionaries", finished, another, "--tokens", "1000", "--out", page, "--json")

    assert outcome.code == 0, outcome.err
    answer = outcome.json
    figures = {row["metric"]: row["mean"] for row in answer["rows"]}
    assert figures["pairs"] == 64
    assert figures["shared"] + figures["alone_a"] == 64
    assert answer["method"] == "hungarian"
    assert answer["seeds"] == [0, 1]
    assert set(figures) == set(answer["definitions"])
    html = page.read_text(encoding="utf-8")
    assert "<mark class=" in html
    assert "<script" not in html
    assert "Matched pairs" in html


def test_a_dictionary_is_like_itself(finished, typed, tmp_path):
    shutil.copytree(finished / "dictionary", tmp_path / "copy")
    out = typed("compare-dictionaries", finished, tmp_path / "copy", "--no-page", "--tokens", "500").out

    assert "mean_max_cosine_a 1.000" in " ".join(out.split())
    assert "comparison.html" not in out


def test_large_dictionaries_are_matched_greedily_and_told_so(finished, another, typed):
    outcome = typed("compare-dictionaries", finished, another, "--no-page", "--hungarian-limit", "10", "--json")

    assert outcome.json["method"] == "greedy"
    assert "greedily" in outcome.json["notes"][0]


def test_what_cannot_be_compared_is_refused(finished, typed, tmp_path):
    same = typed("compare-dictionaries", finished, finished)
    assert same.code == 2
    assert "the same folder" in same.errors[0]
    missing = typed("compare-dictionaries", finished, tmp_path / "none")
    assert missing.code == 2
    assert str(tmp_path / "none") in missing.errors[0]
