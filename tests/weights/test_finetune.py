import copy
import sys
from pydoc_data.topics import topics

import pytest
import torch
from torch.nn.functional import cross_entropy

from apportion.data import Document
from apportion.errors import InputError
from apportion.models import LanguageModel, load
from apportion.models.saving import save_model
from apportion.training import Hook
from apportion.weights import Unstructured, add_masks, choose_masks, prunable
from apportion.weights.finetune import (
    Contexts,
    FinetuneSettings,
    finetune,
    perplexity,
    read_contexts,
    read_language,
)
from apportion.weights.squarehead import Distillation, DistillationObjective

# The tiny model's activations are small, which is not what most tests are about.
SQUAREHEAD = Distillation(eps=1e-4)
DOCUMENTS = [Document(name, text) for name, text in sorted(topics.items())[:30]]
SETTINGS = FinetuneSettings(steps=12, batch_size=4, learning_rate=3e-3, checkpoint_every=5)


def pruned(folder, sparsity=0.5, names=("*",)):
    lm = load(folder)
    layers = prunable(lm.model, include=names)
    masks = choose_masks({each.name: each.matrix().abs() for each in layers}, Unstructured(sparsity, "row"))
    for each in layers:
        each.set_matrix(each.matrix() * masks[each.name])
    return lm


def zeros(lm):
    return {each.name: each.matrix() == 0 for each in prunable(lm.model)}


def weights(lm):
    return {name: each.clone() for name, each in lm.model.named_parameters()}


@pytest.fixture
def contexts(tiny_llama):
    return read_contexts(load(tiny_llama), DOCUMENTS, context=16, train=40, held_out=6)


def test_a_pruned_model_gets_better_and_keeps_exactly_its_zeros(tiny_llama, contexts, tmp_path):
    student, teacher = pruned(tiny_llama, 0.7), load(tiny_llama)
    before, own = zeros(student), weights(teacher)
    result = finetune(student, contexts, SETTINGS, teacher=teacher, distillation=SQUAREHEAD, progress=False)
    assert result.after < result.before
    assert result.teacher == perplexity(teacher, contexts.held_out)
    assert result.after == perplexity(student, contexts.held_out)
    assert all(torch.equal(each, before[name]) for name, each in zeros(student).items())
    assert result.weights_before == result.weights_after
    assert result.weights_after.sparsity == pytest.approx(0.7, abs=0.02)
    assert all(torch.equal(each, own[name]) for name, each in weights(teacher).items())
    assert not student.model.training
    assert not any(each.requires_grad for each in student.model.parameters())
    save_model(student, tmp_path / "model")
    again = load(tmp_path / "model")
    assert perplexity(again, contexts.held_out) == pytest.approx(result.after, rel=1e-6)
    assert all(torch.equal(each, before[name]) for name, each in zeros(again).items())


def test_an_interrupted_run_ends_with_the_same_weights(tiny_llama, contexts, tmp_path):
    def run(folder, stop_after=None):
        student = pruned(tiny_llama)
        found = finetune(
            student,
            contexts,
            SETTINGS,
            folder,
            teacher=load(tiny_llama),
            distillation=SQUAREHEAD,
            progress=False,
            stop_after=stop_after,
        )
        return student, found

    whole, result = run(tmp_path / "whole")
    run(tmp_path / "parts", stop_after=7)
    resumed, again = run(tmp_path / "parts")
    assert again.training.resumed_from == 7
    assert again.before == result.before
    assert all(torch.equal(each, weights(whole)[name]) for name, each in weights(resumed).items())
    with pytest.raises(InputError, match=r"student|masks"):
        finetune(
            pruned(tiny_llama, 0.6),
            contexts,
            SETTINGS,
            tmp_path / "parts",
            teacher=load(tiny_llama),
            distillation=SQUAREHEAD,
            progress=False,
        )


@pytest.mark.parametrize(("share", "masked"), [(0.09, False), (0.1, True)])
def test_a_tenth_of_zeros_makes_a_mask(tiny_llama, contexts, share, masked):
    student = pruned(tiny_llama)
    layer = next(each for each in prunable(student.model) if each.name.endswith("0.mlp.up_proj"))
    matrix = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    matrix.view(-1)[: int(share * 2048) + masked] = 0
    layer.set_matrix(matrix)
    finetune(student, contexts, SETTINGS, distillation=Distillation(squarehead=0), progress=False)
    assert bool((layer.matrix()[matrix == 0] == 0).all()) == masked


