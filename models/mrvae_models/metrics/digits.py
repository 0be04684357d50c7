"""Features for Frechet distances of digits without any download: a classifier trained on the embedded digits.

Its distance is called frechet_digits, never FID: another network, another scale.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..curve import Examples
from ..data import load
from ..run import replace_file
from .frechet import cache_folder, frechet_distance

EPOCHS, BATCH, SEED = 6, 64, 0
FILE = f"digit-features-1-epochs{EPOCHS}-seed{SEED}.safetensors"
"""In the cache folder. The first number goes up when what is trained changes."""


class DigitFeatures(nn.Module):
    """Two convolutions and 64 features, after ReLU, of images (N, 1, H, W) in [0, 1]; `classes` are ten logits.

    Images of another size than 28x28 are resized; colours are averaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64), nn.ReLU(),
        )  # fmt: skip
        self.classes = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        grey = images.mean(1, keepdim=True)
        if grey.shape[2:] != (28, 28):
            grey = F.interpolate(grey, (28, 28), mode="bilinear", antialias=True)
        return self.body(grey)


def trained_digit_features() -> DigitFeatures:
    """DigitFeatures trained on the 4,500 embedded training digits, seeded, on the CPU; torch's generators stay."""
    digits = load("digits", "train")
    assert digits.labels is not None
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(SEED)
        network = DigitFeatures()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(digits)).split(BATCH):
                optimizer.zero_grad()
                loss = F.cross_entropy(network.classes(network(digits.examples[rows])), digits.labels[rows])
                loss.backward()
                optimizer.step()
    return network.eval().requires_grad_(False)


def digit_features(path: str | Path | None = None) -> DigitFeatures:
    """The trained features from a file (default: FILE in the cache folder), which is made where it does not exist.

    ValueError for a file that holds something else; a warning where none can be made.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    path = cache_folder() / FILE if path is None else Path(path)
    if not path.exists():
        network = trained_digit_features()
        try:
            replace_file(path, lambda temporary: save_file(network.state_dict(), temporary))
        except OSError as error:
            warnings.warn(f"{path}: cannot be written ({error}); the features are trained at every call", stacklevel=2)
        return network
    network = DigitFeatures()
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(
            f"{path} does not hold the digit features: {str(error).splitlines()[0]}; delete it, and it is made again"
        ) from None
    return network.eval().requires_grad_(False)


def frechet_digits(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    generated: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """frechet_distance() with digit_features(): not the FID, but drawn like it, for images of digits."""
    return frechet_distance(model, dataset, beta, digit_features(), generated, batch_size, seed, calibration)
