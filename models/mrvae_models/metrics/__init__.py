"""Metrics of a model at one beta, by name.

    METRICS["mi"](model, load("digits", "test"), 0.5)        # 8.93, in METRICS["mi"].unit

A metric is called as metric(model, dataset, beta, **options) and returns a float; its own options have defaults, and
those that most share are batch_size, seed (the noise is the same at every beta) and calibration (curve.evaluate has
them). One file a family; a metric of your own is a function of (model, dataset, beta), as "file.py:function" where
commands take a name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..curve import Examples, evaluate
from .area import area_under_curve, area_with_error, common_interval
from .bound import importance_weighted_bound
from .calibration import of_calibration
from .digits import frechet_digits
from .factors import factors_of
from .frechet import check_images, fid, frechet_distance, inception_file
from .gap import mig, mig_discretised
from .gaussian_bound import nll_discretised, nll_implied, nll_optimal, nll_optimal_weighted
from .information import dimension_wise_kl, marginal_kl, mutual_information, total_correlation
from .probes import beta_vae_score, labels_of, linear_probe
from .requirements import need

__all__ = [
    "METRICS",
    "Metric",
    "area_under_curve",
    "area_with_error",
    "common_interval",
    "frechet_distance",
]


@dataclass(frozen=True)
class Metric:
    """A metric, what it is measured in, which way is better, a line that says what it is, and what it needs."""

    function: Callable[..., float]
    unit: str
    best: str | None  # "min", "max", or None where neither is
    help: str
    check: Callable[[], object] = lambda: None  # raises where a package or a file that it needs is not there
    accepts: Callable[[Any], object] = lambda dataset: None  # raises where a data set has not what it is of

    def __call__(self, model: nn.Module, dataset: Any, beta: float, **options: Any) -> float:
        return self.function(model, dataset, beta, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        """The function's: which options it takes."""
        return inspect.signature(self.function)


def active_units(
    model: nn.Module, dataset: Examples, beta: float, batch_size: int = 500, calibration: Tensor | None = None
) -> float:
    """Latent dimensions whose posterior mean varies over the set by more than 0.01 (Burda et al., 2016)."""
    return float(evaluate(model, dataset, [beta], batch_size, calibration=calibration).points[0].active_units)


def _of_curve(name: str) -> Callable[..., float]:
    def quantity(
        model: nn.Module,
        dataset: Examples,
        beta: float,
        batch_size: int = 500,
        samples: int = 1,
        seed: int = 0,
        calibration: Tensor | None = None,
    ) -> float:
        return getattr(evaluate(model, dataset, [beta], batch_size, samples, seed, calibration).points[0], name)

    return quantity


def _sklearn_for(name: str) -> Callable[[], None]:
    return functools.partial(need, "sklearn", name)


def _factors_for(name: str, leave_out: tuple[str, ...] = ()) -> Callable[[Any], object]:
    return functools.partial(factors_of, leave_out=leave_out, wanted_by=name)


METRICS: dict[str, Metric] = {
    "rate": Metric(_of_curve("rate"), "nats", None, "rate R, KL(q(z|x) || p(z))"),
    "distortion": Metric(_of_curve("distortion"), "nats", "min", "distortion D, -log p(x|z)"),
    "objective": Metric(_of_curve("objective"), "nats", "min", "D + beta R"),
    "elbo": Metric(_of_curve("elbo"), "nats", "max", "-(D + R)"),
    "iwae": Metric(importance_weighted_bound, "nats", "max", "importance-weighted bound on log p(x), 100 draws"),
    "nll_implied": Metric(nll_implied, "nats", "min", "bound on -log p at the variance that beta implies (sigma-VAE)"),
    "nll_optimal": Metric(nll_optimal, "nats", "min", "bound on -log p at the best constant variance in training"),
    "nll_optimal_iw": Metric(nll_optimal_weighted, "nats", "min", "the same, importance-weighted, 100 draws"),
    "nll_discretised": Metric(nll_discretised, "nats", "min", "bound on -log P of 256 levels"),
    "variance_ratio": Metric(of_calibration("ratio"), "of 1", None, "predicted variance over mean squared error"),
    "variance_bin_error": Metric(
        of_calibration("bin_error"), "nats", "min", "|log(predicted / empirical variance)| over bins of the predicted"
    ),
    "coverage_error": Metric(
        of_calibration("coverage_error"), "of 1", "min", "|coverage - level| of a Gaussian decoder's central intervals"
    ),
    "active_units": Metric(active_units, "latent dimensions", None, "latent dimensions in use"),
    "mi": Metric(mutual_information, "nats", None, "mutual information of x and z"),
    "marginal_kl": Metric(marginal_kl, "nats", "min", "KL(q(z) || p(z)), q(z) the aggregate posterior"),
    "tc": Metric(total_correlation, "nats", "min", "total correlation of q(z)"),
    "dimension_wise_kl": Metric(dimension_wise_kl, "nats", "min", "sum over dimensions of KL(q(z_d) || p(z_d))"),
    "fid": Metric(
        fid,
        "distance squared",
        "min",
        "Frechet inception distance; its weights must be there",
        inception_file,
        check_images,
    ),
    "frechet_digits": Metric(
        frechet_digits,
        "distance squared",
        "min",
        "Frechet distance by a classifier of the embedded digits: no FID",
        accepts=check_images,
    ),
    "mig": Metric(
        mig,
        "of 1",
        "max",
        "mutual information gap of Chen et al. (needs factors)",
        accepts=_factors_for("mig", ("shape",)),
    ),
    "mig_discretised": Metric(
        mig_discretised,
        "of 1",
        "max",
        "disentanglement_lib's MIG (needs factors)",
        _sklearn_for("mig_discretised"),
        _factors_for("mig_discretised"),
    ),
    "beta_vae_score": Metric(
        beta_vae_score,
        "of 1",
        "max",
        "score of Higgins et al. (needs factors)",
        _sklearn_for("beta_vae_score"),
        _factors_for("beta_vae_score"),
    ),
    "probe": Metric(
        linear_probe,
        "of 1",
        "max",
        "accuracy of a linear classifier of labels (needs labels)",
        _sklearn_for("probe"),
        labels_of,
    ),
}
