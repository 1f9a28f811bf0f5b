import itertools
import sys
import types
from itertools import islice
from pathlib import Path

import pytest

from apportion.data import Corpus, Document, corpus
from apportion.errors import InputError


@pytest.mark.parametrize("name", ["english", "code"])
def test_a_packaged_corpus_comes_in_the_same_mixed_order_every_time(name):
    first, second = list(islice(corpus(name), 60)), list(islice(corpus(name), 60))
    assert first == second
    files = [document.name.split(":")[0].split(" (part")[0] for document in first]
    assert len(set(files)) > 5
    assert files != sorted(files)


def test_code_is_python_that_parses_where_it_was_not_cut():
    for document in islice(corpus("code"), 20):
        assert document.name.startswith("python/")
        assert "/test/" not in document.name
        assert len(document.text) <= 20_000


def test_english_is_prose_without_the_examples_of_its_docstrings():
    documents = list(islice(corpus("english"), 300))
    assert all(len(document.text) >= 100 for document in documents)
    assert len({document.text for document in documents}) == len(documents)
    docstrings = [
        document for document in documents if not document.name.startswith("pydoc/") and ".py" in document.name
    ]
    assert docstrings
    assert not [document.name for document in docstrings if "\n>>> " in document.text]


@pytest.mark.slow
def test_english_holds_more_than_a_million_tokens():
    # SmolLM2's tokeniser makes a token of 3.8 of its characters. Reading all of it takes 10 seconds, so stop when sure.
    characters = itertools.accumulate(len(document.text) for document in corpus("english"))
    assert any(count > 4.2e6 for count in characters)


def test_a_file_is_one_document_named_after_it(tmp_path: Path):
    (tmp_path / "note.txt").write_text("\ufeffTwo\nlines", encoding="utf-8")
    assert list(corpus(tmp_path / "note.txt")) == [Document("note.txt", "Two\nlines")]


def test_a_long_text_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path):
    text = "\n\n".join(f"paragraph {i} " + "word " * 150 for i in range(100))
    (tmp_path / "book.txt").write_text(text)
    parts = list(corpus(tmp_path / "book.txt"))
    assert [part.name for part in parts[:2]] == ["book.txt", "book.txt (part 2)"]
    assert len(parts) >= 4
    assert all(part.text.startswith("paragraph") for part in parts)
    assert "".join(part.text for part in parts) == text


def test_a_text_without_any_line_is_still_cut(tmp_path: Path):
    (tmp_path / "line.txt").write_text("x" * 70_000)
    assert [len(document.text) for document in corpus(tmp_path / "line.txt")] == [20_000, 20_000, 20_000, 10_000]


def test_a_folder_gives_its_text_files_in_order_of_name(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.md").write_text("c")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert list(corpus(tmp_path)) == [Document("a.md", "a"), Document("b.md", "b"), Document("sub/c.md", "c")]


def test_a_glob_gives_the_files_it_matches(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.md").write_text("a")
    (tmp_path / "sub" / "c.md").write_text("c")
    (tmp_path / "sub" / "d.txt").write_text("d")
    assert [document.text for document in corpus(f"{tmp_path}/**/*.md")] == ["a", "c"]


def test_the_fingerprint_changes_with_any_text_and_any_name(tmp_path: Path):
    def fingerprint(**files):
        return Corpus("x", lambda: [Document(name, text) for name, text in files.items()]).fingerprint

    seen = {
        fingerprint(a="one", b="two"),
        fingerprint(a="one", b="twp"),
        fingerprint(a="onet", b="wo"),
        fingerprint(c="one"),
    }
    assert len(seen) == 4
    assert fingerprint(a="one", b="two") in seen
    assert fingerprint(a="\ud800")


def refused(read, *fragments):
    with pytest.raises(InputError) as caught:
        read()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_bad_sources_are_refused_with_the_name_and_a_remedy(tmp_path: Path):
    refused(lambda: corpus(tmp_path / "absent.txt"), "absent.txt", "a file, a folder or a glob")
    refused(lambda: corpus(f"{tmp_path}/*.md"), "*.md", "matches no file")
    refused(lambda: corpus(tmp_path), str(tmp_path), "without files")


def test_files_that_are_not_text_are_refused_by_name(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    refused(lambda: list(corpus(tmp_path / "picture.png")), "picture.png", "not text")
    refused(lambda: list(corpus(tmp_path / "latin.txt")), "latin.txt", "UTF-8", "iconv")
    refused(lambda: list(corpus(tmp_path / "empty.txt")), "empty.txt", "holds no text")
    refused(lambda: list(corpus(f"{tmp_path}/dang*")), "dangling.txt", "cannot be read")


def test_a_hugging_face_corpus_needs_datasets(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: corpus("hf:some/stories"), "some/stories", "pip install datasets")


def test_a_hugging_face_corpus_reads_the_column_text(monkeypatch: pytest.MonkeyPatch):
    rows = {"good/one": [{"text": "once"}, {"text": "upon"}], "bad/one": [{"story": "once"}]}
    module = types.ModuleType("datasets")
    module.load_dataset = lambda identifier, split, streaming: rows[identifier]
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert list(corpus("hf:good/one")) == [Document("good/one#0", "once"), Document("good/one#1", "upon")]
    refused(lambda: list(corpus("hf:bad/one")), "'text'", "story")
    refused(lambda: list(corpus("hf:no/one")), "no/one", "could not be loaded")
