import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from apportion.data import Document
from apportion.errors import InputError
from apportion.models import ActivationStore, Site, StoreView, capture, load
from apportion.models.activations import ShuffledBatches, shuffled
from apportion.models.harvest import harvest

CONTEXT = 16
SITES = ("layers.0.residual", "layers.1.mlp_out")


def documents(count=40, seed=0):
    words = np.random.default_rng(seed).integers(0, 10**6, size=(count, 25))
    return [Document(f"doc{i}", " ".join(map(str, row[: 5 + i % 20]))) for i, row in enumerate(words)]


def make(folder, lm, **changes):
    arguments = {"context": CONTEXT, "tokens": 1000, "shard_tokens": 20 * CONTEXT, "batch_size": 8, "progress": False}
    return harvest(lm, SITES, documents(), folder, **(arguments | changes))


@pytest.fixture(scope="module")
def lm(tiny_llama):
    return load(str(tiny_llama))


@pytest.fixture(scope="module")
def made(lm, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stores") / "store"
    make(folder, lm)
    return folder


@pytest.fixture
def store(made) -> ActivationStore:
    return ActivationStore.open(made, SITES[0])


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path / "copy")


def shard_files(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def test_what_is_read_is_what_the_model_computes(store, lm):
    token_ids, activations, valid, _ = store.contexts(0, store.n_contexts)
    expected = capture(lm, [store.site], token_ids)[store.site]
    # Stored as bfloat16, computed in batches of another size.
    torch.testing.assert_close(activations, expected, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(store.read(torch.arange(store.n_tokens)), activations[valid], rtol=0, atol=0)


def test_float32_is_stored_without_loss(lm, tmp_path):
    store = make(tmp_path / "store", lm, dtype="float32")
    token_ids, activations, _, _ = store.contexts(0, 8, SITES[1])
    site = Site.parse(SITES[1])
    assert torch.equal(activations, capture(lm, [site], token_ids)[site])


def test_rows_come_in_the_order_asked_for_and_as_often(store):
    everything = store.read(np.arange(store.n_tokens))
    wanted = torch.tensor([store.n_tokens - 1, 0, 317, 0, 5, 700, 318])
    assert torch.equal(store.read(wanted), everything[wanted])
    assert store.read(np.array([], dtype=np.int64)).shape == (0, store.width)


def test_shards_are_safetensors_that_anyone_can_read(store):
    tensors = safetensors.torch.load_file(shard_files(store.folder)[0])
    token_ids, activations, valid, document = store.contexts(0, 20)
    assert tensors[SITES[0]].dtype == torch.bfloat16
    assert torch.equal(tensors[SITES[0]].float(), activations)
    assert torch.equal(tensors["token_ids"].long(), token_ids)
    assert torch.equal(tensors["valid"].bool(), valid)
    assert torch.equal(tensors["document"][:, 0].long(), document)


def test_rows_know_their_document_and_their_position_in_it(store, lm):
    encoded = [lm.tokenizer(d.text)["input_ids"] + [lm.tokenizer.eos_token_id] for d in documents()]
    token_ids, _, valid, _ = store.contexts(0, store.n_contexts)
    rows = torch.arange(store.n_tokens)
    document, position = store.origins(rows)
    found = [encoded[d][p] for d, p in zip(document.tolist(), position.tolist(), strict=True)]
    assert found == token_ids[valid].tolist()


def test_contexts_of_a_range_span_shards(store):
    everything = store.contexts(0, store.n_contexts)
    part = store.contexts(15, 45)
    assert all(torch.equal(a[15:45], b) for a, b in zip(everything, part, strict=True))
    assert len(store.contexts(store.n_contexts - 2, store.n_contexts + 9)[0]) == 2
    assert store.contexts(5, 5)[1].shape == (0, CONTEXT, store.width)


def test_an_index_out_of_range_is_refused(store):
    for index in (-1, store.n_tokens):
        with pytest.raises(IndexError, match=f"there are {store.n_tokens} rows"):
            store.read(np.array([index]))


def test_a_site_must_be_named_where_there_are_several(made):
    store = ActivationStore.open(made)
    assert [str(site) for site in store.sites] == list(SITES)
    with pytest.raises(InputError, match=r"several sites.*layers\.1\.mlp_out"):
        store.read(np.arange(2))
    assert store.read(np.arange(2), site=Site.parse(SITES[1])).shape == (2, 32)
    with pytest.raises(InputError, match=r"layers\.2\.residual.*it holds layers\.0\.residual"):
        ActivationStore.open(made, "layers.2.residual")


# ---------------------------------------------------------------------------------------------------- splitting


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_a_split_shares_no_document_and_loses_only_mixed_contexts(store, fraction):
    train, held_out = store.split(fraction)
    in_train, in_held_out = set(train.documents().tolist()), set(held_out.documents().tolist())
    assert not in_train & in_held_out
    assert held_out.n_contexts / store.n_contexts == pytest.approx(fraction, rel=0.5)
    assert train.n_contexts + held_out.n_contexts >= store.n_contexts - 2
    assert train.n_tokens == int(train.contexts(0, train.n_contexts)[2].sum())


def test_a_split_of_many_documents_takes_stretches_from_everywhere(lm, tmp_path):
    many = [replace(d, name=str(i)) for i, d in enumerate(documents(800))]
    store = harvest(lm, SITES[0], many, tmp_path / "s", context=8, tokens=14_000, batch_size=256, progress=False)
    _, held_out = store.split(0.1)
    runs = np.split(held_out._chosen, np.flatnonzero(np.diff(held_out._chosen) > 1) + 1)
    assert len(runs) >= 8
    assert held_out.n_contexts / store.n_contexts == pytest.approx(0.1, rel=0.25)


def test_a_view_reads_its_own_rows(store):
    train, held_out = store.split(0.3)
    for view in (train, held_out):
        _, activations, valid, _ = view.contexts(0, view.n_contexts)
        assert torch.equal(view.read(torch.arange(view.n_tokens)), activations[valid])
        assert view.width == store.width
        assert view.context == CONTEXT


def test_a_split_is_the_same_every_time(made):
    splits = [ActivationStore.open(made, SITES[0]).split() for _ in range(2)]
    assert all(torch.equal(a.documents(), b.documents()) for a, b in zip(*splits, strict=True))


def test_a_split_needs_two_documents_and_a_fraction(lm, tmp_path, store):
    single = harvest(
        lm, SITES[0], [Document("long", "word " * 300)], tmp_path / "s", context=16, tokens=200, progress=False
    )
    with pytest.raises(InputError, match="in more documents"):
        single.split()
    for fraction in (0.0, 1.0):
        with pytest.raises(InputError, match="held_out_fraction"):
            store.split(fraction)


# ---------------------------------------------------------------------------------------------------- shuffling


@settings(deadline=None, max_examples=150)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31))
def test_shuffling_is_a_permutation_of_any_size(size, seed, epoch):
    assert np.array_equal(np.sort(shuffled(np.arange(size), size, (seed, epoch))), np.arange(size))


