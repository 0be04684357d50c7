"""The Frechet distance between real images and a model's samples, in the feature space of a network that is given.

    |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)),    m, S mean and covariance of the images' features (Heusel et al., 2017)

It is "the FID" with Inception's features of 2048 numbers alone; any other features give another scale. torchmetrics
computes it; here the images are made, in batches.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mrvae_kernels import measurements

from ..curve import Examples, check_finite
from .posteriors import example_batches, ready
from .requirements import need

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
"""The weights of the original FID, as torch-fidelity publishes them."""


class Features(nn.Module):
    """`extractor` with its number of features, which torchmetrics asks for; images (N, C, H, W) clamped to [0, 1]."""

    def __init__(self, extractor: nn.Module, like: Tensor):
        super().__init__()
        self.extractor = extractor
        with torch.no_grad():
            found = extractor(like.clamp(0, 1))
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(like):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"the feature extractor {type(extractor).__name__} makes {shape} of images {tuple(like.shape)}; "
                f"expected one row of features an image, ({len(like)}, features)"
            )
        self.num_features = found.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        return self.extractor(images.clamp(0, 1)).double()


class Inception(nn.Module):
    """Inception v3 with the weights of the original FID: images (N, 1 or 3, H, W) in [0, 1] -> features (N, 2048)."""

    def __init__(self, weights: str | Path | None = None):
        super().__init__()
        path = inception_file(weights)
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.network = FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path)).inception

    def forward(self, images: Tensor) -> Tensor:
        colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        return self.network((255 * colour).round().byte())


def inception_file(weights: str | Path | None = None) -> Path:
    """The file of Inception's weights; FileNotFoundError that says what to put where, and ModuleNotFoundError without
    torch-fidelity, which has Inception's layers."""
    path = inception_path() if weights is None else Path(weights).expanduser()
    advice = "or take another extractor: the metric frechet_digits, or frechet_distance(..., extractor=module)"
    if not path.is_file():
        raise FileNotFoundError(
            f"FID needs Inception's weights, and {path} does not exist: put {INCEPTION_FILE} there, from the releases "
            f"of torch-fidelity (nothing is downloaded by itself); MRVAE_INCEPTION names another file; {advice}"
        )
    need("torch_fidelity", "FID", f"; {advice}")
    return path


def inception_path() -> Path:
    """Where Inception's weights are looked for: $MRVAE_INCEPTION, or their name in the cache folder."""
    given = os.environ.get("MRVAE_INCEPTION")
    return Path(given).expanduser() if given else cache_folder() / INCEPTION_FILE


def cache_folder() -> Path:
    """$MRVAE_CACHE, or ~/.cache/mrvae_kernels; a temporary folder where there is no home."""
    return measurements.cache_folder() or Path(tempfile.gettempdir()) / "mrvae_kernels"


def frechet_distance(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    extractor: nn.Module,
    generated: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The distance between the set's images and as many samples of the model at beta, or `generated` of them.

    extractor: a module, images (n, C, H, W) in [0, 1] -> features (n, f). Samples are means E[x | z], z ~ p(z), with
    the same z at every beta. The covariance of f features wants more than f images, and distances of other numbers of
    images do not compare. ValueError for data that are no images, fewer than two of either, other features than
    (n, f), and numbers that are not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    check_images(dataset)
    count = len(dataset.examples) if generated is None else generated
    if min(count, len(dataset.examples)) < 2:
        raise ValueError(f"{len(dataset.examples)} images and {count} samples; a covariance needs two of each at least")
    with ready(model, beta, calibration) as network:
        device = next(network.parameters()).device
        extractor = extractor.to(device).eval()
        measure = None
        for x in example_batches(model, dataset, batch_size):
            if measure is None:
                measure = FrechetInceptionDistance(feature=Features(extractor, x[:2].float())).to(device)
            measure.update(x.float(), real=True)
        assert measure is not None
        generator = torch.Generator(device).manual_seed(seed)
        for start in range(0, count, batch_size):
            drawn = network.sample(min(batch_size, count - start), generator=generator)
            check_finite("a sample", drawn, beta)
            measure.update(drawn.float(), real=False)
        # asked before: of what is not finite LAPACK's eigenvalues may end the process, and max(0, NaN) be 0, the best
        sums = (measure.real_features_cov_sum, measure.fake_features_cov_sum)
        finite = all(bool(each.isfinite().all()) for each in sums)
        distance = measure.compute().item() if finite else math.nan
    if math.isnan(distance):
        raise ValueError(
            f"the Frechet distance at beta = {beta:.4g} is NaN: the extractor {type(extractor).__name__} gives "
            "features that are not finite for these images or samples"
        )
    return max(0.0, distance)  # of equal sets it ends beside 0, by rounding


def check_images(dataset: Examples) -> None:
    """ValueError for data that are no images, such as text and clips."""
    if len(dataset.examples.shape) != 4:
        raise ValueError(
            f"examples have shape {tuple(dataset.examples.shape)}; the Frechet distance is of images, (N, C, H, W)"
        )


def fid(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    generated: int | None = None,
    weights: str | Path | None = None,
    batch_size: int = 50,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """frechet_distance() with Inception's features: the FID.

    weights: the file, or None for $MRVAE_INCEPTION, or its name in the cache folder; FileNotFoundError says what to put
    where. ModuleNotFoundError without torch-fidelity.
    """
    return frechet_distance(model, dataset, beta, Inception(weights), generated, batch_size, seed, calibration)
