"""The sprites drawn from dSprites' definition: their number and order, and areas, places and symmetries as computed."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
import torch
from mrvae_models.data import Compact, dsprites, load, sprites

HEART = 366.197
"""Area of the heart at scale 1: 100 times that within (x^2 + y^2 - 1)^3 = x^2 y^3."""


def drawn(shape: int, scale: float, orientation: float, x, y) -> np.ndarray:
    x, y = np.broadcast_arrays(np.atleast_1d(np.float64(x)), np.float64(y))
    return sprites.draw(shape, np.full(len(x), scale), np.full(len(x), orientation), x, y)


def centroid(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) of the centres of mass, in pixels from the left and the top."""
    mass = images.sum((1, 2))
    centres = np.arange(64) + 0.5
    return (images.sum(1) @ centres) / mass, (images.sum(2) @ centres) / mass


def test_the_whole_grid_in_the_order_of_the_original():
    raw = dsprites.generated()["all"]()
    assert raw.images.shape == (737280, 1, 64, 64) and len(raw.images) == 3 * 6 * 40 * 32 * 32
    assert raw.factors.sizes == (3, 6, 40, 32, 32)
    assert np.array_equal(np.ravel_multi_index(tuple(raw.factors.classes.T), raw.factors.sizes), np.arange(737280))
    for index in (0, 1, 32, 32 * 32, 40 * 32 * 32, 6 * 40 * 32 * 32, 737279, 500_000):
        shape, scale, orientation, x, y = np.unravel_index(index, (3, 6, 40, 32, 32))
        alone = drawn(shape, 0.5 + scale / 10, 2 * math.pi * orientation / 39, x / 31, y / 31)
        assert np.array_equal(raw.images[np.array([index])][0], alone)
    # the last factor is y: the next image is the same sprite, further down
    left, top = centroid(raw.images[np.arange(32)][:, 0])
    np.testing.assert_allclose(np.diff(left), 0, atol=1e-9)
    assert (np.diff(top) > 0).all() and top[0] < 17 and top[31] > 47


@pytest.mark.parametrize(
    ("shape", "area"), [(0, 18 * 18), (1, math.pi * 12 * 7), (2, HEART)], ids=["square", "ellipse", "heart"]
)
@pytest.mark.parametrize("scale", sprites.SCALES)
def test_areas_are_those_of_the_shapes(shape, area, scale):
    places = np.random.default_rng(0).random((400, 2))
    angles = np.random.default_rng(1).random(400) * 2 * math.pi
    images = sprites.draw(shape, np.full(400, scale), angles, *places.T)
    counts = images.sum((1, 2))
    # a sprite anywhere covers as many pixels on average as its area has; its outline, some 60 pixels, varies them
    np.testing.assert_allclose(counts.mean(), area * scale**2, rtol=0.005)
    assert counts.std() < 0.08 * area * scale**2


def test_area_of_the_heart_by_integration():
    x, y = np.meshgrid(*[np.linspace(-1.5, 1.5, 1501)] * 2)
    inside = (x**2 + y**2 - 1) ** 3 <= x**2 * y**3
    assert abs(100 * inside.sum() * 0.002**2 - HEART) < 0.1


def test_squares_and_ellipses_lie_around_their_centres():
    x, y = (places.ravel() for places in np.meshgrid(sprites.POSITIONS, sprites.POSITIONS))
    for shape in (0, 1):
        for scale, orientation in ((0.5, 0.0), (0.7, 1.0), (1.0, 2.5)):
            left, top = centroid(drawn(shape, scale, orientation, x, y))
            # pixels along the edges come in or not: less than half a pixel, and nothing on average
            for found, place in ((left, x), (top, y)):
                assert np.abs(found - (16 + 32 * place)).max() < 0.51
                assert abs((found - (16 + 32 * place)).mean()) < 0.05


