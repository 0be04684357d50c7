"""TrainConfig: every option of a training run, its default, its check and its help, in one place.

No torch here: `mrvae --help` is made from these fields and answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .likelihood_names import LIKELIHOOD_NAMES
from .network_names import DEFAULT_LIKELIHOODS, NETWORK_NAMES
from .objective_options import LVAE_FORMS, OBJECTIVES, SIGMAS, TCVAE_SAMPLING, chosen_together
from .option_changes import as_now
from .option_checks import GATE_KINDS, LOGS, check_acting, check_together
from .options import check_format, check_type, parse_duration, parse_gate, parse_setting, read_json
from .recipes import RECIPES, default_recipe, recipe_options

FORMAT = "mrvae-run/1"
"""Written to config.json of a run; another format is refused."""

FROM_RECIPE: Any = object()
"""Default of the options that a recipe sets together."""

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed", "bf16-true")
LAYOUTS = ("NCHW", "NHWC", "NTHW", "TNHW", "NTCHW", "TNCHW", "NTHWC", "TNHWC")
OPTIMIZERS = ("adam", "adamax", "adamw")


def _option(default: Any, help: str, group: str, **details: Any) -> Any:
    """A field of TrainConfig; `details` are parse, metavar, choices and flag for the command line."""
    metadata = {"help": help, "group": group, **details}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Options of one training run; `check()` raises ValueError, naming the option, before anything heavy starts.

    With `beta=None` a multi-rate network is trained over `beta_range` by Algorithm 1 of Bae et al. (2022); with a
    number, the same network without gates at that one KL weight: the beta-VAE to compare with.
    """

    out: str | None = _option(None, "directory of the run (default: runs/<network>-<data>)", "run", metavar="DIR")
    seed: int = _option(0, "seed of weights, data order, betas and noise", "run", metavar="N")
    max_time: float | None = _option(
        None,
        "stop after this time, leaving a run that --resume continues (for as long again): 90, 15m, 2h30m",
        "run",
        metavar="TIME",
        parse=parse_duration,
    )
    patience: int | None = _option(
        None, "stop early after this many validations without a better objective", "run", metavar="N"
    )
    validate_every: int = _option(FROM_RECIPE, "validate every N epochs", "run", metavar="N")
    validation_betas: int = _option(
        5, "number of betas, log-spaced over the range, that the validation objective averages over", "run", metavar="N"
    )
    keep: str = _option(
        "last",
        "weights of model.safetensors: 'last', or 'best' by the validation objective",
        "run",
        choices=("last", "best"),
    )
    checkpoint_every_steps: int | None = _option(
        None, "save last.ckpt every N steps too, not only after every epoch", "run", metavar="N"
    )
    log_to: tuple[str, ...] = _option(
        LOGS, "what to log besides the progress line: csv, tensorboard, or none", "run", metavar="LOG", many=True
    )

    network: str = _option("mlp", f"network: {', '.join(NETWORK_NAMES)}", "model", metavar="NAME")
    latent: int | None = _option(None, "number of latent variables (default: the network's own)", "model", metavar="N")
    likelihood: str | None = _option(
        None,
        "p(x|z) (default: the network's own): bernoulli, of values in [0, 1]; a density, gaussian with a given sigma, "
        "with one learned (shared), computed (optimal) or computed for each image, with one for each pixel, or "
        "student-t; or a probability of 256 levels, from categorical on",
        "model",
        choices=LIKELIHOOD_NAMES,
    )
    sigma: float | None = _option(
        None,
        "standard deviation of gaussian (default: 1), and what a learned one, such as gaussian-shared's, starts from",
        "model",
        metavar="SIGMA",
        parse=float,
    )
    likelihood_options: dict[str, Any] = _option(
        {},
        "further option of the likelihood, such as components=5 of logistic-mixture; may be repeated",
        "model",
        flag="--likelihood-set",
        metavar="NAME=VALUE",
        parse=parse_setting,
    )
    network_options: dict[str, Any] = _option(
        {},
        "further option of the network, such as hidden=600; may be repeated",
        "model",
        flag="--set",
        metavar="NAME=VALUE",
        parse=parse_setting,
    )

    data: str = _option(
        "digits",
        "digits (embedded: 6,000 of MNIST's), a folder of images or of IDX files, a .npz, .npy or IDX file, "
        "a public set by name, such as mnist, omniglot, cifar10, svhn, celeba, dsprites or moving-digits (mrvae data "
        "lists them), "
        "hf:NAME for any other of Hugging Face's; or text, one document a line: a .txt file, or a folder of train.txt, "
        "valid.txt and test.txt",
        "data",
        metavar="SOURCE",
    )
    binarize: str = _option(
        "none",
        "make pixels 0 or 1: none, fixed (once, by the seed) or dynamic (again at every visit)",
        "data",
        choices=("none", "fixed", "dynamic"),
    )
    resize: int | None = _option(None, "resize images from files to this side", "data", metavar="SIDE")
    layout: str | None = _option(
        None,
        "axes of arrays, where the shape leaves it open; NTHW or TNHW for clips of grey frames",
        "data",
        choices=LAYOUTS,
    )
    frames: int | None = _option(
        None,
        "of clips: train on N frames in a row, from anywhere in a clip, and validate and test on the first N (default: "
        "all); a folder of images is clips with it, one a sub-folder",
        "data",
        metavar="N",
    )
    frame_stride: int = _option(1, "of clips: take every N-th frame", "data", metavar="N")
    vocabulary: str | None = _option(
        None,
        "of text: a file of tokens, one a line, to use (default: the most frequent of the training documents)",
        "data",
        metavar="FILE",
    )
    vocabulary_size: int = _option(
        10_000, "of text: most entries of a vocabulary, <pad>, <s>, </s> and <unk> included", "data", metavar="N"
    )
    min_count: int = _option(
        1, "of text: how often a token must occur to be in the vocabulary; others are <unk>", "data", metavar="N"
    )
    max_length: int | None = _option(
        None, "of text: keep the first N tokens of a document, </s> included (default: all)", "data", metavar="N"
    )
    data_seed: int = _option(
        0, "seed of the splits, of fixed binarisation and of data that are made", "data", metavar="N"
    )
    train_on: str = _option(
        "train",
        "examples to train on: the 'train' split, or 'all' of a set that is not divided, as beta-TCVAEs are on "
        "dsprites; validation and test are then parts of what was trained on",
        "data",
        choices=("train", "all"),
    )

    beta_range: tuple[float, float] = _option(
        (0.01, 10.0),
        "lowest and highest KL weight that the network learns",
        "beta",
        metavar=("LOW", "HIGH"),
        parse=float,
    )
    beta: float | None = _option(
        None,
        "train a plain beta-VAE, without gates, at this one KL weight instead of the range",
        "beta",
        metavar="BETA",
        parse=float,
    )
    recipe: str = _option(
        FROM_RECIPE,
        "options chosen together, each of which can be given apart: 'ranked' (default; the best of those tried on "
        "digits), 'linear', 'text', 'hierarchy', 'layers' and 'video' (defaults of linear, lstm, nvae, hvae and "
        "svg-lp) or 'paper' (Algorithm 1 and Listing 1 as printed)",
        "recipe",
        choices=tuple(RECIPES),
    )
    sample: str = _option(
        FROM_RECIPE,
        "draw a beta for every 'example' of a batch or one for the 'step'",
        "beta",
        choices=("example", "step"),
    )
    stratified: bool = _option(
        FROM_RECIPE,
        "spread the betas of a batch evenly over the range; not with --sample step, which draws one",
        "beta",
    )
    margin: tuple[float, float] = _option(
        FROM_RECIPE,
        "draw betas from [LOW / first, HIGH * second]: the ends of the range are learnt better when not at the edge",
        "beta",
        metavar=("FACTOR", "FACTOR"),
        parse=float,
    )
    range_warmup: float = _option(
        FROM_RECIPE,
        "part of the run over which the range that betas are drawn from grows from its low end to the whole",
        "beta",
        metavar="PART",
        parse=float,
    )
    weight_power: float = _option(
        FROM_RECIPE,
        "weigh an example's loss by (1 + beta) to this power; above 0, high betas count more",
        "beta",
        metavar="POWER",
        parse=float,
    )

    objective: str = _option(
        "beta-vae",
        "what is minimised: beta-vae, D + beta R; beta-tcvae, D + ALPHA * mutual information + beta * total "
        "correlation + GAMMA * dimension-wise KL, the rate's three parts; sigma-vae, D + R of a Gaussian whose "
        "variance is learned (--likelihood gaussian-optimal unless told, or gaussian-shared, -image, -pixel); bs-vae, "
        "D + beta R with --likelihood gaussian-image; or l-vae, L / S0^2 + R / S1^2 + S0^2 + S1^2, which learns S0 and "
        "S1, of one network without gates; --beta is S0^2 / S1^2 to start from (default: 1)",
        "objective",
        choices=OBJECTIVES,
    )
    tcvae_weights: tuple[float, float] = _option(
        (1.0, 1.0), "the other two weights of beta-tcvae", "objective", metavar=("ALPHA", "GAMMA"), parse=float
    )
    tcvae_sampling: str = _option(
        "weighted",
        "how beta-tcvae estimates the aggregate posterior from a batch: minibatch-'weighted' or 'stratified' sampling",
        "objective",
        choices=TCVAE_SAMPLING,
    )
    lvae_form: str = _option(
        "sum",
        "what l-vae's reconstruction loss L is: the 'sum' over an example's dimensions, D without its constant, or the "
        "'mean', the paper's MSE",
        "objective",
        choices=LVAE_FORMS,
    )
    lvae_regulariser: bool = _option(
        True, "l-vae's S0^2 + S1^2 in the loss; without it both weights collapse (the paper's ablation)", "objective"
    )
    sigma_from: str = _option(
        "training",
        "the sigma that a decoder of one sigma keeps (--likelihood gaussian-shared, -optimal; -image: in samples): "
        "that of 'training', as in the papers, or the likeliest for the 'validation' examples, by which epochs are "
        "compared too: larger by what the network errs more on examples that it has not seen",
        "objective",
        choices=SIGMAS,
    )
    free_bits: float = _option(
        FROM_RECIPE,
        "nats of each latent variable's (or group's) mean rate that cost nothing more when they shrink",
        "objective",
        metavar="NATS",
        parse=float,
    )
    annealing: float = _option(
        0.0,
        "part of the run (of each cycle) over which the KL weight in the loss rises linearly from 0 to beta; gates get "
        "the whole beta all along",
        "objective",
        metavar="PART",
        parse=float,
    )
    annealing_cycles: int = _option(
        1, "number of equal cycles that the annealing is repeated in", "objective", metavar="N"
    )

    gates: dict[str, str] = _option(
        FROM_RECIPE,
        "gate of the layers under a module, as MODULE=KIND; the most specific module counts; kinds: "
        + ", ".join(GATE_KINDS)
        + "; +shift adds a FiLM shift, +ranked starts a sigmoid gate with a threshold in beta for each feature, "
        "+latent gates the layer's inputs too, +hidden64 makes gates by an MLP with a hidden layer of 64, and +shared "
        "lets all layers share that layer",
        "gates",
        metavar="MODULE=KIND",
        many=True,
        parse=parse_gate,
    )
    gate_degree: int = _option(
        FROM_RECIPE,
        "degree of a gate's argument as a polynomial of log beta: 1, the paper's, is affine; with 2 or 3 a gate may "
        "bend and turn back. Gates with hidden layers have none",
        "gates",
        choices=(1, 2, 3),
    )
    gate_init: str = _option(
        FROM_RECIPE,
        "gates start 'open' (near 1), or as in the 'paper' (U(-1, 1); many sqrt gates are dead then)",
        "gates",
        choices=("open", "paper"),
    )
    exclude: tuple[str, ...] = _option(
        (), "layers to leave without a gate, by name", "gates", metavar="LAYER", many=True
    )
    gated: str = _option(
        "every",
        "layers that get a gate: 'every' one, or those of the 'paper', whose runs leave the decoder's first layer, the "
        "posterior's heads and the output layer without",
        "gates",
        choices=("every", "paper"),
    )
    norms: str = _option(
        "gated",
        "batch norms: 'gated', or 'conditional' as in the paper's convolutional networks: weight and bias each get a "
        "small MLP of log beta, and the layers before the norms have gates of their own",
        "gates",
        choices=("gated", "conditional"),
    )
    include: tuple[str, ...] = _option(
        (),
        "gate only these layers, by name or pattern with *, also those right before a batch norm, whose gate is left "
        "to the norm otherwise",
        "gates",
        metavar="LAYER",
        many=True,
    )

    epochs: int = _option(FROM_RECIPE, "passes over the training data", "optimisation", metavar="N")
    batch_size: int = _option(FROM_RECIPE, "examples a step, over all devices together", "optimisation", metavar="N")
    optimizer: str = _option(
        FROM_RECIPE, "optimiser, torch's defaults but for --lr; NVAE's is adamax", "optimisation", choices=OPTIMIZERS
    )
    lr: float = _option(FROM_RECIPE, "learning rate", "optimisation", metavar="LR", parse=float)
    gate_lr_factor: float = _option(
        FROM_RECIPE, "learning rate of the gates, as a multiple of --lr", "optimisation", metavar="FACTOR", parse=float
    )
    sigma_lr_factor: float = _option(
        10.0,
        "learning rate of the logarithms of learned sigmas, gaussian-shared's and l-vae's S0 and S1, as a multiple of "
        "--lr (1 in the papers)",
        "optimisation",
        metavar="FACTOR",
        parse=float,
    )
    schedule: str = _option(
        FROM_RECIPE,
        "learning rate over the run: cosine down to --final-lr, linear down to it over the last 30 %, constant, or "
        "plateau: halved after two validations without a better objective, down to --final-lr at most",
        "optimisation",
        choices=("cosine", "linear", "constant", "plateau"),
    )
    final_lr: float = _option(
        FROM_RECIPE,
        "learning rate at the end of a cosine or linear schedule, and the least of plateau",
        "optimisation",
        metavar="LR",
        parse=float,
    )
    warmup: float = _option(
        FROM_RECIPE,
        "part of the run over which the learning rate rises linearly from zero",
        "optimisation",
        metavar="PART",
        parse=float,
    )
    clip: float | None = _option(
        FROM_RECIPE,
        "clip the gradient's norm to this (default: no clipping; 5 in the recipe 'text')",
        "optimisation",
        metavar="NORM",
        parse=float,
    )

    ema: float = _option(
        FROM_RECIPE,
        "validate and keep an exponential moving average of the weights with this decay a step, such as 0.9995, that "
        "of the recipe 'layers'; 0: the weights themselves. It takes some 1 / (1 - DECAY) steps to forget the first",
        "optimisation",
        metavar="DECAY",
        parse=float,
    )

    precision: str = _option("32-true", "number format of the products", "hardware", choices=PRECISIONS)
    accelerator: str = _option("auto", "auto, cpu, gpu or any other that Lightning knows", "hardware", metavar="NAME")
    devices: int = _option(1, "devices of each machine", "hardware", metavar="N")
    num_nodes: int = _option(1, "machines", "hardware", metavar="N")
    strategy: str = _option("auto", "Lightning's strategy: auto, ddp, ...", "hardware", metavar="NAME")
    threads: int | None = _option(None, "CPU threads (default: torch's choice)", "hardware", metavar="N")
    deterministic: bool = _option(
        False,
        "only deterministic algorithms on the GPU too (the CPU's are); slower, exact resume there needs it",
        "hardware",
    )

    def __post_init__(self) -> None:
        if self.recipe is FROM_RECIPE:
            self.recipe = default_recipe(self.network)
        usual = DEFAULT_LIKELIHOODS.get(self.network)
        for name, value in chosen_together(self, usual).items():
            setattr(self, name, value)
        if self.likelihood is None:
            self.likelihood = usual
        if self.sample is FROM_RECIPE and self.objective == "beta-tcvae":
            self.sample = "step"
        for name, value in recipe_options(self.recipe if self.recipe in RECIPES else "ranked").items():
            if getattr(self, name) is FROM_RECIPE:
                setattr(self, name, dict(value) if isinstance(value, dict) else value)  # check() refuses an unknown one
        for name in ("log_to", "exclude", "include", "beta_range", "margin", "tcvae_weights"):
            value = getattr(self, name)
            if isinstance(value, (str, list)):  # JSON has lists only
                setattr(self, name, (value,) if isinstance(value, str) else tuple(value))
        if self.log_to == ("none",):
            self.log_to = ()

    @property
    def sampled_range(self) -> tuple[float, float]:
        """[low / margin[0], high * margin[1]]: where training draws beta from."""
        low, high = self.beta_range
        return low / self.margin[0], high * self.margin[1]

    @property
    def directory(self) -> Path:
        """Directory of the run."""
        if self.out is not None:
            return Path(self.out)
        return Path("runs") / f"{self.network}-{Path(self.data).stem.replace(':', '-') or 'data'}"

    def check(self) -> None:
        """ValueError, naming the option, its value and what was expected, for the first option that makes no sense."""
        for entry in fields(self):
            value, metadata = getattr(self, entry.name), entry.metadata
            check_type(entry.name, value, str(entry.type))
            if value is not None and "choices" in metadata and value not in metadata["choices"]:
                choices = ", ".join(map(str, metadata["choices"]))
                raise ValueError(f"{entry.name} is {value!r}; expected one of {choices}")
        check_together(self)

    def check_new(self) -> None:
        """check(), and ValueError for options that a run which is there may have, and that never act."""
        self.check()
        check_acting(self)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types; from_dict() reads them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], source: str = "the configuration") -> TrainConfig:
        """Options from a mapping; ValueError for a key that is no option, with the nearest one that is."""
        known = [entry.name for entry in fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(known)}"
                raise ValueError(f"unknown option {key!r} in {source}; {hint}")
        return cls(**options)

    @classmethod
    def load(cls, path: str | Path) -> TrainConfig:
        """Options from a run's config.json, or from a JSON object of options alone; ValueError when it is neither."""
        document = read_json(path)
        if "format" in document:
            check_format(document, FORMAT, path)
            document = document.get("config", {})
            if not isinstance(document, dict):
                raise ValueError(f"{path}: entry 'config' is {document!r}; expected an object of options")
            document = as_now(document)
        return cls.from_dict(document, str(path))
