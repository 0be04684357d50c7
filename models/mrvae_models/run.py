"""What a run leaves on disk: config.json beside model.safetensors, written so that they can be read back safely.

    RUN/config.json         options (TrainConfig), how to build the model, versions
    RUN/model.safetensors   the weights; its header repeats how the model is built, so that the two cannot be mixed up
    RUN/vocabulary.txt      of a run on text: its tokens, one a line, by number
    RUN/last.ckpt           the state to resume from, RUN/best.ckpt the best by validation (see checkpoint.py)

A baked model's directory holds the same two files. Nothing here unpickles: safetensors and JSON cannot run code.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import platform
import shlex
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

import mrvae_kernels as mk

from .config import FORMAT, TrainConfig
from .data import ImageDataset, InMemory, TextDataset, TextOptions, VideoDataset, load, text_files
from .likelihood_names import takes_beta_range
from .networks import NETWORKS, build
from .options import CONFIG, check_format, config_file, read_json
from .recipes import gate_fields

MODEL = "model.safetensors"
LAST = "last.ckpt"
BEST = "best.ckpt"
VOCABULARY = "vocabulary.txt"
SENTENCES = "sentences.md"
CURVE_FILES = ("curve.csv", "curve.json", "curve.png")

DESCRIPTION: dict[str, tuple[type, ...]] = {
    "network": (str,),
    "input_shape": (list,),
    "latent": (int, NoneType),
    "likelihood": (str, NoneType),
    "sigma": (int, float, NoneType),
    "options": (dict,),
}
GATED: dict[str, tuple[type, ...]] = {"gates": (dict,), "beta_range": (list,), "exclude": (list,)}
PLAIN: dict[str, tuple[type, ...]] = {"beta": (int, float)}
"""Entries of what describe() returns, and their JSON types; of a model with gates, and of a plain one."""

GATE_CHOICES = {"gated": "every", "norms": "gated"}
"""Options that a description names only where they are not these, so that older ones stay what they were."""

OF_RANGE = frozenset((*GATED, *GATE_CHOICES, "include", "sigma_range"))
"""Entries that only the description of a multi-rate model has; sigma_range is where its likelihood's sigma is a
function of beta: all that training draws from."""

CALIBRATION_EXAMPLES = 2000
"""Training images on which BatchNorm statistics are recalibrated at each beta."""

PACKAGES = ("torch", "lightning", "numpy", "safetensors", "mrvae-kernels")


def describe(config: TrainConfig, input_shape: tuple[int, ...]) -> dict[str, Any]:
    """How to build the model of a run, as plain JSON types: the "model" entry of config.json."""
    description: dict[str, Any] = {
        "network": config.network,
        "input_shape": list(input_shape),
        "latent": config.latent,
        "likelihood": config.likelihood,
        "sigma": config.sigma,
        "options": config.network_options,
    }
    if config.likelihood_options:
        description["likelihood_options"] = config.likelihood_options
    if config.beta is None:
        description["beta_range"] = list(config.beta_range)
        description["gates"] = {
            module: gate_fields(gate, config.gate_init, config.gate_degree) for module, gate in config.gates.items()
        }
        description["exclude"] = list(config.exclude)
        chosen = {name: getattr(config, name) for name in GATE_CHOICES}
        description |= {name: value for name, value in chosen.items() if value != GATE_CHOICES[name]}
        if takes_beta_range(config.likelihood):
            description["sigma_range"] = list(config.sampled_range)
        if config.include:
            description["include"] = list(config.include)
    else:
        description["beta"] = config.beta
    return json.loads(json.dumps(description))


def build_model(description: Mapping[str, Any]) -> nn.Module:
    """The model that describe() describes, freshly initialised: a MultiRate, or the plain VAE where it has no gates."""
    sigma_of_beta = {"beta_range": description["sigma_range"]} if "sigma_range" in description else {}
    sigma, of_likelihood = description["sigma"], dict(description.get("likelihood_options", {}))
    if of_likelihood.get("scale") == "value":  # earlier runs may have these, of which nothing came
        sigma = None
        of_likelihood.pop("knots", None)
    network = build(
        description["network"],
        tuple(description["input_shape"]),
        description["latent"],
        likelihood=description["likelihood"],
        sigma=sigma,
        likelihood_options=of_likelihood | sigma_of_beta,
        **_fit_options(description["network"], description["options"]),
    )
    if "gates" not in description:
        return network
    chosen = {name: description.get(name, usual) for name, usual in GATE_CHOICES.items()}
    include, exclude = _choice(network, description["network"], chosen["gated"])
    return mk.multirate(
        network,
        gates={part: _gate_spec(spec) for part, spec in description["gates"].items()},
        beta_range=tuple(description["beta_range"]),
        exclude=(*description["exclude"], *exclude),
        include=description.get("include", include),
        norms=chosen["norms"],
    )


def with_gates_of(model: nn.Module, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> nn.Module:
    """The model, or one with the gates of those layers that a state_dict has them of, where these are others: of a run
    that was made when other layers were left to the norms after them."""
    record = state.get("_extra_state")
    if not isinstance(model, mk.MultiRate) or record is None or torch.equal(record, model.get_extra_state()):
        return model
    try:
        saved = json.loads(bytes(record.tolist()))
        layers = {*(entry.split()[0] for entry in saved["gates"]), *saved.get("conditional", ())}
        return build_model({**description, "include": sorted(layers)})
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return model  # which says what does not fit when it is to hold this state


def _choice(network: nn.Module, name: str, gated: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Layers to include (None for all) and to exclude by `gated`, "every" or "paper"."""
    if gated == "every":
        return None, ()
    if gated != "paper":
        raise ValueError(f"gated is {gated!r}; expected 'every' or 'paper'")
    ungated: tuple[str, ...] = getattr(network, "ungated", ())
    if not ungated:
        raise ValueError(
            f"gated is 'paper', and no choice of layers is known for the network {name!r} with these "
            "options: use 'every', or the options of the paper's network, which its docstring names"
        )
    return getattr(network, "gated_alone", None), ungated


