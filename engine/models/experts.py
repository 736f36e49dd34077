"""Mixture of experts: a router gives each token to a few MLPs of a layer and weighs what they make of it.

All experts of a layer are one tensor [E, …]. Tokens are sorted by expert, so that each expert multiplies its own tokens once and
those that no token chose are not touched. On a CPU the sizes of the groups are read; on a GPU they stay there, and one kernel
does the products of all experts, so that nothing waits and a step can be captured. With `row_tile`, on a CPU, a token's result does
not depend on the tokens beside it: products have one shape, and a token's sum runs over its experts in their order.

Boundary: the MLP of one layer; no quantized experts. Kernel: ``engine.kernels.expert_linear``.
Source: Mixtral (Jiang et al. 2024); Qwen1.5-MoE, whose shared MLP every token takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.kernels.invariant import in_pieces, tiled_linear
from engine.models.layers import Linear, gated
from engine.models.moe_config import MoeConfig
from engine.models.registry import TensorNames


class SparseMlp(nn.Module):
    """The MLP of one layer: experts behind a router, on request a shared MLP beside them."""

    def __init__(self, moe: MoeConfig, hidden_size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()

        def linear(n_in: int, n_out: int) -> Linear:
            return Linear(n_in, n_out, bias=False, dtype=dtype, device=device)

        def experts(n_in: int, n_out: int) -> nn.Parameter:
            empty = torch.empty(moe.num_experts, n_out, n_in, dtype=dtype, device=device)
            return nn.Parameter(empty, requires_grad=False)

        self.moe = moe
        self.row_tile = 0
        self.use_kernel = False
        self.all_reduce: Callable[[Tensor], Tensor] | None = (
            None  # as of Linear: other ranks hold parts of the experts
        )
        self.router = linear(hidden_size, moe.num_experts)
        self.gate_up = experts(hidden_size, 2 * moe.intermediate_size)
        self.down = experts(moe.intermediate_size, hidden_size)
        self.shared_gate_up = linear(hidden_size, 2 * moe.shared_size) if moe.shared_size else None
        self.shared_down = linear(moe.shared_size, hidden_size) if moe.shared_size else None
        self.shared_gate = linear(hidden_size, 1) if moe.shared_size else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]."""
        mixed = self._mix(x)
        return mixed if self.all_reduce is None else self.all_reduce(mixed)

    def _mix(self, x: Tensor) -> Tensor:
        weights, chosen = self._route(x)
        out: Tensor = self._experts(x, weights, chosen)
        if self.shared_gate_up is None or self.shared_down is None or self.shared_gate is None:
            return out
        shared: Tensor = self.shared_down(gated(self.shared_gate_up(x), "silu", invariant=self.row_tile > 0))
        gate = self.shared_gate(x)
        open_by: Tensor = in_pieces(torch.sigmoid, gate) if self.row_tile else torch.sigmoid(gate)
        return out + open_by * shared

    def matrices(self) -> list[Tensor]:
        """One matrix of each shape that experts multiply with."""
        return [self.gate_up[0], self.down[0]]

    @property
    def idle_bytes(self) -> int:
        """Bytes of the experts that a step does not need if all its tokens choose the same."""
        idle = self.moe.num_experts - self.moe.experts_per_token
        return idle * (self.gate_up[0].nbytes + self.down[0].nbytes)

    def weight_targets(self, names: TensorNames) -> Iterator[tuple[str, Tensor]]:
        """Checkpoint tensor names within the layer, each with the view that it fills."""
        yield f"{names.router}.weight", self.router.weight
        size = self.moe.intermediate_size
        for index in range(self.moe.num_experts):
            gate, up, down = (name.format(index) for name in names.expert)
            yield f"{gate}.weight", self.gate_up[index, :size]
            yield f"{up}.weight", self.gate_up[index, size:]
            yield f"{down}.weight", self.down[index]
        if self.shared_gate_up is None or self.shared_down is None or self.shared_gate is None:
            return
        shared = names.shared_expert
        yield f"{shared}.gate_proj.weight", self.shared_gate_up.weight[: self.moe.shared_size]
        yield f"{shared}.up_proj.weight", self.shared_gate_up.weight[self.moe.shared_size :]
        yield f"{shared}.down_proj.weight", self.shared_down.weight
        yield f"{shared}_gate.weight", self.shared_gate.weight

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices of each token's experts, both [T, k]; the weights from a softmax over all experts."""
        scores = self.router(x)
        wide = scores if scores.dtype == torch.float64 else scores.float()
        weights, chosen = wide.softmax(dim=-1).topk(self.moe.experts_per_token, dim=-1)
        if self.moe.is_normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype) if self.moe.rounds_weights else weights, chosen

    def _experts(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        order = chosen.flatten().argsort(stable=True)  # places [T k], expert by expert, tokens ascending
        tokens = order // chosen.shape[1]
        if self.use_kernel or x.is_cuda:
            return self._on_device(x, weights, chosen, order, tokens)
        weights = weights.flatten()[order, None]
        counts = torch.bincount(chosen.flatten(), minlength=self.moe.num_experts).tolist()
        out, end = torch.zeros_like(x), 0
        for index, count in enumerate(counts):
            if not count:
                continue
            own, end = slice(end, end + count), end + count
            gate_up = self._product(x[tokens[own]], self.gate_up[index])
            inner = gated(gate_up, "silu", invariant=self.row_tile > 0)
            result = self._product(inner, self.down[index]) * weights[own]
            out.index_add_(0, tokens[own], result.to(out.dtype))
        return out

    def _on_device(self, x: Tensor, weights: Tensor, chosen: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
        from engine.kernels.expert_linear import expert_linear

        experts = torch.arange(self.moe.num_experts + 1, device=x.device)
        starts = torch.searchsorted(chosen.flatten()[order], experts)
        inner = gated(
            expert_linear(x, self.gate_up, starts, tokens), "silu", invariant=False, use_kernel=True
        )
        result = expert_linear(inner, self.down, starts)
        by_token = torch.empty_like(order)
        by_token[order] = torch.arange(len(order), device=x.device)
        mixed = result[by_token].view(*chosen.shape, -1) * weights[..., None]
        return mixed.sum(dim=1, dtype=torch.float32).to(x.dtype)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.row_tile:
            return tiled_linear(x, weight, None, self.row_tile)
        return F.linear(x, weight)
