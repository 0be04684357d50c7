"""Algorithm 1 of the MR-VAE paper as a Lightning module; with one fixed beta and no gates, the beta-VAE baseline."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

import mrvae_kernels as mk

from .config import TrainConfig
from .curve import at, calibrated, log_spaced, measure
from .data import Batches
from .l_vae import LearnedTerms, learned_weights
from .objectives import Terms, annealing_factor, beta_vae_terms, sample_beta
from .operating import learned_sigma
from .run import plain_network
from .running_averages import RunningAverages
from .total_correlation import beta_tcvae_terms, decompose
from .vae import Output, dimensions_of, target_of

LINEAR_PART = 0.3
"""Part of the steps, at the end, over which a linear schedule falls."""

PLATEAU = "plateau"
PLATEAU_PATIENCE, PLATEAU_FACTOR = 2, 0.5
"""A plateau schedule multiplies the learning rate by this after so many validations without a better objective."""

AVERAGES = "epoch_averages"
"""Entry of a checkpoint: the averages of the epoch so far, and which it is."""

OBJECTIVE = "validation/objective"
"""What validation minimises: the objective on the validation set, averaged over betas of the range."""


class TrainingModule(pl.LightningModule):
    """Trains `model` by the options of a TrainConfig.

    A step: draw beta, log-uniform over the range (one an example, or one), and minimise mean(D_i + beta_i R_i); with
    `weight_power` p, each example's term is multiplied by (1 + beta_i)^p. A network with a method `penalty` adds what
    it returns, a scalar (spectral norms, say), to the loss; one with a method `balance` weighs the rates of its groups
    while the KL weight is annealed, or the range of betas still grows; of one with a method `target`, the distortion is
    of what that makes of a batch (the frames that a video is predicted by).
    With `objective` beta-tcvae the loss is mean(D_i + alpha MI_i + beta TC_i + gamma DWKL_i), one beta a step.
    With `objective` l-vae the loss is L-VAE's, whose two weights, in `learned`, are trained as the network is.
    Annealing multiplies the KL weights in the loss and nothing else: the gates get beta, and weight_power counts it.
    Annealing the betas themselves would teach the gates a smaller range, and leave the upper end to the last steps.
    A batch is a tensor of images, (N, *input_shape), or of sentences, (N, T).
    Validation: D + beta R at `config.validation_betas` betas over the range, averaged, with the same noise each time,
    and without annealing or free bits. With beta-tcvae D + alpha MI + beta TC + gamma DWKL, each batch of validation
    being taken for the whole set: of the mutual information it shows the log of its size at most, and what is beyond
    counts as total correlation. With `sigma_from` validation D is at the sigma that is likeliest for that set. With
    l-vae 2 sqrt(L_R) + 2 sqrt(KL), the least that its loss can be by its weights: what they are does not make one epoch
    look better than another.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, loader: Batches, calibration: Tensor | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loader = loader
        self.config = config
        self.steps = 0  # optimiser steps of the whole run
        self._told = False
        self.learned = learned_weights(config, plain_network(model))
        self._calibration = [calibration]  # in a list: a tensor attribute is no state, and is not moved to the device
        self.recent_averages = RunningAverages()  # for the progress line
        self.epoch_averages = RunningAverages()  # of the epoch so far
        self._averaged_epoch: int | None = None
        self.validated_epoch: int | None = None
        self._saved_plateau: dict[str, Any] | None = None
        self._plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        self._validation: list[Tensor] = []

    def setup(self, stage: str) -> None:
        self.steps = len(self.loader) * self.config.epochs  # here the processes know of each other, and their shares
        self.trainer.precision_plugin.convert_module(self)  # Lightning does so once a checkpoint is loaded, and rounded

    def on_fit_start(self) -> None:
        """Data that fits into a quarter of a GPU's free memory moves there once, instead of batch by batch."""
        images = self.loader.dataset.examples
        if self.device.type == "cuda" and images.nbytes < torch.cuda.mem_get_info(self.device)[0] // 4:
            self.loader.dataset.examples = images.to(self.device)

    def on_train_epoch_start(self) -> None:
        if self._averaged_epoch != self.current_epoch:  # not in an epoch that is gone on with
            self._averaged_epoch, self.epoch_averages = self.current_epoch, RunningAverages()

    def on_train_epoch_end(self) -> None:
        """One warning, with what to do, when L-VAE's weights have collapsed."""
        trouble = None if self.learned is None or self._told else self.learned.trouble()
        if trouble is not None:
            self._told = True
            warnings.warn(trouble, stacklevel=1)

    def trajectory(self) -> dict[str, float]:
        """What training logs besides losses: s0, s1 and beta of L-VAE, sigma of a plain decoder that learns it."""
        if self.learned is not None:
            return self.learned.values()
        sigma = learned_sigma(self.model)
        return {} if sigma is None else {"sigma": sigma}

    def is_finite(self) -> bool:
        """Whether the epoch's mean loss so far and all weights are finite; waits for the device.

        The weights too: after a step whose gradient overflowed, only the next step's loss would show it.
        """
        averages = self.epoch_averages.means()
        if averages is not None and not math.isfinite(averages.loss):
            return False
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters()]).all())

    def training_step(self, x: Tensor) -> Tensor:
        config = self.config
        beta: float | Tensor
        if config.beta is None:
            stratified = config.stratified and config.sample == "example"  # one beta a step cannot be spread
            beta = sample_beta(len(x), self._range_now(), config.sample, stratified, device=self.device)
            output = self.model(x, beta=beta)
        else:
            beta = config.beta
            output = self.model(x)
        terms = self._terms(output, target_of(plain_network(self.model), x), beta)
        unweighted = loss = terms.loss()
        if config.weight_power and isinstance(beta, Tensor):
            loss = terms.loss((1 + beta).expand(len(x)) ** config.weight_power)
        penalty = getattr(plain_network(self.model), "penalty", None)
        if penalty is not None:
            loss = loss + penalty()
        with torch.no_grad():
            step = torch.stack([unweighted, terms.distortion.mean(), terms.rate.mean()])
            self.recent_averages.add(step)
            self.epoch_averages.add(step)
        return loss

    def _terms(self, output: Output, x: Tensor, beta: float | Tensor) -> Terms | LearnedTerms:
        """What the step's loss is made of."""
        config = self.config
        if self.learned is not None:
            likelihood = plain_network(self.model).likelihood
            distortion = likelihood.distortion(output.parameters, x)
            return LearnedTerms(distortion, output.rates.flatten(1).sum(1), self.learned)
        annealing = annealing_factor(self.global_step, self.steps, config.annealing, config.annealing_cycles)
        likelihood = plain_network(self.model).likelihood
        if config.objective == "beta-tcvae":
            size, sampling = len(self.loader.dataset), config.tcvae_sampling
            return beta_tcvae_terms(
                output, x, beta, likelihood, size, *config.tcvae_weights, sampling=sampling, annealing=annealing
            )
        balance = getattr(plain_network(self.model), "balance", None) if annealing * self._part_of_range() < 1 else None
        return beta_vae_terms(output, x, beta, likelihood, config.free_bits, annealing, balance)

    def _range_now(self) -> tuple[float, float]:
        """Where betas are drawn from at this step: the whole range once `range_warmup` of the steps are done.

        Small betas first: what the network learns to keep there is what larger betas then let go of.
        """
        low, high = self.config.sampled_range
        return low, low * (high / low) ** self._part_of_range()

    def _part_of_range(self) -> float:
        if self.config.beta is not None:
            return 1.0
        warmup = self.config.range_warmup * self.steps
        return min(1.0, (self.global_step + 1) / warmup) if warmup else 1.0

    @property
    def betas_of_validation(self) -> list[float]:
        if self.config.beta is not None:
            return [self.config.beta]
        return log_spaced(*self.config.beta_range, self.config.validation_betas)

    @property
    def validation_metrics(self) -> list[str]:
        """Names of what a validation logs."""
        betas = ["learned"] if self.learned is not None else [f"{beta:.3g}" for beta in self.betas_of_validation]
        names = [f"validation/{{}}/beta={beta}" for beta in betas]
        return [OBJECTIVE, *(name.format(quantity) for quantity in ("distortion", "rate") for name in names)]

    def on_validation_epoch_start(self) -> None:
        self._validation = [torch.zeros(len(self.betas_of_validation), 4, dtype=torch.float64, device=self.device)]

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        if batch_idx % self.trainer.world_size != self.global_rank:
            return  # another process's share
        generator = torch.Generator()
        sums = []
        for beta in self.betas_of_validation:
            # one seed a batch: the same noise at every beta and in every epoch
            generator.manual_seed(self.config.seed * 1_000_003 + batch_idx)
            with calibrated(self.model, self._calibration[0], beta):
                distortion, rate, _ = measure(self.model, x, beta, generator)
                objective = distortion + beta * rate
                if self.config.objective == "beta-tcvae":
                    objective = self._tcvae_objective(x, beta, distortion, generator)
                elif self.learned is not None:
                    objective = self.learned.scale.reconstruction(distortion)
            sums.append(torch.stack([objective.sum(), distortion.sum(), rate.sum(), rate.new_tensor(len(x))]))
        self._validation.append(torch.stack(sums).double())  # (betas, 4)

    def _tcvae_objective(self, x: Tensor, beta: float, distortion: Tensor, generator: torch.Generator) -> Tensor:
        """D + alpha MI + beta TC + gamma DWKL of each example, within a batch that is taken for the whole set."""
        network = plain_network(self.model)
        with at(self.model, beta):
            mean, log_variance = network.encode(x)
        noise = torch.randn(mean.shape, generator=generator).to(mean)
        parts = decompose(mean + torch.exp(0.5 * log_variance) * noise, mean, log_variance)
        alpha, gamma = self.config.tcvae_weights
        return distortion + alpha * parts[0] + beta * parts[1] + gamma * parts[2]

    def on_validation_epoch_end(self) -> None:
        sums = torch.stack(self._validation).sum(0)
        sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        means = sums[:, :3] / sums[:, 3:]
        objective, distortion = means[:, 0].mean(), means[:, 1]
        if self.config.sigma_from == "validation":
            network = plain_network(self.model)
            distortion = network.likelihood.at_likeliest(distortion, dimensions_of(network))
            objective = objective + (distortion - means[:, 1]).mean()
        if self.learned is not None:
            rate = means[:, 2].mean().clamp_min(0)  # of single draws, as an hvae's, it may be negative
            objective = 2 * objective.sqrt() + 2 * rate.sqrt()
        values = [objective, *distortion, *means[:, 2]]
        self.log_dict(dict(zip(self.validation_metrics, (value.float() for value in values), strict=True)))
        if self._plateau is not None:
            self._plateau.step(float(values[0]))
        self.validated_epoch = self.current_epoch

    def configure_optimizers(self) -> Any:
        config = self.config
        sigmas = [*plain_network(self.model).likelihood.parameters()]  # of the likelihoods only sigmas are learned
        sigmas += [] if self.learned is None else self.learned.parameters()
        of_sigmas = set(map(id, sigmas))
        gates = self.model.gate_parameters() if isinstance(self.model, mk.MultiRate) else []
        network = self.model.network_parameters() if isinstance(self.model, mk.MultiRate) else self.model.parameters()
        groups: list[dict[str, Any]] = [
            {"params": [each for each in network if id(each) not in of_sigmas], "lr": config.lr}
        ]
        if gates:
            groups.append({"params": list(gates), "lr": config.lr * config.gate_lr_factor})
        if sigmas:  # AdamW's decay would draw every log sigma to 0, and so sigma^2 and beta away from where they belong
            groups.append({"params": sigmas, "lr": config.lr * config.sigma_lr_factor, "weight_decay": 0.0})
        optimizer: torch.optim.Optimizer
        if config.optimizer == "adamax":
            optimizer = torch.optim.Adamax(groups, lr=config.lr)  # torch has no fused one
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
            optimizer = kind(groups, lr=config.lr, fused=self._can_fuse())
        if config.schedule == "plateau":
            self._plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
                optimizer,
                factor=PLATEAU_FACTOR,
                patience=PLATEAU_PATIENCE - 1,  # torch counts those that are let pass
                threshold=0.0,
                min_lr=[group["lr"] * config.final_lr / config.lr for group in optimizer.param_groups],
            )
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(config, self.steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[AVERAGES] = {"epoch": self._averaged_epoch, **self.epoch_averages.state_dict()}
        if self._plateau is not None:  # ours to keep: Lightning steps its own only after the epoch's checkpoint
            checkpoint[PLATEAU] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if AVERAGES in checkpoint:  # earlier ones have none
            self._averaged_epoch = checkpoint[AVERAGES]["epoch"]
            self.epoch_averages.load_state_dict(checkpoint[AVERAGES])
        self._saved_plateau = checkpoint.get(PLATEAU)

    def on_train_start(self) -> None:
        if self._plateau is not None and self._saved_plateau is not None:
            self._plateau.load_state_dict(self._saved_plateau)

    def _can_fuse(self) -> bool:
        """One launch for all parameters instead of several a parameter, where torch has that kernel."""
        unscaling = self.config.precision == "16-mixed"  # Lightning cannot clip inside a fused step that unscales
        return self.device.type in ("cpu", "cuda") and not (unscaling and self.config.clip is not None)


def learning_rate_factor(config: TrainConfig, steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate: a linear rise over warmup, then the schedule's fall."""
    warmup = round(steps * config.warmup)
    floor = config.final_lr / config.lr

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "linear":
            return floor + (1 - floor) * min(1.0, (1 - progress) / LINEAR_PART)
        return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2

    return factor