def _gate_spec(fields: Mapping[str, Any]) -> mk.GateSpec:
    inputs = fields.get("inputs")
    return mk.GateSpec(**{**fields, "inputs": None if inputs is None else mk.GateSpec(**inputs)})


def _fit_options(network: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """JSON and the command line know no tuples: lists, and a number where the network takes several, become tuples."""
    if network not in NETWORKS:
        return dict(options)  # build() names the networks there are
    parameters = inspect.signature(NETWORKS[network]).parameters

    def fit(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        takes_several = name in parameters and isinstance(parameters[name].default, tuple)
        return (value,) if takes_several else value

    return {name: fit(name, value) for name, value in options.items()}


def load_split(
    config: TrainConfig, split: str, run: Path | None = None, anew: bool = False
) -> ImageDataset | TextDataset:
    """One split of the run's data; "train" is what it is trained on, with train_on = "all" the whole set.

    run: the directory of a run that is there already, whose vocabulary text is read with; FileNotFoundError where it
    has none: one built of the data again may number other tokens.
    anew: dynamic binarisation draws at every access, for training; without it every split is drawn once.
    """
    vocabulary: str | Path | None = config.vocabulary
    if run is not None and text_files(config.data):
        vocabulary = run / VOCABULARY
        if not vocabulary.exists():
            raise FileNotFoundError(f"{vocabulary} does not exist; expected the file written with the run: restore it")
    options = TextOptions(vocabulary, config.vocabulary_size, config.min_count, config.max_length)
    binarize = "fixed" if config.binarize == "dynamic" and not anew else config.binarize
    split = config.train_on if split == "train" else split
    layout, resize, clips = config.layout, config.resize, (config.frames, config.frame_stride)
    return load(config.data, split, binarize, config.data_seed, layout, resize, options, *clips)


def save_vocabulary(directory: Path, dataset: ImageDataset | TextDataset) -> None:
    """Write what the numbers of a text mean to DIR/vocabulary.txt; nothing for images."""
    if isinstance(dataset, TextDataset):
        replace_file(directory / VOCABULARY, dataset.vocabulary.write)


def calibration_images(train_set: InMemory) -> Tensor:
    """Training images, CALIBRATION_EXAMPLES of them, to recalibrate running statistics on; of clips as many frames.

    Drawn without replacement, the same at every call: the first of a set may be all of one class, as of folders of
    classes, or of one shape, as of dSprites' grid, where the first 2,000 gave a D + beta R 22 % above that of others.
    """
    frames = train_set.input_shape[0] if isinstance(train_set, VideoDataset) else 1
    most = max(2, CALIBRATION_EXAMPLES // frames)  # running statistics need two examples
    chosen = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(0))[:most]
    device = train_set.examples.device
    return train_set.take(chosen.sort().values.to(device), torch.Generator(device).manual_seed(0))


def plain_network(model: nn.Module) -> Any:
    """The VAE itself: the network inside a MultiRate, or the model."""
    return model.network if isinstance(model, mk.MultiRate) else model


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    found["torch"] = torch.__version__  # with its build tag: +cpu or +cu130
    return found


def check_directory(directory: Path) -> None:
    """FileExistsError where files are to be written into what is itself a file."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; give --out a directory to write to")


def output_directory(run: Path, out: Path | None) -> Path:
    """Where a command on a run writes: `out`, or the run's own directory. Raises what read_description() does, where
    `run` is no run, and check_directory()."""
    read_description(run)
    directory = run if out is None else out
    check_directory(directory)
    return directory


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that `path` is at all times either the old one or the new one, whole, kill -9 included.

    write(temporary) fills a file in the same directory, which is flushed to the disk and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    text = json.dumps(document, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_config(directory: Path, description: Mapping[str, Any], **entries: Any) -> dict[str, Any]:
    """Write DIR/config.json and return it: format, model, versions and the further entries."""
    document = {"format": FORMAT, **entries, "model": dict(description), "versions": versions()}
    write_json(directory / CONFIG, document)
    return document


def save_model(directory: Path, model: nn.Module, description: Mapping[str, Any]) -> Path:
    """Write the weights to DIR/model.safetensors, with the description in its header."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    path = directory / MODEL
    # one entry: safetensors writes several in random order, and the same weights shall be the same bytes
    header = {"model": json.dumps(description, sort_keys=True)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    return path


def load_model(directory: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a run or of a baked directory, in eval mode, and its config.json.

    FileNotFoundError for a missing file; ValueError for one that is truncated, belongs to another configuration
    (another beta range, say), or has other layers than the configuration.
    """
    directory = Path(directory)
    document = read_description(directory)
    path = directory / MODEL
    tensors, header = _read_weights(path)
    description = document["model"]
    if header != description:
        different = sorted(key for key in {*header, *description} if header.get(key) != description.get(key))
        raise ValueError(
            f"{path} belongs to another configuration than {directory / CONFIG}: "
            + "; ".join(f"{key} is {header.get(key)!r} there and {description.get(key)!r} here" for key in different)
        )
    try:
        model = build_model(description)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{directory / CONFIG}: its entry 'model' describes no network that can be built: {first_lines(error)}"
        ) from None
    model = with_gates_of(model, description, tensors)
    _add_biases(model, tensors)
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit the network of {directory / CONFIG}: {first_lines(error)}") from None
    return model.eval(), document


def read_description(directory: str | Path) -> dict[str, Any]:
    """The config.json of a directory; FileNotFoundError or ValueError when this is no directory of a run."""
    path = config_file(directory)
    document = read_json(path)
    check_format(document, FORMAT, path)
    if not isinstance(document.get("model"), dict):
        raise ValueError(f"{path} has no entry 'model', which says how the network is built")
    if not isinstance(document.get("config"), dict):
        raise ValueError(f"{path} has no entry 'config', the options of the run; expected a JSON object")
    _check_description(document["model"], path)
    return document


def _check_description(description: Mapping[str, Any], path: Path) -> None:
    """ValueError unless the description has what describe() writes, so that it can be read without surprises."""
    expected = {**DESCRIPTION, **(GATED if "gates" in description else PLAIN)}
    for name, types in expected.items():
        value = description.get(name)
        if name not in description or not isinstance(value, types) or isinstance(value, bool):
            found = f"is {value!r}" if name in description else "is missing"
            names = " or ".join("null" if kind is NoneType else kind.__name__ for kind in types)
            raise ValueError(
                f"{path}: entry {name!r} of 'model' {found}; expected {names}, as mrvae train writes it; restore the "
                "file, or train again"
            )
    for part, spec in description.get("gates", {}).items():
        if not isinstance(spec, dict) or not isinstance(spec.get("inputs"), (dict, NoneType)):
            raise ValueError(
                f"{path}: the gate of {part!r} is {spec!r}; expected an object of the fields of a GateSpec"
            )


def _read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: the run has not finished; continue it with mrvae train --resume "
            f"{shlex.quote(str(path.parent))}"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("model", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(
            f"{path}: entry 'model' of its header is {header!r}; expected an object, as mrvae train writes it"
        )
    return tensors, header


def _add_biases(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Baking a shift gives a bias to layers that had none: make room for those that the file holds."""
    for name, module in model.named_modules():
        key = f"{name}.bias"
        if key in tensors and "bias" in module._parameters and module._parameters["bias"] is None:
            module.bias = nn.Parameter(torch.empty_like(tensors[key]))


def first_lines(error: BaseException, limit: int = 3) -> str:
    """The first lines of a long message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = f" (and {len(lines) - limit} more lines)" if len(lines) > limit else ""
    return " ".join(lines[:limit]) + more
