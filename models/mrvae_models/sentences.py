"""What a network of text says along beta: sentences.md beside the curve, in place of the pictures of images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .curve import Curve, at, evaluating
from .data import TextDataset
from .networks.lstm import SentenceVAE
from .run import plain_network, replace_file

STEPS = 5


class Sentences(NamedTuple):
    """Sentences along beta, all greedy; b betas, n examples, m draws from the prior."""

    betas: list[float]
    originals: list[str]  # n
    reconstructions: list[list[str]]  # (b, n), from the posterior's mean
    samples: list[list[str]]  # (b, m), the same z ~ N(0, I) at every beta
    between: list[list[str]]  # (b, STEPS), on the line from the first original's posterior mean to the second's


def sentences(
    model: nn.Module, dataset: TextDataset, betas: Sequence[float], count: int = 10, seed: int = 0
) -> Sentences:
    """Reconstructions of `count` sentences, drawn by `seed`, as many samples, and a line between two, at each beta.

    ValueError for a network that does not generate sentences.
    """
    network = plain_network(model)
    if not isinstance(network, SentenceVAE):
        raise ValueError(f"the network is a {type(network).__name__}; expected one of sentences, such as 'lstm'")
    generator = torch.Generator().manual_seed(seed)
    chosen = dataset.take(torch.randperm(len(dataset), generator=generator)[:count])
    parameter = next(network.parameters())
    x = chosen.to(parameter.device)
    z = torch.randn(count, network.latent, generator=generator).to(parameter)
    text = dataset.vocabulary.texts
    reconstructions, drawn, between = [], [], []
    with torch.no_grad(), evaluating(model):
        for beta in betas:
            with at(model, beta):
                reconstructions.append(text(network.reconstruct(x)))
                drawn.append(text(network.generate(z)))
                between.append(text(network.interpolate(x[:1], x[-1:] if len(x) < 2 else x[1:2], STEPS).squeeze(1)))
    return Sentences(list(betas), text(chosen), reconstructions, drawn, between)


def write_sentences(path: Path, curve: Curve, shown: Sentences) -> None:
    """Write a page of Markdown: the curve with its perplexities, then the sentences, beta by beta."""
    lines = [
        "# Sentences along beta",
        "",
        "Rate and distortion in nats a sentence; nats a token and perplexity are those of rate + distortion, an upper "
        "bound of the model's, every token counted, the sentence's end too.",
        "",
        "| beta | rate | distortion | active units | nats a token | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for p in curve.points:
        per_token = ["", ""] if p.perplexity is None else [f"{p.nats_per_token:.3f}", perplexity_cell(p.perplexity)]
        cells = [f"{p.beta:.4g}", f"{p.rate:.2f}", f"{p.distortion:.2f}", str(p.active_units), *per_token]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Reconstructions of held-out sentences", "", "Greedy, from the mean of q(z | x)."]
    for i, original in enumerate(shown.originals):
        lines += ["", f"**{_escaped(original)}**", ""]
        lines += _by_beta(shown.betas, [row[i] for row in shown.reconstructions])
    lines += ["", "## Samples, the same z at every beta", "", "Greedy, from z ~ N(0, I)."]
    for i in range(len(shown.samples[0]) if shown.samples else 0):
        lines += ["", f"z {i + 1}", "", *_by_beta(shown.betas, [row[i] for row in shown.samples])]
    lines += ["", "## From the first sentence above to the second", "", "Greedy, on the line between their means."]
    for beta, row in zip(shown.betas, shown.between, strict=True):
        lines += ["", f"beta = {beta:.3g}", "", *(f"{i}. {_escaped(sentence)}" for i, sentence in enumerate(row, 1))]
    text = "\n".join(lines) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def perplexity_cell(value: float) -> str:
    """A perplexity to read; of a network that gives tokens almost no probability it may have any number of digits."""
    return f"{value:.1f}" if value < 1e6 else f"{value:.4g}"


def _by_beta(betas: Sequence[float], said: Sequence[str]) -> list[str]:
    """A line for each beta, those in a row that say the same in one."""
    found: list[tuple[list[float], str]] = []
    for beta, sentence in zip(betas, said, strict=True):
        if found and found[-1][1] == sentence:
            found[-1][0].append(beta)
        else:
            found.append(([beta], sentence))
    return [f"- {', '.join(f'{beta:.3g}' for beta in group)}: {_escaped(sentence)}" for group, sentence in found]


def _escaped(sentence: str) -> str:
    """So that Markdown shows the tokens as they are; "(nothing)" for an empty sentence."""
    sentence = re.sub(r"[\\`*_<>\[\]#|&~]", r"\\\g<0>", sentence)
    return re.sub(r"^(\d*)([-+.)])", r"\1\\\2", sentence) or "(nothing)"  # what would begin a list
