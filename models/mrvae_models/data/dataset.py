"""Images in memory, their binarisation, and batches of any data set in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from .checks import DataError, Factors, Header
from .fingerprint import Fingerprint
from .mapped import Mapped
from .splits import check_seed
from .storage import PACKING, Chunks, Compact, at_once, pack, turns

BINARIZE = ("none", "fixed", "dynamic")


def bernoulli(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """0 or 1 with these probabilities; faster on a CPU than torch.bernoulli."""
    uniform = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (uniform < probabilities).to(probabilities.dtype)


class InMemory(Protocol):
    """A data set in memory, as batches are made of it."""

    examples: Any  # Rows, (N, ...); a trainer may exchange it for the same on another device
    binarize: str
    draws: bool  # whether `take` draws anything
    source: Fingerprint | None  # of what it was loaded from

    @property
    def lengths(self) -> Tensor | None:
        """Of sequences, (N,) on the CPU: a shuffled batch is of like ones; None where all examples have one shape."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of the likelihood's parameters for one example, which networks are built for."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The examples at `indices` (n,), as one tensor."""


class ImageDataset(Dataset[Tensor]):
    """Images in memory, and what is drawn from them.

    images: (N, C, H, W) float32 in [0, 1], or a Compact or Mapped that reads like it; labels: (N,) int64, or None;
    input_shape: (C, H, W). `examples` are the images: index them, by a slice or by a tensor of indices, and the result
    is a float32 tensor. factors: (N, F) int64, the classes of what generated each image, or None; factor_names and
    factor_sizes: F names and numbers of classes.
    An item is one image (C, H, W), without its label. binarize: "none", the images as they are; "fixed", one Bernoulli
    draw from `seed`, which then are `images`; "dynamic", a draw at every access, `images` being the probabilities. A
    dynamic item takes torch's global generator; `batches` takes its own, so that its draws can be repeated.
    """

    lengths = None
    source: Fingerprint | None = None
    test: Header | None = None
    """Of the test set of the source that `load` took these images from, as Raw has it."""
    shape_of_one: tuple[str, ...] = ("C", "H", "W")

    def __init__(
        self,
        images: Tensor | Compact | Mapped,
        labels: Tensor | None = None,
        binarize: str = "none",
        seed: int = 0,
        factors: Factors | None = None,
    ):
        if images.dim() != 1 + len(self.shape_of_one) or images.dtype != torch.float32 or len(images) == 0:
            raise DataError(
                f"images are {images.dtype}, shape {tuple(images.shape)}; expected float32, "
                f"(N, {', '.join(self.shape_of_one)}), N at least 1: load(array) converts other arrays"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise DataError(f"labels have shape {tuple(labels.shape)}; expected ({len(images)},), one an image")
        if binarize not in BINARIZE:
            raise DataError(f"binarize is {binarize!r}; expected one of {', '.join(BINARIZE)}")
        if factors is not None and factors.classes.shape != (len(images), len(factors.names)):
            raise DataError(
                f"factors have shape {factors.classes.shape}; expected ({len(images)}, {len(factors.names)}), a row an "
                "image and a column a name"
            )
        if binarize == "fixed":
            images = _drawn(images, torch.Generator(images.device).manual_seed(seed))
        self.examples: Any = images
        self.factors = None if factors is None else torch.from_numpy(factors.classes)
        self.factor_names = () if factors is None else factors.names
        self.factor_sizes = () if factors is None else factors.sizes
        self.labels = labels
        self.binarize = binarize
        self.draws = binarize == "dynamic"
        self.input_shape: tuple[int, ...] = tuple(images.shape[1:])

    @property
    def test_shape(self) -> tuple[int, ...] | None:
        """What input_shape is of the source's test set, from its header; None where `test` is. DataError as `load`."""
        return None if self.test is None else self.test.shape_of_one()

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images at `indices` (n,), as one tensor (n, C, H, W)."""
        images = self.examples.index_select(0, indices)
        return bernoulli(images, generator) if self.binarize == "dynamic" else images

    def __getitem__(self, index: int) -> Tensor:
        return bernoulli(self.examples[index]) if self.binarize == "dynamic" else self.examples[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        # torch's DataLoader asks for a whole batch here; a list, because its default collation stacks one.
        return list(self.take(torch.as_tensor(indices)).unbind())


class Batches:
    """Batches of a data set in memory; iterate once for each epoch. `batches` makes it.

    The order of an epoch and the draws of dynamic binarisation depend on (seed, epoch, position) alone. `state_dict`
    and `load_state_dict` hold the place in the epoch, so a run that was stopped goes on with exactly the batches it
    would have had; Lightning saves and restores them, and calls `set_epoch`.

    With several processes, process `rank` of `world` gets every world-th row of a batch of batch_size * world, so that
    together they see what one process with that batch size would; rows that do not divide at the end are left out.

    Shuffled sequences come in batches of like length, which leave little padding: the epoch's order is sorted by length
    and cut into batches, and the batches are shuffled; the last, smaller one is of any rows.
    """

    def __init__(
        self,
        dataset: InMemory,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        rank: int | None,
        world: int | None,
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self._processes = (rank, world)
        self._next_epoch = 0
        self._start_at = 0
        self._place = {"epoch": 0, "position": 0}

    @property
    def world(self) -> int:
        given = self._processes[1]
        return given if given is not None else dist.get_world_size() if _distributed() else 1

    @property
    def rank(self) -> int:
        given = self._processes[0]
        return given if given is not None else dist.get_rank() if _distributed() else 0

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size * self.world)
        return whole + (rest >= self.world and not self.drop_last)

    def __iter__(self) -> Iterator[Tensor]:
        # A generator, so this runs at the first batch: Lightning makes iterators, and only then calls set_epoch.
        epoch, start = self._next_epoch, self._start_at
        self._next_epoch, self._start_at = epoch + 1, 0
        rank, world = self.rank, self.world
        size, device = self.batch_size * world, self.dataset.examples.device
        order = self._order(epoch, size)
        if self.dataset.lengths is None:  # sequences are cut by lengths on the CPU, without waiting for the device
            order = order.to(device)
        for position in range(start, len(self)):
            rows = order[position * size : (position + 1) * size]
            rows = rows[: len(rows) // world * world]
            if self.dataset.draws:  # draws for the whole batch, so that they do not depend on `world`
                x = self.dataset.take(rows, _generator(device, 1, self.seed, epoch, position))[rank::world]
            else:
                x = self.dataset.take(rows[rank::world])
            # Before the yield: a state saved while this batch is in use must name the one after it.
            self._place = {"epoch": epoch, "position": position + 1}
            yield x

    def _order(self, epoch: int, size: int) -> Tensor:
        n, lengths = len(self.dataset), self.dataset.lengths
        if not self.shuffle:
            return torch.arange(n)
        generator = _generator("cpu", 0, self.seed, epoch)
        order = torch.randperm(n, generator=generator)
        if lengths is None or n < size:
            return order
        whole = n // size * size
        alike = order[:whole][lengths[order[:whole]].argsort(stable=True)].view(-1, size)
        return torch.cat([alike[torch.randperm(len(alike), generator=generator)].flatten(), order[whole:]])

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration is; without it, one after the last."""
        if epoch != self._next_epoch:
            self._next_epoch, self._start_at = epoch, 0

    @property
    def sampler(self) -> Batches:
        """Itself: Lightning calls `set_epoch` on a loader's `sampler`."""
        return self

    def state_dict(self) -> dict[str, int]:
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next iteration go on where `state` was saved; after an epoch's last batch, with the next epoch."""
        self._place = {"epoch": int(state["epoch"]), "position": int(state["position"])}
        done = self._place["position"] >= len(self)
        self._next_epoch = self._place["epoch"] + int(done)
        self._start_at = 0 if done else self._place["position"]


