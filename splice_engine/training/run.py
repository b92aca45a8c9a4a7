"""What all runs share: a run is an iterator of steps."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .objective import Objective, Pictures, Targets


@dataclass(frozen=True)
class Step:
    """One step of a run. Its numbers are still on the device: reading them as floats waits for it.

    Attributes:
        index: 0 the first.
        total: The weighted sum that was minimised, a scalar.
        losses: The unweighted losses by name; those of the whole structure picture begin with "whole_".
    """

    index: int
    total: Tensor
    losses: dict[str, Tensor]

    def floats(self) -> dict[str, float]:
        """Total and losses as plain numbers."""
        return {"total": self.total.item(), **{name: loss.item() for name, loss in self.losses.items()}}


class Run(ABC):
    """What is iterated to train, left at any step, and entered again to go on.

    Attributes:
        step: Steps taken so far.
    """

    step: int

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps of the whole run."""

    @property
    def steps_left(self) -> int:
        """Steps not taken yet."""
        return max(0, self.steps - self.step)

    @abstractmethod
    def __iter__(self) -> Iterator[Step]:
        """Takes the steps that are left."""


def backward(
    objective: Objective,
    pictures: Pictures,
    names: Sequence[str] | None = None,
    targets: Targets | None = None,
    weight_scale: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds an objective's gradients to those of the weights; returns its total and losses, detached.

    Args:
        objective: The sum of terms.
        pictures: What is compared.
        names: Only these terms.
        targets: Features of the pictures that outputs are compared with, where they are known already.
        weight_scale: Further factors of the weights, by the terms' names.
    """
    losses = objective.losses(pictures, names, targets)
    total = objective.total(losses, weight_scale)
    total.backward()
    return total.detach(), {name: loss.detach() for name, loss in losses.items()}


def make_forward(module: nn.Module, compiled: bool = False, recompute: bool = False) -> Callable[[Tensor], Tensor]:
    """What applies a module in training.

    Args:
        module: The network.
        compiled: By torch.compile, at any size.
        recompute: Its activations are computed once more in the backward pass instead of kept.
    """
    forward: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=True) if compiled else module
    if not recompute:
        return forward
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def move_parts(parts: dict[str, Any], names: Sequence[str], device: torch.device) -> None:
    """Moves some of a run's parts to a device, in place; those that are not there yet are passed over.

    Args:
        parts: Tensors, networks, frozen dataclasses or tuples of them, or None.
        names: Of those that are moved.
        device: Where to.
    """
    for name in names:
        if name in parts:
            parts[name] = _move(parts[name], device)


def _move(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor | nn.Module):
        return part.to(device)
    if isinstance(part, tuple):
        return tuple(_move(item, device) for item in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{field.name: _move(getattr(part, field.name), device) for field in fields(part)})
    return part
