"""MPI3D's files and other grids of factors: mapped where they are uncompressed, and with their factors."""

from __future__ import annotations

import io
import math
import resource
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mrvae_models.cli import main
from mrvae_models.data import Compact, DataError, arrays, batches, load, memory, mpi3d
from mrvae_models.data.mapped import Mapped, MappedRows
from mrvae_models.metrics.factors import factors_of
from test_data_files import pictures

SIZES = (3, 2, 4, 5)
NAMES = ("colour", "shape", "x", "y")
IMAGES = pictures(120, 6, 5, 3)
EXPECTED = torch.from_numpy(IMAGES).permute(0, 3, 1, 2).float() / 255


def write(path, images=IMAGES, sizes=SIZES, names=NAMES, compressed=False):
    save = np.savez_compressed if compressed else np.savez
    save(path, images=images, factor_sizes=np.array(sizes), factor_names=np.array(names))
    return path


def write_whole(path, n: int = 1_036_800, written: int = 2):
    """An .npz of mpi3d_toy's size and form, by hand: the first images are noise, and the rest is a hole in the file."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (n, 64, 64, 3)}
    )
    head, size = head.getvalue(), n * 64 * 64 * 3
    whole, name = len(head) + size, b"images.npy"
    extra = struct.pack("<HHQQ", 1, 16, whole, whole)  # sizes above 4 GB
    fields = struct.pack("<HHHHHIII", 45, 0, 0, 0, 33, 0, 2**32 - 1, 2**32 - 1) + struct.pack("<HH", 10, len(extra))
    with open(path, "wb") as file:
        file.write(b"PK\3\4" + fields + name + extra + head + pictures(written, 64, 64, 3).tobytes())
        file.seek(30 + len(name) + len(extra) + whole)
        start = file.tell()
        file.write(b"PK\1\2" + struct.pack("<H", 45) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name + extra)
        length, end = file.tell() - start, file.tell()
        file.write(b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, length, start))
        file.write(b"PK\6\7" + struct.pack("<IQI", 0, end, 1))
        file.write(b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, length, 2**32 - 1, 0))
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_a_grid_with_its_factors(tmp_path, compressed):
    path = write(tmp_path / "grid.npz", compressed=compressed)
    whole = load(path, "all")
    assert isinstance(whole.examples, torch.Tensor if compressed else Mapped)
    assert whole.input_shape == (3, 6, 5) and torch.equal(whole.examples[:], EXPECTED)
    assert whole.factor_names == NAMES and whole.factor_sizes == SIZES and whole.factors.dtype == torch.int64
    assert whole.factors.reshape(*SIZES, 4)[2, 1, 3, 0].tolist() == [2, 1, 3, 0]
    parts = [load(path, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [96, 12, 12]
    for part in parts:
        places = np.ravel_multi_index(tuple(part.factors.numpy().T), SIZES)
        assert torch.equal(part.examples[:], EXPECTED[places])
    assert factors_of(parts[0]).sizes == SIZES and factors_of(whole).names == NAMES


def test_mapped_examples_read_like_the_tensor(tmp_path):
    mapped = load(write(tmp_path / "grid.npz"), "all").examples
    assert mapped.shape == EXPECTED.shape and mapped.dtype == torch.float32 and mapped.dim() == 4 and len(mapped) == 120
    indices = torch.tensor([3, 0, 119, 3])
    for index in (0, -1, slice(5, 9), slice(None), slice(110, 999), slice(7, 7), indices, indices[:0], indices.numpy()):
        assert torch.equal(mapped[index], EXPECTED[index])
    assert torch.equal(mapped.index_select(0, indices), EXPECTED[indices])
    with pytest.raises(ValueError, match="dim is 1; expected 0"):
        mapped.index_select(1, indices)
    with pytest.raises(IndexError):
        mapped[120]
    assert mapped.to("cpu") is mapped and mapped.nbytes == IMAGES.size
    elsewhere = mapped.to("meta")
    assert isinstance(elsewhere, Compact) and elsewhere.device.type == "meta" and elsewhere.shape == mapped.shape


def test_batches_of_mapped_images_are_those_of_packed_ones(tmp_path):
    plain, mapped = (load(write(tmp_path / f"{word}.npz", compressed=word == "a"), "train", "dynamic") for word in "ab")
    for x, y in zip(*(batches(data, 7, shuffle=True, seed=3) for data in (plain, mapped)), strict=True):
        assert torch.equal(x, y) and set(x.unique().tolist()) == {0.0, 1.0}
    fixed = [load(tmp_path / f"{word}.npz", "train", "fixed").examples for word in "ab"]
    assert torch.equal(fixed[0], fixed[1][:])


def test_extremes_of_mapped_images_are_exact_and_stop_early(monkeypatch):
    seen = []

    class Counted(MappedRows):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("mrvae_models.data.mapped.at_once", lambda shape: 10)
    array = np.full((100, 2, 2, 1), 9, np.uint8)
    array[35, 0, 0], array[77, 1, 1] = 0, 200
    images = Counted(array, np.arange(100))
    assert (images.min(), len(seen)) == (0, 4) and (images.max(), len(seen)) == (200, 14)


def test_a_file_of_the_published_size_takes_no_memory(root, capsys):
    (root / "mpi3d").mkdir()
    path = write_whole(root / "mpi3d/mpi3d_toy.npz")
    assert path.stat().st_size > 12_740_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = load(path, "test")
    assert len(data) == 103_680 and data.factor_sizes == (6, 6, 2, 3, 3, 40, 40) and data.input_shape == (3, 64, 64)
    x = data.take(torch.arange(0, 103_680, 20_000))
    assert x.shape == (6, 3, 64, 64)
    place = np.ravel_multi_index(tuple(data.factors.numpy().T), data.factor_sizes)
    assert len(np.unique(place)) == 103_680
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # KB: indices and factors
    thin = mpi3d.TOY.sets(path.parent, mpi3d.TOY.variant("8")["every"])["all"]()
    assert thin.factors.sizes == (6, 6, 2, 3, 3, 5, 5) and thin.images.shape == (16_200, 3, 64, 64)
    assert np.array_equal(thin.images[:1], pictures(2, 64, 64, 3)[:1].transpose(0, 3, 1, 2))
    assert thin.images.rows[1] == 8 and thin.images.rows[5] == 320


def test_sets_by_name_and_thinned_out(root, monkeypatch):
    images = pictures(24 * 10, 64, 64, 3)
    small = mpi3d.Published("mpi3d_toy.npz", (1, 2, 1, 3, 2, 4, 5))
    monkeypatch.setattr(mpi3d, "SIZES", small.sizes)
    from mrvae_models.data import public

    entry = public._mpi3d(small, "images")
    monkeypatch.setitem(public.PUBLIC, "mpi3d-toy", entry)
    (root / "mpi3d").mkdir()
    for save in (np.savez, np.savez_compressed):
        save(root / "mpi3d/mpi3d_toy.npz", images=images)
        whole, thin = load("mpi3d-toy", "all"), load("mpi3d-toy:2", "all")
        expected = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        assert torch.equal(whole.examples[:], expected) and whole.factor_names[-1] == "vertical_axis"
        assert thin.factor_sizes == (1, 2, 1, 3, 2, 2, 3)
        grid = expected.reshape(*small.sizes, 3, 64, 64)[..., ::2, ::2, :, :, :]
        assert torch.equal(thin.examples[:].reshape(grid.shape), grid)
        assert torch.equal(load(root / "mpi3d/mpi3d_toy.npz", "all").examples[:], expected)
        (root / "checksums.json").unlink()
    with pytest.raises(DataError, match="every is 'x'; expected one number, of horizontal_axis, vertical_axis, or 7"):
        load("mpi3d-toy:x")
    assert main(["data", "mpi3d-toy"]) == 0


def test_files_that_are_wrong(tmp_path, monkeypatch):
    path = tmp_path / "grid.npz"
    for content, message in [
        ({"images": IMAGES[:-1]}, r"images\]: uint8, shape \(119, 6, 5, 3\); expected uint8, \(120, .*3 x 2 x 4 x 5"),
        ({"images": IMAGES.astype(np.int64)}, r"images\]: int64"),
        ({"sizes": (3, 2, 0)}, r"factor_sizes\]: \[3, 2, 0\]; expected whole numbers"),
        ({"names": ("a", "b")}, r"factor_names\]: \['a', 'b'\]; expected 4 texts"),
    ]:
        write(path, **content)
        with pytest.raises(DataError, match=message):
            load(path)
    write(path, compressed=True)
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(DataError, match="grid.npz: needs .* write it uncompressed, numpy.savez"):
        load(path)
    monkeypatch.undo()
    whole = write(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="grid.npz: cannot be read, damaged or cut short"):
        load(path)
    at = whole.index(b"\x93NUMPY")
    for place, byte, message in [(at, 0, "magic"), (at + 6, 7, "version")]:
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with pytest.raises(DataError, match=f"grid.npz: cannot be read, damaged or cut short .*{message}"):
            load(path)
    whole = write(path, sizes=(11, 11), names=("a", "b")).read_bytes()
    header = whole.index(b"(120, 6, 5, 3)")
    path.write_bytes(whole[:header] + b"(121, 6, 5, 3)" + whole[header + 14 :])
    with pytest.raises(DataError, match=r"images is uint8, shape \(121, 6, 5, 3\), in 10928 bytes"):
        load(path)
    assert arrays.mapped(write(path, compressed=True), "images") is None


def test_metrics_of_factors_find_them(tmp_path):
    data = load(write(tmp_path / "grid.npz"), "test")
    codes = SimpleNamespace(examples=data.examples, factors=data.factors, factor_names=data.factor_names)
    assert factors_of(codes).classes.shape == (12, len(factors_of(codes).names))
    assert math.prod(load(tmp_path / "grid.npz", "all").factor_sizes) == 120
