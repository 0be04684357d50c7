"""Activation checkpointing inside a multi-rate network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .hosting import Hosted, lend

Contexts = Callable[[], tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]]


def checkpoint_context(model: Any) -> Contexts:
    """context_fn for torch.utils.checkpoint inside a multi-rate network: the recomputation gets the forward's gates.

        torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_context(model))

    `model` is the MultiRate. A checkpoint around the whole model needs none of this. RuntimeError outside a forward
    of the model.
    """

    def contexts() -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
        layers = model._hosts() + ([] if model.conditional is None else model.conditional.places.hosted())
        shares, directs = [layer._share for layer in layers], [layer._direct for layer in layers]
        stage = model._plans.stage
        gates = None if stage is None else stage.gates
        if shares[0] is None and gates is None:
            raise RuntimeError(
                "checkpoint_context(model) was used outside a forward of that model; there is no beta to keep"
            )

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            with lend(layers, shares):
                if stage is None:
                    yield
                    return
                before = stage.gates, [layer._direct for layer in layers]
                try:
                    _set(stage, layers, gates, directs)
                    yield
                finally:
                    _set(stage, layers, *before)

        return contextlib.nullcontext(), again()

    return contexts


def _set(stage: Any, layers: Sequence[Hosted], gates: Any, directs: Sequence[Any]) -> None:
    stage.gates = gates
    for layer, direct in zip(layers, directs, strict=True):
        layer.__dict__["_direct"] = direct
