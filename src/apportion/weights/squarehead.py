"""SquareHead: what is left of a pruned network learns from the dense one, layer by layer.

Kurtic, Kuznedelev, Frantar, Goin, Alistarh, *Sparse Fine-tuning for Inference Acceleration of Large Language Models*,
2023, arXiv 2310.06927.

Masks are chosen before and then hold (`train_masked`). What this decides is how the weights that stay are trained: by
the sum, over the layers, of the *relative* squared error of the student's hidden states, beside the task's own loss:

    L  = h_ce * CE  +  h_kl * KL  +  h_sq * SQ
    SQ = sum over layers l of  mean((S_l - T_l)^2) / (mean(T_l^2) + eps)
    KL = T^2 * mean over answers of  KL(softmax(teacher / T) || softmax(student / T))

| paper, published code | here |
|---|---|
| `S_l`, `T_l`, after block l (``hidden_states[1:]``) | ``Seen.hidden`` of student and teacher |
| tokens that are no padding | ``Seen.real`` (prompts count; only CE and KL are of answers alone) |
| answers (``labels != -100``) | the rows of ``Seen.logits`` and ``Seen.targets`` |
| hardness `h_ce`, `h_kl`, `h_sq` = 1, 0, 1 | ``Distillation.ce``, ``kl``, ``squarehead`` |
| eps = 2^-7, bfloat16's machine epsilon | ``Distillation.eps`` |

Departures: the published code leaves gradients of pruned weights in their common norm, and so cannot clip; here they
are zero before anything is clipped. An all-padding batch has loss 0 instead of NaN. Student and teacher must have the
same depth, width and vocabulary: there are no projections between them, in the paper neither.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apportion.errors import InputError

EPS = 2.0**-7
# Where a teacher's mean square is below so many eps, eps decides the term as much as the teacher does.
_SMALL = 10


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network makes of a batch.

    Attributes:
        hidden: after each layer, first to last, ``[*places, width]``; places are those of a batch, or of a batch and
            time.
        logits: of each answer; None if they were not asked for.
        targets: the right class of each answer.
        real: ``[*places]``, False for padding; None where nothing is padded.
    """

    hidden: Sequence[Float[Tensor, "..."]]
    logits: Float[Tensor, "answers classes"] | None
    targets: Int64[Tensor, " answers"]
    real: Bool[Tensor, "..."] | None = None


Reader = Callable[[nn.Module, Any, bool], Seen]
"""Runs a network on a batch, with its logits or without."""


