"""`quire endpoints`: other OpenAI-compatible servers by name: add, list, check, remove, and drain or resume of Quire's own."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench import exit_codes
from workbench import settings as settings_module

if TYPE_CHECKING:
    from workbench.backends.endpoints import Endpoint, Endpoints

_KINDS = "quire, vllm, ollama, llama.cpp, lmstudio, azure, mlflow-gateway, openai"


def add(commands: Any) -> None:
    """Add `quire endpoints add|list|check|remove|drain|resume`."""
    parser = commands.add_parser(
        "endpoints", help="other OpenAI-compatible servers by name; their models are endpoint:NAME/MODEL"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    adding = actions.add_parser("add", help="name a server; it is asked what it is unless --kind says so")
    adding.add_argument("name")
    adding.add_argument("url", help="such as http://10.0.0.7:8000; no credentials in it")
    adding.add_argument("--kind", help=f"{_KINDS}; default: what it answers as")
    adding.add_argument(
        "--key-env",
        metavar="VAR",
        help="the environment variable that holds its key; only the name is stored",
    )
    adding.add_argument("--model", help="what is asked where nobody names one")
    adding.add_argument("--api-version", help="of Azure's addresses by deployment; --model is the deployment")
    adding.add_argument("--replace", action="store_true", help="in the place of one of that name")
    _common(adding, _add)

    _common(
        actions.add_parser(
            "list", help="every endpoint, with its address and the name of its key's variable"
        ),
        _list,
    )
    for name, act, text in (
        ("check", _check, "ask one, or all, how they are: kind, state, models, load"),
        ("remove", _remove, "forget one"),
        ("drain", _drain, "have a Quire instance take no more requests; those that run go on"),
        ("resume", _drain, "have it take requests again"),
    ):  # fmt: skip
        one = actions.add_parser(name, help=text)
        one.add_argument("name", nargs="?" if name == "check" else None)
        _common(one, act)


def _common(parser: argparse.ArgumentParser, run: Any) -> None:
    parser.add_argument("--home-dir", type=Path, help="where everything is kept (HOME_DIR)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


@contextmanager
def _open(arguments: argparse.Namespace) -> Iterator[Endpoints]:
    from workbench.backends.endpoints import Endpoints
    from workbench.store import open_store

    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    with open_store(settings.home_dir) as store:
        yield Endpoints(store)


def _add(arguments: argparse.Namespace) -> int:
    from workbench.backends.discovery import identify
    from workbench.backends.endpoints import endpoint

    given = {"key_env": arguments.key_env, "model": arguments.model, "api_version": arguments.api_version}
    models: tuple[str, ...] = ()
    if arguments.kind is not None:
        made = endpoint(arguments.name, arguments.url, kind=arguments.kind, **given)
    else:
        made, found = identify(arguments.name, arguments.url, **given)
        models = found.models
    with _open(arguments) as endpoints:
        added = endpoints.add(made, replace=arguments.replace)
    shown = ", ".join(f"endpoint:{added.name}/{model}" for model in models[:5])
    _tell(
        arguments,
        {"endpoint": added.as_dict(), "models": list(models)},
        _line(added),
        *([shown] if shown else []),
    )
    return 0


def _list(arguments: argparse.Namespace) -> int:
    with _open(arguments) as endpoints:
        found = endpoints.list()
    lines = [_line(each) for each in found] or ["No endpoints: add one with `quire endpoints add NAME URL`."]
    _tell(arguments, {"endpoints": [each.as_dict() for each in found]}, *lines)
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from workbench.errors import WorkbenchError
    from workbench.fleet.status import read_status

    with _open(arguments) as endpoints:
        chosen = [endpoints.get(arguments.name)] if arguments.name else endpoints.list()
    facts: list[dict[str, Any]] = []
    for each in chosen:
        try:
            facts.append({"name": each.name, "kind": each.kind, **read_status(each).as_dict()})
        except WorkbenchError as error:
            facts.append({"name": each.name, "kind": each.kind, "state": "down", "message": str(error)})
    _tell(arguments, {"endpoints": facts}, *([_status_line(each) for each in facts] or ["No endpoints."]))
    return exit_codes.FAILURE if any(each["state"] == "down" for each in facts) else 0


def _remove(arguments: argparse.Namespace) -> int:
    with _open(arguments) as endpoints:
        endpoints.remove(arguments.name)
    _tell(
        arguments,
        {"removed": arguments.name},
        f"{arguments.name} is forgotten; the server itself is left alone.",
    )
    return 0


def _drain(arguments: argparse.Namespace) -> int:
    from workbench.fleet.status import drain

    with _open(arguments) as endpoints:
        chosen = endpoints.get(arguments.name)
    resume = arguments.action == "resume"
    drain(chosen, resume=resume)
    told = "takes requests again" if resume else "takes no more requests; those that run go on"
    _tell(arguments, {"endpoint": chosen.name, "draining": not resume}, f"{chosen.name} {told}.")
    return 0


def _line(each: Endpoint) -> str:
    key = f"key in {each.key_env}" if each.key_env else ""
    return f"{each.name:16} {each.kind:14} {each.url:40} {each.model or '':24} {key}".rstrip()


def _status_line(facts: dict[str, Any]) -> str:
    load = ""
    if facts.get("running") is not None:
        slots = "" if facts["max_num_seqs"] is None else f" of {facts['max_num_seqs']}"
        load = f"{facts['running']}{slots} running, {facts['waiting'] or 0} waiting"
    named = ", ".join(list(facts.get("models", ()))[:4])
    return f"{facts['name']:16} {facts['kind']:14} {facts['state']:10} {load:26} {named} {facts['message']}".rstrip()


def _tell(arguments: argparse.Namespace, facts: dict[str, Any], *lines: str) -> None:
    print("\n".join(lines), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(facts))
