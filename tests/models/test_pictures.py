"""Images along beta, and the figure of a curve: what is on it, and that nothing on it overlaps."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mrvae_models import plot
from mrvae_models.curve import Curve, Point
from mrvae_models.data import VideoDataset
from mrvae_models.likelihoods import Gaussian
from mrvae_models.networks import build
from mrvae_models.pictures import pictures
from PIL import Image
from test_curve import BETAS, images, multirate


def test_pictures_use_the_same_examples_and_z_at_every_beta():
    model, data = multirate(), images()
    made = pictures(model, data, BETAS, count=5, seed=2)
    assert made.reconstructions.shape == made.samples.shape == (3, 5, 1, 5, 5)
    assert all(any(torch.equal(x, y) for y in data.examples) for x in made.originals)
    with torch.no_grad():
        model.gate_weight.zero_()
    same = pictures(model, data, BETAS, count=5, seed=2)
    assert torch.equal(same.samples[0], same.samples[2])
    assert torch.equal(same.reconstructions[0], same.reconstructions[2])
    assert not torch.equal(made.samples[0], made.samples[2])


def drawn(monkeypatch, curve, path, *more):
    """draw(), and the figure that it made."""
    kept = []

    class Kept(Figure):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            kept.append(self)

    monkeypatch.setattr(plot, "Figure", Kept)
    plot.draw(curve, path, *more)
    return kept[0]


def sketched(betas):
    """A curve with the shape of a trained model's."""
    points = []
    for beta in betas:
        rate = 60 / (1 + beta**0.7)
        distortion = 75 + 90 * math.exp(-rate / 15)
        objective = distortion + beta * rate
        points.append(Point(beta, rate, 0.4, distortion, 1, -rate - distortion, 1, objective, 1, int(rate / 3), 0.2))
    return Curve(tuple(points))


@pytest.mark.parametrize("betas", [[0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], [0.9, 1.0, 1.1], [0.5]])
@pytest.mark.parametrize("channels", [1, 3])
def test_figure_has_labels_with_units_and_none_overlap(tmp_path, monkeypatch, betas, channels):
    shape = (channels, 5, 7)
    model, data = multirate(shape=shape), images(30, shape)
    curve, other = sketched(betas), sketched([1.0])
    figure = drawn(
        monkeypatch, curve, tmp_path / "curve.png", pictures(model, data, betas[:6], count=6), {"separate": other}
    )
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width == 2000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    axes = [axis for subfigure in figure.subfigs for axis in subfigure.axes]
    assert [axis.get_xlabel() for axis in axes[:3]] == ["rate R (nats)"] + 2 * [r"KL weight $\beta$"]
    assert [axis.get_ylabel() for axis in axes[:2]] == ["distortion D (nats)", r"D + $\beta$R (nats)"]
    figure.draw_without_rendering()  # saving drew it at another resolution
    renderer = figure.canvas.get_renderer()
    for axis in axes:
        shown = [
            text
            for labels, place, (low, high) in (
                (axis.get_xticklabels(), 0, axis.get_xlim()),
                (axis.get_yticklabels(), 1, sorted(axis.get_ylim())),
            )
            for text in labels
            if low <= text.get_position()[place] <= high
        ]
        texts = [*shown, *axis.texts, axis.title, axis.xaxis.label, axis.yaxis.label]
        visible = [text for text in texts if text.get_text()]
        boxes = [t.get_window_extent(renderer) for t in visible]
        for i, box in enumerate(boxes):
            assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1), visible[i]
            for j in range(i):
                assert not box.overlaps(boxes[j]), (visible[i], visible[j])
    marked = [text.get_text() for text in axes[0].texts]
    assert rf"$\beta$ = {betas[0]:.3g}" in marked
    assert len(betas) == 1 or rf"$\beta$ = {betas[-1]:.3g}" in marked


