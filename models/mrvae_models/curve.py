"""The rate-distortion curve of a trained model: rate, distortion, ELBO and active units at any betas.

    curve = evaluate(model, load("digits", split="test"), betas=[0.01, 0.1, 1, 10])
    curve.write_csv("curve.csv")

Every beta sees the same noise (common random numbers), so that differences along the curve are the model's own.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

import mrvae_kernels as mk
from mrvae_kernels.recalibration import running_norms

from .data import InMemory, Rows, in_turn, turns
from .likelihoods import perplexity
from .options import read_json
from .run import plain_network, replace_file, versions, write_json
from .spacing import log_spaced
from .vae import VAE, kl_divergences, target_of

ACTIVE_VARIANCE = 0.01
"""A unit is active when the variance of its posterior mean over the data exceeds this (Burda et al., 2016)."""

CALIBRATION_BATCH = 500

DECODED = 2**25
"""Numbers of a likelihood's parameters that are decoded at a time, 128 MiB in float32: of 256 levels a value, 42 images
of 3x32x32."""

BOOTSTRAP = 200
"""Resamples behind the standard error of the number of active units: its own relative error is about 5 %."""


class Examples(Protocol):
    """What evaluate() needs of a dataset; of one of sequences also `lengths`, `take` and `input_shape`."""

    @property
    def examples(self) -> Rows:
        """(N, *input_shape): a slice of them, or those at a tensor of indices, are a tensor."""


class Measurement(NamedTuple):
    """One beta, one batch; N examples, k latent dimensions."""

    distortion: Tensor  # (N,), nats, mean over the draws of z
    rate: Tensor  # (N,), nats
    mean: Tensor  # (N, k), of q(z | x)


@dataclass(frozen=True)
class Point:
    """The curve at one beta. Means over the examples, in nats an example, each followed by its standard error.

    objective = distortion + beta * rate; elbo = -(distortion + rate); active_units by ACTIVE_VARIANCE.
    Of sequences also nats_per_token = -elbo / (tokens an example, its end counted in), and perplexity, its exponential:
    an upper bound of the model's.
    """

    beta: float
    rate: float
    rate_se: float
    distortion: float
    distortion_se: float
    elbo: float
    elbo_se: float
    objective: float
    objective_se: float
    active_units: int
    active_units_se: float
    nats_per_token: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points in order of beta, and what they were made from (`about`: config, seed, versions, examples)."""

    points: tuple[Point, ...]
    about: dict[str, Any] = field(default_factory=dict)

    def column(self, name: str) -> list[float]:
        """One quantity at all betas."""
        return [getattr(point, name) for point in self.points]

    @property
    def quantities(self) -> list[str]:
        """Names of what the points have: the fields of Point, those of text where they are of text."""
        names = [entry.name for entry in fields(Point)]
        return [name for name in names if any(value is not None for value in self.column(name))]

    def write_csv(self, path: str | Path) -> None:
        """One row a beta, columns as in Point without those that no point has, numbers with all their digits."""
        names = self.quantities

        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(asdict(point) for point in self.points)

        replace_file(Path(path), write)

    def write_json(self, path: str | Path) -> None:
        """Points, what they were made from, and the versions of the packages; read_json() gives them back."""
        points = [asdict(point) for point in self.points]
        write_json(Path(path), {"about": {"versions": versions(), **self.about}, "points": points})

    @classmethod
    def read_json(cls, path: str | Path) -> Curve:
        """A curve that write_json() wrote; ValueError for another file."""
        document = read_json(path)
        try:
            return cls(tuple(Point(**point) for point in document["points"]), document["about"])
        except (KeyError, TypeError):
            raise ValueError(f"{path} holds no curve; expected a file that mrvae curve wrote") from None


