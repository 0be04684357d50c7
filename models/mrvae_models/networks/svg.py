"""SVG-LP, stochastic video generation with a learned prior (Denton and Fergus, 2018).

A video x_1 ... x_T is made frame by frame. With h_t the features of frame t:

    posterior   q(z_t | x_1 ... x_t)        an LSTM over h_2 ... h_t
    prior       p(z_t | x_1 ... x_{t-1})    an LSTM over h_1 ... h_{t-1}
    frame       p(x_t | x_1 ... x_{t-1}, z_2 ... z_t)   an LSTM over (h_{t-1}, z_t), then the frame decoder, with skips
                                                        from frame t - 1, the last of the first n_past at most
    D = -sum_{t=2}^T log p(x_t | .),    R = sum_{t=2}^T KL(q(z_t | .) || p(z_t | .))

The first frame is given: D is of the others, `target(x)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..likelihoods import GaussianOptimal, Likelihood
from .frames import BACKBONES, FrameDecoder, FrameEncoder, widths_of
from .hierarchy import Normal, Raw
from .parts import check_shape, check_sizes, squash

INITIAL_STD = 0.02
State = tuple[Tensor, Tensor]
"""h and c of an LSTM, each (layers, N, hidden)."""


class VideoOutput(NamedTuple):
    """What one forward pass gives; N videos of T frames, k latent dimensions a frame."""

    parameters: Tensor  # (N, c, T - 1, H, W), of the likelihood, for target(x)
    mean: Tensor  # (N, (T - 1) k), of the posterior less the prior's, frame by frame
    rates: Tensor  # (N, (T - 1) k), KL of each, in nats
    noise: Tensor  # (N, (T - 1) k), standard normal, of which z = mean + sigma * noise was drawn


class Recurrence(nn.Module):
    """Linear, then an LSTM of some layers: (N, T, features) and a state -> (N, T, hidden) and the state after."""

    def __init__(self, features: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(features, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        return self.lstm(self.embed(x), state)


class GaussianRecurrence(nn.Module):
    """A recurrence and two linear heads: the Normal of (N, T, k) and the state after."""

    def __init__(self, features: int, hidden: int, layers: int, latent: int) -> None:
        super().__init__()
        self.recurrence = Recurrence(features, hidden, layers)
        self.mean = nn.Linear(hidden, latent)
        self.log_sigma = nn.Linear(hidden, latent)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Normal, State]:
        x, state = self.recurrence(x, state)
        return Raw(self.mean(x), self.log_sigma(x)).normal(), state


class Predictor(nn.Module):
    """A recurrence, Linear and tanh: the features of the next frame, (N, T, g), and the state after."""

    def __init__(self, features: int, out: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.recurrence = Recurrence(features, hidden, layers)
        self.output = nn.Linear(hidden, out)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        x, state = self.recurrence(x, state)
        return torch.tanh(self.output(x)), state


class Inference(nn.Module):
    """What reads frames: the encoder of each and the posterior."""

    def __init__(self, frames: FrameEncoder, posterior: GaussianRecurrence) -> None:
        super().__init__()
        self.frames = frames
        self.posterior = posterior


class Generation(nn.Module):
    """What makes frames: the prior, the predictor and the decoder of each."""

    def __init__(self, prior: GaussianRecurrence, predictor: Predictor, frames: FrameDecoder) -> None:
        super().__init__()
        self.prior = prior
        self.predictor = predictor
        self.frames = frames


class SVG(nn.Module):
    """See `svg_lp`. x: (N, T, C, S, S), in [0, 1].

    Frames go through encoder and decoder one at a time, so that a batch norm's statistics are of one time, as in the
    authors' code, and a gate has one row an example. The LSTMs take all times at once where frames are known, and one
    at a time in `predict`.
    """

    def __init__(
        self, encoder: Inference, decoder: Generation, likelihood: Likelihood, input_shape: tuple[int, ...],
        step_latent: int, n_past: int,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = likelihood
        self.input_shape = input_shape
        self.step_latent = step_latent
        self.n_past = n_past
        self.latent = (input_shape[0] - 1) * step_latent

    def target(self, x: Tensor) -> Tensor:
        """What of x the distortion is of: all frames but the first, (N, C, T - 1, S, S), time as an axis of each."""
        return x[:, 1:].transpose(1, 2)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> VideoOutput:
        """One draw from the posterior, each frame predicted from the true one before it. Another shape: ValueError.

        Without noise, (N, latent), it is drawn by torch's global generator, in train and in eval mode alike.
        """
        self._check(x, self.input_shape[0], exactly=True)
        noise = self._noise(x, self.input_shape[0], noise)
        encoded = [self.encoder.frames(frame) for frame in x.unbind(1)]
        features = torch.stack([h for h, _ in encoded], 1)
        before = features[:, :-1]
        posterior, _ = self.encoder.posterior(features[:, 1:])
        prior, _ = self.decoder.prior(before)
        predicted, _ = self.decoder.predictor(torch.cat([before, posterior.draw(noise)], -1))
        made = [
            self.decoder.frames(h, encoded[min(t, self.n_past - 1)][1]) for t, h in enumerate(predicted.unbind(1))
        ]
        return VideoOutput(
            torch.stack(made, 2),
            (posterior.mean - prior.mean).flatten(1),
            posterior.kl_from(prior).flatten(1),
            noise.flatten(1),
        )

    def at_means(self, x: Tensor) -> VideoOutput:
        """The same with every z the mean of its posterior: no noise."""
        return self.forward(x, x.new_zeros(x.shape[0], self.latent))

    def reconstruct(self, x: Tensor) -> Tensor:
        """The first frame of x and E[x_t | .] of the others, every z the mean of its posterior, (N, T, C, S, S)."""
        return self.video(x, self.at_means(x).parameters)

    def video(self, x: Tensor, parameters: Tensor) -> Tensor:
        """The first frame of x and the means that these parameters give of the others, (N, T, C, S, S)."""
        means = self.likelihood.mean(parameters).transpose(1, 2)
        return torch.cat([x[:, :1].to(means.dtype), means], 1)

    def predict(
        self, x: Tensor, noise: Tensor | None = None, frames: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The first n_past frames of x and a draw of what follows, (N, frames, C, S, S), in data space.

        z comes from the posterior while the next frame is known and from the learned prior then; each frame is the mean
        of p(x_t | .), from which the next is predicted. x: (N, at least n_past, C, S, S); frames: the T of training
        unless given; noise: (N, (frames - 1) k), standard normal, drawn by `generator` unless given. Else ValueError.
        """
        self._check(x, self.n_past)
        frames = self.input_shape[0] if frames is None else frames
        if frames <= self.n_past:
            raise ValueError(f"frames is {frames}; expected more than the {self.n_past} that are given (n_past)")
        noise = self._noise(x, frames, noise, generator)
        video = list(x[:, : self.n_past].unbind(1))
        encode, posterior, prior, predictor = (
            self.encoder.frames, self.encoder.posterior, self.decoder.prior, self.decoder.predictor
        )
        (h, skips), states = encode(video[0]), [None, None, None]
        for t in range(frames - 1):
            known = t + 1 < self.n_past
            z, states[0] = prior(h[:, None], states[0])
            if known:
                following, its_skips = encode(video[t + 1])
                z, states[1] = posterior(following[:, None], states[1])
            predicted, states[2] = predictor(torch.cat([h[:, None], z.draw(noise[:, t : t + 1])], -1), states[2])
            if known:
                h, skips = following, its_skips
                continue
            video.append(self.likelihood.mean(self.decoder.frames(predicted[:, 0], skips)).to(x.dtype))
            h = encode(video[-1])[0]
        return torch.stack(video, 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """ValueError: there is no video without its first frames."""
        raise ValueError(
            f"svg-lp continues videos: give their first {self.n_past} frames, predict(x), in place of sample({n})"
        )

    def _noise(
        self, x: Tensor, frames: int, noise: Tensor | None, generator: torch.Generator | None = None
    ) -> Tensor:
        """(N, frames - 1, k)."""
        expected = (x.shape[0], (frames - 1) * self.step_latent)
        if noise is None:
            noise = torch.randn(expected, dtype=x.dtype, device=x.device, generator=generator)
        elif noise.shape != expected:
            raise ValueError(f"noise has shape {tuple(noise.shape)}; expected {expected}, all frames' in a row")
        return noise.unflatten(1, (frames - 1, self.step_latent))

    def _check(self, x: Tensor, frames: int, exactly: bool = False) -> None:
        fits = x.dim() == 5 and x.shape[2:] == self.input_shape[1:]
        if not fits or (x.shape[1] != frames if exactly else x.shape[1] < frames):
            size = ", ".join(map(str, self.input_shape[1:]))
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected videos, (N, {'' if exactly else 'at least '}{frames}, "
                f"{size}), as the network was built for: build(name, dataset.input_shape)"
            )


def svg_lp(
    input_shape: Sequence[int],
    latent: int = 10,
    backbone: str = "dcgan",
    n_past: int = 2,
    features: int = 128,
    hidden: int = 256,
    layers: int = 2,
    width: int = 64,
    likelihood: Likelihood | None = None,
) -> SVG:
    """SVG-LP for videos (N, T, C, S, S), S a power of two of at least 16; by default dcgan_64's sizes and its z.

    latent            dimensions of z_t (the network's `latent` counts those of all frames)
    backbone          "dcgan" (the paper's for moving digits: 12.61 M parameters at 1x64x64 with latent 10) or "vgg"
                      (for robot videos: 22.83 M at 3x64x64 with latent 64)
    n_past            frames to go on from in `predict`, and the last frame with skips: 2 as for robot videos
    features, hidden  g of a frame's features, and the LSTMs' units
    layers            of the predictor's LSTM; posterior and prior have one
    width             channels of the first stage, which doubles up to 8 times that
    likelihood        the optimal Gaussian unless given, the sigma-VAE paper's; where the output is the mean of x itself
                      it ends in a sigmoid, as theirs

    Weights of convolutions and Linear layers begin as N(0, 0.02^2), scales of batch norms as N(1, 0.02^2). Standard
    deviations of z are NVAE's, exp(soft clamp) + 0.01, for both q and p. ValueError for sizes that cannot work.
    Their beta of 1e-4 beside a mean squared error is C S^2 / 2 times that here: 0.61 for 3x64x64, beside 1/2 SSE.
    """
    shape = check_shape(input_shape)
    if len(shape) != 4 or shape[2] != shape[3]:
        raise ValueError(
            f"input_shape is {shape}; this network takes videos of square frames, (T, C, S, S), e.g. (12, 1, 64, 64). "
            "For images use 'cnn'"
        )
    if backbone not in BACKBONES:
        raise ValueError(f"backbone is {backbone!r}; expected one of {', '.join(BACKBONES)}")
    sizes = {"latent": latent, "n_past": n_past, "features": features, "hidden": hidden, "layers": layers}
    for name, size in (sizes | {"width": width}).items():
        check_sizes(name, [size])
    if n_past >= shape[0]:
        raise ValueError(f"n_past is {n_past} and videos have {shape[0]} frames; expected one to predict at least")
    likelihood = GaussianOptimal() if likelihood is None else likelihood
    frame = shape[1:]
    widths = widths_of(frame[1], width)
    stages = BACKBONES[backbone](likelihood.parameter_shape(frame)[0], features, widths)
    frames = FrameEncoder(stages, frame)
    decoder = FrameDecoder(stages, features, frames.maps, squash(likelihood, frame))
    network = SVG(
        Inference(frames, GaussianRecurrence(features, hidden, 1, latent)),
        Generation(
            GaussianRecurrence(features, hidden, 1, latent),
            Predictor(features + latent, features, hidden, layers),
            decoder,
        ),
        likelihood, shape, latent, n_past,
    )
    network.apply(_initialise)
    return network


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, INITIAL_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)
