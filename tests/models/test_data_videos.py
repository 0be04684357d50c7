"""Videos in files: folders of frames, TFRecord files, BAIR's two forms, moving MNIST."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mrvae_models.cli import main
from mrvae_models.data import DataError, VideoDataset, load, memory, tfrecord
from mrvae_models.data.crc32c import TABLE, crc32c
from PIL import Image
from published import agree
from test_data_files import pictures


def write_clips(root: Path, clips: np.ndarray, name: str = "{}.png") -> None:
    """Each clip as SVG's converter of BAIR leaves it: root/traj_0_to_3/1/0.png and so on."""
    for i, clip in enumerate(clips):
        folder = root / f"traj_{i // 4 * 4}_to_{i // 4 * 4 + 3}" / str(i % 4 + 1)
        folder.mkdir(parents=True)
        for t, frame in enumerate(clip):
            Image.fromarray(frame).save(folder / name.format(t))


def varint(n: int) -> bytes:
    return (bytes([n & 127 | 128]) + varint(n >> 7)) if n > 127 else bytes([n])


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: dict[str, object]) -> bytes:
    """A tf.train.Example of bytes, floats and whole numbers, by hand."""
    entries = b""
    for name, value in features.items():
        if isinstance(value, bytes):
            feature = message(1, message(1, value))
        elif isinstance(value, int):
            feature = message(3, message(1, varint(value)))
        else:
            feature = message(2, message(1, struct.pack(f"<{len(value)}f", *value)))
        entries += message(1, message(1, name.encode()) + message(2, feature))
    return message(1, entries)


def bair_example(clip: np.ndarray, other: int = 0, camera: str = "image_aux1") -> bytes:
    features: dict[str, object] = {}
    for t, frame in reversed(list(enumerate(clip))):  # the map has no order
        features[f"{t}/image_main/encoded"] = bytes([other]) * frame.size
        features[f"{t}/{camera}/encoded"] = frame.tobytes()
        features[f"{t}/action"] = (0.5, 1.0, -2.0, 3.0)
        features[f"{t}/step"] = t
    return example(features)


