"""Running a model over text and keeping its activations on disk: see `harvest`, and `join_parts` for many processes."""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from jaxtyping import Int32
from torch import Tensor

from apportion.data import Document
from apportion.data.corpora import add_to_digest
from apportion.data.files import explain_write_error, write_atomically, write_json
from apportion.errors import InputError
from apportion.models.activations import (
    FORMAT,
    MANIFEST,
    PARTS,
    STORED,
    VERSION,
    ActivationStore,
    Place,
    gradient_of,
    identity_of,
    read_manifest,
    shard_layout,
    stored_widths,
)
from apportion.models.capture import capture
from apportion.models.gradients import TARGETS, capture_with_loss_gradients
from apportion.models.language import LanguageModel
from apportion.models.site import Site

if TYPE_CHECKING:
    from rich.console import Console

# Documents tokenised in one call: enough to keep the tokeniser's threads busy, little enough to forget about.
_DOCUMENTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 19
_SECONDS_BETWEEN_LINES = 10.0

_log = logging.getLogger(__name__)


def harvest(
    lm: LanguageModel,
    sites: Site | str | Sequence[Site | str],
    documents: Iterable[Document],
    folder: Path | str,
    *,
    context: int = 128,
    tokens: int = 1_000_000,
    dtype: str = "bfloat16",
    batch_size: int = 16,
    drop_first: bool = True,
    max_norm_ratio: float | None = 10.0,
    shard_tokens: int = 65_536,
    part: tuple[int, int] | None = None,
    gradients: str | None = None,
    gradient_seed: int = 0,
    progress: bool = True,
) -> ActivationStore:
    """Run a model over documents and keep its activations at some sites on disk.

    Documents are tokenised without special tokens and laid end to end, an end-of-sequence token after each; every
    context is the next ``context`` tokens of that stream, begun with the token that the tokeniser itself puts first, if
    it does. A rest that fills no context is left out. All tokens of a context are stored; some of them are marked as
    not valid: the first of each context (``drop_first``), where models park attention and norms are 10 to 100 times the
    median, and tokens whose norm at any site is more than ``max_norm_ratio`` times the median of the first batch.

    A harvest that was interrupted, by ``kill -9`` or otherwise, continues when it is called again with the same
    arguments, and on the same machine ends with the very same bytes as one that was not. A finished store is returned
    at once, after its documents were compared with those it was made from.

    Beside the model and its forward pass it holds the activations of one batch (in the model's dtype, in float32 one
    site at a time, and as stored) and the token ids of one shard, since activations go to the shard's file batch by
    batch. The manifest states the figure, ``peak_memory_bytes``.

    With ``gradients`` every activation is kept with the gradient there of the sum of the next-token losses of its
    context (in nats, not divided by the number of tokens); one forward pass of the whole model and one backward pass
    down to the lowest site give both. They are stored in ``dtype``, divided by a power of two per site that brings
    those of the first batch to a root mean square near 1, so that no type underflows; reading multiplies it back
    (`gradient_of`). A token that is left out has gradient 0, and with ``label`` the last one of each context, which has
    nothing to predict. The forward and backward pass need more memory than a forward pass alone, which is not in the
    figure.

    Several processes (or jobs, one after the other or on many machines) share a harvest by calling this with the same
    arguments but for ``part``. They need not know of each other; when all are done, `join_parts` makes one store of
    what they wrote. Part ``(r, n)`` takes documents r, r + n, r + 2n ..., numbered as in the whole text, and an equal
    share of ``tokens``. All parts leave out tokens by the medians of the same batch, the first of the whole text. What
    differs from a harvest in one piece is where contexts begin, since each part lays its own documents end to end: so
    other tokens are the first of a context, the text before a token within its context can be another document, each
    part leaves out a rest that fills no context and stops at a last document of its own, and up to n contexts come
    beyond ``tokens`` instead of one.

    Args:
        lm: the model; see `load`.
        sites: one site or several; they share rows, so that row i of all of them is the same token.
        documents: a `Corpus`, or any iterable that yields the same documents every time it is asked.
        folder: a new or empty folder, or one that an earlier call wrote.
        context: tokens per context.
        tokens: valid tokens wanted. The harvest stops after the context that reaches this number, or where the text
            ends.
        dtype: how activations are stored, ``bfloat16`` or ``float32``.
        batch_size: contexts per forward pass.
        drop_first: leave out position 0 of every context.
        max_norm_ratio: leave out tokens with larger norms than this many medians; None keeps them all.
        shard_tokens: tokens per shard, at most; what a kill can cost is the time of one shard.
        part: which part of how many, as ``(0, 4)`` to ``(3, 4)``; it goes into a folder of its own in ``folder``.
        gradients: keep gradients, too, of the loss on the tokens that follow (``label``) or on tokens drawn from the
            model's own distribution (``sampled``).
        gradient_seed: of that draw.
        progress: show a bar on stderr.

    Returns:
        The store, or with ``part`` that of the part. A store in one piece and one in parts are the same to a call
        without ``part``: it returns either if it is finished.

    Raises:
        InputError: bad arguments, too little text, a folder that is in use, holds other things or was harvested with
            other arguments, a full disk. Finished shards stay as they are.
        ValueError: the model yields NaN or infinity.
    """
    chosen = _parse(sites)
    widths = {str(site): site.width(lm) for site in chosen}
    _check_part(part)
    _check_numbers(lm, context, tokens, dtype, batch_size, max_norm_ratio, shard_tokens, part)
    _check_gradients(lm, gradients, gradient_seed)
    stream = _ContextStream(documents, lm.tokenizer, context, part or (0, 1))
    made_from: dict[str, Any] = {
        "model": lm.fingerprint,
        "model_dtype": str(next(lm.model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": _fingerprint_of_tokenizer(lm.tokenizer),
        "sites": widths,
        "dtype": dtype,
        "context": context,
        "tokens": tokens,
        "batch_size": batch_size,
        "drop_first": drop_first,
        "max_norm_ratio": max_norm_ratio,
        "shard_tokens": shard_tokens,
        "first_token": stream.first,
        "between_documents": stream.between,
    }
    if gradients is not None:
        made_from["gradients"] = {"target": gradients, "seed": gradient_seed}
    folder = Path(folder)
    with contextlib.ExitStack() as locks:
        if part is not None:
            made_from["parts"] = part[1]
            locks.enter_context(_locked(folder, fcntl.LOCK_SH))
            _check_room_for_parts(folder, part[1])
            folder = folder / part_name(*part)
        locks.enter_context(_locked(folder, fcntl.LOCK_EX))
        manifest = _start_or_resume(folder, made_from, part, lm.name, getattr(documents, "name", None))
        if manifest["complete"]:
            _check_documents(documents, {folder: manifest})
        else:
            with _bar(progress, manifest, _wanted_rows(manifest)) as advance:
                _Harvest(lm, chosen, stream, folder, manifest, advance).run(documents)
    _say_if_text_ended(manifest)
    return ActivationStore.open(folder)


def part_name(number: int, parts: int) -> str:
    """The folder of a part within that of the whole store."""
    return f"part-{number:05}-of-{parts:05}"


def join_parts(folder: Path | str, documents: Iterable[Document]) -> ActivationStore:
    """Make one store of the parts that calls of `harvest` have left in a folder; no activation is copied.

    It writes the manifest of the whole, which lists the shards of all parts and depends on what they hold alone, not on
    when or where they were finished. The parts stay where they are. Joining again changes nothing.

    Args:
        folder: what was given to `harvest`.
        documents: what was given to `harvest`; they are read once, to make sure that all parts were made from them.

    Raises:
        InputError: a part is missing, unfinished or damaged, or was harvested with other arguments than the others or
            from other documents; names it. A harvest into the folder is going on.
    """
    folder = Path(folder)
    found = sorted(path.name for path in folder.glob(PARTS))
    if not found:
        raise InputError(f"{folder} holds no parts of a harvest: give a folder that `harvest(..., part=...)` wrote")
    with _locked(folder, fcntl.LOCK_EX):
        number_of_parts = found[0].rpartition("-")[2]
        names = [part_name(number, int(number_of_parts)) for number in range(int(number_of_parts))]
        others, missing = sorted(set(found) - set(names)), sorted(set(names) - set(found))
        if others:
            raise InputError(f"{folder} holds {found[0]} and {others[0]}: delete the parts of one of these harvests")
        if missing:
            raise InputError(
                f"{folder} lacks {', '.join(missing)}: harvest with part=({names.index(missing[0])}, {len(names)})"
            )
        manifests = {folder / name: ActivationStore.open(folder / name).manifest for name in names}
        whole = _joined(folder, manifests)
        _check_documents(documents, manifests)
        for leftover in folder.glob(f".{MANIFEST}.*.partial"):
            leftover.unlink()
        write_json(folder / MANIFEST, whole)
    _say_if_text_ended(whole)
    return ActivationStore.open(folder)


def text_contexts(
    documents: Iterable[Document], tokenizer: Any, context: int, count: int
) -> Int32[np.ndarray, "contexts context"]:
    """The first contexts of some text, laid out as `harvest` lays it out; fewer where the text ends.

    Args:
        documents: in order.
        tokenizer: of the model that is to read them.
        context: tokens per context.
        count: contexts wanted.
    """
    return _ContextStream(documents, tokenizer, context).take(count).token_ids


def _joined(folder: Path, manifests: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """The manifest of the whole."""
    first_path, first = next(iter(manifests.items()))
    for number, (path, manifest) in enumerate(manifests.items()):
        differences = _differences(manifest["made_from"], first["made_from"])
        if manifest["part"] != number:
            raise InputError(f"{path} is part {manifest['part']}, whatever its name says: put it back, or delete it")
        if differences:
            raise InputError(
                f"{path.name} in {folder} was harvested with other arguments than {first_path.name} "
                f"({'; '.join(differences)}): delete the wrong one and harvest it again"
            )
    documents = [manifest["documents"] for manifest in manifests.values()]
    shards = [
        entry | {"file": f"{path.name}/{entry['file']}"}
        for path, manifest in manifests.items()
        for entry in manifest["shards"]
    ]
    return {name: content for name, content in first.items() if name != "part"} | {
        # Hashes are of all documents up to the last one read, so that of the longest reach is that of the whole.
        "documents": max(documents, key=lambda each: each["read"])
        | {"name": first["documents"]["name"], "exhausted": any(each["exhausted"] for each in documents)},
        "shards": shards,
    }


class _Harvest:
    """One run over what is left to do; everything it decides follows from the manifest and the stream."""

    def __init__(
        self,
        lm: LanguageModel,
        sites: list[Site],
        stream: "_ContextStream",
        folder: Path,
        manifest: dict[str, Any],
        advance: Callable[[int], None],
    ):
        self.lm = lm
        self.sites = sites
        self.stream = stream
        self.folder = folder
        self.manifest = manifest
        self.advance = advance
        self.wanted = manifest["made_from"]

    def run(self, documents: Iterable[Document]) -> None:
        if "part" in self.manifest and self.manifest["norm_medians"] is None:
            self._agree_on_medians(documents)
        for entry in self.manifest["shards"]:
            replayed = self.stream.take(entry["contexts"])
            if len(replayed.token_ids) < entry["contexts"] or self.stream.digest() != entry["documents_sha256"]:
                raise _other_documents(self.folder)
        complete = False
        while not complete:
            asked = self._contexts_of_next_shard()
            contexts = self.stream.take(asked)
            found = len(contexts.token_ids)
            if found:
                self.manifest["shards"].append(self._write_shard(contexts))
            elif not self.manifest["shards"]:
                whose, remedy = "all text", "a smaller context"
                if "part" in self.manifest:
                    whose, remedy = f"all text of {self.folder.name}", "a smaller context, or harvest in fewer parts"
                raise InputError(
                    f"documents: {whose} together is {self.stream.n_tokens} tokens, less than one context "
                    f"(context={self.wanted['context']}): give more text or {remedy}"
                )
            exhausted = found < asked
            complete = exhausted or _rows(self.manifest) >= _wanted_rows(self.manifest)
            if complete:
                read = {"read": self.stream.n_documents, "sha256": self.stream.digest(), "exhausted": exhausted}
                self.manifest |= {"complete": True, "documents": self.manifest["documents"] | read}
            write_json(self.folder / MANIFEST, self.manifest)

    def _contexts_of_next_shard(self) -> int:
        return self._contexts_of_a_shard(_wanted_rows(self.manifest) - _rows(self.manifest))

    def _contexts_of_a_shard(self, rows: int) -> int:
        usable = self.wanted["context"] - self.wanted["drop_first"]
        return min(self.wanted["shard_tokens"] // self.wanted["context"], math.ceil(rows / usable))

    def _agree_on_medians(self, documents: Iterable[Document]) -> None:
        """Take the medians of the batch that a harvest in one piece begins with, which every part finds alike."""
        count = min(self.wanted["batch_size"], self._contexts_of_a_shard(self.wanted["tokens"]))
        first = _ContextStream(documents, self.lm.tokenizer, self.wanted["context"]).take(count).token_ids
        if len(first):
            valid = self._valid_by_place(first)
            activations, gradients = self._captured(first, (0, 0, 0))
            self._set_medians({site: _norms(x, site) for site, x in activations.items()}, valid)
            self._set_scales(gradients)

    def _captured(
        self, token_ids: Int32[np.ndarray, "contexts time"], place: tuple[int, int, int]
    ) -> tuple[dict[Site, Tensor], dict[Site, Tensor]]:
        """The activations of a batch, and gradients where they are wanted; ``place`` is part, shard and row there."""
        on_device = torch.from_numpy(token_ids.astype(np.int64)).to(self.lm.device)
        wanted = self.wanted.get("gradients")
        if wanted is None:
            return capture(self.lm, self.sites, on_device), {}
        found = capture_with_loss_gradients(
            self.lm, self.sites, on_device, target=wanted["target"], seed=(wanted["seed"], *place)
        )
        return {site: x for site, (x, _) in found.items()}, {site: gradient for site, (_, gradient) in found.items()}

    def _valid_by_place(self, token_ids: Int32[np.ndarray, "contexts time"]) -> np.ndarray:
        valid = np.ones(token_ids.shape, np.bool_)
        if self.wanted["drop_first"]:
            valid[:, 0] = False
        return valid

    def _set_medians(self, norms: dict[Site, np.ndarray], valid: np.ndarray) -> None:
        self.manifest["norm_medians"] = {str(site): float(np.median(norm[valid])) for site, norm in norms.items()}

    def _set_scales(self, gradients: dict[Site, Tensor]) -> None:
        if gradients:
            sizes = {str(site): float(gradient.float().square().mean().sqrt()) for site, gradient in gradients.items()}
            # Powers of two change no digit.
            self.manifest["gradient_scales"] = {
                site: 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0 for site, size in sizes.items()
            }

    def _write_shard(self, contexts: "_Contexts") -> dict[str, Any]:
        index, count = len(self.manifest["shards"]), len(contexts.token_ids)
        label = f"{self.manifest['part']}/{index}" if "part" in self.manifest else str(index)
        header, places, size = shard_layout(
            count,
            self.wanted["context"],
            stored_widths(self.wanted),
            self.wanted["dtype"],
            identity_of(self.manifest),
            label,
        )
        path = self.folder / f"shard-{index:05}.safetensors"
        valid = np.ones(contexts.token_ids.shape, np.uint8)
        with write_atomically(path) as temporary, temporary.open("r+b") as file:
            # The whole size at once: what does not fit on the disk fails before the model runs.
            os.posix_fallocate(file.fileno(), 0, size)
            file.write(header)
            for name in ("token_ids", "document", "position"):
                _put(file, places[name], 0, getattr(contexts, name))
            for start in range(0, count, self.wanted["batch_size"]):
                stop = min(start + self.wanted["batch_size"], count)
                where = (self.manifest.get("part", 0), index, start)
                valid[start:stop] = self._write_batch(file, places, where, contexts.token_ids[start:stop])
                self.advance(int(valid[start:stop].sum()))
            _put(file, places["valid"], 0, valid)
            file.flush()
            file.seek(0)
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {
            "file": path.name,
            "bytes": size,
            "sha256": checksum,
            "contexts": count,
            "rows": int(valid.sum()),
            "documents_read": self.stream.n_documents,
            "documents_sha256": self.stream.digest(),
            **({"shard": label} if "part" in self.manifest else {}),
        }

    def _write_batch(
        self,
        file: BinaryIO,
        places: dict[str, Place],
        where: tuple[int, int, int],
        token_ids: Int32[np.ndarray, "contexts time"],
    ) -> np.ndarray:
        (activations, gradients), valid = self._captured(token_ids, where), self._valid_by_place(token_ids)
        norms = {site: _norms(x, site) for site, x in activations.items()}
        if self.manifest["norm_medians"] is None:
            self._set_medians(norms, valid)
            self._set_scales(gradients)
        ratio, dtype, start = self.wanted["max_norm_ratio"], self.wanted["dtype"], where[-1]
        for site, x in activations.items():
            if ratio is not None:
                valid &= norms[site] <= ratio * self.manifest["norm_medians"][str(site)]
            _put(file, places[str(site)], start, _as_stored(x, dtype))
        for site, gradient in gradients.items():
            _norms(gradient, site)
            kept = torch.from_numpy(valid).to(gradient.device).unsqueeze(-1)
            scaled = gradient.float().where(kept, 0.0) / self.manifest["gradient_scales"][str(site)]
            _put(file, places[gradient_of(site)], start, _as_stored(scaled, dtype))
        return valid


@dataclass(frozen=True)
class _Contexts:
    token_ids: Int32[np.ndarray, "contexts time"]
    document: Int32[np.ndarray, "contexts time"]
    position: Int32[np.ndarray, "contexts time"]


class _ContextStream:
    """Documents of one part as a stream of tokens, cut into contexts.

    Knows how many documents of the whole text it has come past, and their hash.
    """

    def __init__(self, documents: Iterable[Document], tokenizer: Any, context: int, part: tuple[int, int] = (0, 1)):
        self.first, self.between = _special_tokens(tokenizer)
        self.context = context
        self.part = part
        self.n_documents = 0
        self.n_tokens = 0
        self._digest = hashlib.sha256()
        self._tokens = self._tokenised(documents, tokenizer)
        # Rows of (token, document, position) that are not in a context yet.
        self._rest = np.empty((0, 3), np.int32)

    def take(self, count: int) -> _Contexts:
        """The next contexts: as many as asked for, or fewer where the text ends."""
        body = self.context - (self.first is not None)
        pieces, available = [self._rest], len(self._rest)
        while available < count * body and (piece := next(self._tokens, None)) is not None:
            pieces.append(piece)
            available += len(piece)
        table = np.concatenate(pieces)
        found = min(count, available // body)
        self._rest = table[found * body :].copy()
        table = table[: found * body].reshape(found, body, 3)
        if self.first is not None:
            begin = table[:, :1].copy()
            begin[:, :, 0], begin[:, :, 2] = self.first, -1
            table = np.concatenate([begin, table], axis=1)
        return _Contexts(*(np.ascontiguousarray(table[:, :, column]) for column in range(3)))

    def digest(self) -> str:
        """A hash of the documents up to the last one that has entered the stream."""
        return self._digest.hexdigest()

    def _tokenised(self, documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
        for group in _groups(self._own(documents)):
            # verbose=False: that a text is longer than the model's window is no news here, it is about to be cut.
            texts = [each.document.text for each in group]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            for each, ids in zip(group, encoded, strict=True):
                if ids and self.between is not None:
                    ids = [*ids, self.between]
                table = np.empty((len(ids), 3), np.int32)
                table[:, 0] = ids
                table[:, 1] = each.number
                table[:, 2] = np.arange(len(ids))
                self._digest, self.n_documents = each.digest, each.number + 1
                self.n_tokens += len(ids)
                yield table
        self._digest, self.n_documents = self._all_read

    def _own(self, documents: Iterable[Document]) -> Iterator["_Numbered"]:
        """The documents of this part; the others are read and hashed too, so that parts can tell their text apart."""
        digest, count = hashlib.sha256(), 0
        for document in documents:
            add_to_digest(digest, document)
            if count % self.part[1] == self.part[0]:
                yield _Numbered(count, document, digest.copy())
            count += 1
        self._all_read = digest, count


@dataclass(frozen=True)
class _Numbered:
    """A document, its number in the whole text, and the hash of the text up to its end."""

    number: int
    document: Document
    digest: Any


def _groups(documents: Iterable[_Numbered]) -> Iterator[list[_Numbered]]:
    group: list[_Numbered] = []
    characters = 0
    for each in documents:
        group.append(each)
        characters += len(each.document.text)
        if len(group) == _DOCUMENTS_AT_ONCE or characters > _CHARACTERS_AT_ONCE:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _special_tokens(tokenizer: Any) -> tuple[int | None, int | None]:
    """What the tokeniser puts before a text by itself, and what separates two texts."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    first = dressed[0] if dressed[:1] != bare[:1] else None
    between = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return first, between


def _fingerprint_of_tokenizer(tokenizer: Any) -> str:
    if not getattr(tokenizer, "is_fast", False):
        described: Any = sorted(tokenizer.get_vocab().items())
    else:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        # These change with every call that pads or truncates.
        described.pop("padding", None)
        described.pop("truncation", None)
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _norms(activations: Tensor, site: Site) -> np.ndarray:
    norms = torch.linalg.vector_norm(activations, dim=-1, dtype=torch.float32).cpu().numpy()
    if not np.isfinite(norms).all():
        raise ValueError(
            f"the model yields NaN or infinity at {site}: load it with another dtype, or check its weights"
        )
    return norms


def _as_stored(activations: Tensor, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return activations.float().cpu().numpy()
    return activations.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().view(STORED[dtype][1])


def _put(file: BinaryIO, place: Place, first: int, rows: np.ndarray) -> None:
    """Write some rows of a tensor, from row ``first`` on, where they belong in the file."""
    file.seek(place.offset + first * (place.n_bytes // place.shape[0]))
    file.write(np.ascontiguousarray(rows, dtype=place.dtype).data)


def _check_room_for_parts(folder: Path, parts: int) -> None:
    """Make sure that a folder is free for the parts of a harvest, or holds a harvest in as many parts."""
    if (folder / MANIFEST).exists():
        there = read_manifest(folder)["made_from"].get("parts")
        if there != parts:
            was = "in one piece" if there is None else f"in {there} parts"
            raise InputError(
                f"folder {folder} holds a harvest {was}, not in {parts} parts: go on as it was begun, choose "
                "another folder, or delete this one"
            )
    ours = re.compile(rf"\..*|{MANIFEST}|part-\d+-of-{parts:05}")
    others = sorted(path.name for path in folder.iterdir() if not ours.fullmatch(path.name))
    if others:
        raise InputError(
            f"folder {folder} holds {others[0]}, which is no part of a harvest in {parts} parts: choose a new folder, "
            "or go on with as many parts as were begun there"
        )


def _differences(asked: dict[str, Any], there: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {asked.get(name)!r}, there it was {there.get(name)!r}"
        for name in there | asked
        if asked.get(name) != there.get(name)
    ]


def _start_or_resume(
    folder: Path, made_from: dict[str, Any], part: tuple[int, int] | None, model: str, corpus: str | None
) -> dict[str, Any]:
    for leftover in [*folder.glob(".shard-*.partial"), *folder.glob(f".{MANIFEST}.*.partial")]:
        leftover.unlink()
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        there = {"part": manifest.get("part")} | manifest["made_from"]
        if part is None and there["part"] is None:
            # A finished store is used as it is, in however many parts it was harvested.
            there.pop("parts", None)
        differences = _differences(made_from | {"part": None if part is None else part[0]}, there)
        if differences:
            raise InputError(
                f"folder {folder} holds a harvest made with other arguments ({'; '.join(differences)}): "
                "choose another folder, or delete this one"
            )
        # Opens every listed shard: a damaged one must not be built upon.
        ActivationStore(folder, manifest, None)
        return manifest
    if any(folder.glob(PARTS)):
        raise InputError(
            f"folder {folder} holds parts of a harvest: finish them, by as many processes as began it, and call "
            "join_parts, or choose another folder"
        )
    if any(folder.iterdir()):
        raise InputError(f"folder {folder} is not empty and holds no harvest: choose a new folder")
    context, width = made_from["context"], sum(stored_widths(made_from).values())
    model_bytes = torch.finfo(getattr(torch, made_from["model_dtype"])).bits // 8
    per_token = width * (model_bytes + STORED[made_from["dtype"]][1].itemsize) + 4 * max(made_from["sites"].values())
    # Three int32 a token, thrice over while contexts are cut from documents.
    shard_bytes = made_from["shard_tokens"] * 3 * 12
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        **({} if part is None else {"part": part[0]}),
        "complete": False,
        "model": {"name": model, "fingerprint": made_from["model"]},
        "documents": {"name": corpus},
        "made_from": made_from,
        "peak_memory_bytes": made_from["batch_size"] * context * per_token + shard_bytes,
        "norm_medians": None,
        **({"gradient_scales": None} if "gradients" in made_from else {}),
        "shards": [],
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _check_documents(documents: Iterable[Document], manifests: dict[Path, dict[str, Any]]) -> None:
    """Make sure that finished stores were made from these documents, as far as they have read them."""
    records = {folder: manifest["documents"] for folder, manifest in manifests.items()}
    marks = {record["read"] for record in records.values()}
    hashes: dict[int, str] = {}
    digest, found = hashlib.sha256(), 0
    for document in documents:
        found += 1
        if found > max(marks):
            break
        add_to_digest(digest, document)
        if found in marks:
            hashes[found] = digest.hexdigest()
    for folder, record in records.items():
        if hashes.get(record["read"]) != record["sha256"] or (record["exhausted"] and found > record["read"]):
            raise _other_documents(folder)


def _other_documents(folder: Path) -> InputError:
    return InputError(
        f"documents: folder {folder} holds a harvest of other documents, or of these before they were changed: "
        "choose another folder, or delete this one"
    )


@contextlib.contextmanager
def _locked(folder: Path, how: int) -> Iterator[None]:
    """Hold a lock on the folder itself: it leaves no file behind, and is gone when the process is killed.

    It is shared (``LOCK_SH``) by those who write parts in it and belongs to one process (``LOCK_EX``) otherwise.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise explain_write_error(error, folder) from error
    try:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"folder {folder} is being written by another harvest: wait for it, or choose another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _bar(progress: bool, manifest: dict[str, Any], tokens: int) -> Iterator[Callable[[int], None]]:
    """Where a harvest says how many more rows it has: a bar on a terminal, a line every ten seconds anywhere else."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class TokensPerSecond(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:,.0f} tokens/s")

    console = Console(stderr=True)
    if not progress or not console.is_terminal:
        yield _lines(console, _rows(manifest), tokens) if progress else lambda rows: None
        return
    columns = (TextColumn("harvest"), BarColumn(), MofNCompleteColumn(), TokensPerSecond(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("harvest", total=tokens, completed=_rows(manifest))
        yield lambda rows: bar.update(task, advance=rows)


def _lines(
    console: "Console", done: int, tokens: int, clock: Callable[[], float] = time.monotonic
) -> Callable[[int], None]:
    started = printed = clock()
    first, count = done, done

    def advance(rows: int) -> None:
        nonlocal count, printed
        count += rows
        now = clock()
        if now - printed >= _SECONDS_BETWEEN_LINES or count >= tokens:
            printed = now
            speed = (count - first) / max(now - started, 1e-9)
            line = f"harvest {count:,}/{tokens:,} tokens, {speed:,.0f} tokens/s"
            console.print(line, highlight=False, soft_wrap=True)

    return advance


def _rows(manifest: dict[str, Any]) -> int:
    return sum(entry["rows"] for entry in manifest["shards"])


def _wanted_rows(manifest: dict[str, Any]) -> int:
    """The tokens wanted; of a part its share of them."""
    tokens = manifest["made_from"]["tokens"]
    if "part" not in manifest:
        return int(tokens)
    return _share(tokens, (manifest["part"], manifest["made_from"]["parts"]))


def _share(tokens: int, part: tuple[int, int]) -> int:
    number, parts = part
    return tokens // parts + (number < tokens % parts)


def _say_if_text_ended(manifest: dict[str, Any]) -> None:
    wanted = _wanted_rows(manifest)
    if manifest["documents"]["exhausted"] and _rows(manifest) < wanted:
        _log.warning("the text ended after %s of the %s tokens wanted", f"{_rows(manifest):,}", f"{wanted:,}")


def _parse(sites: Site | str | Sequence[Site | str]) -> list[Site]:
    listed = [sites] if isinstance(sites, Site | str) else list(sites)
    if not listed:
        raise InputError("sites is empty: name at least one, such as layers.9.residual")
    return list(dict.fromkeys(Site.parse(str(site)) for site in listed))


def _check_part(part: tuple[int, int] | None) -> None:
    if part is not None and not 0 <= part[0] < part[1]:
        raise InputError(f"part is {part}: give (number, parts) with the number from 0 to parts - 1, such as (0, 4)")


def _check_gradients(lm: LanguageModel, target: str | None, seed: int) -> None:
    if target is None:
        return
    if target not in TARGETS:
        raise InputError(f"gradients is {target!r}: choose one of {', '.join(TARGETS)}, or None to keep none")
    if seed < 0:
        raise InputError(f"gradient_seed is {seed}: it must not be negative")
    if not lm.is_causal:
        raise InputError(f"gradients is {target!r}, but {lm.name} does not predict the next token: it has no loss")


def _check_numbers(
    lm: LanguageModel,
    context: int,
    tokens: int,
    dtype: str,
    batch_size: int,
    max_norm_ratio: float | None,
    shard_tokens: int,
    part: tuple[int, int] | None,
) -> None:
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise InputError(f"context is {context}: {lm.name} takes contexts of 2 to {longest or 'any number of'} tokens")
    if tokens < context:
        raise InputError(
            f"tokens is {tokens}, less than one context ({context}): ask for more tokens or a smaller context"
        )
    if part is not None and _share(tokens, part) < context:
        raise InputError(
            f"tokens is {tokens}, in {part[1]} parts less than one context ({context}) each: ask for more tokens, a "
            "smaller context or fewer parts"
        )
    if dtype not in STORED:
        raise InputError(f"dtype is {dtype!r}: activations are stored as {' or '.join(STORED)}")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}: it must be at least 1")
    if max_norm_ratio is not None and not max_norm_ratio > 1:
        raise InputError(
            f"max_norm_ratio is {max_norm_ratio}: it must be greater than 1, such as 10, or None to keep all tokens"
        )
    if shard_tokens < context:
        raise InputError(f"shard_tokens is {shard_tokens}: a shard must hold at least one context ({context} tokens)")
