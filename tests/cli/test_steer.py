import pytest

from apportion.data.files import read_json

PROMPT = ("--prompt", "An assignment statement", "--tokens", "6")


def test_steer_shows_plain_and_steered_text_side_by_side(finished, typed):
    out = typed("steer", finished, "--feature", "5=40", "--ablate", "7", *PROMPT).out

    assert "feature 5: +40 (fires above" in out
    assert "feature 7: silenced" in out
    assert "promotes" in out
    assert "plain" in out
    assert "nats" in out


def test_steering_by_nothing_writes_the_same_text(finished, typed):
    answer = typed("steer", finished, *PROMPT, "--json").json

    assert [each["plain"] == each["steered"] for each in answer["texts"]] == [True]
    assert answer["rows"][0]["mean"] == 0
    assert answer["features"] == []


def test_steering_changes_what_is_written_and_drawing_is_repeatable(finished, typed):
    arguments = ("--feature", "5=60", "--clamp", "3=20", *PROMPT, "--prompt", "A name", "--temperature", "1")
    answer = typed("steer", finished, *arguments, "--seeds", "2", "--json").json

    assert answer["seeds"] == [0, 1]
    assert [(each["prompt"], each["seed"]) for each in answer["texts"]] == [
        ("An assignment statement", 0),
        ("A name", 0),
        ("An assignment statement", 1),
        ("A name", 1),
    ]
    assert all(each["plain"] != each["steered"] for each in answer["texts"])
    assert answer["site"] == read_json(finished / "run.json")["source"]["site"]
    assert {row["metric"] for row in answer["rows"]} == {"next_token_kl"}
    assert answer["rows"][0]["mean"] > 0
    again = typed("steer", finished, *arguments, "--seed", "1", "--json").json
    assert again["texts"] == answer["texts"][2:]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--feature", "5"), ("--feature", "'5'", "2301=8")),
        (("--feature", "five=1"), ("--feature", "'five=1'")),
        (("--feature", "64=1"), ("--feature", "feature 64", "0 to 63")),
        (("--clamp", "3=nan"), ("--clamp", "value nan")),
        (("--ablate", "64"), ("--ablate", "feature 64")),
        (("--feature", "5=1", "--ablate", "5"), ("feature 5 is edited twice",)),
        (("--positions", "middle"), ("--positions", "'middle'", "generated")),
        (("--site", "layers.9.residual"), ("layers.9.residual", "3 layers")),
        (("--chat",), ("chat template",)),
    ],
)
def test_what_cannot_be_steered_is_refused(arguments, named, finished, typed):
    outcome = typed("steer", finished, *arguments, *PROMPT)

    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert all(part in outcome.errors[0] for part in named)
