"""Images, clips or text as one tensor in memory: the embedded digits, files of the user's own, or a public set by name.

    train = load("digits", split="train", binarize="dynamic", seed=0)
    for x in batches(train, 128, shuffle=True, seed=0): ...        # x: (128, 1, 28, 28), float32 in [0, 1]

Everything is checked while loading, before any training: values, shapes, NaN, empty sets, damaged files. What is wrong
raises `DataError`, which names the file, what was found, what was expected and what to do. Nothing read can run code.

Memory: a split takes 4 bytes a value, as float32. Above 1 GiB that way, one of 8-bit images stays 8-bit (CelebA at 64
by 64: 2.0 GB for train), and one of zeros and ones takes a bit a value (dSprites: 378 MB); batches are converted as
they are drawn. Clips do so at any size. While loading, the whole set lies in memory as read, too: 3.0 GB for dSprites'
file, 3.5 GB at the peak. What does not fit is refused. MPI3D's images stay in their file (mapped.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import (
    amat,
    arrays,
    bair,
    celeba,
    cifar,
    dsprites,
    folder,
    frame_folders,
    frey,
    hub,
    idx,
    moving_mnist,
    mpi3d,
    omniglot,
    public,
    svhn,
    text,
)
from .checks import DataError, Factors, Raw, checked
from .clips import VideoDataset, clips_first
from .dataset import Batches, ImageDataset, InMemory, batches, in_turn
from .fingerprint import fingerprint
from .mapped import Mapped
from .splits import SPLITS, Sets, check_seed, choose
from .storage import Chunks, Compact, Rows, turns
from .text import TextDataset, TextOptions
from .vocabulary import Vocabulary

__all__ = [
    "SPLITS",
    "Batches",
    "Chunks",
    "Compact",
    "DataError",
    "Factors",
    "ImageDataset",
    "InMemory",
    "Rows",
    "TextDataset",
    "TextOptions",
    "VideoDataset",
    "Vocabulary",
    "batches",
    "in_turn",
    "load",
    "text_files",
    "turns",
]


def load(
    source: str | os.PathLike[str] | np.ndarray | Tensor = "digits",
    split: str = "train",
    binarize: str = "none",
    seed: int = 0,
    layout: str | None = None,
    resize: int | tuple[int, int] | None = None,
    options: TextOptions | None = None,
    frames: int | None = None,
    frame_stride: int = 1,
) -> ImageDataset | TextDataset:
    """One split of a set of images, as float32 in [0, 1], shape (N, C, H, W); or of sentences, as int64, (N, T).

    Clips are a VideoDataset, (N, T, C, H, W), with the frames before the channels.

    source:
      "digits"     6,000 MNIST digits that come with the package: 4,500 train, 500 validation, 1,000 test
      a name       of public.PUBLIC: "mnist", "binarized-mnist", "omniglot", "cifar10", "cifar100", "svhn",
                   "svhn-extra", "celeba", "dsprites", "mpi3d-toy", "frey-face", "bair", "moving-mnist" and more; from
                   files under MRVAE_DATA, or else fetched; or made, "dsprites-generated" and "moving-digits"; a folder
                   of such a name is "./mnist"
      "hf:NAME"    a public set through Hugging Face `datasets`; "hf:NAME:CONFIG" chooses a configuration
      a folder     with the files of one of these sets as published; or of IDX files (MNIST's names, .gz or not), or of
                   images; sub-folders train, validation, test are the splits, and any others the labels. With `frames`
                   a folder of images is one of clips: those of each sub-folder are the frames of one, by number
      text         a .txt file, or a folder of train.txt, valid.txt and test.txt; one document a line, its tokens
                   divided by white space. A label before a TAB in every line is taken off
      a file       .npz, .npy, IDX, .amat, .tfrecord, chardata.mat, SVHN's and Frey Face's .mat, or dSprites' and
                   MPI3D's .npz, which have factors
      an array     numpy or torch
    split: "train", "validation" or "test"; "all" is an undivided set whole and in its own order. A source with all
      three is used as it is; one with train and test holds out a tenth of train for validation; one undivided set is
      split 8 : 1 : 1. Of an .npz with an array `source` beside its images, no source is in two splits (see splits.py).
      `seed` decides, also of what is made: give every split the same.
    binarize: "none"; "fixed", one Bernoulli draw from `seed`, kept; "dynamic", drawn anew at every access.
    layout: of arrays, "NCHW" or "NHWC", where the shape leaves it open; "NTHW" or "TNHW" for 4-d arrays of clips.
    resize: side, or (height, width), for images in files (folders and "hf:"), and for moving-digits.
    options: of text: its vocabulary and the greatest length; see TextOptions.
    frames, frame_stride: of clips: how many frames an example has, every frame_stride-th; None takes all. Training
      draws where they start in a clip, at every access; the other splits have the first.

    Values: uint8 0 to 255 (divided by 255; a uint8 set of 0 and 1 only is taken as binary), bool, or floats in [0, 1].
    Image files are taken as a viewer shows them on a white page, turned by their EXIF; where any in any split has
    colour, all become RGB. What is hidden in a folder is left out.
    Raises DataError, a ValueError, for anything else.
    """
    if split not in (*SPLITS, "all"):
        raise DataError(f"split {split!r} is not known; expected one of {', '.join(SPLITS)}, or all")
    check_seed(seed)
    named = str(source) if isinstance(source, (str, os.PathLike)) else "the array"
    if paths := text_files(source):
        given = {"binarize": binarize if binarize != "none" else None, "layout": layout, "frames": frames}
        for name, value in given.items():
            if value is not None:
                raise DataError(f"{name}={value!r} is for images, and {named} holds text: leave it out")
        if resize is not None:
            raise DataError(f"resize={resize} is for images, and {named} holds text: max_length cuts documents")
        return text.load_text(paths, split, seed, options or TextOptions(), named)
    if options is not None and options != TextOptions():
        raise DataError(f"{options} is for text, and {named} holds images: leave it out")
    sets = _sets(source, resize, seed, of_clips=frames is not None)
    if layout is not None and layout.startswith("TN"):
        sets, layout = clips_first(sets), f"NT{layout[2:]}"
    raw, kept, part = choose(sets, split, seed, named)
    images, labels = checked(raw, kept, layout)
    factors = raw.factors
    if factors is not None:
        factors = factors._replace(classes=factors.classes[kept])
    made: ImageDataset
    if images.dim() == 5:
        assert not isinstance(images, Mapped)
        moving = split in ("train", "all")
        made = VideoDataset(images, labels, binarize, seed, factors, frames, frame_stride, moving)
    elif (frames, frame_stride) != (None, 1):
        raise DataError(f"frames={frames}, frame_stride={frame_stride} is for clips, and {named} holds images")
    else:
        made = ImageDataset(images, labels, binarize, seed, factors)
    made.test = raw.test and raw.test._replace(layout=layout or raw.test.layout)
    made.source = fingerprint(part, raw.images)
    return made


def text_files(source: Any) -> dict[str, Path]:
    """The text files of a source by split; {} where it holds images."""
    named = str(source) == "digits" or str(source).startswith("hf:") or public.is_public(source)
    is_path = isinstance(source, (str, os.PathLike)) and not named
    return text.files(Path(source).expanduser()) if is_path else {}


def _sets(source: Any, resize: int | tuple[int, int] | None, seed: int, of_clips: bool) -> Sets:
    if isinstance(source, str) and source.startswith("hf:"):
        return hub.sets(source.removeprefix("hf:"), resize)
    if public.is_public(source):
        return public.sets(source, resize, seed)
    if isinstance(source, (str, os.PathLike)) and str(source) != "digits":
        return _sets_of_path(Path(source).expanduser(), resize, of_clips)
    _refuse_resize(resize)
    if isinstance(source, (str, os.PathLike)):
        return arrays.sets(arrays.DIGITS)
    if isinstance(source, Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()  # numpy has no bfloat16
    array = np.asarray(source)
    return {"all": lambda: Raw(array, None, "the array")}


def _refuse_resize(resize: int | tuple[int, int] | None) -> None:
    if resize is not None:
        raise DataError(f"resize={resize} is for image files (a folder of them, or hf:NAME); this source holds arrays")


def _sets_of_path(path: Path, resize: int | tuple[int, int] | None, of_clips: bool) -> Sets:
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise DataError(
            f"{path}: no such file or folder{where}; expected 'digits', {', '.join(public.PUBLIC)}, 'hf:NAME', a .npz, "
            ".npy, IDX or .txt file, or a folder of IDX files, images or text (train.txt, valid.txt, test.txt); of a "
            "run whose data have moved: mrvae train --resume RUN --data PATH"
        )
    for published in (celeba, omniglot, bair):
        if published.found(path):
            return published.sets(path, resize)
    formats = (amat, cifar, svhn, dsprites, frey, moving_mnist, mpi3d)
    arrays_of = next((published for published in formats if published.found(path)), None)
    if arrays_of is None and path.is_dir() and not idx.files(path):
        return (frame_folders if of_clips else folder).sets(path, resize)
    _refuse_resize(resize)
    if arrays_of is not None:
        return arrays_of.sets(path)
    if path.is_dir() or idx.is_idx(path):
        return idx.sets(path)
    if path.suffix.lower() in (".npz", ".npy"):
        return arrays.sets(path)
    raise DataError(
        f"{path}: this kind of file is not known; expected .npz, .npy, .amat, .tfrecord, chardata.mat, ..._32x32.mat, "
        f"{frey.FILE}, or an IDX file (named ...-ubyte, ...-ubyte.gz or .idx); for images give their folder"
    )
