"""MoeConfig: the mixture of experts in the place of an MLP, frozen, as config.json and the family's code state it.

Boundary: plain numbers, no torch. The arithmetic: ``engine.models.experts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import ModelLoadError
from engine.models.registry import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """A router gives each token to `experts_per_token` of `num_experts` MLPs, and weighs what they make of it."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int  # of one expert
    is_normalized: bool  # weights of the chosen experts sum to 1
    rounds_weights: bool  # they are rounded to the model's dtype before they multiply
    shared_size: (
        int  # intermediate size of an MLP that every token takes too, behind a gate of its own; 0: none
    )
    layers: tuple[bool, ...]  # which layers have experts; the others have an MLP

    def num_parameters(self, hidden_size: int, num_experts: int) -> int:
        """Values of one layer's router, shared MLP and so many experts."""
        shared = (3 * self.shared_size + 1) * hidden_size if self.shared_size else 0
        router = self.num_experts * hidden_size
        return router + shared + 3 * num_experts * self.intermediate_size * hidden_size


def read_moe(values: Mapping[str, Any], family: Family, num_layers: int) -> MoeConfig | None:
    """Read the experts of a config.json's `values`; None for a family without.

    Raises:
        ModelLoadError: a number that is not there, or more experts a token than there are.
    """
    if not family.expert_size_key:
        return None
    # transformers 5 writes the one name for all families
    num_experts = _count(values, "num_local_experts" if "num_local_experts" in values else "num_experts")
    chosen = _count(values, "num_experts_per_tok")
    if chosen > num_experts:
        raise _wrong("num_experts_per_tok", chosen, num_experts)
    sparse_step, dense = values.get("decoder_sparse_step", 1), values.get("mlp_only_layers") or ()
    return MoeConfig(
        num_experts=num_experts,
        experts_per_token=chosen,
        intermediate_size=_count(values, family.expert_size_key),
        is_normalized=family.normalizes_experts or bool(values.get("norm_topk_prob", False)),
        rounds_weights=not family.normalizes_experts,
        shared_size=_count(values, "shared_expert_intermediate_size") if family.names.shared_expert else 0,
        layers=tuple(i not in dense and (i + 1) % sparse_step == 0 for i in range(num_layers)),
    )


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, value, 1)
    return value


def _wrong(key: str, value: Any, limit: int) -> ModelLoadError:
    return ModelLoadError(
        f"config.json: {key} is {value!r}, beside a limit of {limit}",
        value=value,
        limit=limit,
        param=key,
        remedy="Use the config.json that belongs to the checkpoint.",
    )
