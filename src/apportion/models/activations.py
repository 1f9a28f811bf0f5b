"""Activations on disk: a folder of safetensors shards and a manifest, read through memory maps.

Every shard is an ordinary safetensors file that any tool can open. It holds whole contexts of ``T`` tokens::

    token_ids, document, position   int32  [contexts, T]    position counts within the document; -1 for a leading BOS
    <site>, one tensor per site            [contexts, T, width]   bfloat16 or float32
    <site>.gradient, where asked for       [contexts, T, width]   the same; times a scale that the manifest has
    valid                           uint8  [contexts, T]    0 for tokens that training and evaluation leave out

A shard belongs to a store once the manifest lists it with its size and checksum. ``harvest`` writes stores.

A store that several processes harvested holds a folder for each, which is a store of its own::

    part-00000-of-00004/   documents 0, 4, 8 ...: shards, and a manifest with "part": 0 and, in "made_from", "parts": 4
    part-00001-of-00004/   documents 1, 5, 9 ...
    ...
    manifest.json          of the whole: lists the shards of all parts, in the order of the parts; "parts": 4

Documents have the numbers of the whole text in all of them. ``join_parts`` writes the manifest of the whole, and no
activation is copied.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float32, Int, Int64
from torch import Tensor

from apportion.data.files import read_json
from apportion.errors import InputError
from apportion.models.site import Site

FORMAT = "apportion-activation-store"
VERSION = 1
MANIFEST = "manifest.json"
_GRADIENT = ".gradient"
PARTS = "part-*-of-*"
# numpy has no bfloat16: its bits travel as uint16 until torch reads them.
STORED: dict[str, tuple[str, np.dtype]] = {"bfloat16": ("BF16", np.dtype("<u2")), "float32": ("F32", np.dtype("<f4"))}
_NUMPY_OF: dict[str, np.dtype] = {
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
# Fewer contexts than this in a held-out stretch, and the mixed ones at its ends begin to weigh.
_CONTEXTS_PER_STRETCH = 20
_ROUNDS = 6


def gradient_of(site: Site | str) -> str:
    """What the gradients at a site are called wherever a store is asked for a site, see `harvest`."""
    return f"{site}{_GRADIENT}"


def stored_widths(made_from: dict[str, Any]) -> dict[str, int]:
    """The width of everything that a store keeps for every token: its sites, then their gradients."""
    sites: dict[str, int] = made_from["sites"]
    gradients = {gradient_of(site): width for site, width in sites.items()} if made_from.get("gradients") else {}
    return sites | gradients


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a shard."""

    offset: int
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """The numpy type of its numbers (uint16 for bfloat16)."""
        return _NUMPY_OF[self.code]

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def shard_layout(
    contexts: int, length: int, widths: dict[str, int], dtype: str, identity: str, label: str
) -> tuple[bytes, dict[str, Place], int]:
    """Plan a shard before any of its numbers is known.

    Args:
        contexts: how many contexts it will hold.
        length: tokens per context.
        widths: width of every site, see `stored_widths`.
        dtype: ``bfloat16`` or ``float32``.
        identity: the store's identity, which tells its shards from those of other stores.
        label: which shard of the store it is: its number, or ``part/number``.

    Returns:
        The safetensors header, the place of every tensor in the file, and the size of the file in bytes.
    """
    per_token = ("token_ids", "document", "position")
    wanted: dict[str, tuple[str, tuple[int, ...]]] = dict.fromkeys(per_token, ("I32", (contexts, length)))
    wanted |= {site: (STORED[dtype][0], (contexts, length, width)) for site, width in widths.items()}
    wanted["valid"] = ("U8", (contexts, length))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "store": identity, "shard": label}}
    places, position = {}, 0
    for name, (code, shape) in wanted.items():
        places[name] = Place(position, code, shape)
        end = position + places[name].n_bytes
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # Numbers aligned to their size can be mapped as they are.
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    moved = {name: Place(start + place.offset, place.code, place.shape) for name, place in places.items()}
    return len(text).to_bytes(8, "little") + text, moved, start + position


