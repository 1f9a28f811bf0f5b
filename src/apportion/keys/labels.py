"""A label of each token: some channels of its key, in few bits, kept beside the keys and read instead of them."""

from jaxtyping import Float, Int
from torch import Tensor

from apportion.errors import InputError
from apportion.keys.budget import KeyBudget
from apportion.keys.stores import Growing
from apportion.ops.key_choice import choose_by_labels
from apportion.ops.label_scores import (
    BITS,
    label_scores,
    pack_channels_into,
    pack_labels,
    packed_label_scores,
    unpack_labels,
)

LABEL_BITS = (*BITS, 16)


class LabelTable:
    """The labels of all tokens of a layer so far.

    The tokens of a channel lie side by side, which is how `label_scores` reads them fastest.

    Args:
        bits: of a channel: 16 keeps float16 (bfloat16 where the model computes in it); 8, 4 and 2 keep codes between
            the smallest and the largest channel of each label, and beside them two float32 numbers a label.
        channels: of a label.

    Raises:
        InputError: other bits, or no channels.
    """

    def __init__(self, bits: int, channels: int) -> None:
        if bits not in LABEL_BITS:
            raise InputError(f"bits={bits}: one of {', '.join(map(str, LABEL_BITS))}")
        if channels < 1:
            raise InputError(f"channels={channels}: a label has at least 1")
        self.bits, self.channels = bits, channels
        self._labels, self._ranges = Growing(3), Growing(3)

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self._labels.length

    def append(self, labels: Float[Tensor, "batch rows new channels"]) -> None:
        """Add those of the newest tokens; rows are query heads, or key-value heads whose query heads share labels."""
        if self.bits == 16:
            short = labels if labels.element_size() == 2 else labels.half()
            self._labels.append(short.transpose(2, 3).contiguous())
            return
        codes, ranges = pack_labels(labels, self.bits)
        self._labels.append(codes.transpose(2, 3).contiguous())
        self._ranges.append(ranges.transpose(2, 3).contiguous())

    def append_one(self, vectors: Float[Tensor, "batch heads 1 width"], places: Int[Tensor, " all_channels"]) -> None:
        """Add that of one token, whose channels are numbers of its vectors; see `pack_channels_into`."""
        if self.bits == 16 or not self._labels.length:
            picked = vectors.flatten(1).index_select(1, places)
            self.append(picked.view(len(vectors), -1, 1, self.channels))
            return
        codes, token = self._labels.more(1)
        ranges, _ = self._ranges.more(1)
        pack_channels_into(vectors, places, self.bits, codes, ranges, token)

    def scores(self, queries: Float[Tensor, "batch heads new channels"]) -> Float[Tensor, "batch heads new tokens"]:
        """Products of queries, in the labels' channels, with all labels; below 16 bits queries are rounded alike."""
        if self.bits == 16:
            return label_scores(queries, self._of(self._labels))
        return packed_label_scores(
            rounded(queries, self.bits), self._of(self._labels), self._of(self._ranges), self.bits
        )

    def choose(
        self,
        queries: Float[Tensor, "batch heads 1 width"],
        places: Int[Tensor, " all_channels"],
        count: int,
        budget: KeyBudget,
        groups: int,
        group: str,
    ) -> Int[Tensor, "batch lists 1 chosen"]:
        """The tokens with the best `scores` for one new token, without the scores; see `choose_by_labels`.

        Args:
            queries: whole ones.
            places: of the labels' channels in the queries of one row, side by side.
            count: tokens of a list.
            budget: sinks and recent tokens among them.
            groups: key-value heads.
            group: whose lists.
        """
        ranges = None if self.bits == 16 else self._of(self._ranges)
        forced = budget.sinks, budget.recent
        table = (self._of(self._labels), ranges, self.bits)
        return choose_by_labels(queries[:, :, 0], *table, count, *forced, groups, group, places)[:, :, None]

    def read(self) -> Float[Tensor, "batch rows tokens channels"]:
        """What the labels stand for."""
        if self.bits == 16:
            return self._of(self._labels)
        return unpack_labels(self._of(self._labels), self._of(self._ranges), self.bits, self.channels)

    def pick_rows(self, rows: Int[Tensor, " kept"]) -> None:
        """Keep these rows of the batch, in this order."""
        self._labels.pick_rows(rows)
        self._ranges.pick_rows(rows)

    @property
    def bytes(self) -> int:
        """Of codes and ranges."""
        return self._labels.bytes + self._ranges.bytes

    @staticmethod
    def _of(kept: Growing) -> Tensor:
        """[batch, rows, tokens, what is kept of a token]."""
        return kept.view.transpose(2, 3)


def rounded(labels: Float[Tensor, "batch rows new channels"], bits: int) -> Float[Tensor, "batch rows new channels"]:
    """Labels as few bits tell them."""
    return unpack_labels(*pack_labels(labels, bits), bits, labels.shape[-1])