def test_positions_are_shuffled_independently_of_who_else_is_asked():
    everything = shuffled(np.arange(1000), 1000, (0, 0))
    for positions in (np.array([3]), np.array([999, 3, 500])):
        assert np.array_equal(shuffled(positions, 1000, (0, 0)), everything[positions])


@pytest.mark.parametrize("size", [64, 1000, 4097])
def test_orders_look_random(size):
    orders = np.stack([shuffled(np.arange(size), size, (0, epoch)) for epoch in range(200)])
    assert len({order.tobytes() for order in orders}) == 200
    # Were it random, the mean row would be near (size - 1) / 2 at every position, and neighbours would not stay
    # together.
    z = (orders.mean(axis=0) - (size - 1) / 2) / (size / np.sqrt(12 * 200))
    assert np.abs(z).max() < 5.5
    assert float(z.std()) == pytest.approx(1, abs=0.3)
    assert (np.abs(np.diff(orders, axis=1)) == 1).mean() == pytest.approx(2 / size, rel=0.3)


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 300), batch_size=st.integers(1, 400), seed=st.integers(0, 100))
def test_every_row_is_served_exactly_once_an_epoch_in_batches_of_one_size(n, batch_size, seed):
    class View:
        n_tokens = n
        store = type("Store", (), {"width_of": lambda self, site: 1})()

    batches = ShuffledBatches.__new__(ShuffledBatches)
    batches.view, batches.batch_size, batches.seed, batches.site = View(), batch_size, seed, None
    steps = -(-3 * n // batch_size)
    served = [batches.indices(step) for step in range(steps)]
    assert {len(indices) for indices in served} == {batch_size}
    for epoch in np.concatenate(served)[: 3 * n].reshape(3, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))


def test_a_batch_depends_only_on_the_seed_and_the_step(store, made):
    train, _ = store.split()
    batches = train.batches(100, seed=5)
    later = batches(7)
    batches(0)
    again = ActivationStore.open(made, SITES[0]).split()[0].batches(100, seed=5)
    assert torch.equal(again(7), later)
    assert torch.equal(train.read(batches.indices(7)), later)
    assert not torch.equal(train.batches(100, seed=6)(7), later)
    assert batches.steps_per_epoch == train.n_tokens / 100


