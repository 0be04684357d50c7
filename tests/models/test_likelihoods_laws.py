"""Each likelihood as a law of x: it sums to one, samples follow it, and it is finite with its gradient everywhere."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from likelihood_cases import CASES, DENSITIES, OF_LEVELS, chi_square_bound, levels, log_integral, made, parameters_for
from mrvae_models.likelihood_names import LIKELIHOOD_NAMES, LIKELIHOOD_OPTIONS
from mrvae_models.likelihoods import LIKELIHOODS, Bernoulli, TextCategorical, convert, likelihood, perplexity
from mrvae_models.likelihoods.numerics import (
    log1mexp,
    log_gamma_ratio,
    log_logistic_mass,
    log_ndtr,
    log_normal_mass,
    soft_clip,
)
from torch import distributions

DRAWS = 20_000
ALL_LEVELS = [*[(name, {}) for name in OF_LEVELS], *[(f"discretized-{law}", {"scale": "value"}) for law in
              ("gaussian", "logistic")]]


# The sum and the integral of p


@pytest.mark.parametrize(("name", "options"), ALL_LEVELS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_probabilities_of_the_levels_sum_to_one(name, options, spread):
    model = made(name, **options)
    for seed in range(3):
        parameters = parameters_for(model, (1,), 1, seed, spread).expand(256, -1)
        total = model.log_prob(parameters, levels().unsqueeze(1)).exp().sum().item()
        assert total == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", ["logistic-mixture", "categorical", "discretized-logistic"])
def test_probabilities_of_a_pixel_of_two_channels_sum_to_one(name):
    model = made(name)
    parameters = parameters_for(model, (2, 1, 1), 1, 1)
    pairs = torch.cartesian_prod(levels(), levels()).view(-1, 2, 1, 1)
    chunks = [model.log_prob(parameters.expand(len(x), -1, -1, -1), x) for x in pairs.split(8192)]
    assert torch.cat(chunks).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_bernoulli_and_text_sum_to_one():
    logits = torch.tensor([[0.3, -2.0]], dtype=torch.float64).expand(4, 2)
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=torch.float64)
    assert Bernoulli().log_prob(logits, x).exp().sum().item() == pytest.approx(1, abs=1e-14)
    sentences = torch.tensor(list(itertools.product(range(1, 5), repeat=2)))
    text = torch.randn(1, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    total = TextCategorical(padding=0).log_prob(text.expand(16, -1, -1), sentences).exp().sum().item()
    p = text.softmax(-1)[0]
    assert total == pytest.approx(((1 - p[0, 0]) * (1 - p[1, 0])).item(), abs=1e-14)  # 0 is no token


@pytest.mark.parametrize("name", DENSITIES)
def test_densities_integrate_to_one(name):
    model = made(name)
    for seed in range(3):
        parameters = parameters_for(model, (1,), 1, seed)
        centre = parameters[0, 0].item()
        t = torch.linspace(-60, 60, 120_001, dtype=torch.float64)
        x = centre + 0.05 * torch.sinh(t)  # tails of Student's t fall slowly: even steps of asinh(x)
        log_density = model.log_prob(parameters.expand(len(t), -1), x.unsqueeze(1)) + torch.cosh(t).log()
        assert log_integral(log_density, t) + math.log(0.05) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("name", ["gaussian-shared", "gaussian-optimal", "discretized-gaussian"])
def test_with_a_sigma_for_every_beta_each_beta_has_a_law(name):
    model = likelihood(name, beta_range=(0.01, 10.0), knots=3).double()
    if name == "gaussian-optimal":
        mean = torch.full((300, 1), 0.5).double()
        beta = torch.logspace(-2, 1, 300, dtype=torch.float64)
        model.distortion(mean, mean + 0.1 * beta.sqrt().unsqueeze(1), beta)
    else:
        learned = model.scale if name == "gaussian-shared" else model.shared
        learned.log_sigma.data = torch.tensor([-3.0, -2.0, -0.5]).double()
    model.eval()
    totals, prices = [], []
    for beta in (0.003, 0.05, 2.0):
        if model.measure == "continuous":
            x = torch.linspace(-12, 13, 50_001, dtype=torch.float64)
            totals.append(log_integral(model.log_prob(torch.full((len(x), 1), 0.4).double(), x[:, None], beta), x))
        else:
            x = levels()
            totals.append(model.log_prob(torch.full((256, 1), 0.4).double(), x[:, None], beta).logsumexp(0).item())
        prices.append(model.distortion(torch.full((1, 1), 0.4).double(), torch.full((1, 1), 102 / 255).double(), beta))
    assert totals == pytest.approx([0, 0, 0], abs=1e-9)
    assert prices[0] < prices[1] < prices[2]  # a smaller sigma where the mean is right
    one = torch.tensor([0.003, 0.05, 2.0], dtype=torch.float64)
    together = model.distortion(torch.full((3, 1), 0.4).double(), torch.full((3, 1), 102 / 255).double(), one)
    torch.testing.assert_close(together, torch.cat(prices), rtol=1e-12, atol=1e-12)


def test_a_sigma_made_of_x_is_no_density_and_says_so():
    model = made("gaussian-image")
    assert not model.normalised and all(LIKELIHOODS[name].normalised for name in LIKELIHOODS if name != model.name)
    x = torch.linspace(-200, 200, 40_001, dtype=torch.float64)
    assert log_integral(model.log_prob(torch.zeros(len(x), 1).double(), x[:, None]), x) > math.log(2)


# Numbers


@pytest.mark.parametrize("mass", [log_normal_mass, log_logistic_mass])
@pytest.mark.parametrize("scale", [-6.0, -4.0, -1.0, 2.0, 6.0])
@pytest.mark.parametrize("level", [1, 100, 254])
@pytest.mark.parametrize("mean", [-3.0, 0.0, 0.3921, 0.99, 7.0])
def test_mass_of_a_bin_is_the_integral_of_the_density(mass, scale, level, mean):
    t = torch.linspace((level - 0.5) / 255, (level + 0.5) / 255, 20_001, dtype=torch.float64)
    z = (t - mean) / math.exp(scale)
    if mass is log_normal_mass:
        log_density = distributions.Normal(0.0, 1.0).log_prob(z)
    else:
        log_density = F.logsigmoid(z) + F.logsigmoid(-z)
    expected = log_integral(log_density, t) - scale
    level, mean, scale = (torch.tensor(float(value), dtype=torch.float64) for value in (level, mean, scale))
    assert mass(level, mean, scale).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    single = mass(level.float(), mean.float(), scale.float()).item()
    assert single == pytest.approx(expected, rel=2e-4, abs=2e-4)


def test_differences_of_logarithms_have_all_digits():
    x = torch.tensor([1e-12, 1e-3, 0.5, math.log(2), 1.0, 50.0, 700.0], dtype=torch.float64, requires_grad=True)
    expected = torch.tensor([math.log(-math.expm1(-value)) for value in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-13, atol=1e-15)
    (slope,) = torch.autograd.grad(log1mexp(x).sum(), x)
    torch.testing.assert_close(slope, 1 / torch.expm1(x.detach()), rtol=1e-13, atol=0)
    for value in (1e-3, 0.5, 1.0, 3.7, 200.0):
        expected = math.lgamma(value + 0.5) - math.lgamma(value)
        assert log_gamma_ratio(torch.tensor(value, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-12)
    assert log_gamma_ratio(torch.tensor(0.5).double()).item() == pytest.approx(-0.5 * math.log(math.pi), abs=1e-12)
    assert log_gamma_ratio(torch.tensor(1e6)).item() == pytest.approx(0.5 * math.log(1e6) - 1.25e-7, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_of_the_normal_distribution_function_and_its_slope(dtype):
    z = torch.tensor([-5e5, -200.0, -20.5, -20.0, -19.5, -3.0, 0.0, 4.0, 50.0], dtype=dtype, requires_grad=True)
    found = log_ndtr(z)
    (slope,) = torch.autograd.grad(found.sum(), z)
    exact, double = torch.float64, z.detach().double()
    t = torch.linspace(0, 40, 400_001, dtype=exact)  # Phi(z) / phi(z) = integral of exp(z t - t^2 / 2), z <= 0
    expected = []
    for value in double[:7].tolist():
        scale = max(1.0, -value)
        mills = log_integral(value * t / scale - 0.5 * (t / scale) ** 2, t) - math.log(scale)
        expected.append((mills - 0.5 * value**2 - 0.5 * math.log(2 * math.pi), math.exp(-mills)))
    values, slopes = torch.tensor(expected, dtype=exact).unbind(1)
    error = 1e-6 if dtype == torch.float32 else 1e-8  # the sum's own error
    torch.testing.assert_close(found[:7].double(), values, rtol=error, atol=error)
    torch.testing.assert_close(slope[:7].double(), slopes, rtol=20 * error, atol=0)
    assert found[-1] == 0 and slope[-1] < 1e-30 and -3.2e-5 < found[-2] < -3.1e-5


def test_soft_clip_is_the_papers():
    x = torch.tensor([-50.0, -6.0, 0.0, 6.0, 50.0], dtype=torch.float64)
    upper = 6 - torch.log1p(torch.exp(6 - x))
    torch.testing.assert_close(soft_clip(x, -6, 6), -6 + torch.log1p(torch.exp(upper + 6)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(soft_clip(x, -6)[2].item(), math.log1p(math.exp(6)) - 6, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["gaussian", "gaussian-shared", "gaussian-pixel", "student-t"])
def test_densities_are_those_of_torch_distributions(name):
    model = made(name)
    shape = (2, 3, 3)
    parameters = parameters_for(model, shape, 4) if name == "gaussian" else parameters_for(model, (18,), 4)
    parameters = parameters.view(4, -1, 3, 3)
    x = torch.rand(4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first, *more = parameters.chunk(model.numbers, 1)
    if name == "student-t":
        freedom = torch.exp(soft_clip(more[1], 0, 6))
        law = distributions.StudentT(freedom, first, torch.exp(soft_clip(more[0], -6, 6)))
    else:
        sigma = {"gaussian": 0.3, "gaussian-shared": 0.2}.get(name) or torch.exp(soft_clip(more[0], -6, 6))
        law = distributions.Normal(first, sigma)
    torch.testing.assert_close(model.log_prob(parameters, x), law.log_prob(x).sum((1, 2, 3)), rtol=1e-7, atol=1e-7)


def test_channels_of_a_mixture_share_the_choice_of_a_component():
    model = made("logistic-mixture", components=2)
    parameters = parameters_for(model, (3, 2, 2), 5)
    x = torch.randint(256, (5, 3, 2, 2), generator=torch.Generator().manual_seed(0)).double() / 255
    logits, means, scales = parameters[:, :2], parameters[:, 2:8], parameters[:, 8:]
    joint = []
    for j in range(2):
        mean, scale = means[:, 3 * j : 3 * j + 3], soft_clip(scales[:, 3 * j : 3 * j + 3], -7, 6)
        joint.append(logits.log_softmax(1)[:, j] + log_logistic_mass((255 * x).round(), mean, scale).sum(1))
    expected = torch.logaddexp(*joint).sum((1, 2))
    torch.testing.assert_close(model.log_prob(parameters, x), expected, rtol=1e-12, atol=1e-12)


def test_measures_differ_by_the_log_of_255_a_dimension():
    x = 100 / 255
    density = made("gaussian", sigma=0.2).distortion(torch.full((1, 4), 0.4).double(), torch.full((1, 4), x).double())
    mass = made("discretized-gaussian", sigma=0.2).distortion(
        torch.full((1, 4), 0.4).double(), torch.full((1, 4), x).double()
    )
    assert convert(density, 4, "continuous", "256 levels").item() == pytest.approx(mass.item(), abs=1e-4)
    assert convert(mass, 4, "256 levels", "continuous").item() == pytest.approx(density.item(), abs=1e-4)
    assert convert(3.0, 4, "continuous", "continuous") == 3.0
    with pytest.raises(ValueError, match="'2 levels'.*'continuous'"):
        convert(1.0, 1, "2 levels", "256 levels")


# Samples


@pytest.mark.parametrize(("name", "options"), ALL_LEVELS)
def test_samples_of_levels_follow_their_probabilities(name, options):
    model = made(name, **options)
    parameters = parameters_for(model, (1,), 1, 2)
    p = model.log_prob(parameters.expand(256, -1), levels().unsqueeze(1)).exp()
    drawn = model.sample(parameters.expand(DRAWS, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (DRAWS, 1)
    torch.testing.assert_close(drawn, (drawn * 255).round() / 255, rtol=0, atol=0)
    _check_counts(torch.bincount((drawn * 255).round().long()[:, 0], minlength=256), p)


def test_samples_of_a_mixture_follow_the_joint_law_of_the_channels():
    model = made("logistic-mixture", components=2)
    parameters = parameters_for(model, (2, 1, 1), 1)
    parameters[:, 6:] -= 2.0  # narrow: some tens of pairs
    pairs = torch.cartesian_prod(levels(), levels()).view(-1, 2, 1, 1)
    p = torch.cat([model.log_prob(parameters.expand(len(x), -1, -1, -1), x).exp() for x in pairs.split(8192)])
    drawn = (model.sample(parameters.expand(DRAWS, -1, -1, -1), torch.Generator().manual_seed(0)) * 255).round().long()
    _check_counts(torch.bincount((256 * drawn[:, 0] + drawn[:, 1]).flatten(), minlength=65536), p)


def _check_counts(counts, p):
    """Pearson's chi-square, cells of fewer than five expected taken together."""
    expected = p * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common].double(), counts[~common].sum().double().view(1)])
    expected = torch.cat([expected[common], expected[~common].sum().view(1)])
    kept = expected > 1e-3
    assert observed[~kept].sum() == 0
    statistic = ((observed - expected).square() / expected)[kept].sum().item()
    assert statistic < chi_square_bound(max(1, int(kept.sum()) - 1))


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_follow_their_density(name):
    """Kolmogorov and Smirnov's distance; above 2.3 / sqrt(n) with probability 5e-5."""
    model = made(name)
    parameters = parameters_for(model, (1,), 1, 2)
    t = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    x = parameters[0, 0] + 0.05 * torch.sinh(t)
    density = model.log_prob(parameters.expand(len(t), -1), x.unsqueeze(1)).exp() * 0.05 * torch.cosh(t)
    cdf = torch.cumulative_trapezoid(density, t)
    drawn = model.sample(parameters.expand(DRAWS, -1), torch.Generator().manual_seed(0))[:, 0].sort().values
    at = cdf[torch.searchsorted(x[1:].contiguous(), drawn).clamp_max(len(cdf) - 1)]
    steps = torch.arange(DRAWS + 1) / DRAWS
    distance = torch.maximum((at - steps[:-1]).abs().max(), (steps[1:] - at).abs().max()).item()
    assert distance < 2.3 / math.sqrt(DRAWS)


