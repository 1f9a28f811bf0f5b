"""What torchrun says to a process, and a job of one: the whole path over a mesh without starting processes."""

import socket

import pytest
import torch
import torch.distributed as dist

from apportion.errors import InputError
from apportion.features import job as job_module
from apportion.features.job import Job, _own_device, _shape, first_to_fail, join_job
from apportion.features.run import ActivationSource, evaluate_dictionary, make_recipe, prepare_store, train_run


@pytest.fixture
def torchrun(monkeypatch):
    """The environment of a process that torchrun started alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_RESTART_COUNT": 0,
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    yield monkeypatch
    job_module._meeting_place.cache_clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_process_alone_waits_for_nobody_and_is_the_first():
    job = join_job(None, "cpu")
    job.wait()
    job.leave()
    assert (type(job), job.first, job.size, job.mesh) == (Job, True, 1, None)
    assert job.as_first_says(True)
    assert not job.as_first_says(False)


@pytest.mark.parametrize(
    ("mesh", "size", "expected"), [(None, 8, (8, 1)), ("2x4", 8, (2, 4)), ("1x8", 8, (1, 8)), ("4x16", 64, (4, 16))]
)
def test_a_mesh_is_two_numbers_and_by_default_all_share_the_tokens(mesh, size, expected):
    assert _shape(mesh, size) == expected


@pytest.mark.parametrize("mesh", ["4", "2x2x2", "0x8", "axb", "", "2 x 4", "-2x-4"])
def test_what_is_no_mesh_is_refused(mesh):
    with pytest.raises(InputError, match=r"DATAxFEATURE.*8x1"):
        _shape(mesh, 8)


def test_a_mesh_of_other_than_all_processes_is_refused_with_its_product():
    with pytest.raises(InputError, match=r"mesh=2x3: that is 6 processes, but torchrun started 8.*product is 8"):
        _shape("2x3", 8)


def test_a_mesh_needs_torchrun():
    with pytest.raises(InputError, match="torchrun --nproc-per-node"):
        join_job("1x1", "cpu")


def test_each_process_takes_the_gpu_of_its_number(torchrun):
    torchrun.setattr(torch.cuda, "device_count", lambda: 4)
    torchrun.setenv("LOCAL_RANK", "3")
    torchrun.setenv("LOCAL_WORLD_SIZE", "4")
    assert _own_device("cuda") == "cuda:3"
    assert _own_device("cpu") == "cpu"
    with pytest.raises(InputError, match="device=cuda:1 is one GPU for 4 processes"):
        _own_device("cuda:1")
    torchrun.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="started 4 processes on a machine that has 2 GPUs"):
        _own_device("cuda")


def test_only_the_first_to_fail_speaks_once_an_attempt(torchrun):
    assert [first_to_fail(), first_to_fail()] == [True, False]
    torchrun.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [first_to_fail(), first_to_fail()] == [True, False]


def test_who_kept_the_count_and_is_gone_has_spoken(torchrun):
    def gone(*_):
        raise dist.DistNetworkError("connection closed")

    assert first_to_fail()
    torchrun.setattr(job_module, "_meeting_place", lambda: type("Gone", (), {"add": gone})())
    assert not first_to_fail()
    torchrun.undo()


def test_a_job_over_a_mesh_of_one_makes_the_run_that_a_process_alone_makes(torchrun, tiny_llama, tmp_path):
    from pydoc_data.topics import topics

    folder = tmp_path / "text"
    folder.mkdir()
    for name, content in sorted(topics.items(), key=lambda item: len(item[1]))[:40]:
        (folder / f"{name.replace('/', '_')}.txt").write_text(content, encoding="utf-8")
    source = ActivationSource(str(tiny_llama), "layers.1.residual", str(folder), 8000, 32, "float32")
    recipe = make_recipe("topk", width=32, train_tokens=6000, n_features=64, budget=4, steps=20, batch_size=128)
    runs = []
    for name, job in (("together", join_job("1x1", "cpu")), ("alone", Job())):
        prepared = prepare_store(source, folder=tmp_path / "store", progress=False, job=job)
        run = train_run(
            tmp_path / name,
            prepared,
            recipe,
            judge=lambda sae, prepared=prepared: evaluate_dictionary(sae, prepared, None),
            progress=False,
            job=job,
        )
        runs.append(run)
        # The same call again trains nothing.
        assert train_run(tmp_path / name, prepared, recipe, progress=False, job=job).evaluation == run.evaluation
        job.leave()
    together, alone = runs
    assert not dist.is_initialized()
    assert together.settings["provenance"] == alone.settings["provenance"]
    assert {path.name for path in together.folder.iterdir()} == {path.name for path in alone.folder.iterdir()}
    for name, tensor in alone.sae.state_dict().items():
        torch.testing.assert_close(together.sae.state_dict()[name], tensor, rtol=1e-4, atol=2e-4, equal_nan=True)
