"""Next-character prediction on the standard library's source: a small text task on which capacity tells."""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int64
from torch import Tensor

from apportion.data.corpora import corpus
from apportion.errors import InputError

# Printable ASCII, tab and newline; everything else is one more code.
_ALPHABET = "\n\t" + "".join(chr(code) for code in range(32, 127))
VOCABULARY = len(_ALPHABET) + 1


@dataclass(frozen=True, eq=False)
class Characters:
    """Codes of consecutive characters; the three parts share no file.

    Attributes:
        train, validation, test: codes below ``VOCABULARY``, documents one after another.
    """

    train: Int64[Tensor, "n"]
    validation: Int64[Tensor, "k"]
    test: Int64[Tensor, "count"]


@cache
def characters(amount: int = 1_500_000) -> Characters:
    """The first characters of the standard library's source.

    Args:
        amount: of characters in all three parts together; some 80 % are for training, 10 % for each of the others.

    Raises:
        InputError: fewer than 200,000: a part would be of a file or two.
    """
    if amount < 200_000:
        raise InputError(f"amount={amount}: use at least 200000 characters, so that each part holds several files")
    parts: tuple[list[str], ...] = ([], [], [])
    read = 0
    for document in corpus("code"):
        # All parts of one file go the same way.
        file = document.name.partition(" (part ")[0]
        place = int.from_bytes(hashlib.sha256(file.encode()).digest()[:4], "big") % 10
        parts[0 if place < 8 else place - 7].append(document.text)
        read += len(document.text)
        if read >= amount:
            break
    return Characters(*(_codes("".join(texts)) for texts in parts))


def windows(codes: Int64[Tensor, "n"], starts: Int64[Tensor, "k"], length: int) -> Int64[Tensor, "k length_and_next"]:
    """Windows of ``length`` characters and the one that follows, which is to be predicted."""
    return codes[starts.unsqueeze(1) + torch.arange(length + 1)]


def _codes(text: str) -> Int64[Tensor, "n"]:
    table = {character: code for code, character in enumerate(_ALPHABET)}
    return torch.tensor([table.get(character, len(_ALPHABET)) for character in text], dtype=torch.int64)
