"""Encoders and decoders described in a few words a stage, and the `VAE` made of them.

    conv 128 k4 s2 p1          nn.Conv2d to 128 channels: kernel 4, stride 2, padding 1 (defaults: stride 1, padding 0)
    convt 512 k3 s2 p1 op1     nn.ConvTranspose2d, with output padding
    block 128                  a residual block, x + Conv3x3 activation Conv3x3, of the 128 channels that there are
    res 128 s2                 a residual block with norms, to 128 channels: see NormedBlock
    pool                       the largest of every 2x2 pixels
    up                         each pixel as 2x2
    linear 400                 nn.Linear on the flattened input
    linear 1024x4x4            the same, and its output as a map of 1024 channels, 4x4
    ... bare                   without norm and activation; otherwise a norm follows what makes a map, other than a
                               block, and an activation follows every stage but pool and up
    linear 400 each            with a batch norm of each output, where norms are batch norms
    ... x3                     the stage three times

Two numbers, as in op1x0, are height and width. Sizes are followed from stage to stage, so that a stage that cannot take
what the one before it gives is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..likelihoods import Bernoulli, Likelihood
from ..vae import VAE, Encoder
from .parts import activation_called, ends, norm_layers

Shape = tuple[int, ...]
Activation = Callable[[], nn.Module]

SETTINGS = {"k": "kernel_size", "s": "stride", "p": "padding", "op": "output_padding"}
TAKES = {
    "conv": ("k", "s", "p"), "convt": ("k", "s", "p", "op"), "block": (), "res": ("s",), "linear": (), "pool": (),
    "up": (),
}
"""Kinds of stage, and the settings that each takes."""
OF_NO_SIZE = ("pool", "up")
WHOLE = ("block", "res", *OF_NO_SIZE)
"""Stages that no norm follows."""


class ResidualBlock(nn.Module):
    """x + Conv3x3(activation(Conv3x3(x))): channels and sides stay."""

    def __init__(self, channels: int, activation: Activation):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), activation(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class NormedBlock(nn.Module):
    """activation(norm(Conv3x3(activation(norm(Conv3x3(x))))) + shortcut(x)); the first convolution has the stride.

    The shortcut is x itself, or norm(Conv1x1(x)) of that stride where channels or sides change.
    """

    def __init__(
        self, channels: int, out: int, stride: tuple[int, int], norm: str, activation: Activation
    ) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1), *norm_layers(norm, out), activation(),
            nn.Conv2d(out, out, 3, padding=1), *norm_layers(norm, out),
        )
        same = channels == out and max(stride) == 1
        change = [] if same else [nn.Conv2d(channels, out, 1, stride), *norm_layers(norm, out)]
        self.shortcut = nn.Sequential(*change)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class EachNorm(nn.Module):
    """A batch norm of every element of a vector or a map, each with a mean, a variance and an affine of its own."""

    def __init__(self, size: Shape) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(math.prod(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(1)).view_as(x)


class Stage(NamedTuple):
    """One stage, as read from its words."""

    words: str
    kind: str
    size: Shape  # what it makes: channels, or of a linear one a shape
    settings: dict[str, tuple[int, int]]  # of torch's constructor, (height, width) each
    bare: bool
    each: bool = False


def parse(stages: Sequence[str]) -> list[Stage]:
    """Read stages; ValueError naming the word that cannot be read, and the stage that it stands in."""
    if isinstance(stages, str):
        raise ValueError(f"stages are the one string {stages!r}; expected one string a stage: ({stages!r},)")
    return [stage for words in stages for stage in _parse_stage(words)]


def _parse_stage(words: str) -> list[Stage]:
    kind, *rest = words.split() or [""]
    if kind not in TAKES:
        raise ValueError(f"stage {words!r} begins with {kind!r}; expected one of {', '.join(TAKES)}")
    if kind in OF_NO_SIZE:
        if rest:
            raise ValueError(f"stage {words!r}: {rest[0]!r} comes after {kind!r}; expected nothing")
        return [Stage(words, kind, (), {}, True)]
    if not rest or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*" if kind == "linear" else r"[1-9]\d*", rest[0]):
        expected = f"channels, as in '{kind} 128'" if kind != "linear" else "a size, as in 'linear 400', 'linear 9x4x4'"
        raise ValueError(f"stage {words!r}: {(rest or ['nothing'])[0]!r} comes after {kind!r}; expected {expected}")
    settings: dict[str, tuple[int, int]] = {}
    flags: dict[str, int] = {}
    own = {"linear": ("bare", "each"), "res": ()}.get(kind, ("bare",))
    for word in rest[1:]:
        setting = re.fullmatch(r"(k|s|p|op)(\d+)(?:x(\d+))?", word)
        repeat = re.fullmatch(r"x([1-9]\d*)", word)
        if setting and setting[1] in TAKES[kind] and SETTINGS[setting[1]] not in settings:
            settings[SETTINGS[setting[1]]] = (int(setting[2]), int(setting[3] or setting[2]))
        elif repeat and "x" not in flags:
            flags["x"] = int(repeat[1])
        elif word in own and word not in flags:
            flags[word] = 1
        else:
            known = ", ".join([*(f"{letter}N" for letter in TAKES[kind]), *own, "xN"])
            raise ValueError(f"stage {words!r}: cannot read {word!r}; expected each at most once: {known}")
    if "k" in TAKES[kind] and "kernel_size" not in settings:
        raise ValueError(f"stage {words!r} has no kernel; expected kN, as in '{kind} 128 k4 s2 p1'")
    if 0 in (*settings.get("kernel_size", ()), *settings.get("stride", ())):
        raise ValueError(f"stage {words!r}: kernel and stride are at least 1")
    size = tuple(int(side) for side in rest[0].split("x"))
    return [Stage(words, kind, size, settings, "bare" in flags, "each" in flags)] * flags.get("x", 1)


def stack(
    stages: Sequence[str], shape: Shape, norm: str = "none", activation: str = "relu"
) -> tuple[nn.Sequential, Shape]:
    """The layers of these stages for inputs of (N, *shape), and the shape of what they give.

    norm: "batch", "group" or "none". ValueError for words that cannot be read and stages that do not fit together.
    """
    act = activation_called(activation)
    layers: list[nn.Module] = []
    for stage in parse(stages):
        made, shape = _STAGES[stage.kind](stage, shape, norm, act)
        layers += made
        if stage.each:
            layers += [EachNorm(shape)] if norm == "batch" else []
        elif not stage.bare and len(shape) == 3 and stage.kind not in WHOLE:
            layers += norm_layers(norm, shape[0])
        if not stage.bare and stage.kind != "res":  # which ends in one itself
            layers.append(act())
    return nn.Sequential(*layers), shape


def _linear(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    flatten = [nn.Flatten()] if len(shape) > 1 else []
    unflatten = [nn.Unflatten(1, stage.size)] if len(stage.size) > 1 else []
    return [*flatten, nn.Linear(math.prod(shape), math.prod(stage.size)), *unflatten], stage.size


def _block(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    _check_map(stage, shape)
    if shape[0] != stage.size[0]:
        raise ValueError(
            f"stage {stage.words!r} gets {shape[0]} channels; a residual block keeps them: expected 'block {shape[0]}'"
        )
    return [ResidualBlock(shape[0], act)], shape


def _normed_block(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    _check_map(stage, shape)
    stride = stage.settings.get("stride", (1, 1))
    made = tuple(-(-side // step) for side, step in zip(shape[1:], stride, strict=True))
    return [NormedBlock(shape[0], stage.size[0], stride, norm, act)], (stage.size[0], *made)


def _pool(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    _check_map(stage, shape)
    if min(shape[1:]) < 2:
        raise ValueError(f"stage {stage.words!r} leaves nothing of maps of {shape[1]}x{shape[2]}")
    return [nn.MaxPool2d(2)], (shape[0], shape[1] // 2, shape[2] // 2)


def _up(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    _check_map(stage, shape)
    return [nn.Upsample(scale_factor=2)], (shape[0], 2 * shape[1], 2 * shape[2])


def _convolution(stage: Stage, shape: Shape, norm: str, act: Activation) -> tuple[list[nn.Module], Shape]:
    _check_map(stage, shape)
    transposed = stage.kind == "convt"
    kind: Any = nn.ConvTranspose2d if transposed else nn.Conv2d
    kernel, stride, padding, extra = (
        stage.settings.get(name, (usual, usual)) for name, usual in zip(SETTINGS.values(), (1, 1, 0, 0), strict=True)
    )
    if transposed and any(more >= step for more, step in zip(extra, stride, strict=True)):
        raise ValueError(f"stage {stage.words!r}: output padding is below the stride")
    made = tuple(
        (side - 1) * s - 2 * p + k + more if transposed else (side + 2 * p - k) // s + 1
        for side, k, s, p, more in zip(shape[1:], kernel, stride, padding, extra, strict=True)
    )
    if min(made) < 1:
        raise ValueError(f"stage {stage.words!r} leaves nothing of maps of {shape[1]}x{shape[2]}")
    return [kind(shape[0], stage.size[0], **stage.settings)], (stage.size[0], *made)


def _check_map(stage: Stage, shape: Shape) -> None:
    if len(shape) != 3:
        raise ValueError(
            f"stage {stage.words!r} gets data of shape {shape}; expected (channels, height, width): put a stage such "
            "as 'linear 128x4x4' before it"
        )


_STAGES: dict[str, Callable[[Stage, Shape, str, Activation], tuple[list[nn.Module], Shape]]] = {
    "conv": _convolution, "convt": _convolution, "block": _block, "res": _normed_block, "linear": _linear,
    "pool": _pool, "up": _up,
}


def described_vae(
    shape: Shape,
    latent: int,
    encoder: Sequence[str],
    decoder: Sequence[str],
    norm: str = "none",
    activation: str = "relu",
    decoder_activation: str | None = None,
    likelihood: Likelihood | None = None,
) -> VAE:
    """The VAE of these stages: the encoder's two linear heads come by themselves, the decoder ends in `shape`.

    likelihood: Bernoulli unless given; where it takes more than one number a value, the decoder's last stage makes as
    many. ValueError where the decoder makes something else than `shape`.
    """
    likelihood = likelihood or Bernoulli()
    body, features = stack(encoder, shape, norm, activation)
    if len(features) > 1:
        body.append(nn.Flatten())
    up, made = stack(decoder, (latent,), norm, decoder_activation or activation)
    if made != shape:
        raise ValueError(f"the decoder {', '.join(map(repr, decoder))} makes {made}; expected {shape}, as the data is")
    parameters = likelihood.parameter_shape(shape)
    if parameters != shape:
        up, made = stack(ending_in(decoder, parameters), (latent,), norm, decoder_activation or activation)
    if made != parameters:
        raise ValueError(
            f"the decoder {', '.join(map(repr, decoder))}, of which the last stage was widened, makes {made}; "
            f"{likelihood.name} takes {parameters}"
        )
    return VAE(Encoder(body, math.prod(features), latent), up, likelihood, latent, shape, ends(up))


def ending_in(stages: Sequence[str], shape: Shape) -> list[str]:
    """These stages, the last one making `shape` in place of the fewer channels that it names."""
    kind, size, *rest = stages[-1].split()
    size = "x".join(map(str, shape if kind == "linear" else shape[:1]))
    return [*stages[:-1], " ".join([kind, size, *rest])]


def halvings(channels: Sequence[int]) -> list[str]:
    """An encoder that halves the sides once for each of `channels`, rounding down: a side s to floor(s / 2)."""
    return [f"conv {width} k4 s2 p1" for width in channels]


def doublings(shape: Shape, channels: Sequence[int]) -> list[str]:
    """`halvings` backwards, to images of `shape`: the output padding is 1 where halving had dropped a row or column."""
    sides = halved(shape, len(channels))
    stages = []
    for i in reversed(range(len(channels))):
        odd = "x".join(str(before - 2 * after) for before, after in zip(sides[i], sides[i + 1], strict=True))
        stages.append(f"convt {channels[i - 1]} k4 s2 p1 op{odd}" if i else f"convt {shape[0]} k4 s2 p1 op{odd} bare")
    return stages


def halved(shape: Shape, times: int, by_channels: bool = True) -> list[tuple[int, int]]:
    """Height and width of images before the first halving and after each; ValueError where a side is used up.

    by_channels: whether the network halves once for each of its `channels`, so that fewer of them are the way out.
    """
    sides = [(shape[1] >> i, shape[2] >> i) for i in range(times + 1)]
    if min(sides[-1]) < 1:
        if not by_channels:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} cannot be halved {times} times; expected sides of at least "
                f"{2**times}: use the network 'mlp'"
            )
        possible = min(shape[1:]).bit_length() - 1
        sizes = ",".join(map(str, (32, 64, 128, 256, 512)[:possible]))
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} cannot be halved {times} times, once for each of `channels`; "
            + (f"give at most {possible}, e.g. --set channels={sizes}" if possible
               else "use the network 'mlp'")
        )
    return sides


def map_of(shape: Shape, channels: Sequence[int]) -> str:
    """What `halvings` make of images of `shape`, in the words of a stage: 1024x4x4."""
    height, width = halved(shape, len(channels))[-1]
    return f"{channels[-1]}x{height}x{width}"
