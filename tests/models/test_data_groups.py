"""Sets whose images come from few sources: no source in two splits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mrvae_models.data import DataError, load
from mrvae_models.data.checks import Raw
from mrvae_models.data.splits import SPLITS, choose

SIZES = (230, 126, 36, 214, 109, 56, 726, 253, 196, 334, 336, 67, 1572, 258)
"""Patches a photograph, as in a set of 4,513 that this was made for."""


def patches(sizes, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Colour patches in a mixed order, each with its source as its first value."""
    source = np.random.RandomState(seed).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.uint8)
    images = np.random.RandomState(seed).randint(0, 256, (len(source), 6, 5, 3)).astype(np.uint8)
    images[:, 0, 0, 0] = source
    return images, source


def sources(data) -> set[int]:
    return set((data.examples[:, 0, 0, 0] * 255).round().long().tolist())


@pytest.mark.parametrize("key", ["images", "patches"])
def test_patches_are_split_by_their_photograph(tmp_path, key):
    images, source = patches(SIZES)
    np.savez(tmp_path / "set.npz", **{key: images, "source": source, "names": np.array(["a.png"] * 14)})
    parts = {split: load(tmp_path / "set.npz", split) for split in SPLITS}
    assert sum(map(len, parts.values())) == len(images) == 4513
    found = [sources(part) for part in parts.values()]
    assert set.union(*found) == set(range(14)) and sum(map(len, found)) == 14
    for split in ("validation", "test"):
        assert 451 <= len(parts[split]) <= 902
    assert parts["train"].input_shape == (3, 6, 5)
    assert torch.equal(parts["test"].examples, load(tmp_path / "set.npz", "test").examples)
    assert any(sources(load(tmp_path / "set.npz", "test", seed=seed)) != found[2] for seed in range(1, 5))
    whole = load(tmp_path / "set.npz", "all")
    assert torch.equal(whole.examples, torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
    order = (parts["train"].examples[:, 0, 0, 0] * 255).round().long()
    assert (order.diff() != 0).float().mean() > 0.5  # patches of a photograph are not next to each other


def test_sources_may_have_names_and_belong_to_splits(tmp_path):
    images, source = patches((20, 30, 10, 5))
    names = np.array(["oak", "ash", "elm", "fir"])[source]
    np.savez(tmp_path / "set.npz", train_images=images, train_source=names, test_images=images[:7])
    train, validation, test = (load(tmp_path / "set.npz", split) for split in SPLITS)
    assert not sources(train) & sources(validation) and len(train) + len(validation) == 65 and len(test) == 7
    np.savez(tmp_path / "set.npz", images=images, source=np.array("taken with a telephone"))
    assert [len(load(tmp_path / "set.npz", split)) for split in SPLITS] == [53, 6, 6]  # by row


@given(
    sizes=st.lists(st.integers(1, 60), min_size=3, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_every_part_has_a_source_of_its_own(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    raw = Raw(np.zeros((len(groups), 1, 1)), None, "set", groups=groups)
    parts = [choose({"all": lambda: raw}, split, seed, "set")[1] for split in SPLITS]
    assert sorted(np.concatenate(parts)) == list(range(len(groups)))
    found = [set(groups[part]) for part in parts]
    assert all(found) and sum(map(len, found)) == len(sizes)
    smallest, tenth = min(sizes), max(1, len(groups) // 10)
    for part in parts[1:]:
        assert len(part) <= 2 * tenth or len(set(groups[part])) == 1
    if smallest <= 2 * tenth:
        assert min(len(part) for part in parts[1:]) <= 2 * tenth


def test_sources_that_are_too_few_or_wrong(tmp_path):
    images, source = patches((20, 30))
    for extra, message in [
        (source, "its 50 examples are from 2 sources; expected at least 3, one each for train, test and validation"),
        (source * 0, "from 1 source; expected at least 3"),
        (source[:-1], r"source\]: uint8, shape \(49,\); expected a whole number or a text for each of the 50 images"),
        (source.astype(float), "float64"),
        (np.array(3), r"int64, shape \(\)"),
    ]:
        np.savez(tmp_path / "set.npz", images=images, source=extra)
        with pytest.raises(DataError, match=message):
            load(tmp_path / "set.npz")
    np.savez(tmp_path / "set.npz", images=images, source=source)
    assert len(load(tmp_path / "set.npz", "all")) == 50
