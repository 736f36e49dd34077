"""Session: what one benchmark run has: a device, its measured limits, whether it runs at reduced size, and until when."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch

from engine.device_limits import measure_limits
from engine.limits import Limits

CPU_BUDGET_S = 0.2  # of the limits, where nothing is judged by them


@dataclass
class Session:
    """One device, measured once. `ends_at` is on the clock of ``time.monotonic()``."""

    device: torch.device
    limits: Limits
    is_tiny: bool
    ends_at: float

    @property
    def left_s(self) -> float:
        return self.ends_at - time.monotonic()

    @property
    def dtype_bytes(self) -> int:
        """Of the engines that run here: bfloat16 on a GPU, float32 on a CPU."""
        return 2 if self.device.type == "cuda" else 4

    def has_room(self, what: str, seconds: float) -> bool:
        """Whether so many seconds are left; says so where they are not."""
        if self.left_s >= seconds:
            return True
        print(
            f"{what}: left out, {max(0.0, self.left_s):.0f} s of the budget are left and it is given {seconds:.0f} s"
        )
        return False

    def figures(self) -> dict[str, Any]:
        return {"device": self.device.type, "reduced_size": self.is_tiny, "limits": self.limits.figures()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `open_session` reads, and --no-ablations."""
    parser.add_argument(
        "--tiny", action="store_true", help="reduced size on any device: counts and records, no bars"
    )
    parser.add_argument("--seconds", type=float, default=600.0, help="budget, peers not counted")
    parser.add_argument("--no-ablations", action="store_true", help="only the engine as it is")


def open_session(options: argparse.Namespace) -> Session:
    """Measure the device; leaves the program with code 2 where there is no GPU and --tiny was not given."""
    ends_at = time.monotonic() + options.seconds
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not options.tiny:
        print(
            "This benchmark needs a CUDA device and torch sees none here. --tiny runs it at reduced size on the CPU; "
            "`python -m engine.bench cpu` measures this machine.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    limits = measure_limits(device, torch.bfloat16 if on_gpu else torch.float32, budget_s=CPU_BUDGET_S)
    name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    print(f"{name}: {limits}{', reduced size: nothing is judged' if options.tiny else ''}")
    return Session(device, limits, options.tiny, ends_at)
