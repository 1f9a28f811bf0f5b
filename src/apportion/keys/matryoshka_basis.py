"""Orthogonal bases of heads: principal ones, random ones, and Cayley's map, by which gradients keep them orthogonal.

``Q = (I - A/2)^-1 (I + A/2)`` with ``A = X - X^T`` is orthogonal for every square ``X``. It reaches every rotation
without the eigenvalue -1. The signs of basis vectors are free, and `with_cayley_signs` always finds some that it
reaches.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from apportion.errors import InputError
from apportion.keys.projected_store import HeadSpace

KEYS, VALUES = 0, 1


def cayley(x: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d d"]:
    """Orthogonal matrices of determinant 1, in float32 at least, whatever autocast says."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        skew = (x - x.mT) / 2
        one = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return torch.linalg.solve(one - skew, one + skew)


def cayley_inverse(bases: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d d"]:
    """The strictly lower triangular ``X`` whose `cayley` these are; computed in float64.

    Raises:
        InputError: a matrix is not orthogonal, or has the eigenvalue -1, as all of determinant -1 do.
    """
    exact = bases.double()
    one = torch.eye(bases.shape[-1], dtype=exact.dtype, device=exact.device)
    if float((exact.mT @ exact - one).abs().max()) > 1e-3:
        raise InputError("bases are not orthogonal (entries of Q^T Q - I above 1e-3): take them from principal_bases")
    if float(torch.linalg.svdvals(exact + one).min()) < 1e-6:
        raise InputError(
            "a basis has the eigenvalue -1 (all of determinant -1 do), which Cayley's map does not reach: "
            "turn some of its vectors around by with_cayley_signs, which changes no subspace"
        )
    skew = 2 * torch.linalg.solve(exact + one, exact - one)
    return skew.tril(-1).to(bases.dtype)


def with_cayley_signs(bases: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d d"]:
    """The same basis vectors with signs such that no eigenvalue is -1, and the determinant therefore 1.

    Gaussian elimination of ``Q + D`` with each ``D_jj`` the sign of the pivot it meets leaves no pivot below 1, so
    ``I + Q D = (Q + D) D`` is far from singular (the trick is that of Ballard et al. 2014, "Reconstructing Householder
    vectors from TSQR", section 5). The paper's code turns the first vector around where the determinant is -1, which
    leaves it to luck how close an eigenvalue is to -1.
    """
    rest = bases.double().clone()
    signs = torch.ones_like(rest[..., 0])
    for place in range(bases.shape[-1]):
        pivot = rest[..., place, place]
        signs[..., place] = torch.where(pivot < 0, -1.0, 1.0)
        rest[..., place, place] = pivot + signs[..., place]
        below = rest[..., place + 1 :, place] / rest[..., place, place, None]
        rest[..., place + 1 :, :] -= below[..., None] * rest[..., place, None, :]
    return bases * signs[..., None, :].to(bases.dtype)


def principal_bases(covariances: Float[Tensor, "*heads d d"]) -> Float[Tensor, "*heads d d"]:
    """Eigenvectors in columns, that of the largest eigenvalue first, with signs that Cayley's map reaches."""
    return with_cayley_signs(torch.linalg.eigh(covariances).eigenvectors.flip(-1))


def random_bases(shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "*heads d d"]:
    """Orthogonal matrices ``[*heads, d, d]`` drawn evenly, with signs that Cayley's map reaches."""
    q, r = torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=torch.float64))
    # Without these signs some rotations would be likelier than others; the next ones only turn vectors around.
    return with_cayley_signs(q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :])


class HeadBases(nn.Module):
    """Bases and means of the keys and values of some layers, as parameters.

    Args:
        layers: their numbers, in the order of the tensors' rows.
        bases: of keys and of values, basis vectors in columns; signs may be turned.
        means: likewise. Those of the values are trained too; those of the keys cannot matter, see `MatryoshkaKV`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        bases: Float[Tensor, "layers 2 groups d d"],
        means: Float[Tensor, "layers 2 groups d"],
    ) -> None:
        super().__init__()
        self.layers = list(layers)
        self.angles = nn.Parameter(cayley_inverse(with_cayley_signs(bases)).float())
        self.value_means = nn.Parameter(means[:, VALUES].float())
        self.register_buffer("key_means", means[:, KEYS].float())

    @property
    def width(self) -> int:
        """Of a head."""
        return self.angles.shape[-1]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the ranks: layers, keys or values, key-value heads."""
        layers, kinds, groups = self.angles.shape[:3]
        return layers, kinds, groups

    def means(self) -> Float[Tensor, "layers 2 groups d"]:
        """Of keys and of values."""
        return torch.stack([self.get_buffer("key_means"), self.value_means], dim=1)

    def spaces(self, ranks: Int[Tensor, "layers 2 groups"]) -> dict[int, tuple[HeadSpace, HeadSpace]]:
        """By layer, where its keys and its values are stored at some ranks; gradients flow to the parameters."""
        bases, means, plain = cayley(self.angles), self.means(), ranks.tolist()
        return {
            layer: (
                HeadSpace(bases[row, KEYS], means[row, KEYS], plain[row][KEYS]),
                HeadSpace(bases[row, VALUES], means[row, VALUES], plain[row][VALUES]),
            )
            for row, layer in enumerate(self.layers)
        }
