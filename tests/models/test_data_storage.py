"""Large sets stay packed, and nobody who uses them sees a difference but in memory; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mrvae_models.config import TrainConfig
from mrvae_models.curve import evaluate
from mrvae_models.data import Chunks, Compact, DataError, ImageDataset, batches, checks, load, memory
from mrvae_models.data.storage import pack
from mrvae_models.networks import build, start_from
from mrvae_models.pictures import pictures as drawn_along_beta
from mrvae_models.run import calibration_images
from mrvae_models.training import train
from test_data_files import pictures

import mrvae_kernels as mk

BYTES = pictures(50, 3, 7, 5)
BITS = (pictures(50, 7, 5) > 127).astype(np.uint8)


LARGE = np.tile(BYTES, (1, 1, 40, 40))  # 8.4 MB; train is 40 of its 50 images


@pytest.fixture(params=["bytes", "bits", "bool"])
def both(request, monkeypatch):
    """A set as float32 tensor and the same one packed, as functions of load's options."""
    array = {"bytes": BYTES, "bits": BITS, "bool": BITS.astype(bool)}[request.param]

    def made(split="train", binarize="none", packed=False):
        monkeypatch.setattr(checks, "COMPACT_ABOVE", 0 if packed else 2**30)
        data = load(array, split, binarize, layout="NCHW" if array.ndim == 4 else None)
        assert isinstance(data.examples, Compact if packed else torch.Tensor)
        return data

    return made


def test_packed_examples_read_like_the_tensor(both):
    plain, packed = both().examples, both(packed=True).examples
    assert packed.shape == plain.shape and packed.dtype == plain.dtype and packed.device == plain.device
    assert packed.dim() == 4 and len(packed) == len(plain) == 40
    indices = torch.tensor([3, 0, 39, 3])
    for index in (0, -1, slice(5, 9), slice(None), slice(38, 99), slice(7, 7), indices, indices[:0], indices.numpy()):
        assert torch.equal(packed[index], plain[index])
    assert torch.equal(packed.index_select(0, indices), plain.index_select(0, indices))
    assert torch.equal(torch.stack(list(packed)), plain)
    assert torch.equal(packed.to("cpu")[:], plain)
    with pytest.raises(IndexError):
        packed[40]
    with pytest.raises(ValueError, match="dim is 1; expected 0"):
        packed.index_select(1, indices)


def test_packed_examples_take_a_quarter_or_a_32nd(both):
    packed = both(packed=True).examples
    assert packed.nbytes == 40 * (105 if not packed.bits else 5)  # 35 values are 4.4 bytes of bits


@pytest.mark.parametrize("binarize", ["none", "fixed", "dynamic"])
def test_batches_and_their_places_are_the_same_packed(both, binarize):
    plain, packed = both(binarize=binarize), both(binarize=binarize, packed=True)
    loaders = [batches(data, 7, shuffle=True, seed=3) for data in (plain, packed)]
    for _ in range(2):
        for x, y in zip(*loaders, strict=True):
            assert x.dtype == torch.float32 and torch.equal(x, y)
    iterators = [iter(loader) for loader in loaders]
    for _ in range(3):
        assert torch.equal(*map(next, iterators))
    assert loaders[0].state_dict() == loaders[1].state_dict()
    resumed = batches(packed, 7, shuffle=True, seed=3)
    resumed.load_state_dict(loaders[1].state_dict())
    for x, y in zip(iterators[0], resumed, strict=True):
        assert torch.equal(x, y)
    torch.manual_seed(0)
    first = [plain[2], *plain.__getitems__([1, 2])]
    torch.manual_seed(0)
    assert all(map(torch.equal, first, [packed[2], *packed.__getitems__([1, 2])]))


def test_one_fixed_draw_whatever_its_number_of_parts(both, monkeypatch):
    plain = both(binarize="fixed")
    monkeypatch.setattr("mrvae_models.data.dataset.PACKING", 11)
    packed = both(binarize="fixed", packed=True)
    assert packed.examples.bits and torch.equal(packed.examples[:], plain.examples)


def test_chunks_are_the_examples_in_order(both):
    for packed in (False, True):
        examples = both(packed=packed).examples
        parts = Chunks(examples, 16)
        assert [len(part) for part in parts] == [16, 16, 8] and len(parts) == 3
        assert torch.equal(torch.cat(list(parts)), examples[:])
        assert len(Chunks(examples, 40)) == len(list(Chunks(examples, 40))) == 1