def test_a_sample_per_image_has_the_spread_of_the_errors_in_training():
    model = made("gaussian-image")
    mse = torch.tensor([[-0.1, 0.2, 0.0], [-0.3, 0.0, 0.1]]).double().square().mean().item()
    assert model.sigma == pytest.approx(math.sqrt(mse), rel=1e-6)
    drawn = model.sample(torch.zeros(DRAWS, 1).double(), torch.Generator().manual_seed(0))
    assert drawn.std().item() == pytest.approx(model.sigma, rel=5 / math.sqrt(2 * DRAWS))


@pytest.mark.parametrize("name", [name for name in LIKELIHOODS if not name.startswith("discretized")])
@pytest.mark.parametrize("shape", [(4,), (3, 2, 2)])
def test_mean_is_the_mean_of_samples_and_both_have_the_shape_of_the_data(name, shape):
    model = made(name)
    flat = parameters_for(model, (math.prod(shape),) if name != "logistic-mixture" else shape, 1, 3)
    if len(shape) == 3 and name != "logistic-mixture":
        flat = flat.view(1, *model.parameter_shape(shape))
    mean = model.mean(flat)
    assert mean.shape == (1, *shape)
    drawn = model.sample(flat.expand(4000, *flat.shape[1:]), torch.Generator().manual_seed(1))
    assert drawn.shape == (4000, *shape)
    rounding = 1 / 510 if name == "logistic-mixture" else 0.0
    spread = drawn.std(0) / math.sqrt(4000)
    assert ((drawn.mean(0) - mean[0]).abs() <= 5 * spread + rounding).all()


