"""Public sets by name: from files in the form in which they are published, or else through Hugging Face `datasets`.

    MRVAE_DATA/NAME/...          default ~/.cache/mrvae/data; torchvision's folders under it are found, too

What is loaded is compared with the first load (checksums.py). The paper's binarisation (Bae et al., 2022): MNIST
static, "binarized-mnist" (the published draw) or binarize="fixed" (one by a seed); Omniglot dynamic for train and fixed
for test.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import (
    amat,
    bair,
    celeba,
    checksums,
    cifar,
    dsprites,
    frey,
    hub,
    idx,
    moving_digits,
    moving_mnist,
    mpi3d,
    omniglot,
    svhn,
)
from .checks import DataError
from .splits import Sets


@dataclass(frozen=True)
class PublicSet:
    """A set with a name: what it is, where its files are looked for, who reads them, and where else it comes from."""

    about: str
    source: str
    files: str  # to put there, or "" for a set that is made and not read
    folders: tuple[str, ...]  # under the root
    found: Callable[[Path], bool]
    sets: Callable[..., Sets]
    options: dict[str, Any] = field(default_factory=dict)
    resizable: bool = False  # image files
    seeded: bool = False  # made from the seed
    variant: Callable[[str], dict[str, Any]] | None = None  # options from what follows a colon
    repository: str | None = None  # of Hugging Face, NAME or NAME:CONFIG, read by:
    fetched: Callable[..., Sets] = hub.sets


def _mnist_found(path: Path) -> bool:
    return path.is_dir() and bool(idx.files(path))


def _mpi3d(published: mpi3d.Published, about: str) -> PublicSet:
    sizes = " x ".join(map(str, published.sizes))
    return PublicSet(
        f"{math.prod(published.sizes):,} {about} of seven factors, {sizes}, colour, 64x64, one undivided set",
        "Gondal et al., 2019",
        published.file,
        ("mpi3d",),
        published.found,
        published.sets,
        variant=published.variant,
    )


PUBLIC: dict[str, PublicSet] = {
    "mnist": PublicSet(
        "60,000 train and 10,000 test digits, grey, 28x28",
        "LeCun, Cortes and Burges, 1998",
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte (.gz or not)",
        ("mnist", "MNIST/raw"),
        _mnist_found,
        idx.sets,
        repository="ylecun/mnist",
    ),
    "binarized-mnist": PublicSet(
        "50,000 train, 10,000 validation and 10,000 test digits, 0 or 1, 28x28, no labels",
        "Larochelle and Murray, 2011",
        ", ".join(amat.FILES.values()),
        ("binarized-mnist", "binarized_mnist"),
        amat.found,
        amat.sets,
    ),
    "omniglot": PublicSet(
        "characters, 28x28: 24,345 train and 8,070 test (chardata.mat), or 19,280 and 13,180 (the original images)",
        "Lake et al., 2015; chardata.mat: Burda et al., 2016",
        "chardata.mat, or images_background and images_evaluation, folders or .zip",
        ("omniglot", "omniglot-py"),
        omniglot.found,
        omniglot.sets,
        resizable=True,
    ),
    "cifar10": PublicSet(
        "50,000 train and 10,000 test photographs, colour, 32x32",
        "Krizhevsky, 2009",
        "data_batch_1 to data_batch_5 and test_batch (python), or the same with .bin (binary)",
        ("cifar10", *(f"{parent}cifar-10-batches-{kind}" for parent in ("cifar10/", "") for kind in ("py", "bin"))),
        cifar.found,
        cifar.sets,
        repository="uoft-cs/cifar10",
    ),
    "cifar100": PublicSet(
        "50,000 train and 10,000 test photographs of 100 classes, colour, 32x32",
        "Krizhevsky, 2009",
        "train and test (python), or train.bin and test.bin (binary)",
        ("cifar100", *(f"{parent}cifar-100-{kind}" for parent in ("cifar100/", "") for kind in ("python", "binary"))),
        cifar.found,
        cifar.sets,
        repository="uoft-cs/cifar100",
    ),
    "svhn": PublicSet(
        "73,257 train and 26,032 test house numbers, colour, 32x32",
        "Netzer et al., 2011",
        "train_32x32.mat, test_32x32.mat",
        ("svhn",),
        svhn.found,
        svhn.sets,
        repository="ufldl-stanford/svhn:cropped_digits",
    ),
    "svhn-extra": PublicSet(
        "the same, with the 531,131 extra digits in train",
        "Netzer et al., 2011",
        "train_32x32.mat, test_32x32.mat, extra_32x32.mat",
        ("svhn",),
        svhn.found,
        svhn.sets,
        {"extra": True},
    ),
    "celeba": PublicSet(
        "162,770 train, 19,867 validation and 19,962 test faces, colour, the middle 148x148 resized to 64x64",
        "Liu et al., 2015",
        "img_align_celeba (folder or .zip) and list_eval_partition.txt",
        ("celeba",),
        celeba.found,
        celeba.sets,
        resizable=True,
        repository="flwrlabs/celeba",
        fetched=hub.faces,
    ),
    "dsprites": PublicSet(
        "737,280 sprites of five factors, 0 or 1, 64x64, one undivided set; dsprites:4 is a thinner grid",
        "Matthey et al., 2017",
        dsprites.FILE,
        ("dsprites",),
        dsprites.found,
        dsprites.sets,
        variant=dsprites.variant,
        repository="eurecom-ds/dsprites",
        fetched=hub.sprites,
    ),
    "dsprites-generated": PublicSet(
        "the same grid of factors, drawn here; not the original's pixels; dsprites-generated:4 is a thinner grid",
        "made, not read",
        "",
        (),
        lambda path: False,
        dsprites.generated,
        variant=dsprites.variant,
    ),
    "mpi3d-toy": _mpi3d(mpi3d.TOY, "simply rendered images"),
    "mpi3d-realistic": _mpi3d(mpi3d.REALISTIC, "realistically rendered images"),
    "mpi3d-real": _mpi3d(mpi3d.REAL, "photographs"),
    "mpi3d-complex": _mpi3d(mpi3d.REAL_COMPLEX, "photographs, of other objects,"),
    "frey-face": PublicSet(
        "1,965 frames of one face, grey, 28x20, one undivided set, split by 20 blocks of frames in a row",
        "Frey and Roweis",
        frey.FILE,
        ("frey-face", "frey_face"),
        frey.found,
        frey.sets,
    ),
    "bair": PublicSet(
        "43,264 train and 256 test clips of 30 frames, a robot arm that pushes things, colour, 64x64",
        "Ebert et al., 2017",
        "softmotion30_44k/train and test (TFRecord files), or processed_data/train and test (folders of frames)",
        ("bair", "bair_robot_pushing"),
        bair.found,
        bair.sets,
        resizable=True,
    ),
    "moving-mnist": PublicSet(
        "10,000 clips of 20 frames, two digits that bounce off walls, grey, 64x64, one undivided set",
        "Srivastava et al., 2015",
        moving_mnist.FILE,
        ("moving-mnist", "MovingMNIST"),
        moving_mnist.found,
        moving_mnist.sets,
    ),
    "moving-digits": PublicSet(
        "2,000 train, 200 validation and 200 test clips of 20 frames, two of the embedded digits bouncing off walls, "
        "grey, 64x64; or as moving-digits:deterministic,clips=500,frames=30 says",
        "made, not read, from the seed; as in Denton and Fergus, 2018",
        "",
        (),
        lambda path: False,
        moving_digits.sets,
        resizable=True,
        seeded=True,
        variant=moving_digits.parse_variant,
    ),
}

OFFICIAL_MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
    "img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb",
    "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
    "mpi3d_toy.npz": "55889cb7c7dfc655d6e0277beee88868",
    "mpi3d_realistic.npz": "59a6225b88b635365f70c91b3e52f70f",
    "mpi3d_real.npz": "0f33f609918fb5c97996692f91129802",
}
"""MD5 of the files as published, as torchvision, or disent for MPI3D's, checks them after downloading; of other files
none is known."""


def root() -> Path:
    """The folder of public sets: MRVAE_DATA, or ~/.cache/mrvae/data."""
    return Path(os.environ.get("MRVAE_DATA") or "~/.cache/mrvae/data").expanduser()


def split_name(source: str) -> tuple[str, str | None]:
    """("dsprites", "4") from "dsprites:4"."""
    name, sign, variant = source.partition(":")
    return name, variant if sign else None


def is_public(source: object) -> bool:
    return isinstance(source, str) and split_name(source)[0] in PUBLIC


def place(name: str) -> Path | None:
    """Where a set's files lie; None when they do not."""
    candidates = (root() / folder for folder in PUBLIC[name].folders)
    return next((path for path in candidates if path.is_dir() and PUBLIC[name].found(path)), None)


