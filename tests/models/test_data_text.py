"""Text files as data sets, and batches of sentences of like length."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from mrvae_models.data import DataError, TextDataset, TextOptions, Vocabulary, batches, in_turn, load, memory, text
from mrvae_models.data.vocabulary import END, PAD


def corpus(n: int, words: int = 9, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (n,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(words, (k,), generator=generator).tolist()) for k in lengths]


def folder(path, **files):
    path.mkdir(exist_ok=True)
    for name, lines in files.items():
        (path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def numbered(n: int) -> TextDataset:
    """Sentences of which the first token tells which one it is, of lengths 2 to 8."""
    vocabulary = Vocabulary([f"w{i}" for i in range(n)])
    return TextDataset(vocabulary.encode([" ".join([f"w{i}"] * (1 + i * 7919 % 7)) for i in range(n)]), vocabulary)


# Files


def test_a_folder_gives_its_splits_with_the_vocabulary_of_train(tmp_path):
    path = folder(tmp_path, train=["a b a", "", "c a b d"], valid=["a z b"], test=["d d d d d d"])
    train, valid, test = (load(path, split) for split in ("train", "validation", "test"))
    assert sorted(train.vocabulary.texts(train.examples)) == ["a b a", "c a b d"]
    assert train.vocabulary.tokens[4:] == ("a", "b", "c", "d")
    assert valid.vocabulary == test.vocabulary == train.vocabulary
    assert valid.examples.tolist() == [[4, 3, 5, END]]
    assert {data.input_shape for data in (train, valid, test)} == {(7, 8)}
    assert train.lengths.tolist() == (train.examples != PAD).sum(1).tolist() and train.labels is None
    assert train[0].tolist() == train.examples[0, : train.lengths[0]].tolist()


def test_the_name_of_a_public_set_is_no_folder_of_text(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "mnist", train=["a b"] * 9)
    assert isinstance(load("./mnist"), TextDataset)
    with pytest.raises(DataError, match="mnist: not found in .*put there train-images"):
        load("mnist")


@pytest.mark.parametrize("names", [("training", "val", "testing"), ("yahoo.train", "yahoo.validation", "yahoo.test")])
def test_other_usual_names(tmp_path, names):
    path = folder(tmp_path, **dict(zip(names, (["a b"] * 3, ["b"], ["a a"]), strict=True)))
    assert [len(load(path, split)) for split in ("train", "validation", "test")] == [3, 1, 1]


def test_one_file_is_divided_by_the_seed(tmp_path):
    lines = [f"{line} x" for line in corpus(50)]
    path = folder(tmp_path, corpus=lines) / "corpus.txt"
    parts = [load(path, split, seed=1) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [40, 5, 5]
    assert sorted(text for part in parts for text in part.vocabulary.texts(part.examples)) == sorted(lines)
    assert not load(path, seed=2).examples.equal(parts[0].examples)
    assert load(tmp_path).examples.equal(load(path).examples)  # the only file of its folder
    held_out = folder(tmp_path / "two", train=lines, test=["x"])
    assert [len(load(held_out, split)) for split in ("train", "validation", "test")] == [45, 5, 1]


def test_the_vocabulary_is_of_the_training_documents_alone(tmp_path):
    path = folder(tmp_path, corpus=[f"w{i}" for i in range(50)]) / "corpus.txt"
    train = load(path)
    assert len(train.vocabulary) == 4 + 40 and not (train.examples == 3).any()
    with pytest.raises(DataError, match="5 of 5 tokens are not in"):
        load(path, "test")


def test_labels_before_a_tab_are_taken_off(tmp_path):
    path = folder(tmp_path, train=["7\ta b", "1\tc\td", "7\ta"], valid=["3\ta"], test=["1\tb"])
    train, valid = load(path), load(path, "validation")
    assert dict(zip(train.vocabulary.texts(train.examples), train.labels.tolist(), strict=True)) == {
        "a b": 2,
        "c d": 0,
        "a": 2,
    }
    assert valid.labels.tolist() == [1] and "7" not in train.vocabulary.tokens


def test_options_cut_documents_and_choose_the_vocabulary(tmp_path):
    path = folder(tmp_path / "data", train=["a b c a", "a b"], valid=["c c"], test=["b"])
    short = load(path, options=TextOptions(max_length=3))
    assert sorted(short.vocabulary.texts(short.examples)) == ["a b", "a b"] and short.input_shape == (3, 7)
    assert load(path, options=TextOptions(size=5)).vocabulary.tokens[4:] == ("a",)
    assert load(path, options=TextOptions(min_count=2)).vocabulary.tokens[4:] == ("a", "b")
    Vocabulary(["c", "b", "a", "zz"]).write(tmp_path / "v.txt")
    data = load(path, "validation", options=TextOptions(tmp_path / "v.txt"))
    assert data.examples.tolist() == [[4, 4, END]] and data.input_shape[1] == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "train.txt: the file is empty; expected one document a line"),
        (b"\n  \n", "the file is empty"),
        (b"good\nb\xe9d one\n", "train.txt, line 2: byte 0xe9 at 2 is no UTF-8"),
        (b"1\ta b\nno tab\n", "line 1 holds a TAB and line 2 none"),
        (b"one two\ta b\n", "line 1: .*expected one label, a TAB, and the text"),
        (b"a </s> b\n", "line 1: holds '</s>'.*remove it"),
        (b"a\n\n<pad>\n", "line 3: holds '<pad>'"),
    ],
)
def test_wrong_files_are_named(tmp_path, content, message):
    path = folder(tmp_path, train=["a"], valid=["a"], test=["a"])
    (path / "train.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_wrong_sources_and_options_are_named(tmp_path):
    path = folder(tmp_path / "one", train=["a b"] * 9 + ["c d e"], valid=["c d e f"], test=["a"])
    for keywords, message in (
        ({"options": TextOptions(max_length=1)}, "max_length is 1; expected at least 2"),
        ({"options": TextOptions(size=4)}, "size is 4"),
        ({"options": TextOptions(min_count=99)}, "smaller min_count"),
        ({"split": "validation", "options": TextOptions(size=6)}, "4 of 4 tokens are not in the vocabulary of .*train"),
        ({"binarize": "fixed"}, "binarize='fixed' is for images"),
        ({"resize": 8}, "resize=8 is for images"),
        ({"layout": "NCHW"}, "layout='NCHW' is for images"),
    ):
        with pytest.raises(DataError, match=message):
            load(path, **keywords)
    with pytest.raises(DataError, match="is for text, and digits holds images"):
        load("digits", options=TextOptions(max_length=9))
    folder(path, val=["a"])
    with pytest.raises(DataError, match="a second file of the validation set"):
        load(path)


def test_a_folder_of_images_stays_one(tmp_path):
    (tmp_path / "train").mkdir()
    folder(tmp_path, train=["train/one.png"])
    with pytest.raises(DataError, match="no images"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[4, 5, END], [4, END, 5]], "row 1"),
        ([[4, PAD, END]], "row 0"),
        ([[4, 5, 5]], "row 0"),
        ([[END, END, PAD]], "row 0"),
        ([[PAD, PAD, PAD]], "row 0"),
        ([[4, 6, END]], "from 2 to 6; expected 0 to 5"),
        ([[-1, END, PAD]], "from -1"),
    ],
)
def test_rows_that_are_no_sentences_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        TextDataset(torch.tensor(rows), Vocabulary(["a", "b"]))


def test_wrong_tensors_are_refused():
    vocabulary = Vocabulary(["a"])
    for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)):
        with pytest.raises(DataError, match=r"expected int64, \(N, T\)"):
            TextDataset(wrong, vocabulary)
    with pytest.raises(DataError, match="labels have shape"):
        TextDataset(vocabulary.encode(["a"]), vocabulary, torch.zeros(2))


def test_one_long_line_is_refused_before_all_rows_are_made_as_long(tmp_path, monkeypatch):
    path = folder(tmp_path, train=["a b"] * 5000 + ["a " * 20_000], valid=["a"], test=["b a"])
    monkeypatch.setattr(memory, "available", lambda: 10**9)
    monkeypatch.setattr(text, "padded", lambda documents: pytest.fail("the rows are made"))
    with pytest.raises(DataError, match=r"train.txt, 5001 documents .*20001 tokens .*needs 1 GB.*: --max-length, half"):
        load(path)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available", lambda: 10**6)
    assert load(path, options=TextOptions(max_length=9)).examples.shape == (5001, 9)


# Batches


def test_shuffled_batches_hold_sentences_of_like_length_and_every_one_once():
    data = numbered(103)
    loader = batches(data, 10, shuffle=True, seed=3)
    first, second = list(loader), list(loader)
    assert len(first) == len(loader) == 11 and [len(x) for x in first] == [10] * 10 + [3]
    assert sorted(row[0].item() for x in first for row in x) == list(range(4, 107))
    spreads = [(x != PAD).sum(1) for x in first[:-1]]
    assert sum(int(lengths.max() - lengths.min()) for lengths in spreads) <= 6  # the seven lengths, in sorted order
    assert all(x.shape[1] == (x != PAD).sum(1).max() for x in first)
    assert [x.shape[1] for x in first[:-1]] != sorted(x.shape[1] for x in first[:-1])
    sets = [{frozenset(x[:, 0].tolist()) for x in epoch} for epoch in (first, second)]
    assert len(sets[0] & sets[1]) < 3
    loader.set_epoch(0)
    assert all(x.equal(y) for x, y in zip(loader, first, strict=True))
    assert len(batches(data, 10, shuffle=True, drop_last=True)) == 10


def test_a_stopped_epoch_goes_on_with_the_batches_it_would_have_had():
    whole = batches(numbered(50), 8, shuffle=True, seed=5)
    expected = [x for _ in range(2) for x in whole]
    stopped = batches(numbered(50), 8, shuffle=True, seed=5)
    begun = list(islice(stopped, 3))
    resumed = batches(numbered(50), 8, shuffle=True, seed=5)
    resumed.load_state_dict(stopped.state_dict())
    rest = [x for _ in range(2) for x in resumed]
    assert len(begun + rest) == len(expected)
    assert all(x.equal(y) for x, y in zip(begun + rest, expected, strict=True))


def test_processes_share_the_batches_of_one():
    alone = list(batches(numbered(45), 8, shuffle=True))
    shares = [list(batches(numbered(45), 4, shuffle=True, rank=rank, world=2)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(alone)
    for whole, *parts in zip(alone, *shares, strict=True):
        even = len(whole) // 2 * 2
        assert {row for part in parts for row in part[:, 0].tolist()} == set(whole[:even, 0].tolist())


def test_in_turn_gives_every_sentence_in_batches_that_fit():
    data = numbered(40)
    for numbers, largest in ((2**25, 16), (5 * 8 * 44, 8)):
        parts = in_turn(data, 16, numbers)
        assert sorted(row[0].item() for x in parts for row in x) == list(range(4, 44))
        assert max(map(len, parts)) == largest
        assert all(len(x) == 1 or x.numel() * 44 <= numbers for x in parts)
    images = load(split="test")
    assert torch.cat(list(in_turn(images, 300))).equal(images.examples)
