import errno
import json
import logging
import math
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from apportion.data import Document, corpus
from apportion.errors import InputError
from apportion.models import (
    ActivationStore,
    Site,
    capture_with_loss_gradients,
    gradient_of,
    join_parts,
    load,
)
from apportion.models.harvest import harvest

harvest_module = sys.modules["apportion.models.harvest"]
SITE = "layers.1.residual"


def documents(count=60, seed=0):
    words = np.random.default_rng(seed).integers(0, 10**6, size=(count, 30))
    return [Document(f"doc{i}", " ".join(map(str, row[: 1 + i % 30]))) for i, row in enumerate(words)]


ARGUMENTS = {"context": 16, "tokens": 1500, "shard_tokens": 256, "batch_size": 4, "progress": False}


def make(folder, lm, texts=None, site=SITE, **changes):
    return harvest(lm, site, documents() if texts is None else texts, folder, **(ARGUMENTS | changes))


def contents(folder: Path):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return load(str(tiny_llama))


def expected_stream(lm, texts):
    stream = []
    for document in texts:
        ids = lm.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        stream += [*ids, lm.tokenizer.eos_token_id] if ids else []
    return torch.tensor(stream)


def test_contexts_are_the_documents_laid_end_to_end(lm, tmp_path):
    store = make(tmp_path / "store", lm)
    token_ids = store.contexts(0, store.n_contexts)[0]
    assert torch.equal(token_ids.flatten(), expected_stream(lm, documents())[: token_ids.numel()])


