"""Distillation of bases: what it minimises, what it leaves alone, and that it goes on after being killed."""

import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from apportion.errors import InputError
from apportion.keys import record_trace
from apportion.keys.matryoshka_basis import HeadBases, cayley
from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.matryoshka_training import (
    Distillation,
    attention_errors,
    distil,
    encode_rows,
    fit_to_attention,
    stored_in,
)
from apportion.models import LanguageModel, load

TEXTS = [topics["assignment"], topics["function"]]


@pytest.fixture(scope="module")
def lm(tiny_llama: Path) -> LanguageModel:
    return load(tiny_llama)


@pytest.fixture
def bases(lm: LanguageModel) -> HeadBases:
    return MatryoshkaKV().fit(lm, TEXTS, tokens=100).head_bases()


@torch.no_grad()
def divergence(lm: LanguageModel, bases: HeadBases, rank: int, rows: torch.Tensor) -> float:
    exact = lm.model(rows).logits.log_softmax(-1)
    with stored_in(lm, bases.spaces(torch.full(bases.shape, rank))):
        found = lm.model(rows, use_cache=False).logits.log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@pytest.mark.parametrize("cross_entropy", [0.0, 0.75])
def test_the_loss_is_the_divergence_and_the_share_of_cross_entropy(
    lm: LanguageModel, bases: HeadBases, cross_entropy: float
) -> None:
    rows = encode_rows(lm, TEXTS, 24)[:1]
    kl = divergence(lm, bases, 4, rows)
    with torch.no_grad(), stored_in(lm, bases.spaces(torch.full(bases.shape, 4))):
        logits = lm.model(rows, use_cache=False).logits[0, :-1]
    nll = float(torch.nn.functional.cross_entropy(logits, rows[0, 1:]))
    how = Distillation(steps=1, tokens=24, cross_entropy=cross_entropy, fixed_share=0.5)
    record = distil(lm, bases, rows, how, progress=False).history[0]
    assert record["kl"] == pytest.approx(kl, rel=1e-3)
    assert record["loss"] == pytest.approx((1 - cross_entropy) * kl + cross_entropy * nll, rel=1e-3)


def test_training_brings_the_model_closer_at_several_ranks_and_keeps_bases_orthogonal(
    lm: LanguageModel, bases: HeadBases
) -> None:
    rows = encode_rows(lm, TEXTS, 32)
    weights = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    before = [divergence(lm, bases, rank, rows[:8]) for rank in (2, 4)]
    distil(lm, bases, rows, Distillation(steps=40, learning_rate=1e-2, tokens=32), progress=False)
    after = [divergence(lm, bases, rank, rows[:8]) for rank in (2, 4)]
    # A model of random weights has little to find, and at high ranks hardly anything to lose.
    assert all(now < 0.97 * then for now, then in zip(after, before, strict=True))
    q = cayley(bases.angles).detach()
    torch.testing.assert_close(q.mT @ q, torch.eye(8).expand_as(q), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(q), torch.ones(q.shape[:-2]), rtol=0, atol=1e-5)
    assert all(torch.equal(weights[name], tensor) for name, tensor in lm.model.state_dict().items())
    assert divergence(lm, bases, 8, rows[:2]) < 1e-5


def test_training_on_attention_wins_there_and_not_at_reconstruction(lm: LanguageModel, bases: HeadBases) -> None:
    trace = record_trace(lm, TEXTS[:1], tokens=100)
    principal = MatryoshkaKV().fit(lm, TEXTS[:1], tokens=100).head_bases()
    trained = MatryoshkaKV().fit(lm, TEXTS[:1], tokens=100).head_bases()
    how = Distillation(steps=60, learning_rate=1e-2, fixed_share=0.5)
    fit_to_attention(trace, trained, how)
    with torch.no_grad():
        spaces = [each.spaces(torch.full(each.shape, 4)) for each in (principal, trained)]
    theirs, ours = (attention_errors(trace, each) for each in spaces)
    assert sum(ours.values()) < 0.9 * sum(theirs.values())
    for layer in trace.layers:
        keys = trace.steps[layer][0].keys
        lost = []
        for each in spaces:
            space = each[layer][0]
            lost.append(float((space.restore(space.project(keys)) - keys).square().sum()))
        assert lost[0] <= lost[1] * 1.0001


def test_ranks_are_multiples_of_an_eighth_drawn_for_each_head_and_fixed_ones_are_not_drawn(bases: HeadBases) -> None:
    torch.manual_seed(0)
    drawn = torch.stack([Distillation().ranks(bases) for _ in range(200)])
    assert drawn.unique().tolist() == list(range(1, 9))
    assert (drawn.float().std(0) > 1).all()
    assert Distillation(fixed_share=0.5).ranks(bases).unique().tolist() == [4]


def test_every_row_comes_once_a_round_in_another_order() -> None:
    how = Distillation(batch_size=3)
    seen = torch.cat([how.order(step, 6) for step in range(4)]).tolist()
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]


@pytest.mark.parametrize("options", [{"cross_entropy": 1.5}, {"fixed_share": 0.0}, {"batch_size": 0}])
def test_settings_that_cannot_work_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        Distillation(**options)


def test_another_run_in_the_folder_is_refused(lm: LanguageModel, tmp_path: Path) -> None:
    method = MatryoshkaKV().fit(lm, TEXTS, tokens=100)
    how = Distillation(steps=2, tokens=16)
    method.distil(lm, TEXTS, how, tmp_path, progress=False)
    with pytest.raises(InputError, match="holds another run"):
        method.distil(lm, TEXTS, how, tmp_path, progress=False)


@pytest.mark.slow
def test_a_killed_training_ends_like_an_undisturbed_one(tiny_llama: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_distillation.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tiny_llama), str(tmp_path)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert answer.returncode == 0, answer.stderr
    files = [tmp_path / name / "method" / "fitted.safetensors" for name in ("undisturbed", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