@pytest.mark.parametrize("name", ["discretized-gaussian", "discretized-logistic"])
def test_mean_of_a_discretised_law_is_exact_where_the_scale_is_a_level(name):
    model = made(name, scale="value")
    for location, log_scale, error in ((0.31, -5.5, 1e-6), (0.0, -3.0, 2e-3), (1.2, -2.0, 2e-3), (0.41, -6.9, 0.5)):
        parameters = torch.tensor([[location, log_scale]], dtype=torch.float64)
        p = model.log_prob(parameters.expand(256, -1), levels().unsqueeze(1)).exp()
        assert 255 * abs(model.mean(parameters).item() - (p @ levels()).item()) <= error
    shared = made(name)
    torch.testing.assert_close(shared.mean(torch.tensor([[-0.2, 0.3, 1.7]])), torch.tensor([[0.0, 0.3, 1.0]]))


# Gradients, and the ends of the range


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_finite_differences(name):
    model = made(name).train()
    shape = (2, 2, 1) if name == "logistic-mixture" else (4,)
    parameters = parameters_for(model, shape, 2).requires_grad_()
    x = torch.tensor([0, 1, 100, 128, 129, 200, 254, 255]).double().div(255).reshape(2, *shape)
    x = x if name != "bernoulli" else x.round()
    assert torch.autograd.gradcheck(lambda p: model.distortion(p, x), parameters)
    own = list(model.parameters())
    if own:
        assert torch.autograd.gradcheck(lambda value: _with(model, value, parameters.detach(), x), own[0])


