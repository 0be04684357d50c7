"""Clips: which frames an example has, layouts of arrays, and what is made of the embedded digits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mrvae_models.cli import main
from mrvae_models.config import TrainConfig
from mrvae_models.data import Compact, DataError, VideoDataset, arrays, batches, load, moving_digits, turns
from mrvae_models.data.clips import Windows
from mrvae_models.likelihoods import likelihood
from mrvae_models.preflight import check_kind
from mrvae_models.run import calibration_images
from test_data_files import multiset, pictures

CLIPS = pictures(30, 7, 6, 5, 3)  # (N, T, H, W, C)
SMALL = "moving-digits:clips=40,frames=6"


def numbered(n: int = 12, length: int = 9, **options) -> VideoDataset:
    """Clip i has i in its first pixel, and frame t has t in its second."""
    clips = torch.zeros(n, length, 1, 1, 2)
    clips[..., 0] = torch.arange(n)[:, None, None, None] / 255
    clips[..., 1] = torch.arange(length)[None, :, None, None] / 255
    return VideoDataset(clips, **options)


def times(x: torch.Tensor) -> torch.Tensor:
    return (x[:, :, 0, 0, 1] * 255).round().long()


# Arrays


def test_clips_of_arrays_and_files(tmp_path):
    np.save(tmp_path / "clips.npy", CLIPS)
    np.savez(tmp_path / "clips.npz", train_images=CLIPS, test_images=CLIPS[:5])
    expected = torch.from_numpy(CLIPS).permute(0, 1, 4, 2, 3).float() / 255
    whole = load(tmp_path / "clips.npy", "all")
    assert isinstance(whole, VideoDataset) and isinstance(whole.examples, Compact)
    assert whole.input_shape == (7, 3, 6, 5) and torch.equal(whole.examples[:], expected)
    test = load(tmp_path / "clips.npz", "test")
    assert multiset(test.examples) == multiset(expected[:5])
    assert [len(load(tmp_path / "clips.npz", split)) for split in ("train", "validation")] == [27, 3]
    assert torch.equal(load(CLIPS.transpose(0, 1, 4, 2, 3), "all").examples[:], expected)
    assert torch.equal(load(np.float32(CLIPS) / np.float32(255), "all").examples, expected)
    with pytest.raises(DataError, match=r"values go from 0 to 255; expected floats in \[0, 1\]: divide by 255"):
        load(CLIPS.astype(np.float32), "all")
    with pytest.raises(DataError, match=r"\(30, 7, 3, 5, 3\) does not tell .*layout='NTCHW' or layout='NTHWC'"):
        load(CLIPS[:, :, :3], "all")
    assert load(CLIPS[:, :, :3], "all", layout="NTCHW").input_shape == (7, 3, 5, 3)


def test_grey_clips_by_their_layout(tmp_path):
    grey = CLIPS[..., 0]
    expected = torch.from_numpy(grey)[:, :, None].float() / 255
    assert torch.equal(load(grey, "all", layout="NTHW").examples[:], expected)
    assert torch.equal(load(grey.swapaxes(0, 1), "all", layout="TNHW").examples[:], expected)
    assert torch.equal(load(CLIPS.swapaxes(0, 1)[..., :1], "all", layout="TNHWC").examples[:], expected)
    assert len(load(grey.swapaxes(0, 1), "test", layout="TNHW")) == 3  # a tenth of the clips, not of the frames
    with pytest.raises(DataError, match="'NTHW' or 'TNHW' for clips of grey frames"):
        load(pictures(8, 9, 8, 9))
    with pytest.raises(DataError, match=r"shape \(30, 6, 5\); expected clips, \(T, N, H, W\)"):
        load(grey[:, 0], layout="TNHW")
    with pytest.raises(DataError, match=r"\(30, 7, 6, 5, 3\); expected clips, here NTHW"):
        load(CLIPS, layout="NTHW")


# Frames


def test_training_takes_frames_from_anywhere_and_the_rest_the_first():
    data = numbered(frames=4, stride=2, moving=True)  # starts 0, 1 and 2
    assert data.input_shape == (4, 1, 1, 2) and data.draws and data.examples.starts == 3
    assert torch.equal(times(data.examples[:]), torch.tensor([0, 2, 4, 6]).expand(12, 4))
    indices = torch.tensor([5, 0, 5, 11]).repeat(50)
    x = data.take(indices, torch.Generator().manual_seed(0))
    assert torch.equal((x[:, :, 0, 0, 0] * 255).round().long(), indices[:, None].expand(-1, 4))
    starts = times(x)[:, 0]
    assert torch.equal(times(x), starts[:, None] + torch.tensor([0, 2, 4, 6]))
    assert (starts.bincount(minlength=3) > 40).all() and len(starts.bincount()) == 3  # of 200; 3 sigma is 20
    assert torch.equal(x, data.take(indices, torch.Generator().manual_seed(0)))
    assert data[3].shape == (4, 1, 1, 2) and len(data.__getitems__([1, 2])) == 2
    still = numbered(frames=4, stride=2)
    assert not still.draws and torch.equal(still.take(indices), still.examples[indices])


def test_windows_of_packed_clips_are_those_of_the_tensor():
    for array in (CLIPS, (CLIPS > 127)[..., 0]):
        layout = "NTHW" if array.ndim == 4 else None
        packed = load(array, "train", frames=3, layout=layout)
        plain = load(array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1), "train", frames=3,
                     layout=layout)  # fmt: skip
        assert isinstance(packed.examples.clips, Compact) and isinstance(plain.examples.clips, torch.Tensor)
        one, two = (batches(data, 7, shuffle=True, seed=3) for data in (packed, plain))
        for _ in range(2):
            for x, y in zip(one, two, strict=True):
                assert x.shape[1] == 3 and torch.equal(x, y)
        for index in (1, slice(1, 3), torch.tensor([4, 0])):
            assert torch.equal(packed.examples[index], plain.examples[index])


def test_draws_are_of_seed_epoch_and_place_and_survive_a_stop():
    data = load(CLIPS, "train", frames=3)
    loader = batches(data, 8, shuffle=True, seed=1)
    first, second = list(loader), list(loader)
    assert not torch.equal(torch.cat(first).sort(0).values, torch.cat(second).sort(0).values)
    again = batches(data, 8, shuffle=True, seed=1)
    iterator = iter(again)
    for x in first[:2]:
        assert torch.equal(next(iterator), x)
    resumed = batches(data, 8, shuffle=True, seed=1)
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(next(iter(resumed)), first[2])
    both = [list(batches(data, 4, shuffle=True, seed=1, rank=rank, world=2)) for rank in (0, 1)]
    for x, one, two in zip(first, *both, strict=True):
        assert torch.equal(x[0::2], one) and torch.equal(x[1::2], two)


def test_frames_of_splits_and_what_does_not_fit():
    for split, moving in (("train", True), ("all", True)):
        assert load(CLIPS, split, frames=3).moving is moving
    assert not load(CLIPS, "test", frames=3).draws and not load(CLIPS, "train").draws
    assert load(CLIPS, "train", frame_stride=3).input_shape[0] == 3  # frames 0, 3 and 6
    assert not load(CLIPS, "train", frame_stride=3).draws
    dynamic = load(CLIPS, "train", "dynamic", frames=3)
    x = dynamic.take(torch.arange(24), torch.Generator().manual_seed(0))
    assert set(x.unique().tolist()) == {0.0, 1.0} and x.shape == (24, 3, 3, 6, 5)
    for frames, stride, most in ((8, 1, 7), (3, 4, 2), (0, 1, 7)):
        with pytest.raises(DataError, match=f"frames is {frames}, every {stride} of a clip's 7; .* at most {most}"):
            load(CLIPS, "train", frames=frames, frame_stride=stride)
    with pytest.raises(DataError, match="frames=3, frame_stride=1 is for clips, and digits holds images"):
        load("digits", frames=3)
    with pytest.raises(ValueError, match="dim is 1; expected 0"):
        load(CLIPS, frames=3).examples.index_select(1, torch.tensor([0]))
    with pytest.raises(DataError, match=r"shape \(2, 1, 3, 3\); expected float32, \(N, T, C, H, W\)"):
        VideoDataset(torch.zeros(2, 1, 3, 3))


def test_clips_are_taken_few_at_a_time_to_evaluate_and_to_calibrate():
    shape = (20, 1, 64, 64)
    clips = Windows(torch.zeros(1, 1).expand(200, 20).reshape(200, 20, 1, 1, 1).expand(200, *shape), 20)
    assert turns(clips, 500).size == 51 and turns(clips, 8).size == 8
    assert turns(torch.zeros(600, 1, 2, 2), 500).size == 500
    assert len(calibration_images(numbered(400, 9))) == 222  # 2,000 frames


def test_a_likelihood_looks_at_few_packed_clips_at_a_time(monkeypatch):
    data, taken = load(np.tile(CLIPS, (9, 1, 1, 1, 1)), "train", frames=3), []
    monkeypatch.setattr("mrvae_models.likelihoods.data_checks.at_once", lambda shape, most: 50)
    original = Compact.__getitem__
    monkeypatch.setattr(Compact, "__getitem__", lambda self, index: taken.append(original(self, index)) or taken[-1])
    likelihood("bitwise").check_data(data.examples)
    assert taken and max(map(len, taken)) == 44  # every fifth of 216, of whole clips
    assert taken[0].shape[1] == 7


def test_a_network_of_one_kind_of_data_on_another(tmp_path):
    for network, data, message in [
        ("cnn", SMALL, "network is 'cnn' and .* holds clips; expected one for clips, --network svg-lp, or other"),
        ("svg-lp", "digits", "network is 'svg-lp' and digits holds images; .*, --network linear or mlp or"),
        ("lstm", SMALL, "holds clips"),
    ]:
        config = TrainConfig(network=network, data=data, out=str(tmp_path / "run"), recipe="ranked")
        with pytest.raises(ValueError, match=message) as error:
            check_kind(load(data), config)
        assert "lstm or" not in str(error.value)


# Moving digits


@pytest.fixture(scope="module")
def digits():
    return {split: load(SMALL, split) for split in ("train", "validation", "test")}


def test_moving_digits_are_made_of_the_seed(digits):
    assert [len(data) for data in digits.values()] == [40, 4, 4]
    train = digits["train"]
    assert train.input_shape == (6, 1, 64, 64) and isinstance(train.examples, Compact) and train.labels is None
    assert torch.equal(train.examples[:], load(SMALL).examples[:])
    assert not torch.equal(train.examples[:], load(SMALL, seed=1).examples[:])
    paths = [moving_digits.sets(clips=10, seed=seed)[split]().images.positions for seed, split in
             ((0, "validation"), (0, "test"), (1, "test"))]  # fmt: skip
    assert not np.array_equal(paths[0], paths[1]) and not np.array_equal(paths[1], paths[2])
    levels = train.examples[:] * 255
    assert torch.equal(levels.round() / 255, train.examples[:]) and levels.max() == 255 and levels.min() == 0
    assert 0.03 < train.examples[:].mean() < 0.09  # two digits of 0.1 of a quarter of the frame each


@pytest.mark.parametrize("stochastic", [True, False])
def test_moving_digits_bounce_off_the_walls(stochastic):
    path = moving_digits.trajectories(np.random.RandomState(0), (300, 2), 30, stochastic)
    assert path.shape == (300, 2, 30, 2) and path.min() == 0 and path.max() == 31
    v = np.diff(path, axis=2)
    assert np.abs(v).max() <= 4
    # in flight, where neither end of the step is at a wall, a digit keeps its velocity
    inner = ((path > 4) & (path < 27)).all(-1)
    flight = inner[:, :, :-2] & inner[:, :, 1:-1] & inner[:, :, 2:]
    assert flight.sum() > 1000 and (v[:, :, 1:] == v[:, :, :-1]).all(-1)[flight].all()
    starts = path[:, :, 0].reshape(-1)
    assert np.abs(np.bincount(starts, minlength=32) - 1200 / 32).max() < 4 * np.sqrt(1200 / 32)


@pytest.mark.parametrize("stochastic", [True, False])
def test_a_path_is_that_of_its_definition(stochastic):
    """The rule of the module's docstring for one digit, a step and a wall at a time, on the same random numbers."""
    bounces = 0
    for seed in range(20):
        random = np.random.RandomState(seed)
        p, v = random.randint(0, 32, 2).tolist(), random.randint(-4, 5, 2).tolist()
        expected = []
        for _ in range(40):
            for axis in (0, 1):
                away, along = (random.randint(1, 5), random.randint(-4, 5)) if stochastic else (0, 0)
                if 0 <= p[axis] <= 31:
                    continue
                bounces += 1
                wall, sign = (0, 1) if p[axis] < 0 else (31, -1)
                p[axis] = wall
                if stochastic:
                    v[axis], v[1 - axis] = sign * away, along
                else:
                    v[axis] = -v[axis]
            expected.append(list(p))
            p = [p[0] + v[0], p[1] + v[1]]
        path = moving_digits.trajectories(np.random.RandomState(seed), (1, 1), 40, stochastic)
        assert path[0, 0].tolist() == expected
    assert bounces > 50


