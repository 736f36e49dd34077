"""`quire`: up, serve, chat, doctor, and the commands of `workbench.commands`, a module each.

Bad input ends with exit code 2 and one message that names value, limit and remedy; other failures with 1. With ``--json`` the
last line on stdout is one JSON object. Each command imports what it needs: `quire --help` imports nothing heavy.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench import exit_codes
from workbench import settings as settings_module
from workbench.access import exposure
from workbench.commands import engine_options
from workbench.errors import ApiError, NotReadyError, WorkbenchError
from workbench.settings import Settings

COMMAND_MODULES = (
    "chat",
    "endpoints",
    "versions",
    "models",
    "bench",
    "compare",
    "gate",
    "notebook",
    "schedule",
    "lab",
    "keys",
    "audit",
    "quantize",
    "users",
    "erase",
    "deploy",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        return exit_codes.INTERRUPTED
    except Exception as error:  # the boundary: typed errors become one message, others keep their traceback
        code = _exit_code(error)
        if code is None:
            raise
        _tell(error, as_json=arguments.json)
        return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quire", description="Serve, measure and improve open models on one engine."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="pages, API and MLflow, restarted when they die")
    _add_server_options(up)
    up.add_argument("--mlflow-port", type=int, help="port of MLflow (MLFLOW_PORT, default 5001)")
    up.set_defaults(run=_up)

    serve = commands.add_parser("serve", help="the API alone, without pages")
    _add_server_options(serve)
    serve.set_defaults(run=_serve)

    doctor = commands.add_parser("doctor", help="what this machine has, and what is missing")
    doctor.add_argument("--home-dir", type=Path)
    doctor.add_argument("--model")
    doctor.add_argument(
        "--gpu-memory",
        help="such as 80GiB: what fits there of --model, from its config alone; nothing is loaded",
    )
    doctor.add_argument(
        "--context", type=int, help="with --gpu-memory: tokens of one sequence (default 8192)"
    )
    doctor.add_argument(
        "--tensor-parallel-size",
        type=int,
        default=1,
        help="with --gpu-memory: GPUs of that size that share the model",
    )
    doctor.add_argument("--dtype", help="with --gpu-memory: bfloat16 (default) or float16")
    doctor.add_argument("--json", action="store_true", help="print one JSON object at the end")
    doctor.set_defaults(run=_doctor)

    for room in COMMAND_MODULES:
        importlib.import_module(f"workbench.commands.{room}").add(commands)
    return parser


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, help="port of pages and API (PORT, default 8501)")
    parser.add_argument(
        "--host",
        help="address to listen on (QUIRE_HOST, default 127.0.0.1); others than loopback need a login",
    )
    parser.add_argument("--ssl-certfile", type=Path, help="certificate, PEM: https (QUIRE_SSL_CERTFILE)")
    parser.add_argument("--ssl-keyfile", type=Path, help="its key, PEM (QUIRE_SSL_KEYFILE)")
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR, default .quire)")
    parser.add_argument("--model", help="a folder or hub id (QUIRE_MODEL); default: the bundled model")
    parser.add_argument("--dtype", help="auto, float32, bfloat16, … (QUIRE_DTYPE)")
    parser.add_argument(
        "--tensor-parallel-size", type=int, help="GPUs that share each model (QUIRE_TENSOR_PARALLEL_SIZE); default: 1"
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="CPU threads of the forward pass (QUIRE_THREADS)")
    parser.add_argument(
        "--enable-lora", action=argparse.BooleanOptionalAction,
        help="serve adapters over engines of their bases, or merge them (QUIRE_ENABLE_LORA)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object when all is up")
    engine_options.add(parser)


def _up(arguments: argparse.Namespace) -> int:
    settings = _server_settings(arguments, mlflow_port=arguments.mlflow_port)
    exposure.check_pages(settings)
    from workbench.supervisor import Supervisor

    return Supervisor(
        settings, say=sys.stderr if arguments.json else sys.stdout, as_json=arguments.json
    ).run()


def _serve(arguments: argparse.Namespace) -> int:
    settings = _server_settings(arguments)
    from workbench import app
    from workbench.logs import configure_logging
    from workbench.ports import bind

    configure_logging(settings.log_level, settings.log_format)
    listener = bind(settings.host, settings.port)
    return app.serve(
        settings, with_ui=False, listener=listener, announce=_announcer(settings, arguments.json)
    )


def _announcer(settings: Settings, as_json: bool) -> Any:
    """Tells people, and with --json a program, how far `quire serve` is."""

    def announce(event: str, **facts: Any) -> None:
        if event == "listening":
            print(f"API: {settings.url}/v1 (the model is loading)", file=sys.stderr, flush=True)
            return
        text = f"{facts['title']} is ready." if event == "loaded" else f"No model: {facts['message']}"
        print(text, file=sys.stderr, flush=True)
        if as_json:
            print(json.dumps({"url": settings.url, "event": event, **facts}), flush=True)

    return announce


def _server_settings(arguments: argparse.Namespace, **more: Any) -> Settings:
    """Settings, checked as far as files and folders tell: nothing has been started when this raises."""
    settings = settings_module.load(
        port=arguments.port, host=arguments.host, home_dir=arguments.home_dir, model=arguments.model,
        dtype=arguments.dtype, threads=arguments.threads, enable_lora=arguments.enable_lora,
        tensor_parallel_size=arguments.tensor_parallel_size, ssl_certfile=arguments.ssl_certfile,
        ssl_keyfile=arguments.ssl_keyfile, **engine_options.chosen(arguments), **more,
    )  # fmt: skip
    settings_module.prepare_home(settings)
    if not settings.fake:
        from workbench.model_card import check_model

        check_model(settings.model_path)
    settings.engine_config()
    return settings


def _doctor(arguments: argparse.Namespace) -> int:
    if arguments.gpu_memory is not None:
        return _plan(arguments)
    from workbench.doctor import examine, render

    findings = examine(home_dir=arguments.home_dir, model=arguments.model)
    print(render(findings), file=sys.stderr if arguments.json else sys.stdout)
    broken = any(finding.level == "error" for finding in findings)
    if arguments.json:
        print(json.dumps({"ok": not broken, "findings": [finding.as_dict() for finding in findings]}))
    return exit_codes.FAILURE if broken else 0


def _plan(arguments: argparse.Namespace) -> int:
    from workbench import model_plan

    settings = settings_module.load(home_dir=arguments.home_dir, model=arguments.model)
    plan = model_plan.make_plan(
        settings.model_path,
        gpu_bytes=model_plan.parse_bytes(arguments.gpu_memory),
        context=arguments.context,
        dtype=arguments.dtype or "bfloat16",
        tensor_parallel_size=arguments.tensor_parallel_size,
    )
    print(model_plan.render(plan), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(plan.as_dict()))
    return 0 if any(row.num_sequences for row in plan.rows) else exit_codes.FAILURE


def _exit_code(error: Exception) -> int | None:
    """2 for bad input, 1 for other typed failures, None for what nobody expected."""
    from engine.errors import ConfigError, EngineError, InvalidRequestError, ModelLoadError

    if isinstance(error, ConfigError | InvalidRequestError | ModelLoadError | ApiError):
        return exit_codes.BAD_INPUT
    if isinstance(error, WorkbenchError):
        return exit_codes.FAILURE if isinstance(error, NotReadyError) else exit_codes.BAD_INPUT
    return exit_codes.FAILURE if isinstance(error, EngineError) else None


def _tell(error: Exception, *, as_json: bool) -> None:
    print(f"quire: {error}", file=sys.stderr)
    if as_json:
        facts = {
            name: getattr(error, name, None)
            for name in ("code", "message", "value", "limit", "remedy", "param")
        }
        print(json.dumps({"error": facts}, default=str))


if __name__ == "__main__":
    sys.exit(main())
