"""Muon for the matrices inside the model: momentum, then an orthogonalized update; the rest is AdamW's.

It is meant to learn more per token than AdamW; the price is three steps of small matrix products per matrix,
spread over the caller's workers (about a fifth of a step's time on a CPU at 4,000 tokens a step). fp32 throughout. Source: K. Jordan et al., "Muon" (2024); update
scale after J. Liu et al., "Muon is Scalable for LLM Training" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
)
"""Of x, x³ and x⁵, best for three steps. Source: N. Amsel et al., "The Polar Express" (2025)."""
_CHUNK = 8


class Mapper(Protocol):
    """`Executor.map`, or the builtin."""

    def __call__(
        self, fn: Callable[[torch.Tensor], torch.Tensor], items: Iterable[torch.Tensor], /
    ) -> Iterable[torch.Tensor]: ...


@torch.no_grad()
def orthogonalize(updates: torch.Tensor) -> torch.Tensor:
    """Matrices [N, R, C] with the same singular vectors and singular values near 1 (most from 0.2 to 1.9)."""
    wide = updates.shape[1] <= updates.shape[2]
    x: torch.Tensor = updates if wide else updates.transpose(1, 2)
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    result: torch.Tensor = x if wide else x.transpose(1, 2)
    return result


class Muon:
    """Nesterov momentum with orthogonalized updates and decoupled weight decay, for matrices only.

    `lr` is on AdamW's scale: an update's root mean square is about 0.2 × lr.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], *, momentum: float = 0.95, weight_decay: float
    ) -> None:
        if any(parameter.ndim != 2 for parameter in parameters):
            raise ValueError("Muon takes matrices only: give vectors to AdamW")
        self._momentum = momentum
        self._weight_decay = weight_decay
        self._groups = _same_shapes(parameters)
        self._buffers = [[torch.zeros_like(p) for p in group] for group in self._groups]

    @torch.no_grad()
    def step(self, lr: float, mapper: Mapper) -> None:
        """One update from the gradients; `mapper` may run the groups in parallel."""
        directions = [self._direction(g, b) for g, b in zip(self._groups, self._buffers, strict=True)]
        for group, update in zip(self._groups, mapper(orthogonalize, directions), strict=True):
            scale = 0.2 * max(update.shape[1:]) ** 0.5
            for parameter, part in zip(group, update.unbind(0), strict=True):
                parameter.mul_(1 - lr * self._weight_decay).add_(part, alpha=-lr * scale)

    def _direction(self, group: list[torch.nn.Parameter], buffers: list[torch.Tensor]) -> torch.Tensor:
        rows = []
        for parameter, buffer in zip(group, buffers, strict=True):
            if parameter.grad is None:
                raise ValueError("a parameter has no gradient: run backward before step")
            buffer.lerp_(parameter.grad, 1 - self._momentum)
            rows.append(parameter.grad.lerp(buffer, self._momentum))
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        """The momentum buffers, in order of construction."""
        return {"buffers": self._buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the buffers over."""
        for mine, theirs in zip(self._buffers, state["buffers"], strict=True):
            for buffer, value in zip(mine, theirs, strict=True):
                buffer.copy_(value)


def _same_shapes(parameters: Sequence[torch.nn.Parameter]) -> list[list[torch.nn.Parameter]]:
    by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
    for parameter in parameters:
        by_shape.setdefault(parameter.shape, []).append(parameter)
    return [group[i : i + _CHUNK] for group in by_shape.values() for i in range(0, len(group), _CHUNK)]