def test_a_token_that_the_tokeniser_puts_first_begins_every_context(lm, tmp_path):
    import tokenizers
    import transformers

    inner = tokenizers.Tokenizer.from_str(lm.tokenizer.backend_tokenizer.to_str())
    inner.add_special_tokens(["<begin>"])
    begin = 5
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="! $A", special_tokens=[("!", begin)])
    dressed = replace(lm, tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>"))
    store = make(tmp_path / "store", dressed)
    token_ids = store.contexts(0, store.n_contexts)[0]
    assert (token_ids[:, 0] == begin).all()
    body = token_ids[:, 1:].flatten()
    assert torch.equal(body, expected_stream(lm, documents())[: body.numel()])


def test_the_first_token_of_each_context_is_dropped_where_asked(lm, tmp_path):
    dropped = make(tmp_path / "dropped", lm, max_norm_ratio=None)
    valid = dropped.contexts(0, dropped.n_contexts)[2]
    assert not valid[:, 0].any()
    assert valid[:, 1:].all()
    kept = make(tmp_path / "kept", lm, max_norm_ratio=None, drop_first=False)
    assert kept.n_tokens == kept.n_contexts * 16


def test_tokens_with_outlying_norms_are_dropped_at_all_sites(lm, tmp_path):
    sites = [SITE, "layers.1.mlp_out"]
    store = make(tmp_path / "store", lm, site=sites, max_norm_ratio=1.2, dtype="float32")
    medians = store.manifest["norm_medians"]
    _, first, valid, _ = store.contexts(0, store.n_contexts, sites[0])
    second = store.contexts(0, store.n_contexts, sites[1])[1]
    norms = [first.norm(dim=-1), second.norm(dim=-1)]
    for site, norm in zip(sites, norms, strict=True):
        assert medians[site] == pytest.approx(float(np.median(norm[:4, 1:])), rel=1e-6)
    within = (norms[0] <= 1.2 * medians[sites[0]]) & (norms[1] <= 1.2 * medians[sites[1]])
    within[:, 0] = False
    assert torch.equal(valid, within)
    assert 0.2 < valid.float().mean() < 0.9
    assert store.n_tokens >= 1500


def test_the_harvest_stops_after_the_context_that_reaches_the_number_of_tokens(lm, tmp_path):
    store = make(tmp_path / "store", lm, tokens=1000, max_norm_ratio=None)
    assert store.n_contexts == -(-1000 // 15)
    assert 1000 <= store.n_tokens < 1015


def test_a_text_that_ends_early_gives_what_it_has_and_says_so(lm, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        store = make(tmp_path / "store", lm, documents(20))
    assert store.n_contexts == len(expected_stream(lm, documents(20))) // 16
    assert f"the text ended after {store.n_tokens:,} of the 1,500 tokens wanted" in caplog.text
    # More text would have made another store.
    with pytest.raises(InputError, match="other documents"):
        make(tmp_path / "store", lm, documents(21))


def test_a_finished_store_is_returned_without_running_the_model(lm, tmp_path, monkeypatch):
    make(tmp_path / "store", lm)
    before = contents(tmp_path / "store")
    monkeypatch.setattr(harvest_module, "capture", None)
    make(tmp_path / "store", lm)
    assert contents(tmp_path / "store") == before


def test_the_manifest_tells_where_the_activations_come_from(lm, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(document.text for document in documents()))
    store = make(tmp_path / "store", lm, corpus(tmp_path / "text.txt"))
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest == store.manifest
    assert manifest["model"] == {"name": lm.name, "fingerprint": lm.fingerprint}
    assert manifest["documents"]["name"].endswith("text.txt")
    assert manifest["made_from"]["sites"] == {SITE: 32}
    assert [shard["rows"] for shard in manifest["shards"]][:2] == [240, 240]
    assert store.n_tokens == sum(shard["rows"] for shard in manifest["shards"])


# ---------------------------------------------------------------------------------------------------- interruption


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("batches", [0, 3, 4, 11])
def test_an_interrupted_harvest_continues_and_ends_with_the_same_bytes(lm, tmp_path, monkeypatch, batches):
    continued_after(batches, "capture", {}, lm, tmp_path, monkeypatch)


@pytest.mark.parametrize("gradients", ["label", "sampled"])
def test_an_interrupted_harvest_of_gradients_ends_with_the_same_bytes(lm, tmp_path, monkeypatch, gradients):
    continued_after(9, "capture_with_loss_gradients", {"gradients": gradients}, lm, tmp_path, monkeypatch)


def continued_after(batches, name, changes, lm, tmp_path, monkeypatch):
    make(tmp_path / "whole", lm, **changes)
    capture, calls = getattr(harvest_module, name), []

    def failing_capture(*arguments, **more):
        calls.append(1)
        if len(calls) > batches:
            raise Interrupted
        return capture(*arguments, **more)

    monkeypatch.setattr(harvest_module, name, failing_capture)
    with pytest.raises(Interrupted):
        make(tmp_path / "broken", lm, **changes)
    with pytest.raises(InputError, match="not finished"):
        ActivationStore.open(tmp_path / "broken")
    done = len(list((tmp_path / "broken").glob("shard-*")))
    assert done == batches // 4
    calls.clear()
    counting = lambda *arguments, **more: (calls.append(1), capture(*arguments, **more))[1]  # noqa: E731
    monkeypatch.setattr(harvest_module, name, counting)
    make(tmp_path / "broken", lm, **changes)
    assert len(calls) == 25 - 4 * done
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")


HARVEST = """
import numpy as np, torch
torch.set_num_threads(1)
from apportion.data import Document
from apportion.models.harvest import harvest
from apportion.models.language import load
words = np.random.default_rng(0).integers(0, 10**6, size=(600, 30))
documents = [Document(str(i), " ".join(map(str, row[: 1 + i % 30]))) for i, row in enumerate(words)]
lm, folder = load({model!r}), {folder!r}
settings = dict(context=16, tokens={tokens}, shard_tokens=320, batch_size=5, part={part}, progress=False)
harvest(lm, "layers.1.residual", documents, folder, gradients={gradients}, **settings)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("part", "tokens", "inside", "gradients"),
    [(None, 16_000, ".", "sampled"), ((1, 2), 32_000, "part-00001-of-00002", None)],
)
def test_a_harvest_killed_at_random_moments_ends_with_the_same_bytes(
    tiny_llama, tmp_path, part, tokens, inside, gradients
):
    # The processes are forked from one that has imported the libraries, so that their time goes into the harvest.
    context = multiprocessing.get_context("forkserver")
    libraries = ["accelerate", "transformers.generation", "transformers.models.auto.modeling_auto"]
    context.set_forkserver_preload([*libraries, "transformers.models.llama.modeling_llama", "apportion.models.harvest"])

    def start(folder):
        script = tmp_path / f"{folder.name}.py"
        script.write_text(
            HARVEST.format(
                model=str(tiny_llama), folder=str(folder), part=part, tokens=tokens, gradients=repr(gradients)
            )
        )
        process = context.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        return process

    whole, written = start(tmp_path / "whole"), tmp_path / "broken" / inside
    moments = random.Random()
    for target in sorted(moments.sample(range(35), 5)):
        process = start(tmp_path / "broken")
        while len(list(written.glob("shard-*"))) < target or not written.exists():
            assert process.exitcode is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(tmp_path / "broken")
    last.join()
    whole.join()
    assert (whole.exitcode, last.exitcode) == (0, 0)
    assert contents(written) == contents(tmp_path / "whole" / inside)
    assert ActivationStore.open(written).n_tokens >= 16_000


def test_a_truncated_shard_is_not_built_upon(lm, tmp_path):
    make(tmp_path / "store", lm)
    shard = tmp_path / "store" / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"shard-00001.*bytes"):
        make(tmp_path / "store", lm)


def test_two_harvests_do_not_write_the_same_folder(lm, tmp_path, monkeypatch):
    capture = harvest_module.capture

    def capture_while_another_starts(*arguments):
        monkeypatch.setattr(harvest_module, "capture", capture)
        with pytest.raises(InputError, match="another harvest"):
            make(tmp_path / "store", lm)
        return capture(*arguments)

    monkeypatch.setattr(harvest_module, "capture", capture_while_another_starts)
    assert make(tmp_path / "store", lm).n_tokens >= 1500


# ---------------------------------------------------------------------------------------------------- in parts


def make_parts(folder, lm, parts, texts=None, order=None, **changes):
    """What jobs that know nothing of each other write, and the store that is made of it."""
    texts = documents() if texts is None else texts
    for number in order or range(parts):
        make(folder, lm, texts, part=(number, parts), **changes)
    return join_parts(folder, texts)


def all_contents(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents_of_contexts(store):
    return [set(row.tolist()) for shard in store._shards for row in shard.tensor("document")]


def documents_of_whole_contexts(lm, count=36):
    """Documents that fill one to three contexts of 16 tokens, so that none shares a context with another."""
    texts = []
    for document in documents(count):
        text = document.text
        while text and (len(lm.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1) % 16:
            text = text[:-1]
        texts += [replace(document, text=text)] if text else []
    return texts


def rows_by_document(store):
    number, position = store.origins(np.arange(store.n_tokens))
    rows, found = store.read(np.arange(store.n_tokens)), {}
    for index in np.lexsort((position, number)):
        found.setdefault(int(number[index]), []).append((int(position[index]), rows[index]))
    return found


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_hold_what_a_harvest_in_one_piece_holds_of_documents_that_fill_whole_contexts(lm, tmp_path, parts):
    texts = documents_of_whole_contexts(lm)
    # More tokens than there are: all documents are in both. The ratio leaves out many tokens.
    changes = {"tokens": 100_000, "max_norm_ratio": 1.2, "dtype": "float32"}
    alone = make(tmp_path / "alone", lm, texts, **changes)
    joined = make_parts(tmp_path / "parts", lm, parts, texts, **changes)
    assert joined.n_contexts == alone.n_contexts > 40
    assert joined.manifest["norm_medians"] == alone.manifest["norm_medians"]
    assert joined.manifest["documents"] == alone.manifest["documents"]
    expected, found = rows_by_document(alone), rows_by_document(joined)
    assert len(expected) == len(texts)
    assert {number: [place for place, _ in rows] for number, rows in found.items()} == {
        number: [place for place, _ in rows] for number, rows in expected.items()
    }
    for number, rows in expected.items():
        for (_, row), (_, other) in zip(rows, found[number], strict=True):
            torch.testing.assert_close(other, row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4])
def test_every_part_lays_its_own_documents_end_to_end(lm, tmp_path, parts):
    joined = make_parts(tmp_path / "store", lm, parts)
    for number in range(parts):
        part = ActivationStore.open(tmp_path / "store" / f"part-{number:05}-of-{parts:05}")
        token_ids = part.contexts(0, part.n_contexts)[0]
        assert torch.equal(token_ids.flatten(), expected_stream(lm, documents()[number::parts])[: token_ids.numel()])
        assert {each % parts for one in documents_of_contexts(part) for each in one} == {number}
        assert part.n_tokens >= 1500 // parts
    assert 1500 <= joined.n_tokens < 1500 + parts * 15
    joined.verify()


def test_parts_end_with_the_same_bytes_in_whatever_order_they_are_finished(lm, tmp_path):
    make_parts(tmp_path / "one", lm, 4)
    make_parts(tmp_path / "other", lm, 4, order=[2, 0, 3, 1])
    whole = all_contents(tmp_path / "one")
    assert all_contents(tmp_path / "other") == whole
    join_parts(tmp_path / "one", documents())
    assert all_contents(tmp_path / "one") == whole


@pytest.mark.parametrize("batches", [0, 1, 4, 6])
def test_an_interrupted_part_continues_and_ends_with_the_same_bytes(lm, tmp_path, monkeypatch, batches):
    make_parts(tmp_path / "whole", lm, 2)
    capture, calls = harvest_module.capture, []

    def failing_capture(*arguments):
        calls.append(1)
        if len(calls) > batches:
            raise Interrupted
        return capture(*arguments)

    make(tmp_path / "broken", lm, part=(0, 2))
    with monkeypatch.context() as patch:
        patch.setattr(harvest_module, "capture", failing_capture)
        with pytest.raises(Interrupted):
            make(tmp_path / "broken", lm, part=(1, 2))
    refused(lambda: join_parts(tmp_path / "broken", documents()), "part-00001-of-00002", "not finished")
    refused(lambda: ActivationStore.open(tmp_path / "broken"), "not one store yet", "join_parts")
    make_parts(tmp_path / "broken", lm, 2)
    assert all_contents(tmp_path / "broken") == all_contents(tmp_path / "whole")


def test_the_store_of_parts_is_split_so_that_no_document_is_on_both_sides(lm, tmp_path):
    store = make_parts(tmp_path / "store", lm, 4, documents(400), tokens=6000)
    of_context = documents_of_contexts(store)
    train, held_out = store.split(0.2)
    trained, held = (set(view.documents().tolist()) for view in (train, held_out))
    assert not trained & held
    assert 0.1 < held_out.n_tokens / store.n_tokens < 0.3
    left_out = set(range(store.n_contexts)) - set(train._chosen) - set(held_out._chosen)
    assert left_out
    # Nothing is left out but what has documents of both kinds.
    assert not [each for each in left_out if of_context[each] <= trained or of_context[each] <= held]
    assert train.batches(100)(3).shape == (100, 32)


def test_a_missing_part_is_named(lm, tmp_path):
    make(tmp_path, lm, part=(0, 3))
    make(tmp_path, lm, part=(2, 3))
    refused(lambda: join_parts(tmp_path, documents()), str(tmp_path), "part-00001-of-00003", "part=(1, 3)")
    refused(lambda: join_parts(tmp_path / "none", documents()), "holds no parts")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"tokens": 2000}, "tokens is 2000, there it was 1500"),
        ({"site": "layers.0.residual"}, "sites is {'layers.0.residual': 32}"),
        ({"batch_size": 8}, "batch_size is 8, there it was 4"),
    ],
)
def test_parts_of_other_arguments_are_not_joined(lm, tmp_path, changes, fragment):
    make(tmp_path, lm, part=(0, 2))
    make(tmp_path, lm, part=(1, 2), **changes)
    refused(lambda: join_parts(tmp_path, documents()), "part-00001-of-00002", fragment)
    assert not (tmp_path / "manifest.json").exists()


def test_parts_of_another_model_or_other_documents_are_not_joined(lm, tmp_path):
    make(tmp_path, lm, part=(0, 2))
    other = replace(lm)
    other.fingerprint = "0" * 32
    make(tmp_path, other, part=(1, 2))
    refused(lambda: join_parts(tmp_path, documents()), "part-00001-of-00002", f"model is '{'0' * 8}")
    shutil.rmtree(tmp_path / "part-00001-of-00002")
    changed = documents()
    changed[4] = replace(changed[4], text=changed[4].text + "!")
    make(tmp_path, lm, changed, part=(1, 2))
    # The document that was changed belongs to the other part: this one's tokens are the same.
    refused(lambda: join_parts(tmp_path, documents()), "part-00001-of-00002", "other documents")
    refused(lambda: join_parts(tmp_path, changed), "part-00000-of-00002", "other documents")


def test_a_part_under_the_name_of_another_is_noticed(lm, tmp_path):
    make(tmp_path, lm, part=(0, 2))
    shutil.copytree(tmp_path / "part-00000-of-00002", tmp_path / "part-00001-of-00002")
    refused(lambda: join_parts(tmp_path, documents()), "part-00001-of-00002", "is part 0")
    refused(lambda: make(tmp_path, lm, part=(1, 2)), "part is 1, there it was 0")


def test_a_finished_store_is_used_in_however_many_parts_it_was_harvested(lm, tmp_path, monkeypatch):
    make_parts(tmp_path / "parts", lm, 2)
    make(tmp_path / "alone", lm)
    before = all_contents(tmp_path)
    monkeypatch.setattr(harvest_module, "capture", None)
    assert make(tmp_path / "parts", lm).parts == 2
    make_parts(tmp_path / "parts", lm, 2)
    refused(lambda: make(tmp_path / "parts", lm, tokens=2000), "tokens is 2000, there it was 1500")
    refused(lambda: make(tmp_path / "parts", lm, documents(seed=1)), "other documents")
    refused(lambda: make(tmp_path / "parts", lm, part=(0, 3)), "in 2 parts, not in 3 parts")
    refused(lambda: make(tmp_path / "alone", lm, part=(0, 2)), "in one piece, not in 2 parts")
    assert all_contents(tmp_path) == before


def test_parts_of_two_harvests_and_other_things_are_kept_apart(lm, tmp_path):
    make(tmp_path / "store", lm, part=(0, 2))
    refused(lambda: make(tmp_path / "store", lm, part=(0, 3)), "part-00000-of-00002", "as many parts")
    refused(lambda: make(tmp_path / "store", lm), "holds parts of a harvest", "join_parts")
    shutil.copytree(tmp_path / "store" / "part-00000-of-00002", tmp_path / "store" / "part-00000-of-00003")
    refused(lambda: join_parts(tmp_path / "store", documents()), "part-00000-of-00002 and part-00000-of-00003")
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(lambda: make(tmp_path, lm, part=(0, 2)), "holds", "new folder")


def test_a_store_of_parts_notices_damaged_missing_and_foreign_shards(lm, tmp_path):
    store = make_parts(tmp_path, lm, 2)
    shard = tmp_path / "part-00001-of-00002" / "shard-00001.safetensors"
    shutil.copy(shard, shard.with_name("shard-00009.safetensors"))
    refused(lambda: ActivationStore.open(tmp_path), "part-00001-of-00002/shard-00009", "does not list")
    shard.with_name("shard-00009.safetensors").unlink()
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused(store.verify, "part-00001-of-00002/shard-00001", "checksum")
    shutil.copy(tmp_path / "part-00000-of-00002" / shard.name, shard)
    refused(lambda: ActivationStore.open(tmp_path), "is not shard 1/1")
    shard.unlink()
    refused(lambda: ActivationStore.open(tmp_path), "part-00001-of-00002/shard-00001", "missing")


def test_parts_that_would_hold_too_little_are_refused(lm, tmp_path):
    refused(lambda: make(tmp_path / "a", lm, part=(0, 100)), "tokens is 1500", "100 parts", "one context (16)")
    for part in ((2, 2), (-1, 2), (0, 0)):
        refused(lambda part=part: make(tmp_path / "a", lm, part=part), f"part is {part}")
    assert not (tmp_path / "a").exists()
    refused(lambda: make(tmp_path / "b", lm, documents(3), part=(3, 4)), "part-00003-of-00004", "fewer parts")


def test_a_part_is_written_by_one_process_and_not_while_all_are_joined(lm, tmp_path, monkeypatch):
    capture = harvest_module.capture

    def capture_while_others_start(*arguments):
        monkeypatch.setattr(harvest_module, "capture", capture)
        refused(lambda: make(tmp_path, lm, part=(0, 2)), "another harvest", "part-00000-of-00002")
        make(tmp_path, lm, part=(1, 2))
        refused(lambda: join_parts(tmp_path, documents()), "another harvest")
        refused(lambda: make(tmp_path, lm), "another harvest")
        return capture(*arguments)

    monkeypatch.setattr(harvest_module, "capture", capture_while_others_start)
    make(tmp_path, lm, part=(0, 2))
    assert join_parts(tmp_path, documents()).n_tokens >= 1500


# ---------------------------------------------------------------------------------------------------- memory


def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_stays_within_what_the_manifest_states(lm, tmp_path, monkeypatch):
    # Wide activations without the work of computing them.
    width = 4096

    def wide(lm, sites, input_ids):
        block = torch.linspace(0.5, 1.5, width).expand(*input_ids.shape, width)
        return dict.fromkeys(sites, block * (1 + input_ids[..., None] / 1000))

    monkeypatch.setattr(harvest_module, "capture", wide)
    monkeypatch.setattr(Site, "width", lambda self, model: width)
    arguments = {"context": 32, "batch_size": 16, "shard_tokens": 4096, "dtype": "float32"}
    texts = documents(700)
    make(tmp_path / "warm", lm, texts, tokens=4000, **arguments)
    before = memory("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not let this process reset its peak")
    store = make(tmp_path / "store", lm, texts, tokens=20_000, **arguments)
    used = memory("VmHWM") - before
    stored = sum(shard["bytes"] for shard in store.manifest["shards"])
    assert stored > 300e6
    # What Python and the tokeniser use for a group of documents comes on top.
    assert used < store.manifest["peak_memory_bytes"] + 30e6


# ---------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("target", ["label", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_kept_with_the_activations_that_they_belong_to(lm, tmp_path, target, dtype):
    sites = [SITE, "layers.2.mlp_out"]
    store = make(tmp_path / "store", lm, site=sites, dtype=dtype, gradients=target, gradient_seed=7, shard_tokens=4096)
    token_ids, _, valid, _ = store.contexts(0, 4, SITE)
    computed = capture_with_loss_gradients(
        lm, [Site.parse(site) for site in sites], token_ids, target=target, seed=(7, 0, 0, 0)
    )
    for site, (x, gradient) in zip(sites, computed.values(), strict=True):
        found, kept = (store.contexts(0, 4, name)[1] for name in (site, gradient_of(site)))
        tolerance = 1e-6 if dtype == "float32" else 2**-8
        torch.testing.assert_close(found, x, rtol=tolerance, atol=1e-6)
        torch.testing.assert_close(kept, gradient * valid[..., None], rtol=tolerance, atol=1e-6)
        assert kept[valid].ne(0).any()
        scale = store.manifest["gradient_scales"][site]
        assert math.log2(scale) == round(math.log2(scale))
        assert 0.7 < float((gradient / scale).square().mean().sqrt()) < 1.5
    assert store.gradient_target == store.manifest["made_from"]["gradients"]["target"] == target
    assert repr(store).endswith(f"layers.1.residual, layers.2.mlp_out with gradients, {dtype})")


def test_pairs_are_shuffled_together(lm, tmp_path):
    store = make(tmp_path / "store", lm, dtype="float32", gradients="label")
    pairs = store.joint_batches(16, seed=1, sites=[SITE, gradient_of(SITE)])
    x, gradient = pairs(3)
    rows = store.batches(16, seed=1, site=SITE).indices(3)
    assert x.equal(store.read(rows, SITE))
    assert gradient.equal(store.read(rows, gradient_of(SITE)))
    for name in (SITE, gradient_of(SITE)):
        _, in_place, valid, _ = store.contexts(0, store.n_contexts, name)
        assert in_place[valid].equal(store.read(torch.arange(store.n_tokens), name))


def test_a_store_with_gradients_opens_at_its_only_site(lm, tmp_path):
    make(tmp_path / "store", lm, gradients="label")
    assert str(ActivationStore.open(tmp_path / "store").site) == SITE
    at_gradients = ActivationStore.open(tmp_path / "store", SITE).read(torch.arange(5), gradient_of(SITE))
    assert at_gradients.shape == (5, 32)


def test_a_store_without_gradients_says_so(lm, tmp_path):
    store = make(tmp_path / "store", lm)
    assert store.gradient_target is None
    assert "gradient_scales" not in store.manifest
    with pytest.raises(InputError, match=r"holds no gradients: harvest one that does, with gradients='label'"):
        store.joint_batches(4, sites=[SITE, gradient_of(SITE)])


def test_parts_scale_their_gradients_alike(lm, tmp_path):
    texts = documents_of_whole_contexts(lm)
    changes = {"tokens": 100_000, "dtype": "float32", "gradients": "label"}
    alone = make(tmp_path / "alone", lm, texts, **changes)
    joined = make_parts(tmp_path / "parts", lm, 2, texts, **changes)
    assert joined.manifest["gradient_scales"] == alone.manifest["gradient_scales"]
    expected = alone.read(torch.arange(alone.n_tokens), gradient_of(SITE))
    found = joined.read(torch.arange(joined.n_tokens), gradient_of(SITE))
    torch.testing.assert_close(found.norm(dim=1).sort().values, expected.norm(dim=1).sort().values)


# ---------------------------------------------------------------------------------------------------- bad input


def refused(run, *fragments):
    with pytest.raises(InputError) as caught:
        run()
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"context": 1}, ("context is 1", "2 to 256")),
        ({"context": 257, "tokens": 1000}, ("context is 257", "2 to 256")),
        ({"tokens": 15}, ("tokens is 15", "one context (16)")),
        ({"dtype": "float16"}, ("'float16'", "bfloat16 or float32")),
        ({"batch_size": 0}, ("batch_size is 0",)),
        ({"max_norm_ratio": 1.0}, ("max_norm_ratio is 1.0",)),
        ({"shard_tokens": 15}, ("shard_tokens is 15",)),
        ({"site": []}, ("sites is empty",)),
        ({"gradients": "truth"}, ("gradients is 'truth'", "label, sampled")),
        ({"gradients": "label", "gradient_seed": -1}, ("gradient_seed is -1",)),
        ({"site": "layers.3.residual"}, ("layers.3.residual", "3 layers")),
        ({"site": "layers.1.mood"}, ("mood",)),
    ],
)
def test_impossible_arguments_are_refused_by_name(lm, tmp_path, changes, fragments):
    refused(lambda: make(tmp_path / "store", lm, **changes), *fragments)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("texts", "found"), [([], "0 tokens"), ([Document("short", "one")], "tokens, less than")])
def test_too_little_text_is_refused(lm, tmp_path, texts, found):
    refused(lambda: make(tmp_path / "store", lm, texts), "documents", found, "context=16", "more text")


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"batch_size": 8}, ("batch_size is 8, there it was 4",)),
        ({"tokens": 3000}, ("tokens is 3000, there it was 1500",)),
        ({"dtype": "float32"}, ("dtype is 'float32'",)),
        ({"gradients": "label"}, ("gradients is {'target': 'label', 'seed': 0}, there it was None",)),
        ({"site": "layers.0.residual"}, ("sites is {'layers.0.residual': 32}",)),
        ({"texts": documents(seed=1)}, ("other documents",)),
    ],
)
def test_a_folder_with_another_harvest_is_left_alone(lm, tmp_path, changes, fragments):
    make(tmp_path / "store", lm)
    before = contents(tmp_path / "store")
    refused(lambda: make(tmp_path / "store", lm, **changes), str(tmp_path / "store"), "another folder", *fragments)
    assert contents(tmp_path / "store") == before


def test_other_documents_are_noticed_when_a_harvest_is_continued(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(
        _unfinished := harvest_module._Harvest, "_write_shard", _failing_after(_unfinished._write_shard, 3)
    )
    with pytest.raises(Interrupted):
        make(tmp_path / "store", lm)
    changed = documents()
    changed[2] = replace(changed[2], text=changed[2].text + "!")
    refused(lambda: make(tmp_path / "store", lm, changed), "other documents")


def _failing_after(method, times):
    calls = []

    def failing(*arguments):
        calls.append(1)
        if len(calls) > times:
            raise Interrupted
        return method(*arguments)

    return failing


def test_a_folder_with_other_things_is_left_alone(lm, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    refused(lambda: make(tmp_path, lm), "not empty", "new folder")
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_folder_that_cannot_be_written_is_named(lm, tmp_path):
    (tmp_path / "file").write_text("")
    refused(lambda: make(tmp_path / "file", lm), "cannot write", "file")
    refused(lambda: make(tmp_path / "file" / "store", lm), "cannot write", "file")


def test_a_full_disk_is_one_clear_message_and_finished_shards_stay(lm, tmp_path, monkeypatch):
    make(tmp_path / "whole", lm)
    allocate, calls = os.posix_fallocate, []

    def allocate_until_full(*arguments):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return allocate(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", allocate_until_full)
    refused(lambda: make(tmp_path / "store", lm), "disk is full", "shard-00002", "run the same command again")
    assert sorted(contents(tmp_path / "store")) == [
        "manifest.json",
        "shard-00000.safetensors",
        "shard-00001.safetensors",
    ]
    monkeypatch.setattr(os, "posix_fallocate", allocate)
    make(tmp_path / "store", lm)
    assert contents(tmp_path / "store") == contents(tmp_path / "whole")


def test_a_model_that_yields_nan_is_refused(lm, tmp_path, monkeypatch):
    capture = harvest_module.capture
    monkeypatch.setattr(harvest_module, "capture", lambda *a: {k: v * float("nan") for k, v in capture(*a).items()})
    with pytest.raises(ValueError, match=r"NaN or infinity at layers\.1\.residual"):
        make(tmp_path / "store", lm)


def test_progress_goes_to_stderr_and_can_be_silenced(lm, tmp_path, capsys):
    make(tmp_path / "quiet", lm)
    assert capsys.readouterr() == ("", "")
    make(tmp_path / "loud", lm, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "tokens/s" in err


def test_without_a_terminal_a_harvest_says_a_line_now_and_then(capsys):
    from rich.console import Console

    from apportion.models.harvest import _lines

    times = iter([0.0, 4.0, 11.0, 12.0, 25.0])
    advance = _lines(Console(stderr=True), 100, 5000, clock=lambda: next(times))
    for _ in range(4):
        advance(500)
    assert capsys.readouterr().err.splitlines() == [
        "harvest 1,100/5,000 tokens, 91 tokens/s",
        "harvest 2,100/5,000 tokens, 80 tokens/s",
    ]