def sets(source: str, resize: int | tuple[int, int] | None = None, seed: int = 0) -> Sets:
    """The sets of a name, such as "mnist" or "dsprites:4". DataError where it is neither in files nor to be fetched."""
    name, variant = split_name(source)
    public = PUBLIC[name]
    options = dict(public.options)
    if variant is not None:
        if public.variant is None:
            variable = ", ".join(name for name, entry in PUBLIC.items() if entry.variant is not None)
            raise DataError(f"{source}: only {variable} take something after a colon; give {name}")
        options |= public.variant(variant)
    if not public.files:
        if public.seeded:
            options["seed"] = seed
        if public.resizable:
            options["resize"] = resize
        else:
            _refuse_resize(name, resize)
        return public.sets(**options)
    path = place(name)
    if path is None:
        made = _fetched(name, resize, options)
    elif public.resizable:
        made = public.sets(path, resize, **options)
    else:
        _refuse_resize(name, resize)
        made = public.sets(path, **options)
    return checksums.remembered(made, source, origin(name, path), root() / checksums.FILE)


def origin(name: str, path: Path | None) -> str:
    """Where a set's arrays come from, as checksums.json names it."""
    return str(PUBLIC[name].repository) if path is None else str(path.relative_to(root()))


def _refuse_resize(name: str, resize: int | tuple[int, int] | None) -> None:
    if resize is not None:
        raise DataError(f"resize={resize} is for image files; {name} holds arrays of its own size: leave it out")


def _fetched(name: str, resize: int | tuple[int, int] | None, options: dict[str, Any]) -> Sets:
    public = PUBLIC[name]
    where = f"{name}: not found in {root() / public.folders[0]}; put there {public.files} (or set MRVAE_DATA)"
    if public.repository is None:
        raise DataError(f"{where}; no hub is known that has it in this form")
    try:
        return public.fetched(public.repository, resize, **options)
    except DataError as error:
        raise DataError(f"{where}. Fetching it instead failed: {error}") from error


def md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
