"""`quire chat`: one question or a conversation in the terminal, with every sampling control, a form of the output, and tools."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from workbench import settings as settings_module
from workbench.commands import sampling_options


def add(commands: Any) -> None:
    """Add `quire chat`."""
    parser = commands.add_parser("chat", help="talk to a model in the terminal")
    parser.add_argument("question", nargs="?", help="one question; without it, a conversation")
    parser.add_argument(
        "--url", help="a running server, such as http://127.0.0.1:8501; default: the one of this HOME_DIR"
    )
    parser.add_argument(
        "--model",
        help="a folder or hub id to load here; NAME@alias or NAME/3 of the running app; endpoint:NAME/MODEL; with --url, a model of that server",
    )
    parser.add_argument("--system", help="system prompt")
    parser.add_argument("--dtype")
    parser.add_argument("--home-dir", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    sampling_options.add(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check what was asked for before anything is loaded, then answer."""
    options = sampling_options.chosen(arguments)
    from workbench.model_source import alias_of, version_of
    from workbench.terminal_chat import run_chat

    model = arguments.model
    is_elsewhere = model is not None and model.startswith("endpoint:")
    is_of_app = bool(model) and not Path(model).exists() and bool(alias_of(model) or version_of(model))
    settings = settings_module.load(
        home_dir=arguments.home_dir, model=None if arguments.url or is_of_app or is_elsewhere else model, dtype=arguments.dtype
    )  # fmt: skip
    return run_chat(
        settings, options, question=arguments.question, url=arguments.url, model=model, system=arguments.system,
        as_json=arguments.json,
    )  # fmt: skip
