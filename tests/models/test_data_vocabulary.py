"""Vocabularies: built, read, written, and both ways between sentences and numbers."""

from __future__ import annotations

import pytest
import torch
from mrvae_models.data import DataError, Vocabulary
from mrvae_models.data.vocabulary import END, PAD, SPECIALS, START, UNKNOWN, padded

DOCUMENTS = [["e", "c", "<unk>"], ["a", "b", "d", "<unk>"], ["a"], ["b", "a", "c"]]


def test_the_most_frequent_come_first_and_equally_frequent_ones_in_alphabetical_order():
    assert Vocabulary.build(DOCUMENTS).tokens == (*SPECIALS, "a", "b", "c", "d", "e")
    assert Vocabulary.build(DOCUMENTS, size=6).tokens == (*SPECIALS, "a", "b")
    assert Vocabulary.build(DOCUMENTS, min_count=2).tokens == (*SPECIALS, "a", "b", "c")
    assert Vocabulary.build(DOCUMENTS, size=100, min_count=3).tokens == (*SPECIALS, "a")


def test_sentences_and_numbers_both_ways():
    vocabulary = Vocabulary.build(DOCUMENTS)
    x = vocabulary.encode(["a b zebra", "", "e <unk>"])
    assert x.tolist() == [[4, 5, UNKNOWN, END], [END, PAD, PAD, PAD], [8, UNKNOWN, END, PAD]]
    assert x.dtype == torch.int64
    assert vocabulary.texts(x) == ["a b <unk>", "", "e <unk>"]
    assert vocabulary.text([START, 4, 5, END, 6, 7]) == "a b" and vocabulary.text([4, 4, PAD]) == "a a"
    assert padded([]).shape == (0, 1)


def test_a_file_is_the_vocabulary_that_was_written(tmp_path):
    vocabulary = Vocabulary.build([["ä", "naïve", "日本"]])
    vocabulary.write(tmp_path / "v.txt")
    assert Vocabulary.read(tmp_path / "v.txt") == vocabulary and len(vocabulary) == 7
    (tmp_path / "bare.txt").write_bytes("\ufeffnaïve\r\nä\r\n日本".encode())
    assert Vocabulary.read(tmp_path / "bare.txt").tokens == (*SPECIALS, "naïve", "ä", "日本")
    assert vocabulary != Vocabulary(["ä"]) and len({vocabulary, Vocabulary(vocabulary.tokens)}) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "b", "a"], "entry 3: 'a' occurs twice"),
        (["a", ""], "entry 2: '' is empty"),
        (["a b"], "holds white space"),
        (["a", "<unk>"], "'<unk>' is a special token; expected <pad> <s> </s> <unk> as the first four"),
        (SPECIALS, "no token besides"),
        ([], "no token besides"),
    ],
)
def test_wrong_lists_are_named(tokens, message):
    with pytest.raises(DataError, match=message):
        Vocabulary(tokens)


def test_a_size_or_count_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="size is 4; expected at least 5"):
        Vocabulary.build(DOCUMENTS, size=4)
    with pytest.raises(DataError, match="min_count is 0"):
        Vocabulary.build(DOCUMENTS, min_count=0)
    with pytest.raises(DataError, match="smaller min_count"):
        Vocabulary.build(DOCUMENTS, min_count=9)


def test_damaged_files_are_named_with_the_line(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"one\ntw\xffo\n")
    with pytest.raises(DataError, match="v.txt, line 2: byte 0xff at 3 is no UTF-8"):
        Vocabulary.read(tmp_path / "v.txt")
    with pytest.raises(DataError, match="cannot be read"):
        Vocabulary.read(tmp_path / "none.txt")