def test_the_heart_turns_about_its_pivot_with_its_point_down():
    u, v = np.meshgrid(*[np.linspace(-16, 16, 1601)] * 2)
    offset = v[sprites.heart(u, v)].mean()  # of the centroid from the pivot, along v
    assert offset < -1  # the lobes are above
    for orientation in (0.0, 0.8, math.pi / 2, 4.0):
        x = np.random.default_rng(0).random(200)
        left, top = centroid(drawn(2, 1.0, orientation, x, x[::-1]))
        # clockwise as displayed: a quarter turn moves the lobes from the top to the right
        assert abs((left - 16 - 32 * x).mean() + math.sin(orientation) * offset) < 0.05
        assert abs((top - 16 - 32 * x[::-1]).mean() - math.cos(orientation) * offset) < 0.05
    widths = drawn(2, 1.0, 0.0, 0.5, 0.5)[0].sum(1)
    rows = np.flatnonzero(widths)
    assert widths[rows[0]] > widths[rows[-1]]


def test_symmetries():
    x, y = np.random.default_rng(0).random((2, 100))
    for orientation in sprites.ORIENTATIONS + 0.01:
        for shape, turn in ((0, math.pi / 2), (1, math.pi), (2, 2 * math.pi)):
            first, second = (drawn(shape, 0.9, angle, x, y) for angle in (orientation, orientation + turn))
            assert np.array_equal(first, second)
            assert not np.array_equal(first, drawn(shape, 0.9, orientation + turn / 2, x, y))
        centred = drawn(0, 1.0, orientation, 0.5, 0.5)[0]
        assert np.array_equal(centred, np.rot90(centred))
    whole = load("dsprites-generated:1,1,39,8,8", "all").examples.reshape(3, 6, 2, 4, 4, 64, 64)
    assert torch.equal(whole[:, :, 0], whole[:, :, 1])  # 0 and 2 pi


def test_no_sprite_is_cut_off_and_neighbouring_positions_differ():
    ends = np.array([0.0, 1.0])
    for shape in range(3):
        for orientation in sprites.ORIENTATIONS:
            images = drawn(shape, 1.0, orientation, ends, ends)
            border = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].transpose(0, 2, 1)])
            assert not border.any()
        column = drawn(shape, 0.5, 0.3, sprites.POSITIONS, 0.5)
        assert len({image.tobytes() for image in column}) == 32


def test_a_subset_has_its_own_factors_and_is_soon_made():
    begun = time.process_time()
    whole = load("dsprites-generated:4", "all")
    assert time.process_time() - begun < 5
    assert whole.factor_sizes == (3, 6, 10, 8, 8) and len(whole) == 11520 and whole.input_shape == (1, 64, 64)
    assert set(whole.examples[::100].unique().tolist()) == {0.0, 1.0}
    place = np.ravel_multi_index((2, 5, 3, 7, 1), whole.factor_sizes)
    assert whole.factors[place].tolist() == [2, 5, 3, 7, 1]
    alone = drawn(2, 1.0, sprites.ORIENTATIONS[12], sprites.POSITIONS[28], sprites.POSITIONS[4])
    assert np.array_equal(whole.examples[place].numpy(), alone)


def test_memory_of_making_sprites(monkeypatch):
    monkeypatch.setattr("mrvae_models.data.checks.COMPACT_ABOVE", 0)
    tracemalloc.start()
    data = load("dsprites-generated:1,2,4,3,3", "all")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == 10890 and isinstance(data.examples, Compact) and data.examples.nbytes == 10890 * 512
    assert peak < 80e6  # 178 MB as float32; 4,096 images at a time are 17 MB, and once more packed


@pytest.mark.slow
def test_all_737280_sprites():
    data = load("dsprites-generated", "all")
    assert len(data) == 737280 and data.examples.nbytes == 377_487_360
    rows = torch.arange(0, 737280, 4099)
    shape, scale, orientation, x, y = data.factors[rows].numpy().T
    for i, image in enumerate(data.take(rows)):
        values = sprites.SCALES[scale[i]], sprites.ORIENTATIONS[orientation[i]], sprites.POSITIONS[x[i]]
        assert np.array_equal(image.numpy(), drawn(int(shape[i]), *values, sprites.POSITIONS[y[i]]))
