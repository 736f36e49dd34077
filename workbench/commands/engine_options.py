"""What an engine can be told on the command line, whether it is the app's first one or one that is loaded beside it."""

from __future__ import annotations

import argparse
from typing import Any

from workbench.load_options import read_speculation


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options; `chosen` reads them. Values are checked by who builds the engine, not here."""
    group = parser.add_argument_group("engine")
    group.add_argument("--quantization", help="of the weights as they load: int8, int4 or fp8")
    group.add_argument("--kv-cache-dtype", help="auto, fp8 or int8; default: as the model computes")
    group.add_argument(
        "--max-model-len", type=int, help="tokens of one sequence; default: the model's own context"
    )
    group.add_argument(
        "--speculative-config", metavar="JSON", help="guess tokens: '{\"method\": \"ngram\", \"num_speculative_tokens\": 4}'"
    )  # fmt: skip


def chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """What was given, by EngineConfig's names. Raises SettingsError."""
    given = {
        "quantization": arguments.quantization,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "max_model_len": arguments.max_model_len,
        "speculative_config": read_speculation(arguments.speculative_config or ""),
    }
    return {name: value for name, value in given.items() if value is not None}
