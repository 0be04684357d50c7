"""What a baked network of text does, as modules that torch.export can write down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .data.vocabulary import END, PAD, START
from .networks.lstm import SentenceVAE


class TeacherForced(nn.Module):
    """x, (N, longest) -> (log-probabilities (N, longest, V), mean, log_variance), z being the posterior's mean.

    log p(x_t | x_1 ... x_{t-1}, z) of every token at every place; pad x with PAD to the full `longest`: the program's
    steps in time are written out. Padding changes neither the posterior nor what stands before it.
    """

    def __init__(self, network: SentenceVAE) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.network.encode(x)
        return self.network.logits(x, mean).log_softmax(-1), mean, log_variance


class NextToken(nn.Module):
    """(token (N,), z (N, k), h, c (N, hidden)) -> (log-probabilities of the next token (N, V), h, c): a decoder's step.

    Begin with the token START, for which h and c are not looked at (give zeros), and go on with the token chosen and
    the h and c returned until END.
    """

    def __init__(self, network: SentenceVAE) -> None:
        super().__init__()
        self.decoder = network.decoder

    def forward(self, token: Tensor, z: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        begins = (token == START)[:, None]
        first_h, first_c = self.decoder.start(z)
        state = torch.where(begins, first_h, h), torch.where(begins, first_c, c)
        logits, (h, c) = self.decoder(token[:, None], z, state)
        return logits[:, 0].log_softmax(-1), h[0], c[0]


def example_inputs(network: SentenceVAE, n: int = 4) -> tuple[Tensor, tuple[Tensor, ...]]:
    """n sentences of random tokens and lengths for TeacherForced, and inputs for NextToken, START among its tokens."""
    generator = torch.Generator().manual_seed(0)
    longest, vocabulary = network.input_shape
    like = network.decoder.initial.weight
    x = torch.randint(END + 1, vocabulary, (n, longest), generator=generator)
    places, ends = torch.arange(longest), torch.randint(longest, (n, 1), generator=generator)
    x = x.masked_fill(places == ends, END).masked_fill(places > ends, PAD)
    z, h, c = (
        torch.randn(n, width, generator=generator).to(like)
        for width in (network.latent, like.shape[0] // 2, like.shape[0] // 2)
    )
    token = torch.cat([torch.tensor([START]), torch.randint(END, vocabulary, (n - 1,), generator=generator)])
    return x, (token, z, h, c)