def test_every_epoch_has_an_order_of_its_own(store):
    batches = store.batches(store.n_tokens)
    orders = [batches.indices(epoch) for epoch in range(5)]
    assert all(np.array_equal(np.sort(order), np.arange(store.n_tokens)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 5


def test_joint_batches_have_the_tokens_of_single_ones_at_every_site(store):
    joint = store.joint_batches(50, seed=5, sites=SITES)
    for step in (0, 9):
        parts = joint(step)
        assert len(parts) == len(SITES)
        for part, site in zip(parts, SITES, strict=True):
            assert torch.equal(part, store.batches(50, seed=5, site=site)(step))
    assert joint.steps_per_epoch == store.n_tokens / 50


def test_batches_refuse_what_cannot_be(store):
    empty = StoreView(store, np.arange(0))
    for make_batches, named in [
        (lambda: store.batches(0), "batch_size is 0"),
        (lambda: store.batches(4, seed=-1), "seed is -1"),
        (lambda: store.batches(4, site="layers.7.residual"), r"layers\.7\.residual"),
        (lambda: empty.batches(4), "no rows"),
        (lambda: store.joint_batches(4, sites=()), "sites is empty"),
        (lambda: store.joint_batches(4, sites=(SITES[0], "layers.7.residual")), r"layers\.7\.residual"),
    ]:
        with pytest.raises(InputError, match=named):
            make_batches()


# ---------------------------------------------------------------------------------------------------- damage


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_a_truncated_shard_is_found_on_opening(copy):
    shard = shard_files(copy)[1]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(InputError, match=rf"shard-00001.*{size - 1} bytes.*{size}.*harvest again"):
        ActivationStore.open(copy)


def test_a_missing_shard_is_found_on_opening(copy):
    shard_files(copy)[0].unlink()
    with pytest.raises(InputError, match=r"shard-00000.*missing"):
        ActivationStore.open(copy)


def test_a_shard_of_another_store_is_found_on_opening_although_its_size_fits(copy, lm, tmp_path):
    make(tmp_path / "other", lm, batch_size=4)
    shutil.copy(shard_files(tmp_path / "other")[1], shard_files(copy)[1])
    with pytest.raises(InputError, match=r"shard-00001.*not shard 1 of this store"):
        ActivationStore.open(copy)


def test_shards_that_changed_places_are_found_on_opening(copy):
    first, second = shard_files(copy)[:2]
    assert first.stat().st_size == second.stat().st_size
    first.rename(copy / "aside")
    second.rename(first)
    (copy / "aside").rename(second)
    with pytest.raises(InputError, match=r"shard-00000.*not shard 0"):
        ActivationStore.open(copy)


def test_a_file_that_the_manifest_does_not_list_is_found_on_opening(copy):
    shutil.copy(shard_files(copy)[0], copy / "shard-00099.safetensors")
    with pytest.raises(InputError, match=r"shard-00099.*does not list"):
        ActivationStore.open(copy)


def test_verify_finds_a_flipped_bit(copy):
    store = ActivationStore.open(copy)
    store.verify()
    shard = shard_files(copy)[2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"shard-00002.*checksum"):
        ActivationStore.open(copy).verify()


@pytest.mark.parametrize("read", ["rows", "contexts"])
def test_nan_is_refused_with_the_shard_it_is_in(copy, read):
    store = ActivationStore.open(copy, SITES[0])
    shard = store._shards[1]
    with shard.path.open("r+b") as file:
        file.seek(shard._places[SITES[0]].offset + 2 * (5 * CONTEXT + 3) * store.width)
        file.write(np.array([0x7FC0], "<u2").tobytes())
    with pytest.raises(ValueError, match=r"shard-00001.*not finite"):
        store.read(np.arange(store.n_tokens)) if read == "rows" else store.contexts(0, store.n_contexts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="something else"), "not the manifest of an activation store"),
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.update(complete=False), "not finished"),
    ],
)
def test_a_wrong_manifest_is_refused(copy, change, message):
    edit_manifest(copy, change)
    with pytest.raises(InputError, match=message):
        ActivationStore.open(copy)


def test_what_is_no_store_is_refused(tmp_path, copy):
    with pytest.raises(InputError, match=r"no manifest\.json"):
        ActivationStore.open(tmp_path / "absent")
    (copy / "manifest.json").write_text('{"format": ')
    with pytest.raises(InputError, match="not readable JSON"):
        ActivationStore.open(copy)


def test_a_store_of_another_model_is_refused(store, lm):
    store.check_model(lm)
    other = replace(lm, name="other")
    other.fingerprint = "0" * 32
    with pytest.raises(InputError, match=r"harvested from .*tiny-llama.*not from other"):
        store.check_model(other)