def identity_of(manifest: dict[str, Any]) -> str:
    """A hash of what makes two stores the same: everything that was asked for, nothing that was found on the way."""
    return hashlib.sha256(json.dumps(manifest["made_from"], sort_keys=True).encode()).hexdigest()[:32]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a store's manifest.

    Raises:
        InputError: there is none, or it is not one of ours, or of another version.
    """
    path = folder / MANIFEST
    if not path.exists() and any(folder.glob(PARTS)):
        raise InputError(
            f"{folder} holds parts of a harvest that are not one store yet: when all are finished, call "
            "`apportion.models.join_parts`"
        )
    if not path.exists():
        raise InputError(
            f"{folder} is not an activation store (it has no {MANIFEST}): make one with `apportion.models.harvest`"
        )
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path} is not the manifest of an activation store: give a folder that harvest wrote")
    if manifest.get("version") != VERSION:
        raise InputError(
            f"{path} has version {manifest.get('version')}, this apportion reads version {VERSION}: harvest again"
        )
    return manifest


class Shard:
    """One shard file, checked against the manifest and mapped into memory when first used.

    Raises:
        InputError: the file is missing, truncated, or from another store.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], index: int):
        entry = manifest["shards"][index]
        self.path = folder / entry["file"]
        self.n_contexts: int = entry["contexts"]
        self.n_rows: int = entry["rows"]
        self.sha256: str = entry["sha256"]
        remedy = f"delete {folder} and harvest again, or put the original file back"
        if not self.path.is_file():
            raise InputError(f"shard {self.path} is missing: {remedy}")
        found = self.path.stat().st_size
        if found != entry["bytes"]:
            raise InputError(f"shard {self.path} has {found} bytes where the manifest has {entry['bytes']}: {remedy}")
        made_from, label = manifest["made_from"], entry.get("shard", str(index))
        header, self._places, _ = shard_layout(
            self.n_contexts,
            made_from["context"],
            stored_widths(made_from),
            made_from["dtype"],
            identity_of(manifest),
            label,
        )
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                raise InputError(
                    f"shard {self.path} is not shard {label} of this store, although its size fits: {remedy}"
                )
        self._mapped: dict[str, np.ndarray] = {}

    def tensor(self, name: str) -> np.ndarray:
        """A tensor of the shard, mapped read-only: pages are read when touched, and the system may drop them again."""
        if name not in self._mapped:
            place = self._places[name]
            self._mapped[name] = np.memmap(self.path, place.dtype, mode="r", offset=place.offset, shape=place.shape)
        return self._mapped[name]

    @cached_property
    def valid_rows(self) -> np.ndarray:
        """Where the valid rows are among all rows of the shard."""
        return np.flatnonzero(self.tensor("valid")).astype(np.uint32)

    def verify(self) -> None:
        """Compare the whole file with its checksum.

        Raises:
            InputError: they differ.
        """
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise InputError(
                f"shard {self.path} does not match its checksum ({found[:12]}, in the manifest {self.sha256[:12]}): "
                "the file was damaged or changed; delete the store and harvest again"
            )


