"""What is checked before a run starts, and what --force clears away: after this, nothing is found out mid-epoch."""

from __future__ import annotations

import contextlib
import shlex
import shutil
from pathlib import Path

import torch
from torch import nn

import mrvae_kernels as mk

from .baking import DECODER, PROGRAM
from .commands import metrics
from .config import FORMAT, TrainConfig
from .curve import has_running_statistics
from .data import DataError, ImageDataset, InMemory, TextDataset, VideoDataset
from .l_vae import learned_weights
from .network_names import NETWORK_NAMES
from .objective_options import OF_ONE_BETA
from .options import check_format, read_json
from .progress import METRICS
from .run import BEST, CONFIG, CURVE_FILES, LAST, MODEL, SENTENCES, VOCABULARY, check_directory, plain_network
from .vae import VAE

TENSORBOARD = "tensorboard"

OWNED = (CONFIG, MODEL, LAST, BEST, METRICS, VOCABULARY)
"""Files that make a directory a run; --force removes these, the logs, and what was derived from the run in it."""

TEXT_NETWORKS = ("lstm",)
VIDEO_NETWORKS = ("svg-lp",)

BAKED = (CONFIG, MODEL, PROGRAM, DECODER, VOCABULARY, SENTENCES, *CURVE_FILES)


def check_splits(train_set: InMemory, validation_set: InMemory, data: str) -> None:
    """DataError unless all splits have images of one shape; otherwise the first validation would find it out.

    The test set is not read before the run is trained; what its file's header says of it is compared, if it says any.
    """
    shapes = {"validation": validation_set.input_shape}
    if isinstance(train_set, ImageDataset) and train_set.test_shape is not None:
        shapes["test"] = train_set.test_shape
    for split, shape in shapes.items():
        own = train_set.input_shape
        if shape != own:
            advice = "resize the images (--resize for image files)"
            if len(shape) == 4 and shape[1:] == own[1:]:
                advice = f"take as many frames of each (--frames {min(shape[0], own[0])})"
            raise DataError(
                f"{data}: training images have shape {own} and {split} images {shape}; expected one shape in all "
                f"splits: {advice}, or give data whose splits agree"
            )


def check_kind(train_set: InMemory, config: TrainConfig) -> None:
    """ValueError for a network of one kind of data on another: text's numbers would pass for pixels."""
    images = tuple(name for name in NETWORK_NAMES if name not in TEXT_NETWORKS + VIDEO_NETWORKS)
    kinds = {"text": TEXT_NETWORKS, "clips": VIDEO_NETWORKS, "images": images}
    holds = "text" if isinstance(train_set, TextDataset) else "images"
    holds = "clips" if isinstance(train_set, VideoDataset) else holds
    wants = next((kind for kind, names in kinds.items() if config.network in names), holds)  # build() refuses others
    if wants != holds:
        raise ValueError(
            f"network is {config.network!r} and {config.data} holds {holds}; expected one for {holds}, "
            f"--network {' or '.join(kinds[holds])}, or other --data"
        )


def check_likelihood(model: nn.Module, config: TrainConfig, *sets: InMemory) -> None:
    """ValueError where data are not what the likelihood is of, or a batch takes more memory than there is."""
    network = plain_network(model)
    for data in sets:
        if data.binarize == "dynamic":  # the examples are probabilities, and the network sees draws
            rows = torch.arange(min(len(data), 1000))
            network.likelihood.check_data(data.take(rows, torch.Generator().manual_seed(0)))
        else:
            network.likelihood.check_data(data.examples)
    on_gpu = config.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    share = min(config.batch_size // _processes(config), len(sets[0]))
    network.likelihood.check_memory(share, network.input_shape, "cuda" if on_gpu else "cpu")


def check_last_batch(model: nn.Module, n: int, config: TrainConfig) -> None:
    """ValueError when a process would get a batch of one example for batch norm, which has no variance to divide by."""
    if not has_running_statistics(model) or not _has_batch_of_one(n, config.batch_size, _processes(config)):
        return
    processes = _processes(config)
    sizes = range(2 * processes, max(2 * config.batch_size, 4 * processes) + 1, processes)
    works = sorted(
        (size for size in sizes if size <= max(n, 2 * processes) and not _has_batch_of_one(n, size, processes)),
        key=lambda size: abs(size - config.batch_size),
    )[:2]
    choose = f"choose --batch-size {' or '.join(map(str, sorted(works)))}, or " if works else "give more images, or "
    shared = f" shared by {processes} processes" if processes > 1 else ""
    raise ValueError(
        f"{n} training images in batches of {config.batch_size}{shared} leave a batch of 1 example, on which the "
        f"network's batch norm cannot train; expected at least 2 in each: {choose}a network without batch norm "
        "(cnn: --set norm=group)"
    )


def check_objective(model: nn.Module, n: int, config: TrainConfig) -> None:
    """ValueError where the objective asks more of the network, or of n training images, than they have."""
    if config.objective in OF_ONE_BETA and isinstance(model, mk.MultiRate):
        raise ValueError(
            f"objective is {config.objective!r} and the network has gates; expected a plain network, of which there is "
            "one beta: give --beta 1"
        )
    learned_weights(config, plain_network(model))  # L-VAE's, where the likelihood has what it weighs
    if config.objective != "beta-tcvae":
        return
    if not isinstance(plain_network(model), VAE):
        raise ValueError(
            f"objective is 'beta-tcvae' and network {config.network!r}; expected a network with one Gaussian latent "
            "vector, whose distribution has a total correlation: use --objective beta-vae, or another network"
        )
    if config.tcvae_sampling == "stratified" and _has_batch_of_one(n, config.batch_size, _processes(config)):
        raise ValueError(
            f"{n} training images in batches of {config.batch_size} leave a batch of 1 example, of which stratified "
            "sampling can say nothing; expected at least 2 in each: choose another --batch-size"
        )


def _processes(config: TrainConfig) -> int:
    return config.devices * config.num_nodes


def _has_batch_of_one(n: int, batch_size: int, processes: int) -> bool:
    # as Batches shares them: rows that do not divide at the end are left out
    return (batch_size == processes and n >= processes) or n % batch_size // processes == 1


def check_free(directory: Path, force: bool) -> None:
    """FileExistsError when the directory holds a run and force does not allow to replace it."""
    check_directory(directory)
    found = [name for name in OWNED if (directory / name).exists()]
    if found and not force:
        resume = f"continue it with --resume {shlex.quote(str(directory))}, " if LAST in found else ""
        if found == [CONFIG]:
            resume = "it has saved nothing yet, as one that has just begun or failed at its start; "
        raise FileExistsError(
            f"{directory} holds a run already ({', '.join(found)}): {resume}replace it with --force, or choose another "
            "--out"
        )


def remove_run(directory: Path) -> None:
    """Remove a run, and its curve and baked models, which would pass for those of the run that replaces it.

    Only files that we write, by name; a curve or a baked model only beside or with a config.json of ours.
    """
    if _is_ours(directory):
        for name in (*CURVE_FILES, SENTENCES, *metrics.FILES):
            (directory / name).unlink(missing_ok=True)
        for baked in directory.glob("baked-*"):
            if baked.is_symlink() or not _is_ours(baked):
                continue
            for name in BAKED:
                (baked / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds files of the user's as well: they stay
                baked.rmdir()
    for name in OWNED:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TENSORBOARD, ignore_errors=True)


def _is_ours(directory: Path) -> bool:
    path = directory / CONFIG
    try:
        check_format(read_json(path), FORMAT, path)
    except (ValueError, OSError):
        return False
    return True
