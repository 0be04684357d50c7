"""The mutual information gap, MIG, in its two definitions, which do not compare with each other.

    MIG = 1/F sum_v [I(z_j1; v) - I(z_j2; v)] / H(v),    j1, j2 the two latent dimensions that know most of factor v
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..options import expect
from .factors import factors_of
from .information import log_aggregate
from .posteriors import Posteriors, posteriors
from .requirements import need

SAMPLES = 10_000
BINS = 20


def gap(information: Tensor) -> float:
    """The mean over factors of the difference between the two largest; information: (k, F), in parts of H(v)."""
    if information.shape[0] < 2:
        raise ValueError("a gap needs two latent dimensions at least; the network has one")
    largest = information.topk(2, dim=0).values
    return (largest[0] - largest[1]).mean().item()


def marginal_entropies(over: Posteriors, z: Tensor) -> Tensor:
    """H(z_d) of the mixture of `over`, (k,), nats: -mean over the draws z, (S, k), of log q(z_d)."""
    _, marginals = log_aggregate(z, over, dimensions=True)
    assert marginals is not None
    return -marginals.mean(0)


def factor_information(over: Posteriors, classes: Tensor, samples: int = SAMPLES, seed: int = 0) -> Tensor:
    """I(z_d; v_f) / H(v_f), (k, F), at least 0, with z_d of q(z | x), not of its mean (Chen et al., 2018).

    I = H(z_d) - sum_values p(value) H(z_d | v = value), p the part of the examples (N, F) of `classes` with it; each
    entropy over all examples concerned, at z of `samples` of them, drawn without replacement (all, where there are
    fewer). On a full grid p is 1 / size and H(v_f) log size, as in the paper.
    """
    z = over.draw(seed)
    generator = torch.Generator().manual_seed(seed)

    def entropies(rows: Tensor) -> Tensor:
        chosen = rows[torch.randperm(len(rows), generator=generator)[:samples].to(rows.device)]
        return marginal_entropies(over.take(rows), z[chosen])

    classes = classes.to(z.device)
    total = entropies(torch.arange(len(z), device=z.device))
    columns = []
    for values in classes.T:
        parts = torch.bincount(values).double() / len(values)
        conditional = torch.stack([entropies((values == value).nonzero()[:, 0]) for value in range(len(parts))])
        columns.append((total - parts @ conditional) / -(parts * parts.log()).sum())
    return torch.stack(columns, 1).clamp_min(0)


def mig(
    model: nn.Module,
    dataset: Any,
    beta: float,
    leave_out: tuple[str, ...] = ("shape",),
    entropy_samples: int = SAMPLES,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """The authors' MIG (Chen et al., 2018, Eqn. 6): information of z ~ q(z | x) on a factor, per the factor's entropy.

    As in their code the shape of dSprites is left out, and entropies come from 10,000 samples. From 0 to 1.
    It is defined on the full grid of factors, whose entropy is the log of their size; a part of the grid estimates it.
    The work is N * entropy_samples * k * (F + 1) densities: 3.7e11 for the 737,280 images of dSprites, for a GPU.
    ValueError for a set without factors.
    """
    expect(entropy_samples >= 1, "entropy_samples", entropy_samples, "a positive integer")
    factors = factors_of(dataset, leave_out, "mig")
    over = posteriors(model, dataset, beta, batch_size, calibration, "mig")
    return gap(factor_information(over, factors.classes, entropy_samples, seed))


def discretised_information(mean: Tensor, classes: Tensor, bins: int = BINS) -> Tensor:
    """I(bin of mean_d; v_f) / H(v_f), (k, F): codes cut into `bins` equal intervals between their extremes."""
    from sklearn.metrics import mutual_info_score

    columns = []
    for number, values in enumerate(classes.cpu().T.numpy()):
        entropy = mutual_info_score(values, values)
        if entropy == 0:
            raise ValueError(
                f"factor {number} has one value on the {len(values)} examples that were drawn, and so no information "
                "to find; expected two values or more: give more examples, or leave this factor out"
            )
        found = []
        for code in mean.cpu().T:
            low, high = code.min(), code.max()
            cut = ((code - low) / (high - low).clamp_min(1e-300) * bins).floor().clamp(0, bins - 1)
            found.append(mutual_info_score(cut.long().numpy(), values) / entropy)
        columns.append(torch.tensor(found, dtype=torch.float64))
    return torch.stack(columns, 1)


def mig_discretised(
    model: nn.Module,
    dataset: Any,
    beta: float,
    leave_out: tuple[str, ...] = (),
    examples: int = SAMPLES,
    bins: int = BINS,
    batch_size: int = 500,
    seed: int = 0,
    calibration: Tensor | None = None,
) -> float:
    """disentanglement_lib's MIG (Locatello et al., 2019): posterior means in 20 bins, information per factor entropy.

    Of `examples` of the set, drawn without replacement (all, where there are fewer), with all factors of two values or
    more. ModuleNotFoundError without scikit-learn.
    """
    need("sklearn", "mig_discretised")
    expect(examples >= 2, "examples", examples, "2 or more")
    expect(bins >= 2, "bins", bins, "2 or more")
    factors = factors_of(dataset, leave_out, "mig_discretised")
    mean = posteriors(model, dataset, beta, batch_size, calibration, "mig_discretised").mean
    rows = torch.randperm(len(mean), generator=torch.Generator().manual_seed(seed))[:examples]
    return gap(discretised_information(mean[rows.to(mean.device)], factors.classes[rows], bins))
