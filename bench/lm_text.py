"""Text that is installed wherever Python is, its own standard library, as pieces: frequent words, else letters."""

from __future__ import annotations

import collections
import functools
import itertools
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

N_PIECES, HELD_OUT = 8192, 20  # of the vocabulary; every so many-th file is kept for validation
WORDS = re.compile(r" ?[A-Za-z]+|\n *| +|.", re.DOTALL)  # a word with the space before it, a line's end and indent, ...
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data"}
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


class Text(NamedTuple):
    """Pieces as indices into the vocabulary, files one after another."""

    pieces: list[str]
    train: Tensor
    validation: Tensor
    n_files: int
    n_characters: int


@functools.cache
def text(n_pieces: int, n_files: int | None = None) -> Text:
    """Return the standard library's text, of its first files only where a number is given."""
    files = list(itertools.islice(_files(), n_files))
    kept = [i % HELD_OUT != HELD_OUT - 1 for i in range(len(files))]
    words = [WORDS.findall(file) for file in files]
    counted = collections.Counter(word for each, trains in zip(words, kept, strict=True) if trains for word in each)
    letters = {letter for word in counted for letter in word if letter.isascii()}
    frequent = [word for word, _ in counted.most_common() if word not in letters]
    pieces = [UNKNOWN, *sorted(letters), *frequent][:n_pieces]
    index = {piece: i for i, piece in enumerate(pieces)}

    def encoded(trains: bool) -> Tensor:
        found: list[int] = []
        for each, is_trained in zip(words, kept, strict=True):
            for word in each if trains == is_trained else ():
                at = index.get(word)
                found.extend([at] if at is not None else [index.get(letter, 0) for letter in word])
        return torch.tensor(found)

    return Text(pieces, encoded(True), encoded(False), len(files), sum(map(len, files)))


def _files() -> Iterator[str]:
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not SKIPPED & set(file.relative_to(root).parts):
            yield file.read_text("utf-8", "replace")
