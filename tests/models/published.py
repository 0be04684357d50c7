"""Small files in the forms in which the data of the MR-VAE paper are published, and what reads like them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from test_data_files import pictures

SMALL = (3, 2, 4, 3, 3)
"""Sizes of dSprites' factors in the tests."""


def by_bytes(images) -> list[bytes]:
    return sorted(np.ascontiguousarray(image).tobytes() for image in images)


def agree(data, images: np.ndarray, labels: np.ndarray | None = None) -> None:
    """Every example is one of the images, / 255 where they are bytes, and with its own label."""
    expected = images.astype(np.float32) / (255 if images.dtype == np.uint8 and images.max() > 1 else 1)
    assert by_bytes(data.examples[:].numpy()) == by_bytes(expected.reshape(len(data), *data.input_shape))
    if labels is None:
        assert data.labels is None
    else:
        pairs = sorted(zip((image.tobytes() for image in expected), labels.tolist(), strict=True))
        assert pairs == sorted(zip((x.numpy().tobytes() for x in data.examples), data.labels.tolist(), strict=True))


def write_amat(folder: Path, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    made = {}
    for seed, (word, n) in enumerate(sizes.items()):
        made[word] = np.random.default_rng(seed).integers(0, 2, (n, 28, 28), dtype=np.uint8)
        np.savetxt(folder / f"binarized_mnist_{word}.amat", made[word].reshape(n, -1), fmt="%d")
    return made


def cifar(n: int, seed: int, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    return pictures(n, 3072, seed=seed), np.random.default_rng(seed).integers(0, classes, n).tolist()


def python2_pickle(array: np.ndarray, labels: list[int], key: str) -> bytes:
    """By hand, the bytes that Python 2's cPickle writes for a batch by protocol 2: texts are byte strings there."""

    def text(content: bytes) -> bytes:
        return b"T" + len(content).to_bytes(4, "little") + content

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = b"".join(map(number, array.shape)) + b"\x86"
    state = b"(" + number(1) + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"
    batch = b"\x80\x02}(" + text(b"data") + made + state
    batch += text(key.encode()) + b"](" + b"".join(map(number, labels)) + b"e"
    return batch + text(b"batch_label") + text(b"training batch 1 of 5") + b"u."


def python3_pickle(array: np.ndarray, labels: list[int], key: str, protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": array, key.encode(): labels, b"filenames": [b"a.png"]}, protocol=protocol)


def write_svhn(path: Path, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    path.parent.mkdir(exist_ok=True)
    images, labels = pictures(n, 32, 32, 3, seed=seed), np.arange(n) % 10
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)})
    return images.transpose(0, 3, 1, 2), labels


def write_celeba(root: Path, zipped: bool) -> dict[str, np.ndarray]:
    """Faces of 178x218: row, column and noise as colours; PNG, so that nothing is lost, under the names of JPEGs."""
    (root / "img_align_celeba").mkdir(parents=True)
    noise = np.random.default_rng(0)
    faces, lines = {}, []
    for i in range(12):
        row, column = np.mgrid[:218, :178]
        faces[f"{i + 1:06}.jpg"] = np.stack([row, column, noise.integers(0, 256, row.shape)], 2).astype(np.uint8)
        lines.append(f"{i + 1:06}.jpg {i // 4}")
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    for name, face in faces.items():
        Image.fromarray(face).save(root / "img_align_celeba" / name, format="PNG")
    if zipped:
        with zipfile.ZipFile(root / "img_align_celeba.zip", "w") as archive:
            for file in sorted((root / "img_align_celeba").iterdir()):
                archive.write(file, f"img_align_celeba/{file.name}")
                file.unlink()
        (root / "img_align_celeba").rmdir()
    return faces


def write_dsprites(path: Path, images: np.ndarray, classes: np.ndarray, metadata: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = np.concatenate([np.zeros((len(classes), 1), np.int64), classes], 1)
    np.savez_compressed(path, metadata=np.array(metadata, object), imgs=images, latents_classes=classes,
                        latents_values=classes.astype(np.float64))  # fmt: skip
    return path


def grid(sizes=SMALL) -> tuple[np.ndarray, np.ndarray]:
    classes = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), 1)
    return np.random.default_rng(0).integers(0, 2, (len(classes), 64, 64), dtype=np.uint8), classes


def encoded(folder: Path, images) -> list[bytes]:
    made = []
    for image in images:
        Image.fromarray(image).save(folder / "one.png")
        made.append((folder / "one.png").read_bytes())
    (folder / "one.png").unlink()
    return made