def write_records(path: Path, examples: list[bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b""
    for data in examples:
        head = struct.pack("<Q", len(data))
        content += head + struct.pack("<I", tfrecord.masked(head)) + data + struct.pack("<I", tfrecord.masked(data))
    path.write_bytes(content)
    return path


# Folders of frames


def test_folders_of_frames_are_clips_when_frames_are_asked_for(tmp_path):
    clips = pictures(12, 11, 6, 5, 3)  # eleven frames: 10.png comes after 9.png
    write_clips(tmp_path, clips)
    whole = load(tmp_path, "all", frames=11)
    assert isinstance(whole, VideoDataset) and whole.input_shape == (11, 3, 6, 5)
    assert torch.equal(whole.examples[:], torch.from_numpy(clips).permute(0, 1, 4, 2, 3).float() / 255)
    assert [len(load(tmp_path, split, frames=3)) for split in ("train", "validation", "test")] == [10, 1, 1]
    test = load(tmp_path, "test", frames=3)
    assert any(torch.equal(test.examples[0], x[:3]) for x in whole.examples[:]) and not test.draws
    for name, number in (("9", "0"), ("10", "1"), ("b", "2")):
        write_clips(tmp_path / "clips" / name, clips[int(number) : int(number) + 1])
    ordered = load(tmp_path / "clips", "all", frames=11).examples[:]
    assert torch.equal(ordered, whole.examples[:3])  # 9 before 10
    shutil.rmtree(tmp_path / "clips")
    assert len(load(tmp_path, "all")) == 132 and load(tmp_path, "all").input_shape == (3, 6, 5)  # images, without
    assert load(tmp_path, "all", frames=2, resize=(3, 4)).input_shape == (2, 3, 3, 4)


def test_clips_whose_names_differ_in_leading_zeros_are_all_there(tmp_path):
    clips = pictures(5, 3, 6, 5)
    for name, clip in zip(("clip01", "clip1", "clip2", "clip002", "clip10"), clips, strict=True):
        write_clips(tmp_path / name, clip[None])
    expected = torch.from_numpy(clips[[0, 1, 3, 2, 4]])[:, :, None].float() / 255
    assert torch.equal(load(tmp_path, "all", frames=3).examples[:], expected)


def test_names_splits_and_lengths_of_clips(tmp_path):
    grey = pictures(10, 4, 6, 5)
    write_clips(tmp_path / "train", grey[:6], "frame_{:04}.png")
    write_clips(tmp_path / "val", grey[6:8], "{}.png")
    write_clips(tmp_path / "test", grey[8:, 1:], "shot3-{}.bmp")
    for split, expected in (("train", grey[:6]), ("validation", grey[6:8]), ("test", grey[8:, 1:])):
        agree(load(tmp_path, split, frames=expected.shape[1]), expected[:, :, None])
    long = tmp_path / "train/traj_0_to_3/1"
    Image.fromarray(grey[9, 0]).save(long / "frame_0004.png")
    agree(load(tmp_path, "train", frames=4), grey[:6, :, None])  # the shortest clip has four
    with pytest.raises(DataError, match="frames is 5, every 1 of a clip's 4"):
        load(tmp_path, "train", frames=5)


def test_clips_have_colour_and_size_in_all_splits_or_in_none(tmp_path):
    grey = pictures(8, 3, 6, 5)
    write_clips(tmp_path / "train", grey[:6])
    write_clips(tmp_path / "test", grey[6:])
    hidden = tmp_path / "train/traj_0_to_3/.ipynb_checkpoints"
    hidden.mkdir()
    Image.fromarray(grey[0, 0]).save(hidden / "0-checkpoint1.png")
    agree(load(tmp_path, "test", frames=3), grey[6:, :, None])
    assert len(load(tmp_path, frames=3)) == 6 - 1
    Image.fromarray(grey[0, 0]).convert("RGB").save(tmp_path / "train/traj_0_to_3/1/0.png")
    for split in ("train", "test"):
        assert load(tmp_path, split, frames=3).input_shape == (3, 3, 6, 5)
    Image.fromarray(pictures(7, 7)).save(tmp_path / "test/traj_0_to_3/1/0.png")
    with pytest.raises(DataError, match="test/traj_0_to_3/1/0.png: 7x7 pixels, and .*train/.*0.png has 5x6"):
        load(tmp_path, frames=3)


def test_frames_that_are_wrong(tmp_path):
    write_clips(tmp_path, pictures(3, 5, 6, 5))
    clip = tmp_path / "traj_0_to_3/2"
    content = (clip / "2.png").read_bytes()
    (clip / "2.png").unlink()
    with pytest.raises(DataError, match="traj_0_to_3/2: frame 2 is missing from 0 to 4"):
        load(tmp_path, frames=2)
    (clip / "2.png").write_bytes(content[:60])
    with pytest.raises(DataError, match="2/2.png: cannot be decoded"):
        load(tmp_path, frames=2)
    (clip / "2.png").write_bytes(content)
    (clip / "02.png").write_bytes(content)
    with pytest.raises(DataError, match="2.png: frame 2 a second time, beside 02.png"):
        load(tmp_path, frames=2)
    (clip / "02.png").rename(clip / "title.png")
    with pytest.raises(DataError, match="title.png: no number at the end of its name"):
        load(tmp_path, frames=2)
    (clip / "title.png").unlink()
    Image.fromarray(pictures(7, 5)).save(clip / "2.png")
    with pytest.raises(DataError, match="2.png: 5x7 pixels, and .*0.png has 5x6"):
        load(tmp_path, frames=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no frames; expected a folder for each clip"):
        load(tmp_path / "empty", frames=2)


# CRC-32C and TFRecord


def test_crc_of_published_examples():
    """RFC 3720, B.4, and the catalogue's check value."""
    for content, expected in [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
        (b"", 0),
    ]:
        assert crc32c(content) == expected


@given(length=st.integers(0, 40_000), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_crc_is_that_of_one_byte_after_the_other(length, seed):
    content = np.random.RandomState(seed).bytes(length)
    table, state = TABLE.tolist(), 0xFFFFFFFF
    for byte in content:
        state = table[(state ^ byte) & 255] ^ (state >> 8)
    assert crc32c(content) == state ^ 0xFFFFFFFF


def test_records_of_another_writer_are_read(tmp_path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    contents = [b"", b"a", np.random.RandomState(0).bytes(70_001), b"\0" * 64]
    with open(tmp_path / "set.tfrecord", "wb") as file:
        writer = RecordWriter(file)
        for content in contents:
            writer.write(content)
    path = tmp_path / "set.tfrecord"
    assert list(tfrecord.records(path)) == contents and tfrecord.count(path) == 4
    assert write_records(tmp_path / "own.tfrecord", contents).read_bytes() == path.read_bytes()


def test_features_of_another_writer_are_read():
    """protobuf's own descriptors of tf.train.Example, from the fields' numbers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def add(name, *fields):
        made = file.message_type.add(name=name)
        for number, (label, kind, of, repeated) in enumerate(fields, 1):
            made.field.add(name=label, number=number, type=kind, type_name=of,
                           label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL)  # fmt: skip

    add("BytesList", ("value", field.TYPE_BYTES, None, True))
    add("FloatList", ("value", field.TYPE_FLOAT, None, True))
    add("Feature", ("bytes_list", field.TYPE_MESSAGE, ".t.BytesList", False),
        ("float_list", field.TYPE_MESSAGE, ".t.FloatList", False))  # fmt: skip
    add("Entry", ("key", field.TYPE_STRING, None, False), ("value", field.TYPE_MESSAGE, ".t.Feature", False))
    add("Features", ("feature", field.TYPE_MESSAGE, ".t.Entry", True))
    add("Example", ("features", field.TYPE_MESSAGE, ".t.Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    for name, value in (("0/image_aux1/encoded", b"\x08" * 300), ("é", b""), ("two", None), ("floats", 1.5)):
        entry = made.features.feature.add(key=name)
        if isinstance(value, float):
            entry.value.float_list.value.extend([value] * 40)
        else:
            entry.value.bytes_list.value.extend([b"a", b"b"] if value is None else [value])
    found = tfrecord.byte_features(made.SerializeToString())
    assert {name: bytes(value) for name, value in found.items()} == {"0/image_aux1/encoded": b"\x08" * 300, "é": b""}


def test_records_that_are_damaged(tmp_path):
    clips = pictures(4, 3, 8, 8, 3)
    path = write_records(tmp_path / "set.tfrecords", [bair_example(clip) for clip in clips])
    whole = path.read_bytes()
    second = len(whole) // 4
    for content, message in [
        (whole[:-1], "record 3, at byte .*it is [0-9]+ bytes long.*cut short"),
        (whole[: second + 5], f"record 1, at byte {second} of {second + 5}: its length and the checksum"),
        (whole[:3] + b"\1" + whole[4:], "record 0, at byte 0 of .*its length and the checksum of that do not agree"),
        (whole[:second + 400] + b"\xff\xfe" + whole[second + 402 :], f"record 1, at byte {second}: .*do not have the"),
        (whole[:-2] + b"\0\0", "record 3, .*do not have the checksum"),
    ]:  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"set.tfrecords: {message}"):
            load(path)


def test_every_damaged_byte_of_a_record_is_noticed(tmp_path):
    path = write_records(tmp_path / "set.tfrecord", [b"0123456789" * 8])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(DataError, match="record 0"):
            list(tfrecord.records(path))


# BAIR


@pytest.mark.parametrize("form", ["records", "frames"])
def test_bair_by_name_and_folder(root, form, capsys):
    clips = pictures(12, 5, 64, 64, 3)
    for split, part in (("train", clips[:10]), ("test", clips[10:])):
        if form == "frames":
            write_clips(root / "bair/processed_data" / split, part)
            continue
        for i in range(0, len(part), 4):
            path = root / "bair/softmotion30_44k" / split / f"traj_{i}_to_{i + 3}.tfrecords"
            write_records(path, [bair_example(clip, 7) for clip in part[i : i + 4]])
    expected = clips.transpose(0, 1, 4, 2, 3)
    inner = root / "bair" / ("softmotion30_44k" if form == "records" else "processed_data")
    for source in ("bair", root / "bair", inner):
        parts = [load(source, split) for split in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [9, 1, 2] and parts[0].input_shape == (5, 3, 64, 64)
        agree(parts[2], expected[10:])
    together = torch.cat([load("bair", split).examples[:] for split in ("train", "validation")])
    agree(VideoDataset(together), expected[:10])
    assert load("bair", frames=2).draws
    assert main(["data", "bair"]) == 0
    assert "test: 2 clips of 5 x 64 x 64 x 3, 0 to 255, no labels" in capsys.readouterr().out
    if form == "frames":
        assert load("bair", resize=32).input_shape == (5, 3, 32, 32)
    else:
        with pytest.raises(DataError, match="resize=32 is for image files, and .* holds TFRecord files"):
            load("bair", resize=32)
        agree(load(inner / "test/traj_0_to_3.tfrecords", "all"), expected[10:])
        agree(load(inner / "test", "all"), expected[10:])


def test_records_that_hold_no_clips(tmp_path, monkeypatch):
    clip = pictures(3, 8, 8, 3)
    frame = clip[0].tobytes()
    path = tmp_path / "set.tfrecord"
    for examples, message in [
        ([example({"label": 3, "name": b"x"})], "frames of none of image_aux1, of the features name; expected 0/image"),
        ([example({"0/image_aux1/encoded": frame, "2/image_aux1/encoded": frame})], "frames 0, 2 of image_aux1"),
        ([example({"0/image_aux1/encoded": frame[:-1]})], "frames of 191 bytes; expected 12288"),
        ([b"\x0a\xff\x01"], "set.tfrecord, clip 0: no tf.train.Example: a field of 255 bytes"),
        ([b"\x0b"], "a field of wire type 3"),
        ([b"\xff"], "a number that does not end"),
        ([bair_example(clip), bair_example(clip[:2])], r"clip 1: shape \(2, 8, 8, 3\); expected \(3, 8, 8, 3\)"),
        ([bair_example(clip, camera="image_x")], None),
        ([example({"0/a/encoded": frame, "0/b/encoded": frame})], "of none of image_aux1, of the features 0/a/encoded"),
        ([], "the set is empty|too few"),
    ]:
        write_records(path, examples * (4 if message is None else 1))
        if message is None:
            continue
        with pytest.raises(DataError, match=message):
            load(path)
    write_records(path, [example({"0/top/encoded": frame, "1/top/encoded": frame})] * 5 + [
        example({f"{t}/top/encoded": clip[t].tobytes() for t in range(2)})])  # fmt: skip
    assert load(path).input_shape == (2, 3, 8, 8)  # the only camera there is
    monkeypatch.setattr(memory, "available", lambda: 1000)
    with pytest.raises(DataError, match="set.tfrecord: needs .* or give fewer files"):
        load(path)


# Moving MNIST


def test_moving_mnist_in_its_published_form(root):
    frames = pictures(20, 30, 8, 7)  # frames before clips
    (root / "moving-mnist").mkdir()
    path = root / "moving-mnist/mnist_test_seq.npy"
    np.save(path, frames)
    expected = torch.from_numpy(frames.swapaxes(0, 1)).float()[:, :, None] / 255
    for options in ({}, {"layout": "TNHW"}, {"layout": "NTHW"}):
        assert torch.equal(load(path, "all", **options).examples[:], expected)
    assert torch.equal(load("moving-mnist", "all").examples[:], expected)
    assert [len(load("moving-mnist", split)) for split in ("train", "validation", "test")] == [24, 3, 3]
    with pytest.raises(DataError, match="layout is 'NCHW'; expected 'NTHW', or none"):
        load(path, layout="NCHW")
    np.save(path, frames[0])
    with pytest.raises(DataError, match=r"mnist_test_seq.npy: uint8, shape \(30, 8, 7\); expected uint8, \(T, N, 64"):
        load(path)
    np.save(path, frames)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="mnist_test_seq.npy: cannot be read, damaged or cut short"):
        load(path)
