"""The linear VAE against its closed form: the formula against independent optima, and one trained run against it."""

import math

import pytest
import torch
from mrvae_models.closed_form import eigenvalues, expected_linear, linear_optimum
from mrvae_models.config import TrainConfig
from mrvae_models.curve import at, log_spaced
from mrvae_models.data import load
from mrvae_models.objectives import rate

BETAS = log_spaced(0.01, 10, 10)


def objective_of(mean, log_variance, weight, offset, x, beta):
    return (expected_linear(mean, log_variance, weight, offset, x) + beta * rate(mean, log_variance)).mean().item()


@pytest.mark.parametrize("beta", [0.05, 0.7, 3.0])
def test_probabilistic_pca_reaches_the_formula(beta):
    # D*, E* and C* of Appendix A.1 (Eqn. 21 to 23), put into the objective itself
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 12, generator=generator).double() * torch.linspace(0.2, 2.5, 12) + 1.0
    centred = data - data.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(data))
    values, vectors = values.flip(0)[:5], vectors.flip(1)[:, :5]
    decoder = vectors * (values - beta).clamp(min=0).sqrt()
    squares = decoder.square().sum(0)
    mean = centred @ (decoder / (squares + beta))
    log_variance = torch.log(beta / (squares + beta)).expand_as(mean)
    found = objective_of(mean, log_variance, decoder, data.mean(0), data, beta)
    optimum = linear_optimum(eigenvalues(data), 5, beta)
    assert found == pytest.approx(optimum.distortion + beta * optimum.rate, rel=1e-10)


def test_no_descent_goes_below_the_formula():
    generator = torch.Generator().manual_seed(1)
    data = (torch.randn(200, 6, generator=generator) * torch.linspace(0.3, 2.0, 6)).double()
    beta, latent = 0.5, 3
    encoder = torch.randn(6, latent, generator=generator).double().mul(0.3).requires_grad_()
    decoder = torch.randn(6, latent, generator=generator).double().mul(0.3).requires_grad_()
    log_variance = torch.zeros(latent, dtype=torch.float64, requires_grad=True)
    parameters = [encoder, decoder, log_variance]
    optimizer = torch.optim.LBFGS(parameters, max_iter=2000, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    offset = data.mean(0)

    def loss():
        mean = (data - offset) @ encoder
        distortion = expected_linear(mean, log_variance.expand_as(mean), decoder, offset, data)
        return (distortion + beta * rate(mean, log_variance.expand_as(mean))).mean()

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    optimum = linear_optimum(eigenvalues(data), latent, beta)
    best = optimum.distortion + beta * optimum.rate
    assert best <= loss().item() + 1e-9
    assert loss().item() == pytest.approx(best, rel=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="beta is 0"):
        linear_optimum(torch.ones(3), 2, 0)
    with pytest.raises(ValueError, match="latent is 4; expected 1 to 3"):
        linear_optimum(torch.ones(3), 4, 1.0)


@pytest.mark.slow
def test_one_run_is_within_one_percent_of_the_optimum(tmp_path):
    from mrvae_models.training import train

    config = TrainConfig(network="linear", out=str(tmp_path / "run"), log_to=(), validate_every=100)
    result = train(config, progress=False)
    images = load("digits", "train").examples
    spectrum, x = eigenvalues(images), images.flatten(1).double()
    model = result.model.double()
    excess = []
    for beta in BETAS:
        with torch.no_grad(), at(model, beta):
            vae = model.network
            mean, log_variance = vae.encode(images.double())
            offset = vae.decode(torch.zeros(1, vae.latent).double()).flatten(1)
            weight = (vae.decode(torch.eye(vae.latent).double()).flatten(1) - offset).T
            found = objective_of(mean, log_variance, weight, offset[0], x, beta)
        optimum = linear_optimum(spectrum, vae.latent, beta)
        excess.append(found / (optimum.distortion + beta * optimum.rate) - 1)
    by_beta = zip(BETAS, excess, strict=True)
    print("excess over the optimum:", " ".join(f"{beta:.3g}: {100 * e:.2f} %" for beta, e in by_beta))
    print(f"mean {100 * sum(excess) / len(excess):.3f} %, worst {100 * max(excess):.3f} %")
    assert min(excess) > -1e-6 and all(map(math.isfinite, excess))
    assert sum(excess) / len(excess) <= 0.01
    assert max(excess) <= 0.02
