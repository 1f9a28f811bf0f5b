"""A step of Adam and the projection, spelled out: what every backend must equal."""

from jaxtyping import Float, Int64
from torch import Tensor


def adam_step_(
    param: Float[Tensor, "rows d"],
    exp_avg: Float[Tensor, "rows d"],
    exp_avg_sq: Float[Tensor, "rows d"],
    grad: Float[Tensor, "n d"],
    grad_rows: Int64[Tensor, "n"] | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    unit_rows: bool,
) -> None:
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with the bias correction of ``torch.optim.Adam``, then unit rows."""
    if grad_rows is not None:
        grad = param.new_zeros(param.shape).index_copy_(0, grad_rows, grad)
    grad = grad + weight_decay * param
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    param -= lr / (1 - beta1**step) * exp_avg / denominator
    if unit_rows:
        param /= param.norm(dim=1, keepdim=True).clamp(min=1e-12)


def project_rows_(
    grad: Float[Tensor, "n d"], unit: Float[Tensor, "rows d"], grad_rows: Int64[Tensor, "n"] | None
) -> None:
    """``grad - (grad . unit) unit``, row by row."""
    rows = unit if grad_rows is None else unit[grad_rows]
    grad -= (grad * rows).sum(dim=1, keepdim=True) * rows