def test_masks_can_be_given_for_zeros_that_mean_nothing(tiny_llama, contexts):
    student = pruned(tiny_llama)
    name = "model.layers.0.mlp.up_proj"
    mask = torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.3
    result = finetune(
        student, contexts, SETTINGS, distillation=Distillation(squarehead=0), masks={name: mask}, progress=False
    )
    found = zeros(student)
    assert torch.equal(found[name] | mask, torch.ones_like(mask))
    assert not bool(found["model.layers.1.mlp.up_proj"].any())
    assert result.weights_after.prunable == mask.numel()


def test_an_untied_head_with_zeros_keeps_them_too(tiny_llama, contexts):
    student = pruned(tiny_llama)
    head = student.model.get_output_embeddings()
    weight = head.weight.detach().clone()
    weight[:, ::2] = 0
    head.weight = torch.nn.Parameter(weight, requires_grad=False)
    finetune(student, contexts, SETTINGS, distillation=Distillation(squarehead=0), progress=False)
    assert bool((student.model.get_output_embeddings().weight[:, ::2] == 0).all())


def test_hooks_can_prune_while_it_learns(tiny_llama, contexts):
    class Prune(Hook):
        def after_step(self, module, step, metrics, /):
            if step == 5:
                scores = {each.name: each.matrix().detach().abs() for each in prunable(module)}
                add_masks(module, choose_masks(scores, Unstructured(0.8)))

    student = pruned(tiny_llama)
    result = finetune(
        student,
        contexts,
        SETTINGS,
        teacher=load(tiny_llama),
        distillation=SQUAREHEAD,
        hooks=[Prune()],
        progress=False,
    )
    assert result.weights_after.sparsity == pytest.approx(0.8, abs=0.01)


def test_padding_and_prompts_are_left_out_as_they_should(tiny_llama):
    student, teacher = pruned(tiny_llama), load(tiny_llama)
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    objective = DistillationObjective(read_language, Distillation(kl=1, eps=1e-4), teacher.model)
    loss, parts = objective(student.model, (ids, mask, labels), 0)
    ids[1, 6:] = 7  # what is under padding does not matter
    again, _ = objective(student.model, (ids, mask, labels), 0)
    assert float(again) == pytest.approx(float(loss), rel=1e-5)
    logits = [
        student.model(input_ids=row[None, :length]).logits[0, 2 : length - 1]
        for row, length in zip(ids, (9, 6), strict=True)
    ]
    answers = torch.cat([ids[0, 3:9], ids[1, 3:6]])
    assert float(parts["ce"]) == pytest.approx(float(cross_entropy(torch.cat(logits), answers)), rel=1e-4)
    seen = read_language(student.model, (ids, mask, labels), False)
    assert seen.logits is None
    assert int(seen.real.sum()) == 15
    assert len(seen.targets) == 9
    nothing, _ = objective(student.model, (ids, torch.zeros_like(mask), labels.fill_(-100)), 0)
    assert float(nothing) == 0


def test_the_losses_and_gradients_without_masks_are_those_of_plain_text(tiny_llama):
    lm = load(tiny_llama)
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = read_language(lm.model, ids, True)
    expected = lm.loss_per_token(ids).flatten()
    assert torch.allclose(cross_entropy(seen.logits, seen.targets, reduction="none"), expected, atol=1e-5)