@dataclass(frozen=True)
class Distillation:
    """How much each loss counts, and their constants; the defaults are the paper's final recipe.

    Attributes:
        ce: of the cross-entropy with the right answers.
        kl: of the divergence from the teacher's predictions.
        squarehead: of the relative error of hidden states.
        temperature: at which predictions are compared.
        eps: added to the teacher's mean square; 2^-7 as in the published code. It damps layers whose activations are
            small.

    Raises:
        InputError: a negative weight, or none above 0; a temperature or eps that cannot work.
    """

    ce: float = 1.0
    kl: float = 0.0
    squarehead: float = 1.0
    temperature: float = 1.0
    eps: float = EPS

    def __post_init__(self) -> None:
        for name in ("ce", "kl", "squarehead"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)}: use a weight of 0 (without it) or more, such as 1")
        if not self.ce + self.kl + self.squarehead > 0:
            raise InputError("ce, kl and squarehead are all 0: there is nothing to learn from; set one of them to 1")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: use a positive number, such as 1")
        _check_eps(self.eps)

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is learned from a teacher."""
        return self.kl + self.squarehead > 0

    @classmethod
    def parse(cls, text: str, **constants: float) -> "Distillation":
        """Read a loss as people write it.

        Args:
            text: ``squarehead`` (the paper's recipe, ``ce+sq``), or a sum of ``ce``, ``kl`` and ``sq``, each with a
                weight if need be: ``ce``, ``ce+kl``, ``ce+0.5*kl+sq``.
            constants: ``temperature`` and ``eps``.

        Raises:
            InputError: it is none of these.
        """
        found: dict[str, float] = {"ce": 0.0, "kl": 0.0, "sq": 0.0}
        for term in ("ce+sq" if text == "squarehead" else text).replace(" ", "").split("+"):
            parts = re.fullmatch(r"(?:([0-9]*\.?[0-9]+)\*)?(ce|kl|sq)", term)
            if parts is None or found[parts[2]]:
                raise InputError(
                    f"{text!r} is no loss: use squarehead, or a sum of ce, kl and sq, each at most once, such as ce+kl "
                    "or ce+0.5*kl+sq"
                )
            found[parts[2]] = float(parts[1] or 1)
        return cls(found["ce"], found["kl"], found["sq"], **constants)


def squarehead_terms(
    student: Sequence[Float[Tensor, "..."]],
    teacher: Sequence[Float[Tensor, "..."]],
    real: Bool[Tensor, "..."] | None = None,
    eps: float = EPS,
) -> Float[Tensor, " layers"]:
    """The relative squared error of each layer, computed in float32 whatever the hidden states are in.

    Args:
        student: hidden states ``[*places, width]`` of each layer.
        teacher: the same of the teacher; no gradient reaches it.
        real: ``[*places]``, False for padding, which is not looked at (it may be NaN).
        eps: added to each teacher's mean square.

    Raises:
        InputError: there are no layers, or the two differ in their number, shape or device; ``eps`` is not positive.
    """
    _check_alike(student, teacher)
    _check_eps(eps)
    terms = []
    for s, t in zip(student, teacher, strict=True):
        s, t = _precise(s), _precise(t.detach())
        if real is not None:
            unseen = ~real.unsqueeze(-1)
            s, t = s.masked_fill(unseen, 0), t.masked_fill(unseen, 0)
        count: Any = t.numel() if real is None else t.shape[-1] * real.sum().clamp_min(1)
        terms.append((s - t).square().sum() / count / (t.square().sum() / count + eps))
    return torch.stack(terms)


def squarehead_loss(
    student: Sequence[Float[Tensor, "..."]],
    teacher: Sequence[Float[Tensor, "..."]],
    real: Bool[Tensor, "..."] | None = None,
    eps: float = EPS,
) -> Float[Tensor, ""]:
    """SQ: the *sum* of `squarehead_terms`; 0 for a copy, about the number of layers for a student of zeros."""
    return squarehead_terms(student, teacher, real, eps).sum()


def prediction_loss(
    student: Float[Tensor, "answers classes"],
    teacher: Float[Tensor, "its_answers its_classes"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """KL: how far the student's predictions are from the teacher's, the mean over answers times ``temperature ** 2``.

    Raises:
        InputError: the two do not have the same answers and classes.
    """
    if student.shape != teacher.shape:
        raise InputError(
            f"the student's logits are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)} (answers, "
            "classes): both need the same vocabulary; use the dense model that the student was pruned from"
        )
    expected = (_precise(teacher.detach()) / temperature).log_softmax(-1)
    found = (_precise(student) / temperature).log_softmax(-1)
    divergence = (expected.exp() * (expected - found)).sum()
    return temperature**2 * divergence / max(1, len(student))


class DistillationObjective:
    """The loss of a student that learns from a frozen teacher: an objective of `train` and `train_masked`.

    The teacher is put in eval mode and asked for no gradients. Logged beside the loss are its parts: ``ce``, ``kl`` and
    ``squarehead``.

    Args:
        read: runs a network on a batch.
        distillation: the weights of the losses.
        teacher: the dense network; needed unless only ``ce`` counts.

    Raises:
        InputError: there is no teacher where one is needed; at the first batch: the teacher is the student itself, or
            differs from it in depth, width, vocabulary or device; a network gives no hidden states.
    """

    def __init__(
        self, read: Reader, distillation: Distillation | None = None, teacher: nn.Module | None = None
    ) -> None:
        self.read = read
        self.distillation = distillation or Distillation()
        if self.distillation.needs_teacher and teacher is None:
            raise InputError(
                f"{self.distillation} learns from a teacher, and there is none: give the dense network that the "
                "student was pruned from, or use ce alone"
            )
        self.teacher = teacher if self.distillation.needs_teacher else None
        if self.teacher is not None:
            self.teacher.eval().requires_grad_(False)
        self._looked = False

    def __call__(self, student: nn.Module, batch: Any, step: int, /) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts."""
        weights = self.distillation
        seen = self.read(student, batch, weights.ce + weights.kl > 0)
        parts: dict[str, Tensor] = {}
        if weights.ce:
            assert seen.logits is not None  # asked for
            total = cross_entropy(_precise(seen.logits), seen.targets, reduction="sum")
            parts["ce"] = total / max(1, len(seen.targets))
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.read(self.teacher, batch, weights.kl > 0)
            if not self._looked:
                self._look(student, seen, expected)
            if weights.kl:
                assert seen.logits is not None
                assert expected.logits is not None
                parts["kl"] = prediction_loss(seen.logits, expected.logits, weights.temperature)
            if weights.squarehead:
                parts["squarehead"] = squarehead_loss(seen.hidden, expected.hidden, seen.real, weights.eps)
        loss = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
        return loss, {name: part.detach() for name, part in parts.items()}

    def _look(self, student: nn.Module, seen: Seen, expected: Seen) -> None:
        """At the first batch: is this a teacher, and is it seen through eps?"""
        assert self.teacher is not None
        own = {id(each) for each in student.parameters()}
        if any(id(each) in own for each in self.teacher.parameters()):
            raise InputError("the teacher shares parameters with the student: give a copy of the dense network")
        self._looked = True
        if not self.distillation.squarehead:
            return
        _check_alike(seen.hidden, expected.hidden)
        eps = self.distillation.eps
        squares = [
            float(_precise(each if seen.real is None else each[seen.real]).square().mean()) for each in expected.hidden
        ]
        damped = [layer for layer, square in enumerate(squares) if square < _SMALL * eps]
        if damped:
            warnings.warn(
                f"the teacher's activations after layers {', '.join(map(str, damped))} are small (mean squares from "
                f"{min(squares[layer] for layer in damped):.2g}, eps={eps:.2g}): eps damps their errors; a smaller eps "
                "lets them count in full",
                stacklevel=3,
            )


def _check_alike(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not student or not teacher:
        whose = "student" if not student else "teacher"
        raise InputError(f"the {whose} returns no hidden states: SquareHead needs those after each layer")
    if len(student) != len(teacher):
        raise InputError(
            f"the student has {len(student)} layers, the teacher {len(teacher)}: SquareHead compares them one by one, "
            "so use the dense network that the student was pruned from"
        )
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        if s.shape != t.shape:
            raise InputError(
                f"after layer {layer} the student has {tuple(s.shape)}, the teacher {tuple(t.shape)}: they need the "
                "same places and the same width (there are no projections between them)"
            )
        if s.device != t.device:
            raise InputError(
                f"after layer {layer} the student is on {s.device}, the teacher on {t.device}: put both on one device"
            )


def _check_eps(eps: float) -> None:
    # At 0 a silent layer, or a batch of padding, would be 0 / 0.
    if not 0 < eps < math.inf:
        raise InputError(f"eps={eps}: use a small positive number, such as 2**-7")


def _precise(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
