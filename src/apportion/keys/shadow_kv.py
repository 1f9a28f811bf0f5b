"""ShadowKV: keys as a small factorisation of the prompt, values in slow memory, a few chunks read per token.

Sun, Chang, Bao, Zheng, Zheng, Liu, Dong, Chi, Chen, *ShadowKV: KV Cache in Shadows for High-Throughput Long-Context LLM
Inference*, 2024, arXiv 2410.21465.

What is allocated: to each key-value head and decoding step, some of the prompt's chunks of consecutive tokens, by the
product of the query and the chunk's mean key. Outlier chunks, the end of the prompt and later tokens are always read.
Bytes are saved by keeping keys, before their rotary embedding, as one factorisation of low rank for all heads together.

| paper | here |
|---|---|
| T, sparse budget | ``budget`` |
| C, chunk size | ``chunk`` |
| r, rank | ``rank``, ``rank_share`` |
| A, B of the SVD | ``factors`` (which carry the singular values), ``basis`` |
| landmarks | ``ChunkTable.means`` |
| outlier chunks, local chunks | ``outliers``, ``local`` |
| hit rate α | ``ShadowReport.hit_rate`` |

Departures from the paper and its code:

- the rank is a share of the key width of all heads, r = 160 of 1024 there: a fixed 160 would save a sixth of
  SmolLM2's 192. ``rank=160`` says it as the paper does; a rank above that width is refused. A prompt of fewer tokens
  than the rank has as many directions as tokens;
- the factorisation is found from eigenvectors in float64, not by an SVD in float32 (see `principal_directions`);
- factors and slow values are of the tokens in chunks alone: the end of the prompt is kept exactly and needs neither;
- padding is in no chunk, no landmark, no outlier and no factorisation: a padded row is cut as it would be alone;
- the number of local chunks is as it was asked for, not rounded for a kernel;
- ``counted="all"`` lets outliers, local and later tokens be part of the budget, for comparisons at equal keys read;
- ``turn="each"`` lets every query of a later turn choose for itself, which gives what token by token would;
- ``fold`` (which the paper has not): later tokens join the chunks, without new outliers;
- values are not fetched on a second stream while keys are rebuilt.
"""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

from typing_extensions import override

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.chunks import ChunkRule, ChunkTable
from apportion.keys.landmarks import COUNTED, TURNS, ChunkBudget, Landmarks
from apportion.keys.memory import ComposedMemory
from apportion.keys.method import KeyMethod, OpenMethod
from apportion.keys.prompt_svd import Folding, PromptSVDStore
from apportion.models.key_door import layer_facts
from apportion.models.key_memory import LayerFacts


