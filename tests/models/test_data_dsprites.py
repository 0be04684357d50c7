"""dSprites' file with its factors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, load, public
from published import SMALL, grid, write_dsprites, write_svhn


class RunsWhenRead:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_dsprites_with_its_factors_and_its_metadata_unread(root):
    images, classes = grid()
    ran = root / "ran"
    path = write_dsprites(root / "dsprites" / public.dsprites.FILE, images, classes, RunsWhenRead(ran))
    for source in ("dsprites", root / "dsprites", path):
        whole = load(source, "all")
        assert np.array_equal(whole.examples[:, 0].numpy(), images)
        assert torch.equal(whole.factors, torch.from_numpy(classes)) and whole.factors.dtype == torch.int64
        assert whole.factor_sizes == SMALL
        assert whole.factor_names == ("shape", "scale", "orientation", "position_x", "position_y")
        assert whole.factors.reshape(*SMALL, 5)[2, 1, 3, 0, 2].tolist() == [2, 1, 3, 0, 2]
    train, validation, test = (load("dsprites", split) for split in ("train", "validation", "test"))
    assert [len(part) for part in (train, validation, test)] == [174, 21, 21]
    place = np.ravel_multi_index(tuple(train.factors.numpy().T), SMALL)
    assert np.array_equal(train.examples[:, 0].numpy(), images[place])  # factors stay with their images
    assert not ran.exists()
    with np.load(path, allow_pickle=True) as content:
        content["metadata"]
    assert ran.exists()  # so it would have run


def test_dsprites_thinned_out(root):
    images, classes = grid()
    write_dsprites(root / "dsprites" / public.dsprites.FILE, images, classes)
    thin = load("dsprites:1,2,2,1,3", "all")
    assert thin.factor_sizes == (3, 1, 2, 3, 1) and len(thin) == 18
    assert np.array_equal(thin.examples[:, 0].numpy().reshape(3, 1, 2, 3, 1, 64, 64),
                          images.reshape(*SMALL, 64, 64)[:, ::2, ::2, :, ::3])  # fmt: skip
    assert torch.equal(thin.factors, torch.from_numpy(np.stack(np.unravel_index(np.arange(18), thin.factor_sizes), 1)))
    for wrong in ("0", "x", "1,2", "1,1,1,1,33", "-1"):
        with pytest.raises(DataError, match=f"every is '{wrong}'; expected one number"):
            load(f"dsprites:{wrong}")
    with pytest.raises(DataError, match="mnist:4: only dsprites"):
        load("mnist:4")


def test_dsprites_files_that_are_wrong(root):
    images, classes = grid()
    path = root / "set.npz"
    swapped = classes.copy()
    swapped[[5, 6]] = classes[[6, 5]]
    for content, message in [
        ((images[:-1], classes), r"latents_classes\]: int64, shape \(216, 6\); expected whole numbers, \(215, 6\)"),
        ((images, swapped), "image 5 has the classes .*order of the grid"),
        ((images[:-1], classes[:-1]), "215 images; expected 216"),
        ((images.astype(np.float32), classes), r"imgs\]: float32, shape"),
        ((images, classes[:, :4]), "expected whole numbers"),
    ]:
        write_dsprites(path, *content)
        with pytest.raises(DataError, match=message):
            load(path)
    write_dsprites(path, images, classes)
    whole = path.read_bytes()
    path.write_bytes(whole[:3000] + bytes(500) + whole[3500:])
    with pytest.raises(DataError, match="set.npz: cannot be read, damaged or cut short"):
        load(path)
    path.write_bytes(whole[:3000])
    with pytest.raises(DataError, match="set.npz"):
        load(path)


def test_all_is_for_undivided_sets(root):
    write_svhn(root / "svhn/train_32x32.mat", 20, 0), write_svhn(root / "svhn/test_32x32.mat", 20, 1)
    with pytest.raises(DataError, match="svhn: holds test, train; split 'all' is for a set that is not divided"):
        load("svhn", "all")