def batches(
    dataset: InMemory,
    batch_size: int,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    rank: int | None = None,
    world: int | None = None,
) -> Batches:
    """An iterable over batches of a data set in memory, which Lightning takes as a dataloader.

    Batches are (n, C, H, W), or (n, t) of text; each is one indexing of one tensor. batch_size: examples a step, of
    each process. shuffle: a new order each epoch, from `seed` and the epoch's number. rank, world: this process and how
    many there are; None asks torch.distributed. Raises DataError for a batch size below 1, and for one that leaves no
    batch.
    """
    check_seed(seed)
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; expected at least 1")
    made = Batches(dataset, batch_size, shuffle, seed, drop_last, rank, world)
    if len(made) == 0:
        raise DataError(f"{len(dataset)} examples give no whole batch of {batch_size}; use a smaller batch_size")
    return made


def _drawn(images: Tensor | Compact | Mapped, generator: torch.Generator) -> Tensor | Compact:
    """One Bernoulli draw of all images; packed as bits where they were packed, and the same draw."""
    if isinstance(images, Tensor):
        return bernoulli(images, generator)
    parts = [
        pack(bernoulli(part, generator).numpy().astype(bool), np.arange(len(part)), 1).stored
        for part in Chunks(images, at_once(images.shape[1:], PACKING))
    ]
    return Compact(torch.cat(parts), tuple(images.shape[1:]), 1, True)


class Parts:
    """Batches as they are; Lightning would take a list of them for several loaders."""

    def __init__(self, parts: Sequence[Tensor]):
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.parts)


def in_turn(dataset: InMemory, batch_size: int, numbers: int = 2**25) -> Chunks | Parts:
    """All examples in batches to evaluate on: images and clips in their order, sequences by length.

    Batches of sequences are smaller than batch_size where the likelihood's parameters would be more than `numbers`
    numbers (128 MiB in float32), as of 500 sentences over a large vocabulary.
    """
    if dataset.lengths is None:
        return turns(dataset.examples, batch_size)
    order, parts = dataset.lengths.argsort(stable=True), []
    while len(order):
        size = batch_size
        while size > 1 and size * int(dataset.lengths[order[:size][-1]]) * dataset.input_shape[-1] > numbers:
            size //= 2
        parts.append(dataset.take(order[:size]))
        order = order[size:]
    return Parts(parts)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _generator(device: torch.device | str, *entropy: int) -> torch.Generator:
    """A generator from several numbers, so that (seed 0, epoch 1) and (seed 1, epoch 0) have nothing in common."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed)