def test_moving_digits_are_pasted_where_their_paths_say(digits):
    drawn = np.zeros((2, 32, 32), np.uint8)
    drawn[0, 0, 0], drawn[0, 31, 31], drawn[1, 0, 0] = 200, 10, 100
    positions = np.zeros((2, 2, 3, 2), int)
    positions[0, 0, 1], positions[0, 1, 1] = (5, 7), (5, 7)  # on top of each other
    positions[1, 0, 2] = (31, 0)
    frames = moving_digits.draw(drawn, np.array([[0, 1], [1, 1]]), positions)
    assert frames.shape == (2, 3, 64, 64)
    assert frames[0, 1, 5, 7] == 255 and frames[0, 1, 36, 38] == 10 and frames[0, 1].astype(int).sum() == 265
    assert frames[1, 0, 0, 0] == 200 and frames[1, 2, 31, 0] == 100 and frames[1, 2, 0, 0] == 100


def test_no_digit_is_in_two_splits(digits):
    made = {split: read() for split, read in moving_digits.sets(clips=40, frames=2).items()}
    train, validation, test = (set(raw.images.used.tolist()) for raw in made.values())
    assert len(train) > 70 and not train & validation and max(train | validation) < 5000 and max(test) < 1000
    kept = {x.numpy().tobytes() for x in load("digits", "train").examples}
    images = arrays.sets(arrays.DIGITS)["train"]().images
    for index in sorted(train)[:20]:
        assert (images[index].astype(np.float32) / 255).tobytes() in kept