def round_betas(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within [low, high], and its ends; log-spaced where those are fewer than five."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    # an inner one too near to an end would crowd it
    betas = [low, *(beta for beta in steps if low * 1.2 < beta < high / 1.2), high]
    return betas if 5 <= len(betas) <= 30 else log_spaced(low, high, 10)


def evaluate(
    model: nn.Module,
    dataset: Examples,
    betas: Sequence[float],
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
    about: dict[str, Any] | None = None,
) -> Curve:
    """Rate, distortion, ELBO, D + beta R and active units of `model` at `betas`, on all of `dataset`.

    model        a MultiRate around a VAE, or a plain (baked, or separately trained) VAE with the one beta it is for
    samples      draws of z an example that the distortion averages over; the rate is analytic
    seed         of the noise, which is the same at every beta; the noise depends on batch_size too, as each batch is
                 seeded by `seed` and its place: compare curves of one batch_size
    calibration  training images, (n, *input_shape); needed by networks with BatchNorm, whose running statistics are
                 recalibrated at each beta and put back afterwards
    Standard errors are over examples: std / sqrt(N), and for active units the bootstrap's.
    ValueError for an empty dataset, for betas that are not positive, and for more than one with a plain model.
    """
    images = dataset.examples
    check(model, images, betas, batch_size, samples)
    tokens = tokens_of(dataset)
    points = [
        point_of(beta, measure_all(model, dataset, beta, batch_size, samples, seed, calibration), tokens)
        for beta in sorted(betas)
    ]
    calibrated_on = 0 if calibration is None else len(calibration)
    details = {"examples": len(images), "samples": samples, "seed": seed, "calibration_examples": calibrated_on}
    return Curve(tuple(points), {**(about or {}), "evaluation": details})


def batches_of(dataset: Examples, batch_size: int) -> Iterable[Tensor]:
    """All examples, in turn; those of text by length, in batches that fit into memory."""
    if getattr(dataset, "lengths", None) is None:
        return turns(dataset.examples, batch_size)
    return in_turn(cast(InMemory, dataset), batch_size)


def tokens_of(dataset: Examples) -> float | None:
    """Mean number of tokens of an example of text; None for images."""
    lengths: Tensor | None = getattr(dataset, "lengths", None)
    return None if lengths is None else lengths.sum().item() / len(lengths)


def measure_all(
    model: nn.Module,
    dataset: Examples,
    beta: float,
    batch_size: int = 500,
    samples: int = 1,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> Measurement:
    """What evaluate() averages, by example: distortion (N,), rate (N,), mean (N, k), in float64 on the CPU.

    Examples are in their order; those of text by length, the same at every beta. ValueError where one is not finite.
    """
    generator = torch.Generator()
    parts, start = [], 0
    with torch.no_grad(), evaluating(model), calibrated(model, calibration, beta):
        for x in batches_of(dataset, batch_size):
            # one seed a batch: the same noise at every beta, whatever order they come in
            generator.manual_seed(seed * 1_000_003 + start)
            parts.append(measure(model, x, beta, generator, samples))
            start += len(x)
    measured = Measurement(*(torch.cat(part).double().cpu() for part in zip(*parts, strict=True)))
    for name, values in measured._asdict().items():
        check_finite("the posterior mean" if name == "mean" else f"the {name}", values, beta)
    return measured


def check_finite(what: str, values: Tensor, beta: float) -> None:
    """ValueError where a model's numbers are not finite, of which a count or a maximum would look like any other."""
    if not values.isfinite().all():
        raise ValueError(
            f"{what} at beta = {beta:.4g} has NaN or infinite values: the training of this model has diverged (train "
            "again with a smaller --lr, or with --clip), or this beta lies too far outside the range it was trained for"
        )


def measure(model: nn.Module, x: Tensor, beta: float, generator: torch.Generator, samples: int = 1) -> Measurement:
    """Distortion, rate and posterior mean of a batch at one beta, with noise drawn on the CPU from `generator`.

    A network that is no VAE of one latent vector (a hierarchy) draws its noise itself: torch's global generators are
    seeded from `generator` for it and put back.
    """
    network = plain_network(model)
    parameter = next(network.parameters())
    x = x.to(device=parameter.device, dtype=parameter.dtype if x.is_floating_point() else None)
    if not isinstance(network, VAE):
        return _measure_whole(model, x, beta, generator, samples)
    with at(model, beta):
        mean, log_variance = network.encode(x)
        noise = torch.randn((samples, *mean.shape), generator=generator).to(mean)
        distortion = torch.stack(
            [distortion_of(network, mean + torch.exp(0.5 * log_variance) * draw, x, beta) for draw in noise]
        ).mean(0)
    return Measurement(distortion, kl_divergences(mean, log_variance).sum(1), mean)


def distortion_of(network: VAE, z: Tensor, x: Tensor, beta: float) -> Tensor:
    """-log p(x | z), (N,), nats, decoded in parts where the likelihood's parameters are many."""
    rows = _rows_at_once(network)
    parts = zip(z.split(rows), x.split(rows), strict=True)
    return torch.cat([network.likelihood.distortion(network.decode(code), data, beta=beta) for code, data in parts])


def _rows_at_once(network: Any) -> int:
    return max(1, DECODED // math.prod(network.likelihood.parameter_shape(network.input_shape)))


def _measure_whole(model: nn.Module, x: Tensor, beta: float, generator: torch.Generator, samples: int) -> Measurement:
    network = plain_network(model)
    parts = x.split(_rows_at_once(network)) if x.is_floating_point() else [x]  # batches of text are cut already
    measured = []
    with seeded(x.device, generator), at(model, beta):
        for part in parts:
            target = target_of(network, part)
            outputs = [network(part) for _ in range(samples)]
            measured.append(
                Measurement(
                    torch.stack(
                        [network.likelihood.distortion(output.parameters, target, beta=beta) for output in outputs]
                    ).mean(0),
                    torch.stack([output.rates.flatten(1).sum(1) for output in outputs]).mean(0),
                    torch.stack([output.mean.flatten(1) for output in outputs]).mean(0),
                )
            )
            del outputs
    return Measurement(*(torch.cat(values) for values in zip(*measured, strict=True)))


def at(model: nn.Module, beta: float) -> contextlib.AbstractContextManager[Any]:
    """A block in which the network's encode() and decode() run at this beta; a plain model is at its own already."""
    return model.at(beta) if isinstance(model, mk.MultiRate) else contextlib.nullcontext()


def has_running_statistics(model: nn.Module) -> bool:
    """Whether the model has norms whose running statistics mix the betas of training."""
    return bool(running_norms(model))


def calibration_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Even parts of at most CALIBRATION_BATCH: each counts alike, and one of a single image has no variance."""
    return images.tensor_split(max(1, math.ceil(len(images) / CALIBRATION_BATCH)))


@contextlib.contextmanager
def recalibration_noise(device: torch.device) -> Iterator[None]:
    """A block in which torch's global generators start from a fixed seed; they are put back at the end.

    Recalibrating draws z. With the same draws each time, statistics are the same for baking as for evaluating, curves
    are compared with common random numbers, and a validation leaves training's numbers alone.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def calibrated(model: nn.Module, images: Tensor | None, beta: float) -> Iterator[None]:
    """A block in which a MultiRate's norms have the running statistics of this beta, on `images`.

    They are put back at the end. Nothing to do for a plain model, or without such norms; ValueError when images are
    missing.
    """
    if not isinstance(model, mk.MultiRate) or not has_running_statistics(model):
        yield
        return
    if images is None:
        raise ValueError(
            "the network has norms whose running statistics mix the betas of training: "
            "pass calibration=, training images to recalibrate them on at each beta"
        )
    buffers = dict(model.named_buffers())
    saved = {name: buffer.clone() for name, buffer in buffers.items()}
    parameter = next(model.parameters())
    try:
        with recalibration_noise(parameter.device):
            model.recalibrate((batch.to(parameter) for batch in calibration_batches(images)), beta)
        yield
    finally:
        for name, buffer in buffers.items():
            buffer.copy_(saved[name])


@contextlib.contextmanager
def seeded(device: torch.device, generator: torch.Generator) -> Iterator[None]:
    """A block in which torch's global generators start from a seed drawn from `generator`; they are put back."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A block in which every module is in eval mode; each gets its own mode back at the end."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def check(model: nn.Module, images: Rows, betas: Sequence[float], batch_size: int, samples: int) -> None:
    """ValueError, naming what is wrong, for what no curve can be made of."""
    if len(images) == 0:
        raise ValueError("the dataset is empty; expected at least one example")
    if not betas:
        raise ValueError("no betas given; expected at least one")
    for beta in betas:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta is {beta}; expected a positive, finite KL weight")
    plain_network(model).likelihood.check_data(images)
    if len(betas) > 1 and not isinstance(model, mk.MultiRate):
        raise ValueError(
            f"{len(betas)} betas for a plain model, which is one point of a curve; give the beta it was trained at"
        )
    if batch_size < 1 or samples < 1:
        raise ValueError(f"batch_size is {batch_size} and samples {samples}; expected positive integers")


def point_of(beta: float, measured: Measurement, tokens: float | None = None) -> Point:
    """The means and standard errors of what was measured at one beta; tokens: of an example of text, on average."""
    distortion, rate, mean = measured
    nats = (distortion + rate).mean().item()

    def average(values: Tensor) -> tuple[float, float]:
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
        return values.mean().item(), error

    return Point(
        beta,
        *average(rate),
        *average(distortion),
        *average(-(distortion + rate)),
        *average(distortion + beta * rate),
        *active_units(mean),
        *(() if tokens is None else (nats / tokens, perplexity(nats, tokens))),
    )


def active_units(mean: Tensor, seed: int = 0) -> tuple[int, float]:
    """Number of latent dimensions whose posterior mean, (N, k), varies over the data by more than ACTIVE_VARIANCE.

    The second number is its standard error, by resampling the N examples BOOTSTRAP times.
    """
    mean = mean.double() - mean.double().mean(0)  # centred: no cancellation in E[m^2] - E[m]^2
    n = len(mean)
    count = int((mean.square().mean(0) > ACTIVE_VARIANCE).sum())
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for _ in range(BOOTSTRAP):
        weights = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double() / n
        variance = weights @ mean.square() - (weights @ mean).square()
        counts.append((variance > ACTIVE_VARIANCE).sum())
    return count, torch.stack(counts).double().std().item()