class StoreView:
    """Some contexts of a store, in the store's order; rows are counted over the valid tokens of these contexts.

    Attributes:
        store: where the activations are.
    """

    store: "ActivationStore"

    def __init__(self, store: "ActivationStore", chosen: Int64[np.ndarray, " contexts"]):
        self.store = store
        self._chosen = chosen

    def __len__(self) -> int:
        return self.n_tokens

    @property
    def n_contexts(self) -> int:
        """The number of contexts."""
        return len(self._chosen)

    @property
    def n_tokens(self) -> int:
        """The number of valid rows."""
        return int(self._row_ends[-1]) if self.n_contexts else 0

    @property
    def context(self) -> int:
        """Tokens per context."""
        return self.store.length

    @property
    def width(self) -> int:
        """The number of activations per token at the store's default site."""
        return self.store.width_of(None)

    @cached_property
    def _row_ends(self) -> np.ndarray:
        return np.cumsum(np.diff(self.store.first_row_of_context)[self._chosen])

    @cached_property
    def _shift_of_context(self) -> np.ndarray:
        """How much further back each context's rows are in the store than in the view."""
        return self.store.first_row_of_context[self._chosen + 1] - self._row_ends

    def read(
        self, indices: Int[Tensor, " n"] | Int[np.ndarray, " n"], site: Site | str | None = None
    ) -> Float32[Tensor, "n width"]:
        """Read some rows, in any order and as often as asked.

        Args:
            indices: from 0 to ``n_tokens - 1``.
            site: needed where the store has several and was opened without naming one. ``gradient_of(site)`` reads the
                gradients there instead of the activations, here and wherever a site is asked for.

        Raises:
            IndexError: an index is out of range.
            InputError: the store lacks the site.
            ValueError: a row holds NaN or infinity; names the shard and the row.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and not (indices.min() >= 0 and indices.max() < self.n_tokens):
            raise IndexError(
                f"indices run from {indices.min()} to {indices.max()}: there are {self.n_tokens} rows from 0"
            )
        return self.store.gather(self._rows_in_store(indices), site)

    def origins(
        self, indices: Int[Tensor, " n"] | Int[np.ndarray, " n"]
    ) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]:
        """The document of each row, in the order in which they were harvested, and the position in that document."""
        rows = self._rows_in_store(np.asarray(indices, dtype=np.int64))
        return self.store.gather_numbers(rows, "document"), self.store.gather_numbers(rows, "position")

    def contexts(
        self, start: int, stop: int, site: Site | str | None = None
    ) -> tuple[
        Int64[Tensor, "contexts time"],
        Float32[Tensor, "contexts time width"],
        Bool[Tensor, "contexts time"],
        Int64[Tensor, " contexts"],
    ]:
        """Read whole contexts in order, ``start`` to ``stop - 1`` (fewer where the view ends).

        Returns:
            The token ids; the activations of all tokens, also of those left out; which tokens are valid (not left out);
            and the document in which each context begins.

        Raises:
            InputError: the store lacks the site.
            ValueError: an activation is NaN or infinite; names the shard.
        """
        return self.store.gather_contexts(self._chosen[max(start, 0) : max(stop, 0)], site)

    def first_documents(self) -> Int64[np.ndarray, " contexts"]:
        """The document in which each context begins; no activation is read."""
        return self.store.document_range_of_context[0][self._chosen]

    def token_ids_of(self, contexts: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "n time"]:
        """The token ids of some contexts, given by their number in the view, ascending; no activation is read."""
        return self.store.gather_token_ids(self._chosen[contexts])

    def documents(self) -> Int64[Tensor, " documents"]:
        """The documents that the view has tokens of, in ascending order."""
        counts = self.store.tokens_per_document(self._chosen)
        return torch.from_numpy(np.flatnonzero(counts))

    def batches(self, batch_size: int, seed: int = 0, site: Site | str | None = None) -> "ShuffledBatches":
        """Shuffled batches without end; see `ShuffledBatches`."""
        return ShuffledBatches(self, batch_size, seed, site)

    def joint_batches(self, batch_size: int, seed: int = 0, *, sites: Sequence[Site | str]) -> "JointBatches":
        """Shuffled batches of the same tokens at several sites; see `JointBatches`."""
        return JointBatches(self, batch_size, seed, sites)

    def split(self, held_out_fraction: float = 0.1) -> tuple["StoreView", "StoreView"]:
        """Cut the view in two so that no document has tokens in both parts.

        Whole documents are held out, in up to 16 evenly spaced runs of neighbours (so that the held-out text is like
        the rest, and near-duplicates, which tend to be neighbours, stay together). A context goes where all its
        documents go; a context with documents of both kinds, one or two at each end of a run, goes nowhere.

        Args:
            held_out_fraction: the share of tokens to hold out; approximate, since documents stay whole.

        Returns:
            The part for training and the held-out part.

        Raises:
            InputError: a fraction outside (0, 1), or too few documents to hold any out.
        """
        if not 0 < held_out_fraction < 1:
            raise InputError(f"held_out_fraction is {held_out_fraction}: it must lie between 0 and 1, such as 0.1")
        counts = self.store.tokens_per_document(self._chosen)
        starts = np.cumsum(counts) - counts
        total = int(counts.sum())
        # Documents part by part, as their tokens follow each other in contexts: there a context's are neighbours.
        order = np.argsort(np.arange(len(counts)) % self.store.parts, kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        first, last = (place[documents[self._chosen]] for documents in self.store.document_range_of_context)

        def parts(held_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            before = np.concatenate([[0], np.cumsum(held_out[order])])
            held = before[last + 1] - before[first]
            return self._chosen[held == 0], self._chosen[held == last + 1 - first]

        most_runs = max(1, int(self.n_contexts * held_out_fraction) // _CONTEXTS_PER_STRETCH)
        candidates = []
        for runs in (16, 8, 4, 2, 1):
            stretch = total / runs
            if runs <= most_runs:
                candidates.append(parts(starts % stretch >= (1 - held_out_fraction) * stretch))
        # However long the last document is, a text of two documents can still be split.
        candidates.append(parts(np.arange(len(counts)) == np.flatnonzero(counts)[-1]))
        usable = [(train, held_out) for train, held_out in candidates if len(train) and len(held_out)]
        if not usable:
            raise InputError(
                f"held_out_fraction is {held_out_fraction}, but {self.n_contexts} contexts of "
                f"{np.count_nonzero(counts)} documents leave no whole document to hold out: harvest more text, in more "
                "documents"
            )

        def miss(pair: tuple[np.ndarray, np.ndarray]) -> float:
            share = len(pair[1]) / self.n_contexts
            # A quarter off is near enough; among those the one with most runs comes first and wins.
            return max(0.25, abs(share - held_out_fraction) / held_out_fraction)

        train, held_out = min(usable, key=miss)
        return StoreView(self.store, train), StoreView(self.store, held_out)

    def _rows_in_store(self, indices: np.ndarray) -> np.ndarray:
        return indices + self._shift_of_context[np.searchsorted(self._row_ends, indices, side="right")]


class ActivationStore(StoreView):
    """A harvested store, all of it: the view of all its contexts.

    Attributes:
        folder: where it is.
        manifest: what the manifest says.
        sites: the sites it holds.
        site: the site that is read where none is named; None if there are several and none was chosen.
        parts: how many processes harvested it; document i is in part ``i % parts``.
        gradient_target: whose loss the gradients are of, see `harvest`; None if the store holds none.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], site: Site | None):
        self.folder = folder
        self.manifest = manifest
        self._widths = stored_widths(manifest["made_from"])
        self._scales: dict[str, float] = {
            gradient_of(site): scale for site, scale in (manifest.get("gradient_scales") or {}).items()
        }
        self.sites = tuple(Site.parse(name) for name in manifest["made_from"]["sites"])
        self.site = self.sites[0] if site is None and len(self.sites) == 1 else site
        self.length: int = manifest["made_from"]["context"]
        self.dtype: str = manifest["made_from"]["dtype"]
        self.parts: int = manifest["made_from"].get("parts", 1)
        self.gradient_target: str | None = (manifest["made_from"].get("gradients") or {}).get("target")
        self._shards = [Shard(folder, manifest, index) for index in range(len(manifest["shards"]))]
        self._first_rows = np.cumsum([0] + [shard.n_rows for shard in self._shards])
        self._first_contexts = np.cumsum([0] + [shard.n_contexts for shard in self._shards])
        super().__init__(self, np.arange(self._first_contexts[-1]))

    @classmethod
    def open(cls, folder: Path | str, site: Site | str | None = None) -> "ActivationStore":
        """Open a finished store; sizes and headers of all shards are checked, their contents only by `verify`.

        Args:
            folder: what ``harvest`` wrote, or ``join_parts`` made one store of.
            site: the site to read where ``read`` and ``contexts`` are not told another.

        Raises:
            InputError: not a store, an unfinished one, a missing, truncated or foreign shard, or a site that it lacks.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if not manifest["complete"]:
            raise InputError(
                f"the harvest into {folder} is not finished: run the same harvest again, it continues where it was"
            )
        listed = {entry["file"] for entry in manifest["shards"]}
        files = [*folder.glob("*.safetensors"), *folder.glob(f"{PARTS}/*.safetensors")]
        foreign = sorted({path.relative_to(folder).as_posix() for path in files} - listed)
        if foreign:
            raise InputError(
                f"{folder} holds {', '.join(foreign)}, which the manifest does not list: move it elsewhere"
            )
        store = cls(folder, manifest, None)
        if site is not None:
            store.width_of(site)
            store.site = Site.parse(str(site))
        return store

    def __repr__(self) -> str:
        sites = ", ".join(map(str, self.sites)) + (" with gradients" if self.gradient_target else "")
        return f"ActivationStore({str(self.folder)!r}: {self.n_tokens:,} tokens of {sites}, {self.dtype})"

    @property
    def n_tokens(self) -> int:
        """The number of valid rows."""
        return int(self._first_rows[-1])

    def width_of(self, site: Site | str | None) -> int:
        """The number of activations per token at a site.

        Raises:
            InputError: the store lacks the site.
        """
        return self._widths[self._name_of(site)]

    def verify(self) -> None:
        """Read every shard and compare it with its checksum.

        Raises:
            InputError: a shard is damaged; names it.
        """
        for shard in self._shards:
            shard.verify()

    def check_model(self, model: Any) -> None:
        """Make sure that the store was harvested from this model, whatever either is called.

        Raises:
            InputError: it was another model.
        """
        source = self.manifest["model"]
        if source["fingerprint"] != model.fingerprint:
            raise InputError(
                f"the store {self.folder} was harvested from {source['name']} ({source['fingerprint'][:12]}), not from "
                f"{model.name} ({model.fingerprint[:12]}): load that model, or harvest from this one"
            )

    @cached_property
    def first_row_of_context(self) -> np.ndarray:
        """The first valid row of each context, counted over the store, and at the end the number of rows."""
        counts = [np.count_nonzero(shard.tensor("valid"), axis=1) for shard in self._shards]
        return np.concatenate([[0], np.cumsum(np.concatenate(counts))])

    @cached_property
    def document_range_of_context(self) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last document that each context has tokens of."""
        first = [shard.tensor("document")[:, 0].astype(np.int64) for shard in self._shards]
        last = [shard.tensor("document")[:, -1].astype(np.int64) for shard in self._shards]
        return np.concatenate(first), np.concatenate(last)

    def tokens_per_document(self, contexts: np.ndarray) -> np.ndarray:
        """How many tokens of each document lie in some contexts, valid or not."""
        counts = np.zeros(int(self.document_range_of_context[1].max()) + 1, dtype=np.int64)
        for shard, local, _ in self._by_shard(contexts, self._first_contexts):
            counts += np.bincount(shard.tensor("document")[local].ravel(), minlength=len(counts))
        return counts

    def gather(self, rows: np.ndarray, site: Site | str | None) -> Float32[Tensor, "n width"]:
        """Read valid rows by their number in the whole store; see `read`."""
        name = self._name_of(site)
        bits = self._gather(
            rows, lambda shard: shard.tensor(name).reshape(-1, self._widths[name]), STORED[self.dtype][1]
        )
        activations = self._as_float(bits, name)
        if not _is_finite(activations):
            worst = int(torch.isfinite(activations).all(dim=1).logical_not().nonzero()[0, 0])
            shard = self._shards[int(np.searchsorted(self._first_rows, rows[worst], side="right")) - 1]
            raise ValueError(
                f"row {rows[worst]} of {name} in {shard.path} is not finite: run verify(), then harvest again"
            )
        return activations

    def gather_numbers(self, rows: np.ndarray, name: str) -> Int64[Tensor, " n"]:
        """Read ``token_ids``, ``document`` or ``position`` of valid rows by their number in the whole store."""
        numbers = self._gather(rows, lambda shard: shard.tensor(name).reshape(-1, 1), np.dtype("<i4"))
        return torch.from_numpy(numbers[:, 0].astype(np.int64))

    def gather_contexts(
        self, contexts: np.ndarray, site: Site | str | None
    ) -> tuple[
        Int64[Tensor, "contexts time"],
        Float32[Tensor, "contexts time width"],
        Bool[Tensor, "contexts time"],
        Int64[Tensor, " contexts"],
    ]:
        """Read contexts by their number in the whole store; see `contexts`."""
        name = self._name_of(site)
        shape = (len(contexts), self.length)
        token_ids, document = np.empty(shape, np.int64), np.empty(shape, np.int64)
        valid = np.empty(shape, np.bool_)
        bits = np.empty((*shape, self._widths[name]), STORED[self.dtype][1])
        for shard, local, into in self._by_shard(contexts, self._first_contexts):
            token_ids[into] = shard.tensor("token_ids")[local]
            document[into] = shard.tensor("document")[local]
            valid[into] = shard.tensor("valid")[local]
            np.take(shard.tensor(name), local, axis=0, out=bits[into], mode="clip")
            if not _is_finite(self._as_float(bits[into], name)):
                raise ValueError(
                    f"an activation of {name} in {shard.path} is not finite: run verify(), then harvest again"
                )
        numbers = (torch.from_numpy(token_ids), torch.from_numpy(valid), torch.from_numpy(document[:, 0].copy()))
        return numbers[0], self._as_float(bits, name), numbers[1], numbers[2]

    def gather_token_ids(self, contexts: np.ndarray) -> Int64[np.ndarray, "n time"]:
        """The token ids of contexts, by their number in the whole store, ascending."""
        token_ids = np.empty((len(contexts), self.length), np.int64)
        for shard, local, into in self._by_shard(contexts, self._first_contexts):
            token_ids[into] = shard.tensor("token_ids")[local]
        return token_ids

    def _gather(self, rows: np.ndarray, table_of: Callable[[Shard], np.ndarray], dtype: np.dtype) -> np.ndarray:
        # Neighbours on disk are read together.
        order = np.argsort(rows, kind="stable")
        gathered: np.ndarray | None = None
        for shard, local, into in self._by_shard(rows[order], self._first_rows):
            table = table_of(shard)
            if gathered is None:
                gathered = np.empty((len(rows), table.shape[1]), dtype)
            np.take(table, shard.valid_rows[local], axis=0, out=gathered[into], mode="clip")
        if gathered is None:
            return np.empty((0, table_of(self._shards[0]).shape[1]), dtype)
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return gathered[inverse]

    def _by_shard(self, ascending: np.ndarray, firsts: np.ndarray) -> list[tuple[Shard, np.ndarray, slice]]:
        """Deal ascending numbers to the shards they lie in, with their numbers there and where they came from."""
        cuts = np.searchsorted(ascending, firsts)
        spans = zip(self._shards, firsts, pairwise(cuts), strict=False)
        return [(shard, ascending[a:b] - first, slice(a, b)) for shard, first, (a, b) in spans if a < b]

    def _as_float(self, bits: np.ndarray, name: str) -> Tensor:
        stored = torch.from_numpy(bits)
        if self.dtype != "float32":
            stored = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()
        return stored * self._scales[name] if name in self._scales else stored

    def _name_of(self, site: Site | str | None) -> str:
        chosen = self.site if site is None else site
        if chosen is None:
            raise InputError(f"the store {self.folder} holds several sites: name one of {', '.join(self._widths)}")
        if str(chosen) not in self._widths and str(chosen).endswith(_GRADIENT) and self.gradient_target is None:
            raise InputError(
                f"the store {self.folder} holds no gradients: harvest one that does, with gradients='label' or "
                "gradients='sampled'"
            )
        if str(chosen) not in self._widths:
            raise InputError(
                f"site {str(chosen)!r} is not in the store {self.folder}: it holds {', '.join(self._widths)}"
            )
        return str(chosen)

    def _rows_in_store(self, indices: np.ndarray) -> np.ndarray:
        return indices


