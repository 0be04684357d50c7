"""The autoregressive LSTM for text of the MR-VAE paper's Yahoo experiment."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.vocabulary import END, PAD, SPECIALS, START, UNKNOWN
from ..likelihoods import Likelihood, TextCategorical
from ..vae import VAEOutput, reparameterise
from .parts import check_flag, check_part, check_shape, check_sizes

UNGATED = ("encoder.mean.0", "encoder.log_variance.0", "decoder.output")
"""With deep heads, as the paper has them; gates on all other layers give Table 1's count."""

State = tuple[Tensor, Tensor]
"""h and c of an LSTM of one layer, each (1, N, hidden)."""


class SentenceEncoder(nn.Module):
    """q(z | x) from the state [h; c] of an LSTM at the sentence's end.

    Sentences are moved to the right before they are read: without a bias an LSTM stays at h = c = 0 while its inputs
    are zeros, as the embedding of padding is, so that the last state is that of the true end whatever the padding.
    """

    def __init__(self, vocabulary: int, embedding: int, hidden: int, latent: int, deep_heads: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.lstm = nn.LSTM(embedding, hidden, bias=False, batch_first=True)
        self.mean = _head(2 * hidden, latent, deep_heads)
        self.log_variance = _head(2 * hidden, latent, deep_heads)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        padding = (x == PAD).sum(1, keepdim=True)
        places = torch.arange(x.shape[1], device=x.device) - padding
        read = x.gather(1, places % x.shape[1])
        _, (h, c) = self.lstm(self.embedding(read))
        features = torch.cat([h[0], c[0]], 1)
        return self.mean(features), self.log_variance(features)


def _head(features: int, latent: int, deep: bool) -> nn.Module:
    if not deep:
        return nn.Linear(features, latent)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, latent))


