"""What a method that prunes a layer once, without training, has to say: the weights that stay, and what they become.

A method is a frozen dataclass with its paper's defaults and one function of a layer's weights and of what its inputs
look like. It knows nothing of models; `apportion.weights.one_shot` takes it through one, block by block.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from jaxtyping import Bool, Float
from torch import Tensor

from apportion.weights.calibration import InputStatistics
from apportion.weights.patterns import Pattern


@dataclass(frozen=True, eq=False)
class Seen:
    """A layer, as a method sees it.

    Attributes:
        name: of the layer.
        statistics: of its inputs on the calibration text.
        in_attention: whether it is part of a block's attention; the rest is the MLP.
    """

    name: str
    statistics: InputStatistics
    in_attention: bool = False


@dataclass(frozen=True, eq=False)
class Pruned:
    """What becomes of a layer.

    Attributes:
        weight: exactly 0 where ``mask`` does not hold.
        mask: True for weights that stay.
        bias: what is added to the layer's bias, for methods that make up for what is lost.
        figures: what the method has to tell of this layer.
    """

    weight: Float[Tensor, "out in"]
    mask: Bool[Tensor, "out in"]
    bias: Float[Tensor, " rows"] | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OneShotMethod(ABC):
    """Settings of a method that prunes a layer once.

    Attributes:
        slug: its name in the catalogue.
        needs_second_moment: whether it asks for ``x x^T`` of the inputs.
    """

    slug: ClassVar[str]
    needs_second_moment: ClassVar[bool] = False

    @abstractmethod
    def prune(self, weight: Float[Tensor, "out in"], seen: Seen, pattern: Pattern) -> Pruned:
        """Prune a layer.

        Args:
            weight: in float32; it is left as it is.
            seen: its inputs.
            pattern: what the mask looks like; it has been checked.
        """

    def check(self, pattern: Pattern) -> None:  # noqa: B027  most methods take every pattern
        """Refuse patterns that the method cannot keep to, before anything expensive begins.

        Raises:
            InputError: says why.
        """

    @property
    def second_moment(self) -> bool:
        """Whether these settings need the second moments of the inputs."""
        return self.needs_second_moment

    def settings(self) -> dict[str, Any]:
        """JSON-ready; decides, with the pattern and the text, what comes out."""
        return {"method": self.slug, **asdict(self)}
