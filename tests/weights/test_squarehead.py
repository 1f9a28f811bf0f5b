import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from apportion.errors import InputError
from apportion.training import TrainingSettings
from apportion.weights import Unstructured, add_masks, choose_masks, prunable, train_masked
from apportion.weights.squarehead import (
    EPS,
    Distillation,
    DistillationObjective,
    Seen,
    prediction_loss,
    squarehead_loss,
    squarehead_terms,
)


def states(seed, layers=3, batch=2, time=5, width=4, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(batch, time, width, generator=generator) for _ in range(layers)]


def by_hand(student, teacher, real, eps):
    """Number by number, in Python's floats."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        error = square = count = 0.0
        for row in range(s.shape[0]):
            for place in range(s.shape[1]):
                if not real[row, place]:
                    continue
                for column in range(s.shape[2]):
                    error += (float(s[row, place, column]) - float(t[row, place, column])) ** 2
                    square += float(t[row, place, column]) ** 2
                    count += 1
        total += (error / count) / (square / count + eps)
    return total


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([EPS, 1e-3, 0.5]))
def test_the_loss_is_the_definition(seed, layers, eps):
    student, teacher = states(seed, layers), states(seed + 1, layers)
    real = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)) > 0.4
    real[0, 0] = True
    assert float(squarehead_loss(student, teacher, real, eps)) == pytest.approx(
        by_hand(student, teacher, real, eps), rel=1e-5
    )
    whole = torch.ones_like(real)
    assert float(squarehead_loss(student, teacher, None, eps)) == pytest.approx(
        by_hand(student, teacher, whole, eps), rel=1e-5
    )


def test_a_copy_has_none_and_a_student_of_zeros_one_a_layer():
    teacher = states(0)
    assert float(squarehead_loss(teacher, teacher)) == 0
    squares = [float(each.square().mean()) for each in teacher]
    expected = sum(each / (each + EPS) for each in squares)
    zeros = [torch.zeros_like(each) for each in teacher]
    assert float(squarehead_loss(zeros, teacher)) == pytest.approx(expected, rel=1e-6)
    assert squarehead_terms(zeros, teacher).shape == (3,)


def test_it_is_relative_to_the_teachers_scale():
    student, teacher = states(0), states(1)
    once = float(squarehead_loss(student, teacher, eps=1e-20))
    scaled = float(squarehead_loss([100 * s for s in student], [100 * t for t in teacher], eps=1e-20))
    assert scaled == pytest.approx(once, rel=1e-5)


def test_padding_does_not_matter_even_where_it_is_not_a_number():
    student, teacher = states(0), states(1)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    expected = squarehead_loss(student, teacher, real)
    for each, value in ((student, float("nan")), (teacher, float("inf"))):
        for layer in each:
            layer[1, 2:] = value
    student = [each.requires_grad_() for each in student]
    found = squarehead_loss(student, teacher, real)
    assert torch.equal(found, expected)
    found.backward()
    assert all(bool(each.grad.isfinite().all()) for each in student)
    assert all(bool((each.grad[1, 2:] == 0).all()) for each in student)


def test_only_the_student_gets_gradients():
    student, teacher = ([each.requires_grad_() for each in states(seed)] for seed in (0, 1))
    squarehead_loss(student, teacher).backward()
    assert all(each.grad is not None for each in student)
    assert all(each.grad is None for each in teacher)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_numbers_are_computed_in_float32(dtype):
    student, teacher = ([each.to(dtype) for each in states(seed, time=200, scale=30)] for seed in (0, 1))
    exact = squarehead_loss([each.double() for each in student], [each.double() for each in teacher])
    found = squarehead_loss(student, teacher)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(exact), rel=1e-3)
    logits = torch.randn(6, 9).to(dtype)
    assert prediction_loss(logits, logits.flip(0)).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_predictions_are_compared_in_the_right_direction(temperature):
    student, teacher = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    expected = temperature**2 * kl_div(
        (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1), reduction="batchmean"
    )
    assert float(prediction_loss(student, teacher, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert float(prediction_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-6)


class Blocks(nn.Module):
    """A network that returns hidden states: three layers of tanh, dropout, a head."""

    def __init__(self, seed=0, depth=3, width=12, classes=5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])
            self.head = nn.Linear(width, classes)
        with torch.no_grad():
            for block in self.blocks:  # activations that eps is small beside
                block.weight.mul_(4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        hidden = []
        for block in self.blocks:
            x = self.dropout(torch.tanh(block(x)))
            hidden.append(x)
        return hidden, self.head(x)


def read(network, batch, want_logits):
    x, y = batch
    hidden, logits = network(x)
    return Seen(hidden, logits if want_logits else None, y)


def batch(step, width=12):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(32, width, generator=generator), torch.randint(5, (32,), generator=generator)


def test_the_objective_adds_its_parts_with_their_weights():
    student, teacher = Blocks(0).eval(), Blocks(1)
    objective = DistillationObjective(read, Distillation(0.5, 2.0, 3.0, temperature=2.0, eps=0.001), teacher)
    loss, parts = objective(student, batch(0), 0)
    x, y = batch(0)
    with torch.no_grad():
        (hidden, logits), (expected, known) = student(x), teacher(x)
    assert float(parts["ce"]) == pytest.approx(float(cross_entropy(logits, y)), rel=1e-5)
    assert float(parts["kl"]) == pytest.approx(float(prediction_loss(logits, known, 2.0)), rel=1e-5)
    assert float(parts["squarehead"]) == pytest.approx(float(squarehead_loss(hidden, expected, eps=0.001)), rel=1e-5)
    assert float(loss.detach()) == pytest.approx(
        float(0.5 * parts["ce"] + 2 * parts["kl"] + 3 * parts["squarehead"]), rel=1e-5
    )
    assert not any(each.requires_grad for each in parts.values())
    loss.backward()


def test_what_does_not_count_is_not_computed():
    asked = []

    def listening(network, pair, want_logits):
        asked.append((network is teacher, want_logits))
        return read(network, pair, want_logits)

    teacher = Blocks(1)
    DistillationObjective(listening, Distillation(), teacher)(Blocks(0), batch(0), 0)
    assert asked == [(False, True), (True, False)]
    asked.clear()
    DistillationObjective(listening, Distillation(ce=0), teacher)(Blocks(0), batch(0), 0)
    assert asked == [(False, False), (True, False)]
    asked.clear()
    DistillationObjective(listening, Distillation(squarehead=0), teacher)(Blocks(0), batch(0), 0)
    assert asked == [(False, True)]


def test_the_teacher_is_frozen_and_stays_what_it_was():
    student, teacher = Blocks(0), Blocks(1).train()
    before = copy.deepcopy(teacher.state_dict())
    objective = DistillationObjective(read, Distillation(kl=1), teacher)
    run = TrainingSettings(steps=5, learning_rate=0.01, clip_norm=None)
    train_masked(student, objective, batch, run, None, progress=False)
    assert not teacher.training
    assert all(not each.requires_grad and each.grad is None for each in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_a_masked_student_learns_its_teacher_and_keeps_its_zeros():
    teacher = Blocks(0)
    student = copy.deepcopy(teacher)
    student.dropout.p = 0.0
    layers = prunable(student)
    add_masks(student, choose_masks({each.name: each.matrix().detach().abs() for each in layers}, Unstructured(0.5)))
    zeros = {each.name: each.matrix() == 0 for each in layers}
    objective = DistillationObjective(read, Distillation(ce=0), teacher)
    before = float(objective(student, batch(999), 0)[0].detach())
    train_masked(
        student,
        objective,
        batch,
        TrainingSettings(steps=60, learning_rate=0.01),
        None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, 0.01, weight_decay=0.1),
        progress=False,
    )
    assert float(objective(student.eval(), batch(999), 0)[0].detach()) < 0.7 * before
    assert all(bool((each.matrix()[zeros[each.name]] == 0).all()) for each in layers)


def test_under_bfloat16_the_losses_stay_in_float32():
    teacher = Blocks(0).eval()
    objective = DistillationObjective(read, Distillation(kl=1), teacher)
    with torch.autocast("cpu", torch.bfloat16):
        loss, parts = objective(Blocks(1), batch(0), 0)
    assert {each.dtype for each in (loss, *parts.values())} == {torch.float32}


def test_a_batch_of_nothing_but_padding_has_loss_0():
    def nothing(network, pair, want_logits):
        hidden, logits = network(pair[0])
        return Seen(hidden, logits[:0], pair[1][:0], torch.zeros(32, dtype=torch.bool))

    student = Blocks(0)
    loss, _ = DistillationObjective(nothing, Distillation(kl=1), Blocks(1))(student, batch(0), 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(bool((each.grad == 0).all()) for each in student.parameters())


def test_a_teacher_with_small_activations_gives_a_warning_once():
    teacher = Blocks(0)
    with torch.no_grad():
        teacher.blocks[1].weight.mul_(0.01)
        teacher.blocks[1].bias.zero_()
    objective = DistillationObjective(read, Distillation(), teacher)
    with pytest.warns(UserWarning, match="after layers 1, 2 are small"):
        objective(Blocks(1), batch(0), 0)
    objective(Blocks(1), batch(1), 1)
    DistillationObjective(read, Distillation(eps=1e-9), teacher)(Blocks(1), batch(0), 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("squarehead", (1, 0, 1)),
        ("ce", (1, 0, 0)),
        ("ce+kl", (1, 1, 0)),
        ("ce + 0.5*kl + 2*sq", (1, 0.5, 2)),
        ("sq", (0, 0, 1)),
    ],
)
def test_losses_are_read_as_written(text, expected):
    found = Distillation.parse(text)
    assert (found.ce, found.kl, found.squarehead) == expected
    assert found.temperature == 1
    assert found.eps == 2**-7
    assert Distillation.parse(text, eps=0.5).eps == 0.5


@pytest.mark.parametrize("text", ["", "mse", "ce+ce", "-1*kl", "ce+", "1.2.3*kl", "kl*2", "0*ce"])
def test_other_losses_are_refused(text):
    with pytest.raises(InputError, match="ce"):
        Distillation.parse(text)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"ce": -1.0}, "ce=-1"),
        ({"squarehead": -0.5}, "squarehead=-0.5"),
        ({"kl": float("nan")}, "kl=nan"),
        ({"ce": 0.0, "squarehead": 0.0}, "all 0"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"eps": 0.0}, "eps=0"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_weights_that_cannot_work_are_refused(arguments, named):
    with pytest.raises(InputError, match=named):
        Distillation(**arguments)


def test_networks_that_do_not_fit_are_refused():
    def objective(teacher, reader=read, **weights):
        return DistillationObjective(reader, Distillation(**weights), teacher)

    with pytest.raises(InputError, match="there is none"):
        objective(None)
    assert objective(None, squarehead=0).teacher is None
    student = Blocks(0)
    with pytest.raises(InputError, match="3 layers, the teacher 4"):
        objective(Blocks(1, depth=4))(student, batch(0), 0)
    with pytest.raises(InputError, match=r"vocabulary"):
        objective(Blocks(1, classes=6), kl=1.0, squarehead=0.0)(student, batch(0), 0)
    with pytest.raises(InputError, match="shares parameters"):
        objective(student)(student, batch(0), 0)

    def silent(network, pair, want_logits):
        _, logits = network(pair[0])
        return Seen([], logits, pair[1])

    with pytest.raises(InputError, match="no hidden states"):
        objective(Blocks(1), silent)(student, batch(0), 0)
    with pytest.raises(InputError, match="same width"):
        squarehead_loss(states(0, width=4), states(0, width=5))
    with pytest.raises(InputError, match=r"on cpu, the teacher on meta"):
        squarehead_loss(states(0), [each.to("meta") for each in states(0)])
    with pytest.raises(InputError, match="eps=0"):
        squarehead_loss(states(0), states(1), eps=0.0)
