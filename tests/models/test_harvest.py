import errno
import json
import logging
import multiprocessing
import os
import random
import runpy
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
from apportion.models import ActivationStore, Site, load
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
    make(tmp_path / "whole", lm)
    capture, calls = harvest_module.capture, []

    def failing_capture(*arguments):
        calls.append(1)
        if len(calls) > batches:
            raise Interrupted
        return capture(*arguments)

    monkeypatch.setattr(harvest_module, "capture", failing_capture)
    with pytest.raises(Interrupted):
        make(tmp_path / "broken", lm)
    with pytest.raises(InputError, match="not finished"):
        ActivationStore.open(tmp_path / "broken")
    done = len(list((tmp_path / "broken").glob("shard-*")))
    assert done == batches // 4
    calls.clear()
    monkeypatch.setattr(harvest_module, "capture", lambda *arguments: (calls.append(1), capture(*arguments))[1])
    make(tmp_path / "broken", lm)
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
settings = dict(context=16, tokens=16_000, shard_tokens=320, batch_size=5, progress=False)
harvest(lm, "layers.1.residual", documents, folder, **settings)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_harvest_killed_at_random_moments_ends_with_the_same_bytes(tiny_llama, tmp_path):
    # The processes are forked from one that has imported the libraries, so that their time goes into the harvest.
    context = multiprocessing.get_context("forkserver")
    libraries = ["accelerate", "transformers.generation", "transformers.models.auto.modeling_auto"]
    context.set_forkserver_preload([*libraries, "transformers.models.llama.modeling_llama", "apportion.models.harvest"])

    def start(folder):
        script = tmp_path / f"{folder.name}.py"
        script.write_text(HARVEST.format(model=str(tiny_llama), folder=str(folder)))
        process = context.Process(target=runpy.run_path, args=(str(script),))
        process.start()
        return process

    whole, broken = start(tmp_path / "whole"), tmp_path / "broken"
    moments = random.Random()
    for target in sorted(moments.sample(range(35), 5)):
        process = start(broken)
        while len(list(broken.glob("shard-*"))) < target or not broken.exists():
            assert process.exitcode is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start(broken)
    last.join()
    whole.join()
    assert (whole.exitcode, last.exitcode) == (0, 0)
    assert contents(broken) == contents(tmp_path / "whole")
    assert ActivationStore.open(broken).n_tokens >= 16_000


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
