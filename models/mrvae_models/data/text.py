"""Tokenised text: one document a line, tokens divided by white space.

    train = load("folder", split="train")           # of train.txt, valid.txt, test.txt
    x = train.take(torch.arange(4))                  # (4, T) int64, each row its tokens, </s>, then <pad>
    train.vocabulary.texts(x)                        # sentences again
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .checks import DataError, Raw
from .fingerprint import Fingerprint, fingerprint
from .memory import check_memory
from .splits import NAMES, Sets, choose
from .vocabulary import END, MOST_UNKNOWN, PAD, SPECIALS, UNKNOWN, Vocabulary, padded, read_lines

SUFFIX = ".txt"

BYTES = 10
"""Memory that a place in the rows takes while they are checked: an int64 and two truths."""


class TextOptions(NamedTuple):
    """How text is read.

    vocabulary  one to use, or the file of one (one token a line); None builds it from the training documents, of at
                most `size` entries (the four specials included; None for all) that occur `min_count` times
    max_length  keep the first so many tokens of a document, </s> included, and drop the rest; None keeps all
    """

    vocabulary: Vocabulary | str | Path | None = None
    size: int | None = 10_000
    min_count: int = 1
    max_length: int | None = None


class TextDataset(Dataset[Tensor]):
    """Sentences in memory.

    examples: (N, T) int64, each row its tokens, END, then PAD; lengths: (N,) int64, on the CPU, END counted in;
    vocabulary: what the numbers mean; labels: (N,) int64, or None; input_shape: (longest, len(vocabulary)), of the
    likelihood's parameters, `longest` being that of all splits. An item is one row, cut to its length.
    DataError for rows that are not of this form.
    """

    binarize = "none"
    draws = False
    source: Fingerprint | None = None

    def __init__(
        self, examples: Tensor, vocabulary: Vocabulary, labels: Tensor | None = None, longest: int | None = None
    ) -> None:
        if examples.dim() != 2 or examples.dtype != torch.int64 or 0 in examples.shape:
            raise DataError(
                f"examples are {examples.dtype}, shape {tuple(examples.shape)}; expected int64, (N, T), N and T at "
                "least 1: vocabulary.encode(sentences) makes them"
            )
        low, high = examples.aminmax()
        if low < 0 or high >= len(vocabulary):
            raise DataError(
                f"examples hold numbers from {low} to {high}; expected 0 to {len(vocabulary) - 1}, the vocabulary's"
            )
        self.lengths = (examples != PAD).sum(1).cpu()
        ends = examples.gather(1, (self.lengths.to(examples.device) - 1).clamp_min(0)[:, None]).squeeze(1)
        wrong = (ends != END) | ((examples == END).sum(1) != 1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(f"row {row} is {examples[row].tolist()}; expected tokens, one {END} at the end, then {PAD}")
        if labels is not None and labels.shape != examples.shape[:1]:
            raise DataError(f"labels have shape {tuple(labels.shape)}; expected ({len(examples)},), one a document")
        self.examples = examples[:, : int(self.lengths.max())]
        self.vocabulary = vocabulary
        self.labels = labels
        self.input_shape = (longest or self.examples.shape[1], len(vocabulary))

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The rows at `indices` (n,), cut to the longest of them: (n, t). Nothing is drawn."""
        longest = int(self.lengths[indices.to(self.lengths.device)].max()) if len(indices) else 0
        return self.examples[:, :longest].index_select(0, indices.to(self.examples.device))

    def __getitem__(self, index: int) -> Tensor:
        return self.examples[index, : self.lengths[index]]


def files(source: Path) -> dict[str, Path]:
    """The text files of a source by split, "all" for a single one; {} where the source holds no text.

    A folder is one of text when a file in it is called as a split, such as train.txt or corpus.valid.txt, or when it
    has one .txt file and nothing else. DataError for two files of one split.
    """
    if source.is_file():
        return {"all": source} if source.suffix.lower() == SUFFIX else {}
    if not source.is_dir():
        return {}
    children = [child for child in sorted(source.iterdir()) if not child.name.startswith(".")]
    found: dict[str, Path] = {}
    for child in children:
        if child.is_dir() and child.name.lower() in NAMES:
            return {}  # sub-folders of images, by split
        split = NAMES.get(child.stem.lower().rpartition(".")[2])
        if split is None or child.suffix.lower() != SUFFIX or not child.is_file():
            continue
        if split in found:
            raise DataError(f"{child}: a second file of the {split} set beside {found[split].name}; keep one of them")
        found[split] = child
    if not found and len(children) == 1 and children[0].suffix.lower() == SUFFIX:
        return {"all": children[0]}
    return found


