"""One training step of other libraries, through what they make public, each with its own defaults.

All start from the same directions and run torch's Adam at the same learning rate. Auxiliary losses for dead features
are on where they are by default, but nothing is dead yet, so they cost nothing; the same holds for apportion.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, TrainingStep
from benchmarks.problem import LEARNING_RATE, SMOKE, Problem
from benchmarks.registry import Unavailable


def peers() -> list[Contender]:
    """Every step of another library that is compared."""
    sparsify = "decoder normalisation, forward, fvu backward, gradient projection, {} Adam, firing record"
    saelens = "training_forward_pass, backward, Adam; without the trainer's clipping and firing statistics"
    learning = "the trainer's update(): forward, backward, gradient projection, clipping, Adam, normalisation"
    complete = "train_sae() on one batch, squared error: forward (BatchNorm encoder), backward, clipping, Adam"
    known = [
        Contender("sparsify", sparsify.format("plain"), _sparsify),
        Contender("sparsify, fused Adam", sparsify.format("fused"), partial(_sparsify, fused=True)),
        Contender("SAELens TopK", saelens, partial(_saelens, kind="TopK")),
        Contender(
            "SAELens TopK, sparse",
            f"use_sparse_activations=True, rescale_acts_by_decoder_norm=False; {saelens}",
            partial(_saelens, kind="TopK sparse"),
        ),
        Contender("SAELens BatchTopK", saelens, partial(_saelens, kind="BatchTopK")),
        Contender("dictionary_learning TopK", learning, partial(_dictionary_learning, kind="TopK")),
        Contender("dictionary_learning BatchTopK", learning, partial(_dictionary_learning, kind="BatchTopK")),
        Contender("overcomplete TopK", complete, partial(_overcomplete, kind="TopK")),
        Contender("overcomplete BatchTopK", complete, partial(_overcomplete, kind="BatchTopK")),
    ]
    return [replace(each, build=_tried(each.build)) for each in known]


def peer(label: str) -> Contender:
    """The peer of that label."""
    return next(each for each in peers() if each.label == label)


def _tried(build: Callable[[Problem], TrainingStep]) -> Callable[[Problem], TrainingStep]:
    """A peer that does not work here must say so before the race begins, rather than end it."""

    def tried(problem: Problem) -> TrainingStep:
        trial = Problem(SMOKE)
        try:
            build(trial).take(trial.batch(0))
        except ImportError as error:
            raise Unavailable(str(error)) from error
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise Unavailable(f"its step fails here ({type(error).__name__}: {reason[:160]})") from error
        return build(problem)

    return tried


def _sparsify(problem: Problem, fused: bool | None = None) -> TrainingStep:
    # Where triton is installed sparsify calls its kernels, also on a machine without a GPU, where they cannot run.
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    library = imported("sparsify")
    shape = problem.shape
    config = library.SparseCoderConfig(num_latents=shape.features, k=shape.budget)
    coder = library.SparseCoder(shape.width, config)
    coder.encoder.weight.data.copy_(problem.directions)
    coder.W_dec.data.copy_(problem.directions)
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE, fused=fused)
    silent_tokens = torch.zeros(shape.features, dtype=torch.long)

    def take(x: Tensor) -> None:
        # The order of `sparsify.Trainer.fit`, which has no step of its own to call.
        fired = torch.zeros(shape.features, dtype=torch.bool)
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        silent_tokens.add_(x.shape[0])
        silent_tokens[fired] = 0

    return TrainingStep(take, list(coder.parameters()), optimizer)


def _saelens(problem: Problem, kind: str) -> TrainingStep:
    topk, batch = imported("sae_lens.saes.topk_sae"), imported("sae_lens.saes.batchtopk_sae")
    base = imported("sae_lens.saes.sae")
    shape = problem.shape
    sizes: dict[str, Any] = {"d_in": shape.width, "d_sae": shape.features, "k": shape.budget}
    if kind == "BatchTopK":
        sae = batch.BatchTopKTrainingSAE(batch.BatchTopKTrainingSAEConfig(**sizes))
    else:
        if kind == "TopK sparse":
            # With rescaling, torch 2.13 has no gradient for what the sparse codes go through.
            sizes |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        sae = topk.TopKTrainingSAE(topk.TopKTrainingSAEConfig(**sizes))
    sae.W_enc.data.copy_(problem.directions.T)
    sae.W_dec.data.copy_(problem.directions)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    nothing_dead = torch.zeros(shape.features, dtype=torch.bool)

    def take(x: Tensor) -> None:
        step_input = base.TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=nothing_dead, n_training_steps=1, is_logging_step=False
        )
        sae.training_forward_pass(step_input).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return TrainingStep(take, list(sae.parameters()), optimizer)


def _dictionary_learning(problem: Problem, kind: str) -> TrainingStep:
    module = {"TopK": "top_k", "BatchTopK": "batch_top_k"}[kind]
    library = imported(f"dictionary_learning.trainers.{module}")
    shape = problem.shape
    trainer = getattr(library, f"{kind}Trainer")(
        steps=1_000_000,
        activation_dim=shape.width,
        dict_size=shape.features,
        k=shape.budget,
        layer=0,
        lm_name="none",
        lr=LEARNING_RATE,
        warmup_steps=0,
        device="cpu",
    )
    trainer.ae.encoder.weight.data.copy_(problem.directions)
    trainer.ae.decoder.weight.data.copy_(problem.directions.T)
    # Step 0 would also compute the geometric median of the batch; a step of every run but one does not.
    return TrainingStep(lambda x: trainer.update(1, x), list(trainer.ae.parameters()), trainer.optimizer)


def _overcomplete(problem: Problem, kind: str) -> TrainingStep:
    _bare_package("overcomplete")
    library = imported("overcomplete.sae")
    shape = problem.shape
    winners = shape.budget * (shape.tokens if kind == "BatchTopK" else 1)
    sae = getattr(library, f"{kind}SAE")(shape.width, nb_concepts=shape.features, top_k=winners, device="cpu")
    sae.encoder.final_block[0].weight.data.copy_(problem.directions)
    sae.dictionary._weights.data.copy_(problem.directions)
    optimizer = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)

    def squared_error(x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def take(x: Tensor) -> None:
        library.train_sae(sae, [x], squared_error, optimizer, nb_epochs=1, monitoring=0)

    return TrainingStep(take, list(sae.parameters()), optimizer)


def _bare_package(name: str) -> None:
    """Let the parts of a package be imported without running the package's own ``__init__``.

    That of overcomplete loads image models, which need torchvision; the autoencoders that are measured do not.
    """
    found = importlib.util.find_spec(name) if name not in sys.modules else None
    if found is None or not found.submodule_search_locations:
        return
    package = types.ModuleType(name)
    package.__path__ = list(found.submodule_search_locations)
    package.__spec__ = found
    sys.modules[name] = package


def imported(name: str) -> Any:
    """A module of a library that may be absent, without its greetings and warnings.

    Raises:
        ImportError: it is not installed, or does not work here; says so in a line.
    """
    try:
        with _hushed(), _torch_as_it_was():
            return importlib.import_module(name)
    except Exception as error:
        # A library that is half compatible may fail with anything at import; it must not end the others' race.
        package = name.partition(".")[0]
        raise ImportError(f"{package} cannot be imported ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _torch_as_it_was() -> Iterator[None]:
    # nnsight, which dictionary_learning imports, replaces Tensor.backward for the whole process by one that parses
    # the caller's source first: everybody's step would pay for it, and code that has no Python source would fail.
    backward = Tensor.backward
    try:
        yield
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    # Stdout may be somebody's JSON.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield
