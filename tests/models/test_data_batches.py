"""Binarisation, and batches: their order, resuming, and several processes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from mrvae_models.data import DataError, ImageDataset, batches, load
from torch.utils.data import DataLoader

# Binarisation


def test_fixed_binarisation_is_one_draw_from_the_seed():
    grey, first, again = load(split="test"), load(split="test", binarize="fixed"), load(split="test", binarize="fixed")
    assert set(first.examples.unique().tolist()) == {0.0, 1.0} and first.examples.equal(again.examples)
    assert first[3].equal(first[3])
    assert first.examples[grey.examples == 1].all() and not first.examples[grey.examples == 0].any()
    assert abs(first.examples.mean() - grey.examples.mean()) < 2e-3
    drawn = ImageDataset(grey.examples, binarize="fixed", seed=1)
    assert not drawn.examples.equal(first.examples)


def test_dynamic_binarisation_draws_at_every_access():
    data = load(split="test", binarize="dynamic")
    assert not data[0].equal(data[0]) and set(data[0].unique().tolist()) == {0.0, 1.0}
    mean = torch.stack([data[0] for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, data.examples[0], rtol=0, atol=0.06)
    epochs = batches(data, 1000)
    first, second = next(iter(epochs)), next(iter(epochs))
    assert not first.equal(second)
    assert next(iter(batches(data, 1000))).equal(first)


# Batches


def numbered(n: int, binarize: str = "none") -> ImageDataset:
    return ImageDataset(torch.arange(n, dtype=torch.float32).reshape(n, 1, 1, 1) / n, binarize=binarize)


def test_batches_cover_an_epoch_once_in_an_order_of_seed_and_epoch():
    data = numbered(10)
    loader = batches(data, 4, shuffle=True, seed=1)
    first, second = torch.cat(list(loader)), torch.cat(list(loader))
    assert [len(x) for x in loader] == [4, 4, 2] and len(loader) == 3
    assert not first.equal(second) and first.sort(0).values.equal(data.examples)
    loader.set_epoch(0)
    assert torch.cat(list(loader)).equal(first)
    assert not torch.cat(list(batches(data, 4, shuffle=True, seed=2))).equal(first)
    assert torch.cat(list(batches(data, 4))).equal(data.examples)
    assert [len(x) for x in batches(data, 4, drop_last=True)] == [4, 4]


def test_iterators_that_are_made_and_not_used_change_nothing():
    loader = batches(numbered(10), 4, shuffle=True)
    expected = torch.cat(list(loader))
    again = batches(numbered(10), 4, shuffle=True)
    iter(again), iter(again)  # as Lightning does, before set_epoch
    again.set_epoch(0)
    assert torch.cat(list(again)).equal(expected)
    again.set_epoch(1)
    assert torch.cat(list(again)).equal(torch.cat(list(loader)))


@pytest.mark.parametrize("stop_after", [1, 2, 3, 4, 6])
def test_batches_go_on_where_their_state_was_saved(stop_after):
    def stream(loader):
        while True:
            yield from loader

    made = lambda: batches(numbered(10, "dynamic"), 4, shuffle=True, seed=1)  # noqa: E731
    whole = list(islice(stream(made()), 9))
    stopped = made()
    list(islice(stream(stopped), stop_after))
    resumed = made()
    resumed.load_state_dict(stopped.state_dict())
    resumed.set_epoch(stop_after // 3)  # as Lightning does
    rest = list(islice(stream(resumed), 9 - stop_after))
    assert all(a.equal(b) for a, b in zip(rest, whole[stop_after:], strict=True))


@pytest.mark.parametrize("binarize", ["none", "dynamic"])
@pytest.mark.parametrize("n", [12, 13])
def test_two_processes_see_together_what_one_sees(n, binarize):
    data = numbered(n, binarize)
    parts = [batches(data, 2, shuffle=True, rank=rank, world=2) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == len(list(parts[0])) == 3
    for one, first, second in zip(
        batches(data, 4, shuffle=True), batches(data, 2, True, rank=0, world=2), parts[1], strict=n == 12
    ):
        assert torch.stack([first, second], 1).flatten(0, 1).equal(one)


def test_batches_that_cannot_be_made():
    with pytest.raises(DataError, match="batch_size is 0"):
        batches(numbered(3), 0)
    with pytest.raises(DataError, match="3 examples give no whole batch of 4"):
        batches(numbered(3), 4, drop_last=True)


def test_torch_dataloader_takes_the_dataset():
    data = numbered(10)
    assert torch.cat(list(DataLoader(data, batch_size=4))).equal(data.examples)
