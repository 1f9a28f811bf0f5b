"""The optimiser of dictionaries: torch's Adam, whatever form the gradient comes in, and unit rows where asked for."""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from apportion.allocate import TokenChoice
from apportion.features import DictionaryAdam, SparseAutoencoder
from apportion.features.optimizer import dictionary_adam
from apportion.training import TrainingSettings
from apportion.training.state import optimizer_numbers, optimizer_tensors, restore_optimizer

OPTIONS = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1}
SETTINGS = TrainingSettings(steps=9, learning_rate=0.03)


class Module(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(9, 5, generator=generator))
        self.bias = nn.Parameter(torch.randn(9, generator=generator))
        self.number = nn.Parameter(torch.randn((), generator=generator))
        self.untouched = nn.Parameter(torch.randn(3, generator=generator))


def give_gradients(module: Module, form: str, step: int) -> None:
    """The same gradients in one of three forms."""
    generator = torch.Generator().manual_seed(step)
    places = torch.tensor([[1, 4, 4, 7]]) + step % 2
    values = torch.randn(4, 5, generator=generator)
    grad = torch.sparse_coo_tensor(places, values, (9, 5), check_invariants=True)
    module.matrix.grad = {"dense": grad.to_dense(), "sparse": grad.coalesce(), "sparse with repeated rows": grad}[form]
    module.bias.grad = torch.randn(9, generator=generator)
    module.number.grad = torch.randn((), generator=generator)


def take_steps(module: Module, optimizer: torch.optim.Optimizer, form: str, steps: Iterable[int]) -> None:
    for step in steps:
        give_gradients(module, form, step)
        optimizer.step()


def by_torch(steps: int) -> Module:
    module = Module()
    take_steps(module, torch.optim.Adam(module.parameters(), **OPTIONS), "dense", range(steps))
    return module


def far(one: nn.Module, other: nn.Module) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("form", ["dense", "sparse", "sparse with repeated rows"])
def test_its_steps_are_those_of_torchs_adam(form: str) -> None:
    module = Module()
    optimizer = DictionaryAdam(module.parameters(), **OPTIONS)
    take_steps(module, optimizer, form, range(6))
    assert far(module, by_torch(6)) < 1e-6
    assert module.untouched not in optimizer.state


def test_a_learning_rate_may_change_between_steps() -> None:
    results = []
    for make in (DictionaryAdam, torch.optim.Adam):
        module = Module()
        optimizer = make(module.parameters(), **OPTIONS)
        for step, rate in enumerate([0.0, 0.1, 0.02]):
            optimizer.param_groups[0]["lr"] = rate
            take_steps(module, optimizer, "dense", [step])
        results.append(module)
    assert far(*results) < 1e-6


def test_only_rows_of_a_flagged_group_are_normalised() -> None:
    module = Module()
    groups = [{"params": [module.bias]}, {"params": [module.matrix], "unit_rows": True}]
    take_steps(module, DictionaryAdam(groups, **OPTIONS), "sparse", range(3))
    torch.testing.assert_close(module.matrix.detach().norm(dim=1), torch.ones(9))
    assert float(module.bias.detach().norm()) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("other", [DictionaryAdam, torch.optim.Adam])
def test_its_state_is_adams_and_what_is_restored_goes_on_exactly(other: type[torch.optim.Optimizer]) -> None:
    whole, parts = Module(), Module()
    undisturbed, paused = (DictionaryAdam(each.parameters(), **OPTIONS) for each in (whole, parts))
    take_steps(whole, undisturbed, "sparse", range(7))
    take_steps(parts, paused, "sparse", range(4))
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(paused, parts).items()}
    keys = {name.rpartition(".")[2] for name in tensors}
    assert keys == {"step", "exp_avg", "exp_avg_sq"}
    resumed = other(parts.parameters(), **OPTIONS)
    restore_optimizer(resumed, parts, tensors, optimizer_numbers(paused, parts))
    take_steps(parts, resumed, "sparse" if other is DictionaryAdam else "dense", range(4, 7))
    assert far(whole, parts) < 1e-6
    if other is DictionaryAdam:
        assert far(whole, parts) == 0


def gradient_of_a_dictionary(sae: SparseAutoencoder) -> Tensor:
    output = sae(torch.randn(6, 8, generator=torch.Generator().manual_seed(1))).output
    return output.square().sum()


def test_a_dictionarys_decoder_alone_has_unit_rows() -> None:
    sae = SparseAutoencoder(8, 20, TokenChoice(2)).train()
    optimizer = dictionary_adam(sae, SETTINGS)(sae.parameters())
    gradient_of_a_dictionary(sae).backward()
    optimizer.step()
    torch.testing.assert_close(sae.decoder_weight.detach().norm(dim=1), torch.ones(20))
    assert float((sae.encoder_weight.detach().norm(dim=1) - 1).abs().max()) > 1e-3
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(map(id, sae.parameters()))


def test_a_decoder_that_is_not_trained_is_left_alone() -> None:
    sae = SparseAutoencoder(8, 20, TokenChoice(2)).train()
    sae.decoder_weight.requires_grad_(False)
    before = sae.decoder_weight.clone()
    optimizer = dictionary_adam(sae, SETTINGS)(each for each in sae.parameters() if each.requires_grad)
    gradient_of_a_dictionary(sae).backward()
    optimizer.step()
    assert torch.equal(sae.decoder_weight, before)