class ShuffledBatches:
    """Batches of shuffled rows; ``batches(step)`` is a pure function of the seed and the step.

    Every epoch serves each row exactly once, in an order of its own. All batches have the same size: the last one of an
    epoch is filled up with the first rows of the next. The order comes from a Feistel network (Luby and Rackoff 1988)
    with cycle walking, so that it needs no memory, and training resumes at any step without a state to restore.

    Args:
        view: the rows.
        batch_size: rows per batch.
        seed: of the order.
        site: see `StoreView.read`.

    Raises:
        InputError: an empty view, a batch size below 1, a negative seed, a site that the store lacks.
    """

    def __init__(self, view: StoreView, batch_size: int, seed: int = 0, site: Site | str | None = None):
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: it must be at least 1")
        if seed < 0:
            raise InputError(f"seed is {seed}: it must not be negative")
        if view.n_tokens < 1:
            raise InputError("there are no rows to make batches of: harvest more text")
        view.store.width_of(site)
        self.view = view
        self.batch_size = batch_size
        self.seed = seed
        self.site = site

    @property
    def steps_per_epoch(self) -> float:
        """How many batches serve every row once."""
        return self.view.n_tokens / self.batch_size

    def __call__(self, step: int) -> Float32[Tensor, "batch width"]:
        """The batch of a step, counted from 0."""
        return self.view.read(self.indices(step), self.site)

    def indices(self, step: int) -> Int64[np.ndarray, " batch"]:
        """The rows of the view that make up the batch of a step."""
        size = self.view.n_tokens
        place = step * self.batch_size + np.arange(self.batch_size)
        epochs, within = place // size, place % size
        parts = [shuffled(within[epochs == epoch], size, (self.seed, int(epoch))) for epoch in np.unique(epochs)]
        return np.concatenate(parts)


