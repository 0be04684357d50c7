"""The variance that a Gaussian likelihood learns or computes, and how it depends on beta."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mrvae_models.likelihoods import Gaussian, GaussianImage, GaussianOptimal, GaussianShared, likelihood
from mrvae_models.likelihoods.sigma_of_beta import (
    Knots,
    LearnedLogSigma,
    RunningVariance,
    best_variances,
    towards_best,
)
from mrvae_models.objectives import beta_vae_terms
from scipy.optimize import minimize_scalar

RANGE = (0.01, 10.0)


def batch(n=6, shape=(1, 3, 4), seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, dtype=torch.float64, generator=generator)
    return x, x + 0.1 * torch.randn(n, *shape, dtype=torch.float64, generator=generator)


# One sigma


def test_optimal_sigma_of_a_case_by_hand():
    x, mean = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.1, 0.8], [0.5, 0.3]])
    # squared errors 0.01, 0.04, 0 and 0.04: the batch's MSE is 0.0225, the examples' 0.025 and 0.02
    model = GaussianOptimal().train()
    nats = model.distortion(mean, x)
    expected = [math.log(2 * math.pi * 0.0225) + error / (2 * 0.0225) for error in (0.05, 0.04)]
    torch.testing.assert_close(nats, torch.tensor(expected))
    assert nats.mean().item() == pytest.approx(math.log(2 * math.pi * 0.0225) + 1, rel=1e-6)
    assert model.sigma == pytest.approx(0.15, rel=1e-6)
    image = GaussianImage().train()
    expected = [math.log(2 * math.pi * mse) + 1 for mse in (0.025, 0.02)]
    for mode in (True, False):
        torch.testing.assert_close(image.train(mode).distortion(mean, x), torch.tensor(expected))
    assert image.sigma == pytest.approx(0.15, rel=1e-6)


def test_optimal_sigma_is_that_of_a_numerical_minimiser():
    x, mean = batch()
    best = minimize_scalar(
        lambda log_sigma: Gaussian(math.exp(log_sigma)).distortion(mean, x).sum().item(), bounds=(-6, 1),
        method="bounded", options={"xatol": 1e-10},
    )
    model = GaussianOptimal().double().train()
    assert model.distortion(mean, x).sum().item() == pytest.approx(best.fun, rel=1e-12)
    assert model.sigma == pytest.approx(math.exp(best.x), rel=1e-6)
    each = [
        minimize_scalar(
            lambda log_sigma, i=i: Gaussian(math.exp(log_sigma)).distortion(mean[i : i + 1], x[i : i + 1]).item(),
            bounds=(-6, 1), method="bounded",
        ).fun
        for i in range(len(x))
    ]
    torch.testing.assert_close(
        GaussianImage().double().distortion(mean, x), torch.tensor(each, dtype=torch.float64), rtol=1e-8, atol=1e-8
    )


def test_gradient_of_the_optimal_sigma_is_that_of_log_mse():
    x, mean = batch()
    mean.requires_grad_()
    (found,) = torch.autograd.grad(GaussianOptimal().double().train().distortion(mean, x).sum(), mean)
    mse = (x - mean).square().mean()
    (expected,) = torch.autograd.grad(len(x) * 12 / 2 * (2 * math.pi * mse).log(), mean)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    # of one example, whose sigma is the batch's: sigma changes with every mean
    (found,) = torch.autograd.grad(GaussianOptimal().double().train().distortion(mean, x)[0], mean)
    assert (found[1:].abs() > 0).all()


def test_learned_sigma_comes_to_the_optimal_one():
    x, mean = batch()
    model = GaussianShared().double()
    assert model.sigma == pytest.approx(1, rel=1e-6)
    optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe", max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = model.distortion(mean, x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert model.sigma == pytest.approx((x - mean).square().mean().sqrt().item(), rel=1e-5)
    torch.testing.assert_close(model.distortion(mean, x), Gaussian(model.sigma).distortion(mean, x), rtol=1e-9, atol=0)


def test_evaluation_takes_the_running_average_of_training():
    model = GaussianOptimal(decay=0.5).double().train()
    x = torch.zeros(2, 4).double()
    assert model.sigma == 1  # nothing was seen
    for error in (1.0, 0.2, 0.1):
        model.distortion(x + error, x)
    expected = (0.125 * 1.0 + 0.25 * 0.04 + 0.5 * 0.01) / 0.875
    assert model.sigma == pytest.approx(math.sqrt(expected), rel=1e-12)
    model.eval()
    torch.testing.assert_close(model.distortion(x + 0.7, x), Gaussian(math.sqrt(expected)).distortion(x + 0.7, x))
    assert model.sigma == pytest.approx(math.sqrt(expected), rel=1e-12)
    restored = GaussianOptimal().double()
    restored.load_state_dict(model.state_dict())
    assert restored.sigma == model.sigma


def test_running_average_of_a_network_in_half_precision_stays_float32():
    model = GaussianOptimal()
    assert {buffer.dtype for buffer in model.half().buffers()} == {torch.float32}
    assert {buffer.dtype for buffer in model.double().buffers()} == {torch.float64}
    model = GaussianOptimal().bfloat16().train()
    for _ in range(300):
        nats = model.distortion(torch.full((2, 4), 0.5).bfloat16(), torch.full((2, 4), 0.25).bfloat16())
    assert nats.dtype == torch.float32 and model.sigma == pytest.approx(0.25, rel=1e-5)


def test_a_learned_sigma_of_a_network_in_half_precision_is_learnt():
    """In bfloat16 steps of 0.01 are lost next to -2: it stayed at 0.063 where 0.05 is likeliest."""
    with_half, alike = GaussianShared().bfloat16(), GaussianShared()
    assert [p.dtype for p in with_half.parameters()] == [torch.float32]
    torch.manual_seed(0)
    mean = torch.rand(32, 3, 8, 8)
    x = mean + 0.05 * torch.randn_like(mean)
    for model in (with_half, alike):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(600):
            optimizer.zero_grad()
            model.distortion(mean, x).mean().backward()
            optimizer.step()
        assert model.sigma == pytest.approx(0.05, rel=0.02)
    assert with_half.sigma == alike.sigma


def test_half_precision_and_back_keeps_what_was_measured():
    model = GaussianOptimal().train()
    model.distortion(torch.zeros(2, 4), torch.full((2, 4), 0.3))
    before = model.sigma
    assert model.bfloat16().float().sigma == before


# A sigma for every beta


def test_weights_of_knots_are_a_partition_and_interpolate_linearly():
    knots = Knots(RANGE, 4)
    betas = torch.tensor([0.001, 0.01, 0.05, 0.1, 0.3, 1.0, 7.0, 10.0, 50.0], dtype=torch.float64)
    weights = knots.weights(betas, betas)
    assert weights.shape == (9, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(9).double())
    at_knots = torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64).log()
    torch.testing.assert_close(weights @ at_knots, betas.clamp(*RANGE).log())
    assert (weights > 1e-12).sum(1).max() == 2
    torch.testing.assert_close(knots.weights(0.3, betas), weights[4:5])
    torch.testing.assert_close(knots.weights(torch.tensor(0.3).double(), betas), weights[4:5])
    for beta in (None, 0.0, math.nan):
        with pytest.raises(ValueError, match="beta"):
            knots.weights(beta, betas)


def test_variances_at_knots_are_means_of_the_errors_near_them_and_then_the_likeliest():
    model = GaussianOptimal(beta_range=RANGE, knots=4).double().train()
    x, mean = batch(5)
    beta = torch.tensor([0.01, 0.1, 0.1, 10**-0.5, 5.0], dtype=torch.float64)
    errors = (x - mean).square().flatten(1).mean(1)
    # by hand: knots at 0.01, 0.1, 1 and 10; 10^-0.5 is half-way between the second and the third
    last = math.log10(5.0)
    knots = [
        errors[0],
        (errors[1] + errors[2] + 0.5 * errors[3]) / 2.5,
        (0.5 * errors[3] + (1 - last) * errors[4]) / (1.5 - last),
        errors[4],
    ]
    variances = torch.stack(
        [knots[0], knots[1], knots[1], (knots[1] * knots[2]).sqrt(), knots[2] ** (1 - last) * knots[3] ** last]
    )
    nats = model.distortion(mean, x, beta)
    found = model.sigma_at(torch.tensor([0.01, 0.1, 1.0, 10.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.stack(knots).sqrt(), rtol=1e-6, atol=0)
    assert model.sigma_at(0.1).dim() == 0
    # the second step: each knot's variance times the mean of errors over variances near it
    weights = model.knots.weights(beta, errors)
    second = torch.stack(knots) * (weights.T @ (errors / variances)) / weights.sum(0)
    torch.testing.assert_close(towards_best(torch.stack(knots), errors, weights), second, rtol=1e-10, atol=0)
    third = towards_best(second, errors, weights)
    torch.testing.assert_close(best_variances(errors, weights, 1e-9), third, rtol=1e-10, atol=0)
    variances = torch.exp(weights @ third.log())
    expected = 6 * (2 * math.pi * variances).log() + 12 * errors / (2 * variances)
    torch.testing.assert_close(nats, expected, rtol=1e-10, atol=1e-10)


def test_many_steps_end_at_the_likeliest_variances():
    generator = torch.Generator().manual_seed(0)
    beta = torch.exp(math.log(0.01) + torch.rand(60, generator=generator, dtype=torch.float64) * math.log(1000))
    errors = 0.01 * beta**0.6 * (0.5 + torch.rand(60, generator=generator, dtype=torch.float64))
    weights = Knots(RANGE, 5).weights(beta, errors)
    variances = errors.mean().expand(5)
    for _ in range(500):
        variances = towards_best(variances, errors, weights)
    log_variances = variances.log().requires_grad_()
    s = torch.exp(weights @ log_variances)
    (slope,) = torch.autograd.grad((s.log() + errors / s).sum(), log_variances)
    assert slope.abs().max() < 1e-8


@pytest.mark.parametrize("beta", [0.03, torch.tensor(0.03)])
def test_with_one_beta_a_batch_the_optimal_sigma_is_the_batchs(beta):
    x, mean = batch()
    found = GaussianOptimal(beta_range=RANGE).double().train().distortion(mean, x, beta)
    torch.testing.assert_close(found, GaussianOptimal().double().train().distortion(mean, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal"])
def test_sigma_follows_the_decoders_error_along_beta(name):
    """Errors of variance v(beta) = 0.01 beta^0.6: sigma(beta) is learned from one beta an example."""
    generator = torch.Generator().manual_seed(0)
    model = likelihood(name, **({"sigma": 0.1} if name == "gaussian-shared" else {"decay": 0.95}), beta_range=RANGE)
    unused = torch.nn.Parameter(torch.zeros(1))  # an optimiser of nothing is an error
    optimizer = torch.optim.Adam([*model.parameters(), unused], lr=0.02)
    for _ in range(300):
        beta = torch.exp(math.log(0.01) + torch.rand(128, generator=generator) * math.log(1000))
        mean = torch.full((128, 30), 0.5)
        x = mean + 0.1 * beta.pow(0.3).unsqueeze(1) * torch.randn(128, 30, generator=generator)
        optimizer.zero_grad()
        (model.distortion(mean, x, beta).mean() + 0 * unused.sum()).backward()
        optimizer.step()
    betas = torch.tensor([0.01, 0.05, 0.7, 3.0, 10.0])
    torch.testing.assert_close(model.eval().sigma_at(betas), 0.1 * betas.pow(0.3), rtol=0.03, atol=0)


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal", "gaussian-image", "discretized-logistic"])
def test_the_likelihood_at_one_beta_is_a_plain_one_with_its_numbers(name):
    model = likelihood(name, beta_range=RANGE, knots=5).double()
    x, mean = batch(16)
    x = (x * 255).round() / 255
    if hasattr(model, "running"):
        model.train().distortion(mean, x, torch.logspace(-2, 1, 16, dtype=torch.float64))
    else:
        next(model.parameters()).data = torch.tensor([-4.0, -3.0, -2.5, -1.0, 0.0]).double()
    model.eval()
    assert model.depends_on_beta
    for beta in (0.004, 0.02, 0.9, 10.0):
        one = model.at(beta)
        assert not one.depends_on_beta and one.at(3.0) is one
        torch.testing.assert_close(one.distortion(mean, x), model.distortion(mean, x, beta), rtol=1e-12, atol=1e-12)
        drawn = [
            m.sample(mean, torch.Generator().manual_seed(1), beta=b) for m, b in ((one, None), (model, beta))
        ]
        torch.testing.assert_close(*drawn)
        plain = likelihood(name).double()
        plain.load_state_dict(one.state_dict())  # as a baked model is read
        torch.testing.assert_close(plain.eval().distortion(mean, x), one.distortion(mean, x))
    if name != "gaussian-image":
        with pytest.raises(ValueError, match="pass beta="):
            model.distortion(mean, x)
    with pytest.raises(ValueError, match="pass beta="):
        model.sample(mean)
    assert repr(model.at(1.0)) == repr(model)  # runs are compared by it


def test_running_average_moves_only_the_knots_that_were_near():
    running = RunningVariance(Knots(RANGE, 3), 0.9, 1e-6).double()
    assert running.values().tolist() == [1, 1, 1]
    knot = torch.eye(3).double()
    running.update(torch.tensor([0.5]), knot[:1])
    assert running.values().tolist() == pytest.approx([0.5, 0.5, 0.5])  # of the nearest that was seen
    running.update(torch.tensor([0.4, 0.2]), knot[[2, 2]])
    assert running.values().tolist() == pytest.approx([0.5, 0.5, 0.3])
    first, kept = 0.5 * (1 - 0.9**3), 0.9**1.5  # three knots: a batch for one counts threefold
    running.update(torch.tensor([0.1, 0.2]), knot[[0, 1]])
    first = (kept * first + (1 - kept) * 0.1) / (kept * (1 - 0.9**3) + 1 - kept)
    assert running.values().tolist() == pytest.approx([first, 0.2, 0.3])


def test_sigma_starts_where_it_is_told_whatever_the_clip():
    for minimum in (-6.0, -3.0):
        for sigma in (0.06, 1.0, 20.0):
            learned = LearnedLogSigma(Knots(RANGE, 3), sigma, minimum)
            assert learned(0.5, learned.log_sigma).exp().item() == pytest.approx(sigma, rel=1e-5)


def test_the_objective_gives_the_likelihood_its_beta():
    from mrvae_models.networks import build

    torch.manual_seed(0)
    network = build("mlp", (4,), 2, hidden=(5,), likelihood=GaussianShared(beta_range=RANGE, knots=2))
    network.likelihood.scale.log_sigma.data = torch.tensor([-2.0, -1.0])
    x, beta = torch.rand(3, 4), torch.tensor([0.01, 0.3, 10.0])
    output = network(x)
    terms = beta_vae_terms(output, x, beta, network.likelihood)
    for i in range(3):
        alone = network.likelihood.distortion(output.parameters[i : i + 1], x[i : i + 1], beta[i].item())
        torch.testing.assert_close(terms.distortion[i : i + 1], alone)


def test_a_copy_does_not_share_the_average():
    model = GaussianOptimal().train()
    other = copy.deepcopy(model)
    model.distortion(torch.zeros(2, 3), torch.full((2, 3), 0.5))
    assert other.sigma == 1 and model.sigma == pytest.approx(0.5)
