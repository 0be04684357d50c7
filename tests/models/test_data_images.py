"""Image files as a viewer shows them, and what the splits of a source have in common: classes, colour and size."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from mrvae_models.data import DataError, load
from mrvae_models.data.folder import _on_white
from PIL import Image
from published import encoded
from test_data_files import Rows, hub, pictures, write_images

UPRIGHT = pictures(6, 9, 3)
"""Six rows, nine columns, colour."""

TRANSPOSED = np.swapaxes(UPRIGHT, 0, 1)
STORED = {
    1: UPRIGHT, 2: UPRIGHT[:, ::-1], 3: UPRIGHT[::-1, ::-1], 4: UPRIGHT[::-1],
    5: TRANSPOSED, 6: TRANSPOSED[::-1], 7: TRANSPOSED[::-1, ::-1], 8: TRANSPOSED[:, ::-1],
}  # fmt: skip
"""The rows and columns of a file by its EXIF orientation, which says on which sides of what is seen they begin."""


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x112] = orientation
    return made


def write_pair(folder, image: Image.Image, name: str = "it.png", **options) -> torch.Tensor:
    """How an image is read, (C, H, W) from 0 to 255, beside a white one, as a set is to have images that differ."""
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    size = image.size[::-1] if options.get("exif", {}).get(0x112, 1) >= 5 else image.size
    Image.new("L", size, 255).save(folder / "white.png")
    kept = load(folder, "all").examples * 255
    return kept[sorted(path.name for path in folder.iterdir()).index(name)].round()


# EXIF


@pytest.mark.parametrize("name", ["it.png", "it.webp", "it.tif", "it.jpg"])
@pytest.mark.parametrize("orientation", sorted(STORED))
def test_images_are_turned_as_their_exif_says(tmp_path, name, orientation):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    options = {"it.webp": {"lossless": True}, "it.jpg": {"quality": 100, "subsampling": 0}}.get(name, {})
    found = write_pair(tmp_path, stored, name, exif=exif(orientation), **options)
    expected = torch.from_numpy(UPRIGHT).permute(2, 0, 1).float()
    assert (found - expected).abs().max() <= (8 if name == "it.jpg" else 0)


def test_sizes_are_those_of_the_turned_images(tmp_path):
    stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
    for name in "ab":
        stored.save(tmp_path / f"{name}.jpg", exif=exif(6))
    Image.fromarray(UPRIGHT).save(tmp_path / "c.jpg")
    assert load(tmp_path, "all").input_shape == (3, 6, 9)
    Image.fromarray(UPRIGHT).save(tmp_path / "b.jpg", exif=exif(8))  # the pixels of one size, and shown at another
    with pytest.raises(DataError, match="b.jpg: 6x9 pixels, and .*a.jpg has 9x6; expected one size for all"):
        load(tmp_path, "all")
    assert load(tmp_path, "all", resize=(5, 7)).input_shape == (3, 5, 7)


def test_a_damaged_exif_does_not_spoil_an_image(tmp_path):
    head = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    turned = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    no_number = struct.pack("<HHII", 0x11A, 2, 3, 0x414141)  # a text where the resolution is
    for name, content in (("turned", head + turned + no_number + bytes(4)), ("not", b"Exif\0\0no TIFF header")):
        folder = tmp_path / name
        folder.mkdir()
        stored = STORED[6] if name == "turned" else UPRIGHT
        for i in range(2):
            Image.fromarray(np.ascontiguousarray(stored) // (1 + i)).save(folder / f"{i}.png", exif=content)
        found = (load(folder, "all").examples[0] * 255).round()
        assert torch.equal(found, torch.from_numpy(UPRIGHT).permute(2, 0, 1).float())


# Transparency


def test_what_is_transparent_is_white(tmp_path):
    alpha = np.array([[0, 64, 128, 255, 1]] * 6, np.uint8)
    grey = np.full((6, 5), 100, np.uint8)
    expected = torch.from_numpy(255 - alpha.astype(float) * (255 - grey) / 255).float().round()
    two = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    assert torch.equal(write_pair(tmp_path, two), expected[None])  # grey stays grey
    assert torch.equal(write_pair(tmp_path, two.convert("RGBA")), expected.expand(3, 6, 5))

    palette = Image.fromarray(np.array([[0, 1, 2, 1, 0]] * 6, np.uint8))
    palette.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
    row = torch.tensor([[255, 10, 40, 10, 255], [255, 20, 50, 20, 255], [255, 30, 60, 30, 255]]).float()
    colours = row[:, None].expand(3, 6, 5)
    for name in ("it.png", "it.gif"):
        assert torch.equal(write_pair(tmp_path / name[3:], palette, name, transparency=0), colours)
    half = write_pair(tmp_path / "half", palette, transparency=bytes([0, 128, 255]))
    assert half[:, 0, 1].tolist() == [132, 137, 142]  # 127 more than half of 10, 20, 30
    keyed = write_pair(tmp_path / "keyed", Image.fromarray(np.array([[0, 7, 0, 9, 0]] * 6, np.uint8)), transparency=0)
    assert keyed[0, 0].tolist() == [255, 7, 255, 9, 255]  # a colour that is transparent, with no alpha


@pytest.mark.parametrize(("mode", "plain_mode"), [("LA", "L"), ("RGBA", "RGB"), ("P", "P"), ("PA", "P")])
def test_opaque_images_keep_their_values(mode, plain_mode):
    plain = Image.fromarray(pictures(16, 16, 3)).convert(plain_mode)
    image = plain.convert(mode)
    if mode == "P":
        image.info["transparency"] = b"\xff" * 256
    assert image.has_transparency_data
    for target in ("L", "RGB"):
        assert np.array_equal(_on_white(image, target), plain.convert(target))


# Hidden files


def test_hidden_folders_are_left_out(tmp_path):
    root = tmp_path / ".cache/set"
    for i, name in enumerate(["cat", "dog"]):
        write_images(root / name, pictures(5, 6, 5, seed=i))
        write_images(root / name / ".ipynb_checkpoints", pictures(1, 6, 5))
    write_images(root / ".thumbnails", pictures(5, 2, 2))
    write_images(root / "__MACOSX/cat", pictures(5, 2, 2))
    data = load(root, "all")
    assert data.labels.tolist() == [0] * 5 + [1] * 5


# All splits


def test_a_class_has_one_number_in_all_splits(tmp_path):
    for split, names in (("train", "cat dog horse"), ("val", "horse"), ("test", "dog horse zebra")):
        for name in names.split():
            write_images(tmp_path / split / name, pictures(3, 6, 5, seed=len(name)))
    assert sorted(set(load(tmp_path, "train").labels.tolist())) == [0, 1, 2]
    assert load(tmp_path, "validation").labels.tolist() == [2, 2, 2]
    assert sorted(load(tmp_path, "test").labels.tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    write_images(tmp_path / "val", pictures(1, 6, 5))  # in no class: labels of the others are as they were
    assert load(tmp_path, "validation").labels is None
    assert sorted(set(load(tmp_path, "test").labels.tolist())) == [1, 2, 3]


@pytest.mark.parametrize("resize", [None, 6])
def test_colour_anywhere_is_colour_everywhere(tmp_path, resize):
    for split in ("train", "val", "test"):
        write_images(tmp_path / split, pictures(5, 8, 8))
    shape = (resize or 8,) * 2
    assert load(tmp_path, "test", resize=resize).input_shape == (1, *shape)
    Image.fromarray(pictures(8, 8, 4)).save(tmp_path / "val/one.png")
    for split in ("train", "validation", "test"):
        assert load(tmp_path, split, resize=resize).input_shape == (3, *shape)


def test_sizes_are_compared_over_all_splits(tmp_path):
    write_images(tmp_path / "train", pictures(5, 8, 8))
    write_images(tmp_path / "test", pictures(5, 9, 8))
    for split, message in (("train", "test/000.png: 8x9 pixels, and .*train/000.png has 8x8"),
                           ("test", "train/000.png: 8x8 pixels, and .*test/000.png has 8x9")):  # fmt: skip
        with pytest.raises(DataError, match=f"{message}; expected one size for all: pass --resize"):
            load(tmp_path, split)
    assert load(tmp_path, "test", resize=8).input_shape == (1, 8, 8)
    (tmp_path / "test/000.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="test/000.png: cannot be decoded"):
        load(tmp_path, "train")


def test_an_empty_split_is_an_error_of_its_own_alone(tmp_path):
    write_images(tmp_path / "train", pictures(5, 8, 8))
    (tmp_path / "test").mkdir()
    assert len(load(tmp_path)) == 4
    with pytest.raises(DataError, match="test: no images"):
        load(tmp_path, "test")


def test_what_the_other_splits_cannot_change_is_not_read(tmp_path, monkeypatch):
    write_images(tmp_path / "test", pictures(3, 8, 8, 3))
    write_images(tmp_path / "train", pictures(9, 8, 8, 3))
    names: list[str] = []
    opened = Image.open
    monkeypatch.setattr(Image, "open", lambda path: names.append(str(path)) or opened(path))
    load(tmp_path, "test", resize=6)
    assert len(names) == 6 and not any("train" in name for name in names)  # its own, their headers and then whole


def test_splits_of_the_hub_have_one_shape(monkeypatch, tmp_path):
    grey, colour = encoded(tmp_path, pictures(20, 8, 8)), encoded(tmp_path, pictures(3, 8, 8, 3))
    hub(monkeypatch, {"train": Rows(grey[:19] + colour[:1], list(range(20))), "test": Rows(grey[:3], [0, 1, 2])})
    for split in ("train", "validation", "test"):
        assert load("hf:some/set", split).input_shape == (3, 8, 8)
    other = encoded(tmp_path, pictures(1, 8, 9))
    hub(monkeypatch, {"train": Rows(grey, list(range(20))), "test": Rows(other, [0])})
    with pytest.raises(DataError, match=r"some/set \[test\] row 0: 9x8 pixels, and .*\[train\] row 0 has 8x8"):
        load("hf:some/set")
