"""What `mrvae curve` does: from directories of runs to curve.csv, curve.json, and curve.png or sentences.md."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mrvae_kernels as mk

from .baking import source_config
from .config import TrainConfig
from .curve import Curve, Point, evaluate, has_running_statistics, round_betas
from .data import ImageDataset, TextDataset, Vocabulary
from .data.fingerprint import change
from .operating import landing_of
from .options import read_json
from .pictures import pictures
from .run import (
    CONFIG,
    CURVE_FILES,
    SENTENCES,
    VOCABULARY,
    calibration_images,
    load_model,
    load_split,
    output_directory,
    plain_network,
)
from .scored import scored_as
from .sentences import perplexity_cell, sentences, write_sentences

PICTURED_BETAS = 6
PICTURED_IMAGES = 10


def report(
    run: Path,
    betas: Sequence[float] | None = None,
    compare: Sequence[Path] = (),
    mark: Sequence[Path] = (),
    split: str = "test",
    samples: int = 1,
    batch_size: int = 500,
    seed: int = 0,
    device: str = "cpu",
    images: bool = True,
    out: Path | None = None,
) -> tuple[Curve, list[Path]]:
    """Evaluate a run (and those to compare with, on the same images), write its curve, and return both with the files.

    betas: default round_betas over the run's range; a plain model's own beta. The data are the run's. ValueError when
    the runs to compare with have gates, or another image shape, likelihood, sigma, data or binarize.
    mark: runs of methods that learn sigma or beta (beta-VAEs as well), each drawn where it has landed on this curve,
    its rate and distortion being those of its means as the curve's own Gaussian: their likelihoods may differ.
    """
    out = output_directory(run, out)
    model, document = load_model(run)
    config = source_config(document)
    dataset = dataset_for(model, config, split, run)
    model = to_device(model, device)
    about = {"run": str(run), "split": split, "config": document["config"], "model": document["model"]}
    settings: dict[str, Any] = {"batch_size": batch_size, "samples": samples, "seed": seed}
    calibration = calibration_for(model, config)
    check_betas(run, document["model"], betas)
    betas = list(betas) if betas else betas_of(document["model"], config)
    curve = evaluate(model, dataset, betas, **settings, calibration=calibration, about=about)
    others: dict[str, Curve] = {}
    for path in compare:
        other, its_document = load_model(path)
        if isinstance(other, mk.MultiRate):
            raise ValueError(f"{path} has gates; --compare takes runs at one beta, trained with --beta or baked")
        check_comparable(path, other, its_document, run, model, document)
        point = evaluate(to_device(other, device), dataset, [its_document["model"]["beta"]], **settings)
        name = "baked" if "baked" in its_document else r"$\beta$-VAEs, one run each"
        others[name] = Curve((*others.get(name, Curve(())).points, *point.points))
    if others:
        about["compared"] = [str(path) for path in compare]
    marks: dict[str, Curve] = {}
    marked: list[dict[str, Any]] = []
    for path in mark:
        name, found = _mark(path, run, model, document, dataset, device, settings)
        marked += [{"name": name, "run": str(path), **asdict(point)} for point in found.points]
        marks[name] = Curve((*marks.get(name, Curve(())).points, *found.points))
    if marks:
        about["marked"] = marked
    curve = Curve(curve.points, {**curve.about, **about})
    files = [out / name for name in CURVE_FILES]
    out.mkdir(parents=True, exist_ok=True)
    curve.write_csv(files[0])
    curve.write_json(files[1])
    from .plot import draw

    shown = _spread(sorted(betas))
    if isinstance(dataset, TextDataset):
        draw(curve, files[2], None, others, marks)
        if images:
            files.append(out / SENTENCES)
            write_sentences(files[-1], curve, sentences(model, dataset, shown, PICTURED_IMAGES, seed))
        return curve, files
    grid = pictures(model, dataset, shown, PICTURED_IMAGES, seed, calibration) if images else None
    draw(curve, files[2], grid, others, marks)
    return curve, files


def _mark(
    path: Path,
    run: Path,
    model: nn.Module,
    document: dict[str, Any],
    dataset: ImageDataset | TextDataset,
    device: str,
    settings: dict[str, Any],
) -> tuple[str, Curve]:
    """Where the run at `path` has landed on the curve of `model`: the name of its method, and a point."""
    other, its_document = load_model(path)
    landed = landing_of(other, its_document, path)
    check_comparable(path, other, its_document, run, model, document, likelihood=False)
    beta = landed.on(model)
    other = to_device(other, device)
    same = landed.variance is None
    with contextlib.nullcontext() if same else scored_as(other, plain_network(model).likelihood):
        return landed.name, evaluate(other, dataset, [beta], **settings)


def points_table(points: Sequence[Point], labels: Sequence[str] | None = None) -> str:
    """A row a point: beta and, each with one standard error, rate, distortion, D + beta R and ELBO; active units.

    labels: what to write before each row, such as the split that it was measured on.
    """
    names = [""] * len(points) if labels is None else list(labels)
    width = max(len(name) + 2 if name else 0 for name in (*names, ""))
    lines = [f"{'':{width}}{'beta':>8} {'rate':>16} {'distortion':>16} {'D + beta R':>16} {'ELBO':>17}  active units"]
    of_text = any(p.perplexity is not None for p in points)
    lines[0] += "  perplexity" if of_text else ""
    for name, p in zip(names, points, strict=True):
        numbers = [
            (p.rate, p.rate_se),
            (p.distortion, p.distortion_se),
            (p.objective, p.objective_se),
            (p.elbo, p.elbo_se),
        ]
        row = "  ".join(f"{value:8.2f} ±{error:5.2f}" for value, error in numbers)
        perplexity = "" if p.perplexity is None else f"  {perplexity_cell(p.perplexity):>10}"
        lines.append(f"{name:{width}}{p.beta:8.4g} {row}  {p.active_units:12d}{perplexity}")
    return "\n".join(lines)


def check_comparable(
    path: Path,
    other: nn.Module,
    its_document: dict[str, Any],
    run: Path,
    model: nn.Module,
    document: dict[str, Any],
    likelihood: bool = True,
) -> None:
    """ValueError where the numbers of two runs would be of different quantities, or of models of different data."""
    its, own = source_config(its_document), source_config(document)
    one, two = plain_network(other), plain_network(model)
    pairs = [
        ("input_shape", tuple(one.input_shape), tuple(two.input_shape)),
        ("binarize", its.binarize, own.binarize),
    ]
    if likelihood:  # its words name sigma, and resolve what was left out
        pairs.append(("likelihood", repr(one.likelihood), repr(two.likelihood)))
    vocabularies = [directory / VOCABULARY for directory in (path, run)]
    if all(file.exists() for file in vocabularies):
        first, second = (Vocabulary.read(file) for file in vocabularies)
        if first != second:
            pairs.append(("vocabulary", f"of {len(first)} entries", f"another one, of {len(second)}"))
    if not _same_source(its.data, own.data):
        pairs.append(("data", its.data, own.data))
    different = [f"{name} is {found} there and {wanted} here" for name, found, wanted in pairs if found != wanted]
    if different:
        raise ValueError(
            f"{path} and {run} have no curve in common: {'; '.join(different)}; give a run of the same data"
            f"{' and likelihood' if likelihood else ''}"
        )


def _same_source(one: str, other: str) -> bool:
    """Whether two values of --data name the same: a file may be given by several paths."""
    if one == other:
        return True
    first, second = Path(one).expanduser(), Path(other).expanduser()
    return first.exists() and second.exists() and first.samefile(second)


def betas_of(description: dict[str, Any], config: TrainConfig) -> list[float]:
    """The betas to show a model at: round ones over the range it was trained for, or a plain model's one."""
    return [description["beta"]] if "beta" in description else round_betas(*config.beta_range)


