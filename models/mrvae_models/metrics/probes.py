"""What a linear classifier reads from codes: labels (the probe), and which factor two images share (beta-VAE score).

Codes are posterior means. The classifier is scikit-learn's LogisticRegression on standardised codes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..options import expect
from .factors import factors_of
from .posteriors import posteriors
from .requirements import need

TEST_PART = 0.2


def accuracy(train_codes: Tensor, train_classes: Tensor, test_codes: Tensor, test_classes: Tensor) -> float:
    """Part of the test rows that a linear classifier, fitted on the training rows, gets right; (n, k) and (n,) each."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    classifier.fit(train_codes.cpu().numpy(), train_classes.cpu().numpy())
    return float(classifier.score(test_codes.cpu().numpy(), test_classes.cpu().numpy()))


def labels_of(dataset: Any) -> Tensor:
    """(N,) classes; ValueError for a set without labels, or of one class."""
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise ValueError(f"probe needs labels, dataset.labels of shape (N,); this {type(dataset).__name__} has none")
    labels = torch.as_tensor(labels)
    if len(labels) != len(dataset.examples) or len(labels.unique()) < 2:
        raise ValueError(
            f"{len(labels)} labels of {len(labels.unique())} classes for {len(dataset.examples)} examples; expected "
            "one an example, of two classes at least"
        )
    return labels


def linear_probe(
    model: nn.Module,
    dataset: Any,
    beta: float,
    train: Any = None,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """Accuracy on `dataset` of a linear classifier of labels from codes, fitted on `train`, 0 to 1.

    Without `train`, a fifth of the set is held out by `seed` and tested on, and the classifier fitted on the rest.
    ValueError for a set without labels, and for fewer than 5 examples to split; ModuleNotFoundError without
    scikit-learn.
    """
    need("sklearn", "probe")
    labels = labels_of(dataset)
    codes = posteriors(model, dataset, beta, batch_size, calibration, "the probe").mean
    if train is not None:
        fit_codes = posteriors(model, train, beta, batch_size, calibration, "the probe").mean
        return accuracy(fit_codes, labels_of(train), codes, labels)
    expect(len(labels) >= 5, "the number of examples", len(labels), "5 or more, or train=, another set to fit on")
    rows = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(codes.device)
    test, fit = rows[: int(TEST_PART * len(rows))], rows[int(TEST_PART * len(rows)) :]
    return accuracy(codes[fit], labels[fit.cpu()], codes[test], labels[test.cpu()])


def factor_differences(
    codes: Tensor, classes: Tensor, votes: int, pairs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """mean over pairs of |code - code'|, (votes, k), and the factor that each pair of images shares, (votes,).

    codes (N, k), classes (N, F). For each vote a factor is drawn, and `pairs` times an example and another (or itself)
    with the same value of that factor, both uniformly: on a full grid all other factors are independent then.
    """
    n = len(codes)
    shared = torch.randint(classes.shape[1], (votes,), generator=generator)
    differences = codes.new_empty(votes, codes.shape[1])
    for factor in range(classes.shape[1]):
        rows = (shared == factor).nonzero()[:, 0]
        first = torch.randint(n, (len(rows), pairs), generator=generator)
        order = classes[:, factor].argsort(stable=True)  # examples by value: those of a value are neighbours
        counts = torch.bincount(classes[:, factor])
        value = classes[first, factor]
        uniform = torch.rand(value.shape, generator=generator, dtype=torch.float64)
        place = (uniform * counts[value]).long().clamp_max(counts[value] - 1)
        second = order[(counts.cumsum(0) - counts)[value] + place]
        for part in range(0, len(rows), 1000):  # 1000 votes at a time: 64,000 pairs of k numbers
            one, two = codes[first[part : part + 1000]], codes[second[part : part + 1000]]
            differences[rows[part : part + 1000]] = (one - two).abs().mean(1)
    return differences, shared


def beta_vae_score(
    model: nn.Module,
    dataset: Any,
    beta: float,
    votes: int = 10_000,
    pairs: int = 64,
    leave_out: tuple[str, ...] = (),
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """Accuracy in telling, from mean |code - code'| over pairs of images, which factor the pairs share, 0 to 1.

    Higgins et al. (2017). votes: training rows of the linear classifier; half as many, drawn apart, test it.
    ValueError for a set without factors, or with one only; ModuleNotFoundError without scikit-learn.
    """
    need("sklearn", "beta_vae_score")
    expect(votes >= 10, "votes", votes, "10 or more")
    expect(pairs >= 1, "pairs", pairs, "a positive integer")
    factors = factors_of(dataset, leave_out, "beta_vae_score")
    expect(len(factors.names) > 1, "the factors", factors.names, "two or more to tell apart")
    codes = posteriors(model, dataset, beta, batch_size, calibration, "beta_vae_score").mean.cpu()
    generator = torch.Generator().manual_seed(seed)
    train, test = (
        factor_differences(codes, factors.classes, count, pairs, generator) for count in (votes, votes // 2)
    )
    return accuracy(*train, *test)
