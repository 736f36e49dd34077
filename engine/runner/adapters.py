"""The adapters of one runner: the weights of all that are loaded, which of them is in which slot, and which row uses which.

All loaded adapters are in host memory, pinned beside a GPU; one comes into a slot when a sequence that uses it is admitted
and the slot holds another. The copy goes to the device after the steps that were launched before it, so that a slot may
be taken over while they run. Slots of rows are kept on the host, for steps of any shape, and on the device, where
captured steps read them.

Boundary: implements ``engine.lora.LoraStore``; which adapter gets which slot is the scheduler's decision.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import OutOfMemoryError
from engine.kernels.lora import TokenSlots, tokens_by_slot
from engine.models.lora import AdapterWeights, LoraSlots
from engine.models.lora_files import read_adapter
from engine.plan import StepPlan

NONE = -1
ALIGNMENT = 4  # int32 values in 16 bytes: a kernel is compiled anew for an address that is less aligned


class Adapters:
    """For rows 0 … `num_rows` - 1, and one row more that padding uses."""

    def __init__(self, slots: LoraSlots, num_rows: int) -> None:
        self._slots = slots
        self._device = slots.device
        self._loaded: dict[int, AdapterWeights] = {}
        self._held = [0] * slots.max_loras  # the adapter in each slot; 0: none
        self._row_slots = np.full(num_rows + 1, NONE, np.int32)
        self._device_slots = torch.full((num_rows + 1,), NONE, dtype=torch.int32, device=slots.device)

    # ── the store ───────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self, folder: Path) -> AdapterWeights:
        """An adapter's weights, checked.

        Raises:
            ModelLoadError: as `engine.models.lora_files.read_adapter`.
            OutOfMemoryError: the host has fewer bytes than an adapter takes.
        """
        from engine.memory import device_memory, in_units  # not at the top: it counts what runners take

        needed = self._slots.adapter_bytes
        free = device_memory(torch.device("cpu")).free_bytes
        if needed > free:
            raise OutOfMemoryError(
                f"an adapter takes {in_units(needed)} of host memory, {in_units(free)} are free",
                value=needed,
                limit=free,
                remedy="Remove another adapter, or build the engine with a lower max_lora_rank.",
                param="lora",
            )
        weights = read_adapter(folder, self._slots.layout, self._slots.dtype)
        if self._device.type == "cuda":
            weights = replace(weights, values=weights.values.pin_memory(), scales=weights.scales.pin_memory())
        return weights

    def add(self, lora_id: int, weights: AdapterWeights) -> None:
        """Hold an adapter's weights."""
        self._loaded[lora_id] = weights

    def remove(self, lora_id: int) -> None:
        """Let an adapter's weights go."""
        del self._loaded[lora_id]

    def close(self) -> None:
        """Give all memory back; nothing can be done afterwards."""
        self._loaded.clear()
        del self._slots, self._device_slots

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def apply(self, plan: StepPlan) -> None:
        """Note the slots of the rows that the plan admits, and see to it that they hold their adapters."""
        if not plan.admitted:
            return
        for admission in plan.admitted:
            slot = admission.lora_slot
            self._row_slots[admission.row] = slot
            if slot != NONE and admission.lora_id and self._held[slot] != admission.lora_id:
                self._slots.put(slot, self._loaded[admission.lora_id])
                self._held[slot] = admission.lora_id
        self._device_slots.copy_(self._to_device(self._row_slots))

    def are_used(self, plan: StepPlan) -> bool:
        """Whether any row of the plan uses an adapter."""
        return bool((self._row_slots[plan.rows] != NONE).any())

    def use(self, plan: StepPlan) -> None:
        """Have the decoder compute this plan's tokens, operation by operation, with their rows' adapters."""
        self._slots.tokens = None
        if self.are_used(plan):
            slots = np.repeat(self._row_slots[plan.rows], plan.num_tokens)
            order = np.argsort(slots, kind="stable").astype(np.int32)
            starts = np.searchsorted(slots[order], np.arange(self._slots.max_loras + 1)).astype(np.int32)
            padding = np.zeros(-len(starts) % ALIGNMENT, np.int32)
            both = self._to_device(np.concatenate((starts, padding, order)))
            self._slots.tokens = TokenSlots(both[-len(order) :], both[: len(starts)])

    def use_captured(self, rows: Tensor | None) -> None:
        """Have the decoder compute one token of each of these rows, whose slots it reads on the device; None: no adapters."""
        self._slots.tokens = (
            None if rows is None else tokens_by_slot(self._device_slots[rows], self._slots.max_loras)
        )

    def reset(self) -> None:
        """Forget every row. What the slots hold stays."""
        self._row_slots.fill(NONE)
        self._device_slots.fill_(NONE)
        self._slots.tokens = None

    def _to_device(self, values: NDArray[np.int32]) -> Tensor:
        """A copy on the device, by a transfer that does not wait for work in flight."""
        host = torch.from_numpy(values)
        if self._device.type != "cuda":
            return host.clone()
        return host.pin_memory().to(self._device, non_blocking=True)
