"""Running a model over text and keeping its activations on disk: see `harvest`."""

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
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
    STORED,
    VERSION,
    ActivationStore,
    Place,
    identity_of,
    read_manifest,
    shard_layout,
)
from apportion.models.capture import capture
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
        progress: show a bar on stderr.

    Raises:
        InputError: bad arguments, too little text, a folder that is in use, holds other things or was harvested with
            other arguments, a full disk. Finished shards stay as they are.
        ValueError: the model yields NaN or infinity.
    """
    chosen = _parse(sites)
    widths = {str(site): site.width(lm) for site in chosen}
    _check_numbers(lm, context, tokens, dtype, batch_size, max_norm_ratio, shard_tokens)
    stream = _ContextStream(documents, lm.tokenizer, context)
    made_from = {
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
    folder = Path(folder)
    with _only_one_writer(folder):
        manifest = _start_or_resume(folder, made_from, lm.name, getattr(documents, "name", None))
        if manifest["complete"]:
            _check_documents(documents, manifest, folder)
        else:
            with _bar(progress, manifest, tokens) as advance:
                _Harvest(lm, chosen, stream, folder, manifest, advance).run()
    if manifest["documents"]["exhausted"] and _rows(manifest) < tokens:
        _log.warning("the text ended after %s of the %s tokens wanted", f"{_rows(manifest):,}", f"{tokens:,}")
    return ActivationStore.open(folder)


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

    def run(self) -> None:
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
                raise InputError(
                    f"documents: all text together is {self.stream.n_tokens} tokens, less than one context "
                    f"(context={self.wanted['context']}): give more text or a smaller context"
                )
            exhausted = found < asked
            complete = exhausted or _rows(self.manifest) >= self.wanted["tokens"]
            if complete:
                read = {"read": self.stream.n_documents, "sha256": self.stream.digest(), "exhausted": exhausted}
                self.manifest |= {"complete": True, "documents": self.manifest["documents"] | read}
            write_json(self.folder / MANIFEST, self.manifest)

    def _contexts_of_next_shard(self) -> int:
        usable = self.wanted["context"] - self.wanted["drop_first"]
        missing = math.ceil((self.wanted["tokens"] - _rows(self.manifest)) / usable)
        return min(self.wanted["shard_tokens"] // self.wanted["context"], missing)

    def _write_shard(self, contexts: "_Contexts") -> dict[str, Any]:
        index, count = len(self.manifest["shards"]), len(contexts.token_ids)
        header, places, size = shard_layout(
            count,
            self.wanted["context"],
            self.wanted["sites"],
            self.wanted["dtype"],
            identity_of(self.manifest),
            index,
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
                valid[start:stop] = self._write_batch(file, places, start, contexts.token_ids[start:stop])
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
        }

    def _write_batch(
        self, file: BinaryIO, places: dict[str, Place], start: int, token_ids: Int32[np.ndarray, "contexts time"]
    ) -> np.ndarray:
        input_ids = torch.from_numpy(token_ids.astype(np.int64)).to(self.lm.device)
        captured = capture(self.lm, self.sites, input_ids)
        valid = np.ones(token_ids.shape, np.bool_)
        if self.wanted["drop_first"]:
            valid[:, 0] = False
        norms = {site: _norms(activations, site) for site, activations in captured.items()}
        if self.manifest["norm_medians"] is None:
            self.manifest["norm_medians"] = {str(site): float(np.median(norm[valid])) for site, norm in norms.items()}
        ratio = self.wanted["max_norm_ratio"]
        for site, activations in captured.items():
            if ratio is not None:
                valid &= norms[site] <= ratio * self.manifest["norm_medians"][str(site)]
            _put(file, places[str(site)], start, _as_stored(activations, self.wanted["dtype"]))
        return valid


@dataclass(frozen=True)
class _Contexts:
    token_ids: Int32[np.ndarray, "contexts time"]
    document: Int32[np.ndarray, "contexts time"]
    position: Int32[np.ndarray, "contexts time"]


class _ContextStream:
    """Documents as one stream of tokens, cut into contexts; knows how many documents went in, and their hash."""

    def __init__(self, documents: Iterable[Document], tokenizer: Any, context: int):
        self.first, self.between = _special_tokens(tokenizer)
        self.context = context
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
        """A hash of the documents that have entered the stream."""
        return self._digest.hexdigest()

    def _tokenised(self, documents: Iterable[Document], tokenizer: Any) -> Iterator[np.ndarray]:
        for group in _groups(documents):
            # verbose=False: that a text is longer than the model's window is no news here, it is about to be cut.
            texts = [document.text for document in group]
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)[
                "input_ids"
            ]
            for document, ids in zip(group, encoded, strict=True):
                if ids and self.between is not None:
                    ids = [*ids, self.between]
                table = np.empty((len(ids), 3), np.int32)
                table[:, 0] = ids
                table[:, 1] = self.n_documents
                table[:, 2] = np.arange(len(ids))
                add_to_digest(self._digest, document)
                self.n_documents += 1
                self.n_tokens += len(ids)
                yield table


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
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


def _start_or_resume(folder: Path, made_from: dict[str, Any], model: str, corpus: str | None) -> dict[str, Any]:
    for leftover in [*folder.glob(".shard-*.partial"), *folder.glob(f".{MANIFEST}.*.partial")]:
        leftover.unlink()
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        differences = [
            f"{name} is {made_from.get(name)!r}, there it was {was!r}"
            for name, was in manifest["made_from"].items()
            if made_from.get(name) != was
        ]
        if differences:
            raise InputError(
                f"folder {folder} holds a harvest made with other arguments ({'; '.join(differences)}): "
                "choose another folder, or delete this one"
            )
        # Opens every listed shard: a damaged one must not be built upon.
        ActivationStore(folder, manifest, None)
        return manifest
    if any(folder.iterdir()):
        raise InputError(f"folder {folder} is not empty and holds no harvest: choose a new folder")
    context, width = made_from["context"], sum(made_from["sites"].values())
    model_bytes = torch.finfo(getattr(torch, made_from["model_dtype"])).bits // 8
    per_token = width * (model_bytes + STORED[made_from["dtype"]][1].itemsize) + 4 * max(made_from["sites"].values())
    # Three int32 a token, thrice over while contexts are cut from documents.
    shard_bytes = made_from["shard_tokens"] * 3 * 12
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "complete": False,
        "model": {"name": model, "fingerprint": made_from["model"]},
        "documents": {"name": corpus},
        "made_from": made_from,
        "peak_memory_bytes": made_from["batch_size"] * context * per_token + shard_bytes,
        "norm_medians": None,
        "shards": [],
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _check_documents(documents: Iterable[Document], manifest: dict[str, Any], folder: Path) -> None:
    """Make sure that a finished store was made from these documents, as far as it has read them."""
    digest, read = hashlib.sha256(), manifest["documents"]["read"]
    found = 0
    for document in documents:
        if found == read:
            found += manifest["documents"]["exhausted"]
            break
        add_to_digest(digest, document)
        found += 1
    if found != read or digest.hexdigest() != manifest["documents"]["sha256"]:
        raise _other_documents(folder)


def _other_documents(folder: Path) -> InputError:
    return InputError(
        f"documents: folder {folder} holds a harvest of other documents, or of these before they were changed: "
        "choose another folder, or delete this one"
    )


@contextlib.contextmanager
def _only_one_writer(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder itself: it leaves no file behind, and is gone when the process is killed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise explain_write_error(error, folder) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def _parse(sites: Site | str | Sequence[Site | str]) -> list[Site]:
    listed = [sites] if isinstance(sites, Site | str) else list(sites)
    if not listed:
        raise InputError("sites is empty: name at least one, such as layers.9.residual")
    return list(dict.fromkeys(Site.parse(str(site)) for site in listed))


def _check_numbers(
    lm: LanguageModel,
    context: int,
    tokens: int,
    dtype: str,
    batch_size: int,
    max_norm_ratio: float | None,
    shard_tokens: int,
) -> None:
    longest = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if context < 2 or (longest is not None and context > longest):
        raise InputError(f"context is {context}: {lm.name} takes contexts of 2 to {longest or 'any number of'} tokens")
    if tokens < context:
        raise InputError(
            f"tokens is {tokens}, less than one context ({context}): ask for more tokens or a smaller context"
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