def test_whoever_uses_examples_finds_the_same_packed(both):
    plain, packed = both("test"), both("test", packed=True)
    assert torch.equal(calibration_images(plain), calibration_images(packed))
    torch.manual_seed(0)
    model = mk.multirate(build("mlp", plain.input_shape, 4, hidden=(8,)), gates={"encoder": "sigmoid"})
    one, two = (evaluate(model, data, [0.1, 1.0], batch_size=3, samples=2) for data in (plain, packed))
    assert "objective" in one.quantities
    for name in one.quantities:  # products round by where their rows lie in memory
        assert one.column(name) == pytest.approx(two.column(name), rel=1e-6)
    for a, b in zip(drawn_along_beta(model, plain, [1.0], 3)[1:4], drawn_along_beta(model, packed, [1.0], 3)[1:4],
                    strict=True):  # fmt: skip
        assert torch.equal(a, b)
    linear = [build("linear", plain.input_shape, 4) for _ in range(2)]
    for network, data in zip(linear, (plain, packed), strict=True):
        start_from(network, data.examples)
        torch.testing.assert_close(network.encoder.centre.mean, plain.examples.double().mean(0).float(), rtol=0, atol=0)


def test_a_run_has_the_same_weights_packed(tmp_path, monkeypatch):
    np.save(tmp_path / "set.npy", BYTES)
    weights = {}
    for limit in (0, 2**30):
        monkeypatch.setattr(checks, "COMPACT_ABOVE", limit)
        options = {"network_options": {"hidden": 8}, "latent": 3, "batch_size": 9, "log_to": ()}
        config = TrainConfig(data=str(tmp_path / "set.npy"), layout="NCHW", out=str(tmp_path / f"run{limit}"), epochs=2,
                             binarize="dynamic", validate_every=1, **options)  # fmt: skip
        weights[limit] = train(config, progress=False).model.state_dict()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[2**30].items())


def test_packing_keeps_what_is_asked_for_in_its_order():
    order = np.random.default_rng(0).permutation(50)[:30]
    assert torch.equal(pack(BYTES, order, 255)[:], torch.from_numpy(BYTES[order]).float() / 255)
    assert torch.equal(pack(BITS, order, 1)[:], torch.from_numpy(BITS[order]).float())


def test_storage_that_does_not_fit_its_shape():
    for stored in (torch.zeros(3, 9), torch.zeros(3, 8, dtype=torch.uint8), torch.zeros(27, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"expected uint8, \(N, 9\)"):
            Compact(stored, (1, 3, 3), 255, False)
    with pytest.raises(ValueError, match=r"\(N, 2\) as bits"):
        Compact(torch.zeros(3, 1, dtype=torch.uint8), (1, 3, 3), 1, True)


# Memory


def test_what_is_available_is_the_least_of_machine_and_container(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available() > 2**30  # neither file: all of the machine
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert memory.available() == 5000 * 1024
    for name, text in (("max", "3000000"), ("current", "2000000"), ("stat", "anon 5\ninactive_file 400000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.available() == 1_400_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available() == 5000 * 1024
    monkeypatch.undo()
    assert 2**20 < memory.available() < 2**50


@pytest.mark.parametrize(
    ("array", "packed", "message"),
    [
        (LARGE / 255, True, "needs 0.0269 GB of memory and 0.001 GB .*uint8 or bool arrays are kept"),
        (LARGE, False, "needs 0.0269 GB of memory and 0.001 GB"),
        (LARGE, True, "needs 0.00672 GB of memory .*fewer or smaller images"),
    ],
)
def test_sets_that_do_not_fit_are_refused(monkeypatch, array, packed, message):
    monkeypatch.setattr(checks, "COMPACT_ABOVE", 0 if packed else 2**30)
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    with pytest.raises(DataError, match=f"the array: {message}"):
        load(array, layout="NCHW")


def test_a_file_that_does_not_fit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    from published import grid, write_dsprites

    path = write_dsprites(tmp_path / "set.npz", *grid())
    monkeypatch.setattr(memory, "available", lambda: 500_000)
    monkeypatch.setattr("mrvae_models.data.arrays.read", lambda *_: pytest.fail("read"))
    with pytest.raises(DataError, match="set.npz: needs .*use dsprites-generated"):
        load(path)


def test_images_that_do_not_fit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    from test_data_files import write_images

    write_images(tmp_path, pictures(5, 60, 50))
    monkeypatch.setattr(memory, "available", lambda: 10_000)
    with pytest.raises(DataError, match="5 images, .*000.png and so on: needs .*resize them to a smaller side"):
        load(tmp_path)


def test_factors_and_examples_that_do_not_belong_together():
    factors = checks.Factors(np.zeros((3, 2), np.int64), ("a", "b"), (1, 1))
    with pytest.raises(DataError, match=r"factors have shape \(3, 2\); expected \(4, 2\)"):
        ImageDataset(torch.rand(4, 1, 2, 2), factors=factors)