class SentenceDecoder(nn.Module):
    """p(x_t | x_1 ... x_{t-1}, z): z begins the state, and goes with every token into the LSTM."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int, latent: int, dropout: float, word_dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.initial = nn.Linear(latent, 2 * hidden)
        self.lstm = nn.LSTM(embedding + latent, hidden, bias=False, batch_first=True)
        self.output = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)
        self.word_dropout = word_dropout

    def start(self, z: Tensor) -> State:
        """The state before the first token, for z of shape (N, latent)."""
        h, c = self.initial(z).unsqueeze(0).chunk(2, -1)
        return h.contiguous(), c.contiguous()

    def forward(self, tokens: Tensor, z: Tensor, state: State) -> tuple[Tensor, State]:
        """Logits of the token after each of `tokens` (N, T), as (N, T, V), and the state after the last."""
        if self.training and self.word_dropout:
            dropped = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
            tokens = tokens.masked_fill(dropped & (tokens != START) & (tokens != PAD), UNKNOWN)
        words = self.dropout(self.embedding(tokens))
        states, state = self.lstm(torch.cat([words, z.unsqueeze(1).expand(-1, tokens.shape[1], -1)], -1), state)
        return self.output(self.dropout(states)), state


class SentenceVAE(nn.Module):
    """A VAE of sentences, x: (N, T) int64, each its tokens, END, then PAD, as `TextDataset` has them; T may vary.

    input_shape: (longest, V): sentences are generated up to `longest` tokens; V is the size of the vocabulary.
    The prior is N(0, I). The noise of z comes from torch's global generator, in train and in eval mode alike.
    ungated: names of the layers without a gate in the paper's runs (`--gated paper`), () if not known.
    """

    def __init__(
        self, encoder: SentenceEncoder, decoder: SentenceDecoder, likelihood: Likelihood, latent: int,
        input_shape: tuple[int, ...], ungated: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.latent = latent
        self.input_shape = input_shape
        self.ungated = ungated

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log_variance) of q(z | x), each (N, latent). ValueError unless x is (N, T), int64, T at least 1."""
        if x.dim() != 2 or x.shape[1] < 1 or x.dtype != torch.int64:
            raise ValueError(
                f"x is {x.dtype}, shape {tuple(x.shape)}; expected tokens, (N, T), int64, T at least 1, as "
                "vocabulary.encode(sentences) makes them"
            )
        return self.encoder(x)

    def forward(self, x: Tensor) -> VAEOutput:
        """Logits of every token given those before it and a draw of z, (N, T, V): teacher forcing."""
        mean, log_variance = self.encode(x)
        z = reparameterise(mean, log_variance)
        return VAEOutput(self.logits(x, z), mean, log_variance, z)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits of the tokens of x, (N, T, V), each given z and the tokens before it."""
        before = torch.cat([torch.full_like(x[:, :1], START), x[:, :-1]], 1)
        return self.decoder(before, z, self.decoder.start(z))[0]

    @torch.no_grad()
    def generate(
        self, z: Tensor, greedy: bool = True, temperature: float = 1.0, generator: torch.Generator | None = None,
        longest: int | None = None,
    ) -> Tensor:
        """Sentences for z (N, latent), token by token: (N, t) int64, ended by END, padded; t at most `longest`.

        greedy: the likeliest token each time, else a draw from softmax(logits / temperature). <unk> may come out, <pad>
        and <s> not. longest: the network's own unless given; what has not ended there stays without END. In train mode
        dropout acts. ValueError for a z of another shape, and for a temperature or length that cannot be.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; expected a positive, finite number")
        longest = self.input_shape[0] if longest is None else longest
        if longest < 1:
            raise ValueError(f"longest is {longest}; expected the most tokens of a sentence, at least 1")
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"z has shape {tuple(z.shape)}; expected (N, {self.latent}), one latent vector a row")
        token = torch.full((len(z), 1), START, device=z.device)
        ended = torch.zeros_like(token, dtype=torch.bool)
        state, made = self.decoder.start(z), []
        for _ in range(longest):
            logits, state = self.decoder(token, z, state)
            logits = logits[:, -1].float()
            logits[:, [PAD, START]] = -torch.inf
            if greedy:
                token = logits.argmax(1, keepdim=True)
            else:
                below = logits - logits.max(1, keepdim=True).values  # 0 for the likeliest, whatever it is divided by
                token = torch.multinomial((below / temperature).softmax(1), 1, generator=generator)
            made.append(token.masked_fill(ended, PAD))
            ended |= token == END
            if ended.all():
                break
        return torch.cat(made, 1)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The greedy sentence at the mean of q(z | x), (N, t): no noise, in eval mode."""
        return self.generate(self.encode(x)[0])

    def sample(
        self, n: int, generator: torch.Generator | None = None, greedy: bool = True, temperature: float = 1.0
    ) -> Tensor:
        """Sentences for n draws z from the prior, (n, t), as generate() makes them."""
        like = self.decoder.initial.weight
        z = torch.randn(n, self.latent, generator=generator, dtype=like.dtype, device=like.device)
        return self.generate(z, greedy, temperature, generator)

    def interpolate(self, x1: Tensor, x2: Tensor, steps: int = 7) -> Tensor:
        """Greedy sentences on the line from the mean of q(z | x1) to that of q(z | x2): (steps, N, t).

        x1, x2: (N, T1) and (N, T2). ValueError for different N, and for fewer than 2 steps.
        """
        if len(x1) != len(x2) or steps < 2:
            raise ValueError(f"{len(x1)} and {len(x2)} sentences in {steps} steps; expected as many, and at least 2")
        first, last = self.encode(x1)[0], self.encode(x2)[0]
        parts = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device).view(-1, 1, 1)
        return self.generate(torch.lerp(first, last, parts).flatten(0, 1)).view(steps, len(x1), -1)


def lstm(
    input_shape: Sequence[int],
    latent: int = 32,
    embedding: int = 256,
    hidden: int = 256,
    dropout: float = 0.5,
    word_dropout: float = 0.0,
    deep_heads: bool = False,
    likelihood: Likelihood | None = None,
) -> SentenceVAE:
    """Encoder: embedding, LSTM, two linear heads on [h; c]; decoder: embedding, LSTM of [word; z], Linear to logits.

    input_shape: (longest, V), a TextDataset's. LSTMs have one layer and no bias; z makes the decoder's first (h, c) by
    a Linear. dropout: on the decoder's words and states, while training; word_dropout: the part of the decoder's tokens
    that become <unk> then (Bowman et al., 2016). deep_heads: 2H-2H-ReLU-z in place of 2H-z, as the paper's multi-rate
    network has them. With V = 10,000 there are 8,821,072 parameters, and, deep and gated but for `ungated`,
    9,351,632 (MR-VAE, Table 1).
    likelihood: TextCategorical. ValueError for another, and for sizes and parts that cannot be.
    """
    shape = check_shape(input_shape)
    if len(shape) != 2 or shape[1] <= len(SPECIALS):
        raise ValueError(
            f"input_shape is {shape}; this network takes text, (longest, vocabulary), e.g. (50, 10000). For images use "
            "the network 'cnn' or 'mlp'"
        )
    latent, embedding, hidden = check_sizes("latent, embedding, hidden", [latent, embedding, hidden])
    check_part("dropout", dropout)
    check_part("word_dropout", word_dropout)
    check_flag("deep_heads", deep_heads)
    if likelihood is not None and not isinstance(likelihood, TextCategorical):
        raise ValueError(f"likelihood is {likelihood!r}; tokens have a categorical one, which is the default")
    return SentenceVAE(
        SentenceEncoder(shape[1], embedding, hidden, latent, deep_heads),
        SentenceDecoder(shape[1], embedding, hidden, latent, dropout, word_dropout),
        likelihood or TextCategorical(PAD),
        latent,
        shape,
        UNGATED if deep_heads else (),
    )
