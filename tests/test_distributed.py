"""DistributedDataParallel: two gloo processes, half a batch each, equal one process with the whole batch."""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mrvae_kernels as mk

STEPS, BATCH = 3, 8


def build() -> mk.MultiRate:
    torch.manual_seed(0)
    network = nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)),
            "decoder": nn.Sequential(nn.Linear(3, 200), nn.LayerNorm(200), nn.Linear(200, 12)),
        }
    )
    return mk.multirate(
        Autoencoder(network).double(),
        {"parts.encoder": mk.GateSpec("sigmoid", shift=True), "parts.decoder": "softplus"},
    )


class Autoencoder(nn.Module):
    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["decoder"](self.parts["encoder"](x))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 6, dtype=torch.float64, generator=generator)
    return x, torch.exp(torch.rand(BATCH, dtype=torch.float64, generator=generator) * 6 - 4)


def train(model: nn.Module, rows: slice, per_sample: bool) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        x, beta = data(step)
        y = model(x[rows], beta=beta[rows] if per_sample else beta[0])
        optimizer.zero_grad()
        (y - x[rows].flatten(1)).square().sum(1).mean().backward()
        optimizer.step()


def work(rank: int, folder: str) -> None:
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    # imported when there is a process group, as DistributedDataParallel does, its defaults hold the group for ever
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        train_replica(rank, folder)
    finally:
        # A replica holds the process group, whose threads end with it alone. One that lives into Python's
        # finalization asks for the interpreter's lock and aborts the process: 1 run in 12.
        gc.collect()
        dist.destroy_process_group()


def train_replica(rank: int, folder: str) -> None:
    for per_sample in (False, True):
        model = DistributedDataParallel(build())
        train(model, slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), per_sample)
        torch.save(model.module.state_dict(), f"{folder}/{rank}-{per_sample}.pt")


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_equal_one(tmp_path: Path):
    mp.spawn(work, (str(tmp_path),), nprocs=2)
    for per_sample in (False, True):
        start, alone = build().state_dict(), build()
        train(alone, slice(None), per_sample)
        states = [torch.load(tmp_path / f"{rank}-{per_sample}.pt", weights_only=True) for rank in (0, 1)]
        for name, value in alone.state_dict().items():
            assert torch.equal(states[0][name], states[1][name]), name
            torch.testing.assert_close(states[0][name], value, rtol=1e-9, atol=1e-11)
            if name != "_extra_state":
                assert not torch.equal(value, start[name]), f"{name} was not trained"