def test_variants_of_moving_digits_and_their_size():
    small = load("moving-digits:deterministic,clips=3,frames=4", resize=32)
    assert len(small) == 3 and small.input_shape == (4, 1, 32, 32)
    whole = load("moving-digits:deterministic,clips=3,frames=4")
    halves = whole.examples[:].unflatten(-1, (32, 2)).mean(-1).unflatten(-2, (32, 2)).mean(-2)
    assert (small.examples[:] - halves).abs().mean() < 0.01
    assert load(SMALL, "train", frames=3).draws and load("moving-digits:frames=2,clips=1", "test").input_shape[0] == 2
    for wrong in ("clips=0", "x", "clips", "frames=-1", "", "deterministic=1"):
        with pytest.raises(DataError, match=f"'{wrong}' is no variant of moving-digits; expected deterministic"):
            load(f"moving-digits:{wrong}")
    with pytest.raises(DataError, match="holds test, train, validation; split 'all'"):
        load(SMALL, "all")
    with pytest.raises(DataError, match="resize is 0"):
        load(SMALL, resize=0)


def test_mrvae_data_describes_moving_digits(capsys):
    assert main(["data", SMALL]) == 0
    text = capsys.readouterr().out
    assert "train: 40 clips of 6 x 1 x 64 x 64, 0 to 255, no labels" in text and "Denton and Fergus" in text
