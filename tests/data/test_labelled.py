import json

import pytest

from apportion.data.labelled import LABELLED_SETS, crossed_texts, labelled_texts, read_labelled
from apportion.errors import InputError


@pytest.mark.slow
@pytest.mark.parametrize("name", LABELLED_SETS)
def test_packaged_sets_have_texts_of_every_class_and_repeat_themselves(name):
    found = labelled_texts(name, 20, 10)

    assert len(found.classes) >= 3
    assert all(found.sizes()[each] == [20, 10] for each in found.classes)
    assert found == labelled_texts(name, 20, 10)
    for each in found.classes:
        assert not set(found.train[each]) & set(found.test[each])
        assert all(len(text) >= 100 for text in found.train[each])


def test_crossed_texts_have_every_kind_of_every_library():
    train, test = crossed_texts(("numpy", "sklearn"), 4, 2)

    assert set(train) == set(test) == {(lib, kind) for lib in ("numpy", "sklearn") for kind in ("code", "prose")}
    assert all("def " in text for text in train["numpy", "code"])
    assert not any('"""' in text for text in train["sklearn", "code"])


def test_seeds_draw_other_texts():
    assert labelled_texts("module", 5, 5, seed=0) != labelled_texts("module", 5, 5, seed=1)


def test_labelled_files_are_read_and_groups_stay_together(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"text": f"{label} {n}", "label": label, "group": f"{n // 4}"} for label in "ab" for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_labelled(path, 100, 100)

    groups = [{int(text.split()[1]) // 4 for text in part["a"]} for part in (found.train, found.test)]
    assert not groups[0] & groups[1]
    assert sum(len(part["a"]) for part in (found.train, found.test)) == 40


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"text": "x"}', "line 1"), ("[]", "line 1"), ('{"text": "x", "label": "a"}', "fewer than 4")],
)
def test_labelled_files_that_are_not_are_refused(content, said, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=said):
        read_labelled(path, 3, 2)


def test_unknown_sets_are_refused():
    with pytest.raises(InputError, match="'colour' are unknown"):
        labelled_texts("colour", 3, 2)