def _with(model, value, parameters, x):
    (name,) = dict(model.named_parameters())
    return torch.func.functional_call(_Priced(model), {f"model.{name}": value}, (parameters, x))


class _Priced(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, parameters, x):
        return self.model.distortion(parameters, x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "options"), [*CASES.items(), *[item for item in ALL_LEVELS if item[1]]], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_infinite_at_the_extremes(name, options, dtype, training):
    model = likelihood(name, **options).to(dtype).train(training)
    for big in (0.0, 1.0, 50.0, 1e4):
        for signs in itertools.product((-1.0, 1.0), repeat=3):
            count = model.parameter_shape((2,))[0]
            parameters = torch.zeros(6, count, dtype=dtype)
            for i, sign in enumerate(signs):
                parameters[:, i * count // 3 : (i + 1) * count // 3] = sign * big
            parameters.requires_grad_()
            x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.2, 0.6], [1 / 255, 254 / 255]])
            nats = model.distortion(parameters, x.to(dtype))
            assert nats.shape == (6,) and nats.dtype == dtype and nats.isfinite().all()
            gradients = torch.autograd.grad(nats.sum(), [parameters, *model.parameters()])
            assert all(gradient.isfinite().all() for gradient in gradients)
            assert model.mean(parameters).isfinite().all()
            assert model.sample(parameters, torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("name", ["gaussian-optimal", "gaussian-image", "gaussian-shared", "gaussian-pixel"])
def test_variance_going_to_zero_stays_at_the_least(name):
    model = likelihood(name).train()
    x = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    parameters = torch.cat([x, torch.full_like(x, -1e6)], 1) if name == "gaussian-pixel" else x.clone()
    if name == "gaussian-shared":
        model.scale.log_sigma.data.fill_(-1e6)
    for _ in range(3):  # of a running average, more than its first step
        nats = model.distortion(parameters.requires_grad_(), x)
        sigma = model.sigma_of(parameters).max().item() if name == "gaussian-pixel" else model.sigma
        assert sigma == pytest.approx(math.exp(-6), rel=1e-5)
    torch.testing.assert_close(nats, torch.full((4,), 25 * (0.5 * math.log(2 * math.pi) - 6)), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(nats.sum(), parameters)
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_summed_in_float32(name):
    model = likelihood(name, **CASES[name])
    shape = (3, 8, 8)
    parameters = torch.randn(2, *model.parameter_shape(shape), generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randint(256, (2, *shape), generator=torch.Generator().manual_seed(1)).float() / 255
    nats = model.eval().distortion(parameters, x)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, model.distortion(parameters.float(), x))


@pytest.mark.parametrize("ranged", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_autocast_leaves_the_numbers_alone(name, ranged):
    """Products of matrices would be taken to 16 bits: a distortion was off by 90 nats of 20,000."""
    if ranged and "knots" not in LIKELIHOOD_OPTIONS[name]:
        pytest.skip("its sigma does not depend on beta")
    shape, beta = (3, 8, 8), torch.logspace(-2, 1, 16)
    model = likelihood(name, **CASES[name], **({"beta_range": (0.01, 10.0)} if ranged else {}))
    parameters = parameters_for(model, shape, 16).float()
    noise = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    x = (model.mean(parameters) + 0.05 * noise).clamp(0, 1)
    x = x.round() if model.measure == "2 levels" else (255 * x).round() / 255
    for mode in (True, False):
        plain, inside = copy.deepcopy(model).train(mode), copy.deepcopy(model).train(mode)
        expected = plain.distortion(parameters, x, beta)
        with torch.autocast("cpu", torch.bfloat16):
            found, mean = inside.distortion(parameters, x, beta), inside.mean(parameters)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(mean, plain.mean(parameters), rtol=1e-6, atol=1e-7)
        for name_of, buffer in plain.named_buffers():
            torch.testing.assert_close(inside.get_buffer(name_of), buffer, rtol=1e-6, atol=0)


def test_the_least_scale_is_one_that_float32_has():
    exact = torch.zeros(2, 4)
    for name in ("gaussian-image", "gaussian-optimal"):
        with pytest.raises(ValueError, match="min_log_sigma is -60; expected a number from -40"):
            likelihood(name, min_log_sigma=-60)
        model = likelihood(name, min_log_sigma=-40)
        assert model.distortion(exact, exact).tolist() == pytest.approx([2 * (math.log(2 * math.pi) - 80)] * 2)


def test_perplexity_of_what_no_float_holds():
    assert perplexity(7.0, 2) == pytest.approx(math.exp(3.5))
    assert perplexity(1000.0, 1) == math.inf and math.isnan(perplexity(math.nan, 1))


# Names and shapes


def test_names_and_options_are_those_for_the_help():
    import inspect

    assert tuple(LIKELIHOODS) == LIKELIHOOD_NAMES
    for name, kind in LIKELIHOODS.items():
        own = set(inspect.signature(kind.__init__).parameters) - {"self", "args", "kwargs"}
        assert own == set(LIKELIHOOD_OPTIONS[name]), name
        assert kind.name == name


@pytest.mark.parametrize("name", CASES)
def test_parameters_of_another_shape_are_refused(name):
    model = likelihood(name)
    shape = model.parameter_shape((3, 4, 4))
    with pytest.raises(ValueError, match=rf"{name}.*expected|expected.*{name}"):
        model.distortion(torch.zeros(2, shape[0] + 1, 4, 4), torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="expected"):
        model.distortion(torch.zeros(2, *shape), torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="expected"):
        model.distortion(torch.zeros(2, *shape), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: likelihood("bitwise", sigma=0.5), "sigma=0.5 given for likelihood 'bitwise'.*none"),
        (lambda: likelihood("gaussian", components=3), "components=3.*sigma"),
        (lambda: likelihood("logistic-mixture", components=0), "components is 0"),
        (lambda: likelihood("gaussian-shared", sigma=-1.0), "sigma is -1.0"),
        (lambda: likelihood("gaussian-shared", sigma=1e-4), "sigma is 0.0001.*clipped at -6.0"),
        (lambda: likelihood("gaussian-pixel", min_log_sigma=math.inf), "min_log_sigma is inf"),
        (lambda: likelihood("gaussian-optimal", decay=1.0), "decay is 1.0"),
        (lambda: likelihood("gaussian-optimal", knots=1), "knots is 1"),
        (lambda: likelihood("gaussian-optimal", beta_range=(1.0, 0.1)), r"beta_range is \(1.0, 0.1\)"),
        (lambda: likelihood("discretized-logistic", scale="pixel"), "scale is 'pixel'.*shared, value"),
        (
            lambda: likelihood("discretized-gaussian", sigma=0.1, scale="value"),
            "sigma is 0.1; expected none with scale='value'",
        ),
        (lambda: likelihood("discretized-logistic", scale="value", knots=5), "knots is 5; expected none with scale"),
        (lambda: likelihood("discretized-logistic", sigma=-1.0), "sigma is -1.0"),
        (lambda: likelihood("categorical", memory_limit=0), "memory_limit is 0"),
        (lambda: likelihood("categorical", memory_limit="x"), "memory_limit is 'x'; expected a positive number"),
        (lambda: likelihood("gaussian-image", decay="x"), "decay is 'x'; expected a number"),
        (lambda: likelihood("student-t", min_log_scale="x"), "min_log_scale is 'x'; expected a number from -40"),
        (lambda: likelihood("gaussian-pixel", min_log_sigma=True), "min_log_sigma is True; expected a number from -40"),
    ],
)
def test_options_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