def test_a_curve_of_one_beta_is_drawn_without_a_warning_and_names_it(tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = drawn(monkeypatch, sketched([0.5]), tmp_path / "curve.png")
    for axis in figure.axes[1:]:
        low, high = axis.get_xlim()
        assert low < 0.5 < high and [text.get_text() for text in axis.get_xticklabels()] == ["0.5"]


def test_colour_tiles_have_a_gap_and_grey_ones_none():
    grey, colour = plot._tiles(torch.zeros(2, 1, 48, 100)), plot._tiles(torch.zeros(2, 3, 48, 100))
    assert grey.shape == (2, 48, 100, 1) and colour.shape == (2, 50, 102, 3)
    assert (colour[:, :48, :100] == 0).all() and (colour[:, 48:] == 1).all() and (colour[:, :, 100:] == 1).all()


def test_a_figure_that_fails_writes_nothing(tmp_path):
    curve = sketched(BETAS)
    with pytest.raises(ValueError, match="not supported"):
        plot.draw(curve, tmp_path / "curve.nothing")
    assert list(tmp_path.iterdir()) == []


def test_images_have_one_size_where_there_are_fewer_examples_than_samples(tmp_path, monkeypatch):
    made = pictures(multirate(), images(3), BETAS, count=8)
    assert len(made.originals) == 3 and made.samples.shape[1] == 8
    figure = drawn(monkeypatch, sketched(BETAS), tmp_path / "curve.png", made)
    axes = figure.subfigs[1].axes
    assert [axis.get_xlim() for axis in axes] == [(0, 8 * 5)] * 2
    assert [axis.images[0].get_extent()[1] for axis in axes] == [3 * 5, 8 * 5]


def test_pictures_of_a_clip_say_what_was_given(tmp_path, monkeypatch):
    model = build("svg-lp", (5, 1, 16, 16), 3, likelihood=Gaussian(), width=4, features=6, hidden=8, n_past=2)
    made = pictures(model, VideoDataset(torch.rand(3, 5, 1, 16, 16)), [1.0], count=8)
    assert made.given == 2 and torch.equal(made.samples[0, :2], made.originals[:2])
    assert not torch.equal(made.samples[0, 2:], made.originals[2:])
    figure = drawn(monkeypatch, sketched([1.0]), tmp_path / "curve.png", made)
    left, right = figure.subfigs[1].axes
    assert "held-out clip" in left.get_title() and right.get_title() == "Predicted from the 2 frames left of the line"
    for axis, frames in ((left, 1), (right, 2)):
        (line,) = axis.get_lines()
        assert line.get_xdata() == [frames * 16, frames * 16] and line.get_ydata() == [0, 0.5], "below the row of data"
    assert drawn(monkeypatch, sketched([1.0]), tmp_path / "curve.png", pictures(multirate(), images(), [1.0])).subfigs[
        1
    ].axes[0].get_title() == "Reconstructions of held-out images"


@pytest.mark.parametrize("ends", [(1e-4, 10), (1e-6, 100), (1e-10, 1e10)])
@pytest.mark.parametrize("rate", [60, 1e-4])
def test_numbers_along_an_axis_do_not_touch(tmp_path, monkeypatch, ends, rate):
    points = sketched(np.geomspace(*ends, 30).tolist()).points
    tiny = [replace(point, rate=point.rate * rate / 60, rate_se=0.0) for point in points]
    figure = drawn(monkeypatch, Curve(tuple(tiny)), tmp_path / "curve.png")
    figure.draw_without_rendering()
    for axis in figure.axes:
        low, high = axis.get_xlim()
        shown = [text for text in axis.get_xticklabels() if low <= text.get_position()[0] <= high]
        boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in shown]
        assert 3 <= len(boxes) <= 7
        assert not any(one.overlaps(next_one) for one, next_one in pairwise(boxes)), [t.get_text() for t in shown]


def test_points_of_many_betas_keep_their_colours(tmp_path, monkeypatch):
    for count, edges in ((10, 1), (200, 0)):
        curve = sketched(np.geomspace(0.001, 100, count).tolist())
        (points,) = drawn(monkeypatch, curve, tmp_path / "curve.png").axes[0].collections[-1:]
        assert len(points.get_offsets()) == count and len(points.get_edgecolors()) == edges
        assert points.get_sizes() == [26 if edges else 10]


def test_points_and_error_bars_of_active_units_are_drawn_whole(tmp_path, monkeypatch):
    curve = Curve((Point(0.1, 1, 0, 1, 0, -2, 0, 1, 0, 4, 0.9), Point(1, 1, 0, 1, 0, -2, 0, 2, 0, 0, 0.0)))
    low, high = drawn(monkeypatch, curve, tmp_path / "curve.png").axes[2].get_ylim()
    assert low < 0 and high > 4.9
