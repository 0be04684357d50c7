"""bake_run(): one beta of a trained run as a plain model on disk, in three forms, checked after writing.

OUT/model.safetensors, OUT/config.json   for load_model(): the network's own classes, no gate left
OUT/model.pt2      torch.export program, x -> (reconstruction, mean, log_variance) at the posterior mean, any batch
                   size; of a hierarchy x -> (reconstruction, mean, rates), every z at its posterior's mean
OUT/decoder.pt2    torch.export program, z -> image, to sample with: z ~ N(0, I), (N, latent); of a hierarchy the noise
                   of all its groups, from the top, whose priors the program computes as it goes down

Of videos both programs take as many frames as training had: model.pt2 as of a hierarchy, and decoder.pt2 (x, noise) ->
video, the first n_past frames of x and what is drawn to follow them.

Of text, with OUT/vocabulary.txt: model.pt2 is TeacherForced and decoder.pt2 NextToken of text_programs.py.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mrvae_kernels as mk

from .config import TrainConfig
from .curve import at, calibrated, calibration_batches, recalibration_noise
from .networks.hierarchy import Hierarchy
from .networks.lstm import SentenceVAE
from .networks.svg import SVG
from .option_changes import as_now
from .run import CONFIG, LAST, MODEL, OF_RANGE, VOCABULARY, load_model, replace_file, save_model, write_config
from .text_programs import NextToken, TeacherForced, example_inputs
from .vae import VAE

PROGRAM = "model.pt2"
DECODER = "decoder.pt2"

TOLERANCE = 1e-5
"""Largest difference allowed between gated and baked outputs, relative to the largest output, in float32."""


class Baked(NamedTuple):
    """What bake_run() wrote, and how far it is from the gated model."""

    directory: Path
    model: nn.Module
    difference: float  # relative to the largest output


class Reconstruction(nn.Module):
    """x, (N, *input_shape) -> (E[x | z = mean], mean, log_variance): deterministic, in data space.

    The third output of a hierarchy is its rates, (N, groups), as of a video, (N, latent).
    """

    def __init__(self, network: VAE | Hierarchy | SVG) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        network = self.network
        if isinstance(network, SVG):
            output = network.at_means(x)
            return network.video(x, output.parameters), output.mean, output.rates
        if isinstance(network, Hierarchy):
            whole = network.at_means(x)
            return network.likelihood.mean(whole.parameters), whole.mean, whole.rates
        mean, log_variance = network.encode(x)
        return network.likelihood.mean(network.decode(mean)), mean, log_variance


class Generation(nn.Module):
    """z, (N, latent) -> E[x | z], (N, *input_shape), in data space; of a hierarchy z is the noise of all groups."""

    def __init__(self, network: VAE | Hierarchy) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network.likelihood.mean(self.network.decode(z))


class Prediction(nn.Module):
    """x, (N, T, C, S, S), and noise, (N, latent) -> the first n_past frames of x and as many more as make T."""

    def __init__(self, network: SVG) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.network.predict(x, noise)


def bake_run(
    run: str | Path, beta: float, out: str | Path | None = None, calibration: Tensor | None = None, force: bool = False
) -> Baked:
    """Bake the model of a run at `beta` into the directory `out` (default: RUN/baked-<beta>).

    calibration: training images, needed by networks with BatchNorm. ValueError for a beta that is not positive, and for
    a run without gates; FileExistsError when `out` holds a model already (force=True replaces it), and, whatever force
    is, when it is this run or another; RuntimeError when what was read back differs from the gated model by more than
    TOLERANCE: nothing in `out` is replaced then. A beta outside the run's range is a warning.
    """
    run = Path(run)
    out = run / f"baked-{beta:g}" if out is None else Path(out)
    _check_out(run, out, force)
    model, document = load_model(run)
    if not isinstance(model, mk.MultiRate):
        raise ValueError(f"{run} holds a plain model, without gates; there is nothing to bake")
    batches = None if calibration is None else calibration_batches(calibration)
    with recalibration_noise(torch.device("cpu")):
        network: Any = mk.bake(model, beta, batches).eval()
    network.likelihood = network.likelihood.at(beta)
    description = {key: value for key, value in document["model"].items() if key not in OF_RANGE}
    description["beta"] = beta
    description = json.loads(json.dumps(description))
    generator = torch.Generator().manual_seed(0)
    parameter = next(network.parameters())
    whole, part = _programs(network)
    x: Tensor
    z: tuple[Tensor, ...]
    if isinstance(network, SentenceVAE):
        x, z = example_inputs(network)
    else:
        x = torch.rand((4, *network.input_shape), generator=generator).to(parameter)
        z = (torch.randn((4, network.latent), generator=generator).to(parameter),)
        z = (x, *z) if isinstance(network, SVG) else z
    out.mkdir(parents=True, exist_ok=True)
    # within it, where moving a file is renaming it even if it is a link or a disk of its own
    with tempfile.TemporaryDirectory(prefix=".baking-", dir=out) as name:
        made = Path(name)
        _export(whole, (x,), made / PROGRAM)
        _export(part, z, made / DECODER)
        save_model(made, network, description)
        if (run / VOCABULARY).exists():
            replace_file(made / VOCABULARY, lambda temporary: temporary.write_bytes((run / VOCABULARY).read_bytes()))
        write_config(made, description, config=document["config"], baked={"beta": beta, "run": str(run)})
        difference = _verify(model, beta, calibration, made, x, z)
        for file in made.iterdir():
            file.replace(out / file.name)
    return Baked(out, network, difference)


def _check_out(run: Path, out: Path, force: bool) -> None:
    """FileExistsError where a baked model would replace a run, or without `force` another model."""
    if out.resolve() == run.resolve():
        raise FileExistsError(
            f"{out} is the run itself, whose model of all betas would be replaced by that of one: leave out --out, or "
            "choose another"
        )
    if (out / LAST).exists():
        raise FileExistsError(
            f"{out} holds a run ({LAST}), whose model would be replaced by a baked one: choose another --out"
        )
    found = [name for name in (CONFIG, MODEL, PROGRAM, DECODER) if (out / name).exists()]
    if found and not force:
        raise FileExistsError(
            f"{out} holds a model already ({', '.join(found)}): replace it with --force, or choose another --out"
        )


def _programs(network: Any) -> tuple[nn.Module, nn.Module]:
    """What model.pt2 and decoder.pt2 compute."""
    if isinstance(network, SentenceVAE):
        return TeacherForced(network), NextToken(network)
    if isinstance(network, SVG):
        return Reconstruction(network), Prediction(network)
    return Reconstruction(network), Generation(network)


def _export(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write module(*inputs) as a torch.export program whose first dimension may be any."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attributes .*_flat_weights")  # an LSTM's list of its own
        program = torch.export.export(module.eval(), inputs, dynamic_shapes=({0: batch},) * len(inputs))
    replace_file(path, lambda temporary: _save_program(program, temporary))


def _save_program(program: Any, path: Path) -> None:
    with open(path, "wb") as file:  # by its name alone torch would warn that it does not end in .pt2
        torch.export.save(program, file)


def _verify(
    model: mk.MultiRate, beta: float, calibration: Tensor | None, made: Path, x: Tensor, z: tuple[Tensor, ...]
) -> float:
    """Read every file back and compare it with the gated model, with other batch sizes than it was exported with.

    The largest |output - reference| / max |reference|, which is 0 where both are 0 throughout.
    """
    x, z = torch.cat([x, x.flip(0), x[:1]]), tuple(torch.cat([part, part.flip(0), part[:1]]) for part in z)
    with torch.no_grad():
        with calibrated(model, calibration, beta), at(model, beta):
            whole, part = (_listed(program) for program in _programs(model.network))
            expected = {PROGRAM: whole(x), DECODER: part(*z)}
        whole, part = (_listed(program) for program in _programs(load_model(made)[0]))
        found = {
            MODEL: whole(x) + part(*z),
            PROGRAM: _listed(torch.export.load(made / PROGRAM).module())(x),
            DECODER: _listed(torch.export.load(made / DECODER).module())(*z),
        }
    expected[MODEL] = expected[PROGRAM] + expected[DECODER]
    worst = 0.0
    for name, outputs in found.items():
        for output, reference in zip(outputs, expected[name], strict=True):
            largest = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            difference = ((output - reference).abs().max() / largest).item()
            if not difference <= TOLERANCE:
                raise RuntimeError(
                    f"{name} as baked differs from the gated model at beta = {beta:g} by {difference:.2g} of the "
                    f"largest output; expected at most {TOLERANCE:g}; nothing was replaced"
                )
            worst = max(worst, difference)
    return worst


def _listed(program: nn.Module) -> Callable[..., list[Tensor]]:
    """The program, its results as a list."""

    def run(*inputs: Tensor) -> list[Tensor]:
        results = program(*inputs)
        return [results] if isinstance(results, Tensor) else list(results)

    return run


def source_config(document: dict[str, Any]) -> TrainConfig:
    """The options of the run that a model comes from."""
    return TrainConfig.from_dict(as_now(document["config"]), CONFIG)