def _given(raw: Raw) -> Raw:
    return raw


def load_text(paths: dict[str, Path], split: str, seed: int, options: TextOptions, origin: str) -> TextDataset:
    """One split of the text in files() of a source. DataError for anything that cannot be used."""
    if options.max_length is not None and options.max_length < 2:
        raise DataError(f"max_length is {options.max_length}; expected at least 2: a token and </s>")
    contents = {name: _read(path) for name, path in paths.items()}
    sets: Sets = {name: functools.partial(_given, raw) for name, raw in contents.items()}
    raw, kept, part = choose(sets, split, seed, origin)
    vocabulary = options.vocabulary
    if vocabulary is None:
        train, of_training, _ = choose(sets, "train", seed, origin)
        vocabulary = Vocabulary.build(train.images[of_training], options.size, options.min_count, train.origin)
    elif not isinstance(vocabulary, Vocabulary):
        vocabulary = Vocabulary.read(vocabulary)
    limit = None if options.max_length is None else options.max_length - 1
    documents = [vocabulary.numbers(document[:limit]) for document in raw.images[kept]]
    _check_known(documents, vocabulary, raw.origin)
    longest = 1 + max(len(document[:limit]) for part in contents.values() for document in part.images)
    _check_memory(documents, raw.origin)
    made = TextDataset(padded(documents), vocabulary, _labels(raw, kept, contents), longest)
    made.source = fingerprint(part, raw.images)
    return made


def _read(path: Path) -> Raw:
    """The documents of a file as lists of tokens, blank lines left out, and their labels.

    Where every line is LABEL TAB text, as in the Yahoo set, the labels are taken off.
    """
    lines = [(number, line) for number, line in enumerate(read_lines(path), 1) if line.strip()]
    if not lines:
        raise DataError(f"{path}: the file is empty; expected one document a line, tokens divided by white space")
    with_tab = [(number, line) for number, line in lines if "\t" in line.strip()]
    labelled = len(with_tab) == len(lines)
    if with_tab and not labelled:
        without = next(number for number, line in lines if "\t" not in line.strip())
        raise DataError(
            f"{path}: line {with_tab[0][0]} holds a TAB and line {without} none; expected LABEL TAB text in every "
            "line, or no TAB at all: put spaces in place of the TABs"
        )
    labels, documents = [], []
    for number, line in lines:
        label, _, text = line.partition("\t") if labelled else ("", "", line)
        tokens = text.split()
        if labelled and (len(label.split()) != 1 or not tokens):
            raise DataError(f"{path}, line {number}: {line[:60]!r}; expected one label, a TAB, and the text")
        for token in SPECIALS[:UNKNOWN]:
            if token in tokens:
                raise DataError(
                    f"{path}, line {number}: holds {token!r}, which marks begin, end or padding and is put in by "
                    "itself: remove it from the text"
                )
        labels.append(label.strip())
        documents.append(tokens)
    lists = np.fromiter(documents, dtype=object, count=len(documents))  # of one length, np.array would make them 2-d
    return Raw(lists, np.array(labels) if labelled else None, str(path))


def _labels(raw: Raw, kept: np.ndarray, contents: dict[str, Raw]) -> Tensor | None:
    """Labels as numbers, in alphabetical order of all that occur in any of the files."""
    if raw.labels is None:
        return None
    names = sorted({str(label) for part in contents.values() if part.labels is not None for label in part.labels})
    return torch.from_numpy(np.searchsorted(np.array(names), raw.labels[kept]).astype(np.int64))


def _check_memory(documents: Sequence[Sequence[int]], origin: str) -> None:
    """DataError where the rows, all as long as the longest document, do not fit: one long line is enough for that."""
    lengths = sorted(1 + len(document) for document in documents)
    check_memory(
        BYTES * len(lengths) * lengths[-1],
        f"{origin}, {len(lengths)} documents as long as the longest, of {lengths[-1]} tokens with </s>",
        f"keep fewer tokens of each: --max-length, half have {lengths[len(lengths) // 2]} at most",
    )


def _check_known(documents: Sequence[Sequence[int]], vocabulary: Vocabulary, origin: str) -> None:
    total = sum(map(len, documents))
    unknown = sum(document.count(UNKNOWN) for document in documents)
    if unknown > MOST_UNKNOWN * total:
        raise DataError(
            f"{origin}: {unknown} of {total} tokens are not in {vocabulary.origin}, which has {len(vocabulary)} "
            "entries; expected less than half: take a larger vocabulary, or the one of these data"
        )