class JointBatches:
    """Shuffled batches of several sites whose rows stay together: row i of all of them is the same token.

    The rows are those of `ShuffledBatches` with the same seed, so that what is trained on one site and what is trained
    on two see the same tokens in the same order.

    Args:
        view: the rows.
        batch_size: rows per batch.
        seed: of the order.
        sites: which, in the order in which a batch has them; ``[site, gradient_of(site)]`` gives activations with
            their gradients.

    Raises:
        InputError: see `ShuffledBatches`; or no sites.
    """

    def __init__(self, view: StoreView, batch_size: int, seed: int, sites: Sequence[Site | str]):
        if not sites:
            raise InputError("sites is empty: name at least one")
        self._of_site = [ShuffledBatches(view, batch_size, seed, site) for site in sites]
        self.sites = tuple(sites)

    @property
    def steps_per_epoch(self) -> float:
        """How many batches serve every row once."""
        return self._of_site[0].steps_per_epoch

    def __call__(self, step: int) -> tuple[Float32[Tensor, "batch _"], ...]:
        """The batch of a step, counted from 0: a tensor for each site."""
        indices = self._of_site[0].indices(step)
        return tuple(each.view.read(indices, each.site) for each in self._of_site)


def shuffled(positions: Int64[np.ndarray, " n"], size: int, seed: Sequence[int]) -> Int64[np.ndarray, " n"]:
    """Where a pseudo-random permutation of ``range(size)`` takes some positions, without computing the rest of it."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)
    result = positions.astype(np.uint64)
    # The network permutes a power of four; what leaves the range walks on until it is back.
    outside = np.arange(len(result))
    while len(outside):
        left, right = result[outside] >> shift, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        result[outside] = (left << shift) | right
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _mix(numbers: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit moves every output bit."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _is_finite(activations: Tensor) -> bool:
    # The sum is a cheap witness: only where it is not finite does every number need a look.
    return bool(torch.isfinite(activations.sum())) or bool(torch.isfinite(activations).all())