@dataclass(eq=False)
class ShadowKV(KeyMethod):
    """Low-rank keys, offloaded values, chunks chosen by landmarks.

    A prompt too short to choose from is kept and read exactly, with one warning. ``KeyBudget(share=1.0)`` means to read
    everything: keys are factorised all the same.

    Attributes:
        budget: keys read per query; see ``counted``. 1.56 % of the prompt, the paper's 2048 of 131,072.
        counted: ``selected``: the budget is of selected chunks, all else is read on top (the paper's T). ``all``: it is
            of everything that is read.
        chunk: tokens of a chunk.
        rank: of the factorised keys of all key-value heads together; None to take ``rank_share``.
        rank_share: rank as a share of heads times width, rounded up.
        outliers: chunks of each key-value head that are kept exactly and always read.
        local: chunks before the end of the prompt that are kept exactly and always read.
        turn: how the queries of a later turn of several tokens choose: ``shared`` (the paper's) or ``each``.
        offload: keep values in slow memory (pinned host memory beside a GPU; elsewhere it is only counted as such).
        fold: so many later tokens at a time join the factorisation and the chunks; None for never. A multiple of
            ``chunk``.
        largest_residual: share of their squared norm that the basis may miss before it is found anew.

    Raises:
        InputError: settings that cannot be.
    """

    slug: ClassVar[str] = "shadow_kv"
    budget: KeyBudget = field(default_factory=lambda: KeyBudget(share=2048 / 131072))
    counted: str = "selected"
    chunk: int = 8
    rank: int | None = None
    rank_share: float = 160 / 1024
    outliers: int = 48
    local: int = 4
    turn: str = "shared"
    offload: bool = True
    fold: int | None = None
    largest_residual: float = 0.1

    def __post_init__(self) -> None:
        fixed = self._rule.fixed
        if self.counted not in COUNTED or self.turn not in TURNS:
            raise InputError(
                f"counted={self.counted!r}, turn={self.turn!r}: {' or '.join(COUNTED)}, and {' or '.join(TURNS)}"
            )
        if self.budget.sinks or self.budget.recent:
            raise InputError(
                f"budget={self.budget}: give no sinks and no recent tokens; outliers={self.outliers} and "
                f"local={self.local} play their part"
            )
        keys = self.budget.keys
        if keys is not None and self.counted == "selected" and keys % self.chunk:
            raise InputError(f"budget of {keys} keys: whole chunks are selected, so give a multiple of {self.chunk}")
        if keys is not None and self.counted == "all" and keys < fixed + self.chunk:
            raise InputError(
                f"budget of {keys} keys: {self.outliers} outlier and {self.local} local chunks of {self.chunk} tokens "
                f"are part of it and leave none to select; give at least {fixed + self.chunk}, or fewer of them"
            )
        if (self.rank is not None and self.rank < 1) or not 0 < self.rank_share <= 1:
            raise InputError(f"rank={self.rank}, rank_share={self.rank_share}: at least 1; above 0 and at most 1")
        if self.fold is not None and (self.fold < 1 or self.fold % self.chunk):
            raise InputError(f"fold={self.fold}: whole chunks are folded, so give a multiple of {self.chunk}, or None")
        self._warning = _OneWarning()

    @override
    def check(self, model: Any) -> None:
        """As every method; and the rank must be one that the model's keys can have.

        Raises:
            InputError: see `KeyMethod.__call__`; ``rank`` is above heads times width.
        """
        super().check(model)
        for facts in layer_facts(model):
            self.rank_of(facts)

    def rank_of(self, facts: LayerFacts) -> int:
        """The rank of a layer's keys.

        Raises:
            InputError: ``rank`` is above heads times width.
        """
        width = facts.groups * facts.width
        if self.rank is None:
            return math.ceil(self.rank_share * width)
        if self.rank > width:
            raise InputError(
                f"rank={self.rank}: the keys of this model's {facts.groups} key-value heads are together {width} wide; "
                "give at most that, or a rank_share"
            )
        return self.rank

    @override
    def memory(self, facts: LayerFacts) -> ComposedMemory:
        budget = ChunkBudget(self.budget, self.counted)
        store = PromptSVDStore(
            self.rank_of(facts),
            self._rule,
            self._stays_exact,
            offload=self.offload,
            folding=Folding(self.fold, self.largest_residual),
            layers=facts.layers,
        )
        return ComposedMemory(facts, store, Landmarks(budget, self.turn))

    @property
    def _rule(self) -> ChunkRule:
        return ChunkRule(self.chunk, self.local, self.outliers)

    def _stays_exact(self, table: ChunkTable) -> bool:
        """Whether a prompt is too short to leave anything out, though the budget is not for everything."""
        if not ChunkBudget(self.budget, self.counted).reads_all(table):
            return False
        self._warning(
            f"a prompt of {int(table.lengths.max())} tokens is too short for ShadowKV with {self.outliers} outlier and "
            f"{self.local} local chunks of {self.chunk} and {self.budget}: it is kept and read in full. Give fewer "
            "outliers, or a smaller budget"
        )
        return True


@dataclass(frozen=True)
class ShadowReport:
    """What a run's layers did, beside its `Usage`.

    Attributes:
        hit_rate: share of the selected chunks that the step before had selected too, over layers; NaN before two.
        residual: largest share, over layers, of newly folded keys' squared norm that the basis missed.
        refits: bases that were found anew, over layers.
    """

    hit_rate: float
    residual: float
    refits: int


def shadow_report(run: OpenMethod) -> ShadowReport:
    """What the newest cache of a run of ShadowKV has seen."""
    memories = [each for each in run.door.memories() if isinstance(each, ComposedMemory)]
    stores = [each.store for each in memories if isinstance(each.store, PromptSVDStore)]
    rates = [each.selector.hit_rate for each in memories if isinstance(each.selector, Landmarks)]
    rates = [rate for rate in rates if not math.isnan(rate)]
    return ShadowReport(
        sum(rates) / len(rates) if rates else math.nan,
        max((each.residual for each in stores), default=0.0),
        sum(each.refits for each in stores),
    )


class _OneWarning:
    """Warns the first time: all layers of all prompts would say the same."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, message: str) -> None:
        if not self._said:
            self._said = True
            warnings.warn(message, stacklevel=2)
