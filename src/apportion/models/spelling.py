"""What tokens say, byte by byte: where each token begins and ends in the text of a window."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spelled:
    """A run of tokens as text.

    Attributes:
        text: all of it; bytes that are no character show as U+FFFD.
        spans: for every token the characters ``start`` to ``stop - 1`` that it has a part in. Two tokens that share a
            character both have it.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def speller(tokenizer: Any) -> Callable[[Sequence[int]], Spelled]:
    """A function that spells token ids, from a transformers tokenizer.

    Tokens are looked up once each; special tokens are left out of the text (their spans are empty).
    """
    alphabet = {character: byte for byte, character in byte_level_alphabet().items()}
    special = set(tokenizer.all_special_ids)
    kind = kind_of_vocabulary(tokenizer)
    known: dict[int, bytes] = {}

    def look_up(token: int) -> bytes:
        piece = tokenizer.convert_ids_to_tokens(int(token)) if token >= 0 else None
        if piece is None or token in special:
            return b""
        if kind == "##":
            return (piece[2:] if piece.startswith("##") else " " + piece).encode("utf-8", "surrogatepass")
        if kind == "▁":
            if len(piece) == 6 and piece.startswith("<0x"):
                return bytes([int(piece[3:5], 16)])
            return str(piece).replace("▁", " ").encode("utf-8", "surrogatepass")
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return str(tokenizer.decode([int(token)])).encode("utf-8", "surrogatepass")

    def spell(ids: Sequence[int]) -> Spelled:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts, spans, done = [], [], 0
        for token in ids:
            raw = known.get(token)
            if raw is None:
                raw = known[token] = look_up(token)
            said = decoder.decode(raw)
            start, done = done, done + len(said)
            parts.append(said)
            # Bytes that are waiting for the rest of their character will be part of the next one.
            spans.append((start, done + (1 if raw and decoder.getstate()[0] else 0)))
        parts.append(decoder.decode(b"", True))
        text = "".join(parts)
        return Spelled(text, tuple((start, min(stop, len(text))) for start, stop in spans))

    return spell


def kind_of_vocabulary(tokenizer: Any) -> str:
    """How a vocabulary marks words: ``Ġ`` (bytes), ``##`` (WordPiece) or ``▁`` (SentencePiece)."""
    # By majority: a byte-level vocabulary made from code also holds tokens that begin with ## and with ▁.
    marks = {mark: sum(piece.startswith(mark) for piece in tokenizer.get_vocab()) for mark in ("Ġ", "##", "▁")}
    return max(marks, key=lambda mark: marks[mark])


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(hidden)}
