"""A vocabulary: which tokens there are, and their numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .checks import DataError

PAD, START, END, UNKNOWN = range(4)
"""Numbers of the special tokens: padding, begin and end of a sentence, and every token that is not in the list."""

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")

MOST_UNKNOWN = 0.5
"""More unknown tokens than this part mean a vocabulary of other data, or one that is too small to be of use."""


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, ended by \n or \r\n; DataError, with the line, for bytes that are no UTF-8."""
    lines = []
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a text file") from None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(line.removesuffix(b"\r").decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: byte 0x{line[error.start]:02x} at {error.start + 1} is no UTF-8; expected a "
                "text file in UTF-8: convert it (iconv -t utf-8), or remove the line"
            ) from None
    return lines


class Vocabulary:
    """Tokens by number, the four SPECIALS first; `len` counts them in.

    tokens: without the specials, or with all four in front, in their order. DataError for a token that occurs twice, is
    empty, holds white space or is a special one elsewhere, and where there is none besides the specials.
    """

    def __init__(self, tokens: Iterable[str], origin: str = "the vocabulary") -> None:
        self.tokens = tuple(tokens)
        if self.tokens[: len(SPECIALS)] != SPECIALS:
            self.tokens = (*SPECIALS, *self.tokens)
        self.origin = origin
        self._numbers: dict[str, int] = {}
        for number, token in enumerate(self.tokens):
            wrong = None
            if token in SPECIALS[:number] and number >= len(SPECIALS):
                wrong = f"is a special token; expected {' '.join(SPECIALS)} as the first four entries, or none of them"
            elif token in self._numbers:
                wrong = "occurs twice; expected every token once"
            elif token.split() != [token]:
                wrong = "is empty or holds white space; expected one token a line"
            if wrong:
                raise DataError(f"{origin}, entry {number + 1 - len(SPECIALS)}: {token!r} {wrong}: correct the list")
            self._numbers[token] = number
        if len(self.tokens) == len(SPECIALS):
            raise DataError(
                f"{origin}: no token besides {' '.join(SPECIALS)}; expected at least one: take a smaller min_count, or "
                "more text"
            )

    @classmethod
    def build(
        cls, documents: Iterable[Sequence[str]], size: int | None = None, min_count: int = 1, origin: str = "the data"
    ) -> Vocabulary:
        """The tokens of the documents by falling frequency, those equally frequent in alphabetical order.

        size: at most so many entries, the four specials included; None for all. min_count: leave out what is rarer.
        DataError for a size below 5 or a min_count below 1, and when no token is left.
        """
        if size is not None and size <= len(SPECIALS):
            raise DataError(f"vocabulary size is {size}; expected at least 5: {' '.join(SPECIALS)} and one token")
        if min_count < 1:
            raise DataError(f"min_count is {min_count}; expected at least 1")
        counts = Counter(token for document in documents for token in document)
        kept = sorted(
            (token for token, count in counts.items() if count >= min_count and token not in SPECIALS),
            key=lambda token: (-counts[token], token),
        )
        return cls(kept[: None if size is None else size - len(SPECIALS)], f"the vocabulary of {origin}")

    @classmethod
    def read(cls, path: str | Path) -> Vocabulary:
        """From a file of one token a line; a last empty line is none."""
        path = Path(path)
        lines = read_lines(path)
        return cls(lines[:-1] if lines and not lines[-1] else lines, str(path))

    def write(self, path: str | Path) -> None:
        """One token a line, the specials first; read() gives it back."""
        Path(path).write_bytes("".join(f"{token}\n" for token in self.tokens).encode())

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    def __hash__(self) -> int:
        return hash(self.tokens)

    def numbers(self, tokens: Iterable[str]) -> list[int]:
        """The numbers of tokens, UNKNOWN for those not in the list."""
        return [self._numbers.get(token, UNKNOWN) for token in tokens]

    def text(self, numbers: Tensor | Sequence[int]) -> str:
        """The sentence of a row of numbers, up to its end and without the specials but <unk>."""
        row = numbers.tolist() if isinstance(numbers, Tensor) else list(numbers)
        row = row[: row.index(END)] if END in row else row
        return " ".join(self.tokens[number] for number in row if number not in (PAD, START))

    def texts(self, numbers: Tensor) -> list[str]:
        """The sentences of rows of numbers, (N, T)."""
        return [self.text(row) for row in numbers]

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences of tokens divided by white space as the networks take them: (N, T) int64, ended and padded."""
        return padded([self.numbers(sentence.split()) for sentence in sentences])


def padded(documents: Sequence[Sequence[int]]) -> Tensor:
    """Rows of numbers, each ended by END and padded to the longest by PAD: (N, T) int64."""
    rows = torch.full((len(documents), 1 + max(map(len, documents), default=0)), PAD, dtype=torch.int64)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = torch.tensor(document, dtype=torch.int64)
        row[len(document)] = END
    return rows
