"""The VAE as a whole: its passes, draws, checks, and that torch can compile and export it."""

from __future__ import annotations

import subprocess
import sys

import mrvae_models
import pytest
import torch
from mrvae_models.likelihoods import Gaussian
from mrvae_models.networks import build
from mrvae_models.vae import VAEOutput


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return build("mlp", (1, 6, 6), 3, hidden=(8,))


def test_forward_is_encode_draw_decode(vae):
    x = torch.rand(5, 1, 6, 6)
    torch.manual_seed(1)
    out = vae(x)
    torch.manual_seed(1)
    noise = torch.randn(5, 3)
    mean, log_variance = vae.encode(x)
    torch.testing.assert_close(out.z, mean + torch.exp(log_variance / 2) * noise)
    torch.testing.assert_close(out.parameters, vae.decode(out.z))
    assert isinstance(out, VAEOutput) and out.mean.equal(mean) and out.log_variance.equal(log_variance)


def test_reconstruct_has_no_noise_and_lies_in_data_space(vae):
    x = torch.rand(5, 1, 6, 6)
    assert vae.reconstruct(x).equal(vae.reconstruct(x))
    torch.testing.assert_close(vae.reconstruct(x), torch.sigmoid(vae.decode(vae.encode(x)[0])))


def test_sample_is_repeated_by_its_generator(vae):
    first, second = (vae.sample(4, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first.shape == (4, 1, 6, 6) and first.equal(second)
    assert 0 <= first.min() and first.max() <= 1
    assert not vae.sample(4, torch.Generator().manual_seed(3)).equal(first)


def test_sample_of_a_gaussian_is_the_mean():
    vae = build("mlp", (4,), 2, likelihood=Gaussian(5.0))
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.sample(3, torch.Generator().manual_seed(0)), vae.decode(z))


@pytest.mark.parametrize("shape", [(5, 36), (5, 6, 6), (5, 3, 6, 6), (5, 1, 7, 6)])
def test_input_of_another_shape_is_refused(vae, shape):
    with pytest.raises(ValueError, match=r"built for \(N, 1, 6, 6\)"):
        vae(torch.rand(shape))


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 3, 1)])
def test_latent_of_another_shape_is_refused(vae, shape):
    with pytest.raises(ValueError, match=r"expected \(N, 3\)"):
        vae.decode(torch.zeros(shape))


def test_empty_batch_passes_through(vae):
    assert vae(torch.rand(0, 1, 6, 6)).parameters.shape == (0, 1, 6, 6)


def test_compiles_whole_and_exports(vae):
    x = torch.rand(5, 1, 6, 6)
    compiled = torch.compile(vae, fullgraph=True, dynamic=True, backend="aot_eager")
    assert compiled(x).parameters.shape == x.shape
    batch = torch.export.Dim("batch")
    exported = torch.export.export(vae, (x,), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(x[:2]).mean, vae.encode(x[:2])[0])


def test_public_names_are_lazy():
    code = (
        "import sys, mrvae_models; assert 'torch' not in sys.modules; mrvae_models.build; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert mrvae_models.build is build and mrvae_models.data.load.__name__ == "load"
    assert {"VAE", "beta_vae", "data", "networks"} <= set(dir(mrvae_models))
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        mrvae_models.missing  # noqa: B018
