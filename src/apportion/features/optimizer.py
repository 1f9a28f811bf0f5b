"""Adam for dictionaries: takes sparse gradients as they are, and leaves the rows of the decoder at unit norm."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apportion.features.dictionary import SparseAutoencoder
from apportion.ops import adam_step_
from apportion.training import TrainingSettings
from apportion.training.optimizer import OptimizerFactory


class DictionaryAdam(torch.optim.Optimizer):
    """``torch.optim.Adam`` in one pass over memory, and unit rows in the same pass; state and its names are Adam's.

    A sparse gradient (``torch.sparse_coo`` with dense rows) gives the same step as the dense one it stands for: unlike
    with ``torch.optim.SparseAdam``, the momentum moves the rows without a gradient too.

    Args:
        params: parameters, or groups of them; a group with ``unit_rows=True`` holds matrices whose rows are brought to
            unit norm after each step.
        lr: learning rate.
        betas: of the running means of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: an L2 penalty, added to the gradient.

    Examples:
        >>> import torch
        >>> from apportion.features import DictionaryAdam
        >>> decoder = torch.nn.Parameter(torch.eye(3))
        >>> optimizer = DictionaryAdam([{"params": [decoder], "unit_rows": True}], lr=0.1)
        >>> decoder.square().sum().backward()
        >>> optimizer.step()
        >>> decoder.detach().norm(dim=1)
        tensor([1., 1., 1.])
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "unit_rows": False}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay as they are.

        Raises:
            TypeError, ValueError: a parameter that ``apportion.ops.adam_step_`` refuses.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            # A tensor on the processor, as torch.optim.Adam's, so that checkpoints keep it.
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        grad, rows = parameter.grad, None
        assert grad is not None
        if grad.is_sparse:
            grad = grad.coalesce()
            grad, rows = grad._values(), grad._indices()[0]
        beta1, beta2 = group["betas"]
        adam_step_(
            _as_matrix(parameter),
            _as_matrix(state["exp_avg"]),
            _as_matrix(state["exp_avg_sq"]),
            _as_matrix(grad),
            rows,
            int(state["step"]),
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            group["unit_rows"],
        )


def dictionary_adam(sae: SparseAutoencoder, settings: TrainingSettings) -> OptimizerFactory:
    """Makes the optimiser of a dictionary's parameters, which keeps the rows of its decoder at unit norm."""

    def build(parameters: Iterable[nn.Parameter]) -> DictionaryAdam:
        groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "unit_rows": True}]
        for each in parameters:
            groups[each is sae.decoder_weight and sae.unit_decoder]["params"].append(each)
        return DictionaryAdam(groups, settings.learning_rate, settings.betas, settings.eps, settings.weight_decay)

    return build


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.view(1, -1)