def dataset_for(model: nn.Module, config: TrainConfig, split: str, run: Path) -> ImageDataset | TextDataset:
    """One split of the data of a run, text in the run's own vocabulary; ValueError for one of another size.

    A warning where the data are not those of the training any more: their splits are others then.
    """
    dataset = load_split(config, split, run)
    document = read_json(run / CONFIG) if (run / CONFIG).exists() else {}
    if changed := change(document.get("data", {}), dataset.source, split):
        of_training = "" if split == "train" else f", and the {split} split may hold examples that were trained on"
        warnings.warn(
            f"the data have changed since {run} was trained: {config.data} has {changed}, so that its splits are "
            f"others{of_training}",
            stacklevel=2,
        )
    if isinstance(dataset, TextDataset):
        found, own = dataset.input_shape[1], plain_network(model).input_shape[1]
        if found != own:
            raise ValueError(
                f"{run / VOCABULARY} has {found} entries and the network {own}; expected the file that was written "
                "with the run: restore it"
            )
    return dataset


def training_examples(
    metrics: Iterable[Callable[..., Any]], model: nn.Module, config: TrainConfig, split: str, run: Path
) -> dict[str, Any]:
    """{"train": the training split} for metrics that are fitted on it (their argument `train`); {} where none is, and
    where it holds the examples of `split` that are measured: the probe then holds out a fifth of these."""
    wanted = any("train" in inspect.signature(metric).parameters for metric in metrics)
    if not wanted or split in ("train", "all") or config.train_on == "all":
        return {}
    return {"train": dataset_for(model, config, "train", run)}


def check_betas(run: Path, description: dict[str, Any], betas: Sequence[float] | None) -> None:
    """ValueError for other betas than its own of a plain model, whose numbers would pass for those of another model."""
    if betas and "beta" in description and set(betas) != {description["beta"]}:
        raise ValueError(
            f"{run} is of one beta, {description['beta']:g}; leave out --betas, or give a multi-rate run"
        )


def calibration_of(run: Path) -> Tensor | None:
    """Training images for the running statistics of a run's network, or None when it has none."""
    model, document = load_model(run)
    return calibration_for(model, source_config(document))


def calibration_for(model: nn.Module, config: TrainConfig) -> Tensor | None:
    """Training images for the running statistics of a multi-rate model, or None when it needs none."""
    if not isinstance(model, mk.MultiRate) or not has_running_statistics(model):
        return None
    return calibration_images(load_split(config, "train"))


def _spread(betas: Sequence[float]) -> list[float]:
    """At most PICTURED_BETAS of them, the ends included."""
    count = min(PICTURED_BETAS, len(betas))
    return [betas[round(i * (len(betas) - 1) / max(1, count - 1))] for i in range(count)]


def to_device(model: nn.Module, device: str) -> nn.Module:
    """The model on a device, by torch's name for it; ValueError where this machine has none such."""
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