def test_every_row_comes_once_an_epoch_whatever_the_batch():
    contexts = Contexts(torch.arange(7).unsqueeze(1), torch.zeros(1, 1, dtype=torch.int64))
    batch = contexts.batches(3, seed=1)
    drawn = torch.cat([batch(step) for step in range(14)]).flatten().tolist()
    assert [len(batch(step)) for step in range(14)] == [3] * 14
    epochs = [drawn[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(each) == list(range(7)) for each in epochs)
    assert len({tuple(each) for each in epochs}) > 1
    assert torch.equal(batch(9), contexts.batches(3, seed=1)(9))
    assert len(contexts.batches(20, seed=0)(3)) == 20


def test_no_file_is_in_both_parts_of_the_text(tiny_llama):
    lm = load(tiny_llama)
    texts = {f"file{number}": chr(ord("a") + number) * 300 for number in range(12)}
    documents = [Document(name, text) for name, text in texts.items()]
    documents.insert(1, Document("file0 (part 2)", "a" * 300))
    found = read_contexts(lm, documents, context=8, train=1000, held_out=1000)

    def characters(rows):
        return set("".join(lm.tokenizer.batch_decode(rows, skip_special_tokens=True))) & set("abcdefghijkl")

    assert characters(found.held_out) == {"a", "k"}
    assert characters(found.train) == set("bcdefghijl")
    # A first document that has more than enough is not all that is read.
    few = read_contexts(lm, documents, context=8, train=1, held_out=1)
    assert characters(few.held_out) == {"a"}
    assert characters(few.train) == {"b"}
    one = [Document(f"book (part {number})" if number > 1 else "book", "some words " * 40) for number in range(1, 4)]
    assert len(read_contexts(lm, one, context=8, train=5, held_out=3).train) == 5


def test_a_book_is_not_read_to_its_end(tiny_llama, monkeypatch):
    def book():
        for part in range(1, 100):
            yield Document(f"book (part {part})", "some words " * 40)
        raise AssertionError("read on")

    monkeypatch.setattr(sys.modules[read_contexts.__module__], "_LONG_FILE", 5000)
    found = read_contexts(load(tiny_llama), book(), context=8, train=5, held_out=3)
    assert (len(found.train), len(found.held_out)) == (5, 3)


def test_learning_rates_rise_and_fall_as_the_paper_has_them():
    run = FinetuneSettings(steps=200).training()
    assert round(run.warmup_fraction * 200) == 20
    assert run.warmup_fraction + run.decay_fraction == 1
    assert run.clip_norm is None
    assert FinetuneSettings(steps=8).training().warmup_fraction == 0.25
    assert FinetuneSettings(steps=1).training().warmup_fraction == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"steps": 0}, "steps=0"), ({"batch_size": 0}, "batch_size=0"), ({"warmup_steps": -1}, "warmup_steps=-1")],
)
def test_settings_that_cannot_work_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        FinetuneSettings(**{"steps": 5, **arguments})


def test_models_that_do_not_fit_are_refused(tiny_llama, contexts):
    def run(student=None, teacher=None, **more):
        finetune(student or pruned(tiny_llama), contexts, SETTINGS, teacher=teacher, progress=False, **more)

    with pytest.raises(InputError, match="there is none"):
        run()
    ce = Distillation(squarehead=0)
    with pytest.raises(InputError, match="10 % zeros or more: prune it first"):
        run(load(tiny_llama), distillation=ce)
    with pytest.raises(InputError, match="no layer 'nowhere'"):
        run(distillation=ce, masks={"nowhere": torch.ones(2, 2, dtype=torch.bool)})

    def other(**changes):
        import transformers

        config = copy.deepcopy(load(tiny_llama).model.config)
        for name, value in changes.items():
            setattr(config, name, value)
        return LanguageModel("other", transformers.LlamaForCausalLM(config), load(tiny_llama).tokenizer)

    with pytest.raises(InputError, match="3 layers, its teacher other 2"):
        run(teacher=other(num_hidden_layers=2))
    with pytest.raises(InputError, match=r"width\), its teacher other 48"):
        run(teacher=other(hidden_size=48))
    strange = load(tiny_llama)
    strange.tokenizer.add_tokens(["<new>"])
    with pytest.raises(InputError, match="other vocabularies"):
        run(teacher=strange)
    student = pruned(tiny_llama)
    with pytest.raises(InputError, match="shares parameters"):
        run(student, student)
    assert not student.model.training


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"context": 1}, "context=1"), ({"train": 0}, "train=0"), ({"held_out": 0}, "held_out=0")],
)
def test_text_that_cannot_work_is_refused(tiny_llama, arguments, named):
    with pytest.raises(InputError, match=named):
        read_contexts(load(tiny_llama), DOCUMENTS, **arguments)
    with pytest.raises(InputError, match="too short: 1 documents"):
        read_contexts(load(tiny_llama), DOCUMENTS[:1])
