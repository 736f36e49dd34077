"""`quire compare A B --dataset D`: two versions on one dataset, with paired intervals and a verdict.

It runs as a job in the running app of HOME_DIR, or in this process when there is none. Exit code 0 whatever the verdict; the
gate is the command whose exit code tells it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `quire compare`."""
    parser = commands.add_parser("compare", help="two versions on one dataset: differences with intervals")
    parser.add_argument(
        "a", help="what is in use: NAME/1, NAME@champion, a folder, a hub id, endpoint:NAME/MODEL"
    )
    parser.add_argument("b", help="the version that may replace it")
    add_dataset_options(parser)
    parser.add_argument(
        "--rules", type=Path, help="gate rules (TOML) for the verdict; default: data/gates/default.toml"
    )
    parser.add_argument("--no-speed", action="store_true", help="leave out the timing of both versions")
    parser.add_argument(
        "--divergence",
        action="store_true",
        help="also the exact KL divergence of their next-token distributions",
    )
    parser.set_defaults(run=run)


def add_dataset_options(parser: argparse.ArgumentParser) -> None:
    """What `quire compare` and `quire gate` have in common."""
    parser.add_argument("--dataset", required=True, help="a JSONL file, or the name of a dataset")
    parser.add_argument("--limit", type=int, help="use so many examples, always the same ones")
    parser.add_argument(
        "--scorer", action="append", dest="scorers", help="may be given several times; default: what fits"
    )
    parser.add_argument("--max-tokens", type=int, default=256, help="of an answer (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home-dir", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, exit with 0."""
    spec = {
        "a": absolute(arguments.a), "b": absolute(arguments.b), "dataset": absolute(arguments.dataset),
        "scorers": arguments.scorers, "limit": arguments.limit, "seed": arguments.seed,
        "speed": not arguments.no_speed, "gate": absolute(arguments.rules), "max_tokens": arguments.max_tokens,
        "divergence": arguments.divergence,
    }  # fmt: skip
    result = run_job("compare", spec, f"{arguments.a} → {arguments.b}", arguments)
    print(as_text(result), file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(result))
    return 0


def run_job(kind: str, spec: dict[str, Any], title: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a job to its end, telling progress on standard error; its result.

    Raises:
        JobFailedError: it ended otherwise than done.
    """
    import os

    from workbench import settings as settings_module
    from workbench.evals.errors import JobFailedError
    from workbench.jobs import Jobs, JobState
    from workbench.store import open_store

    settings = settings_module.load(home_dir=arguments.home_dir)
    settings_module.prepare_home(settings)
    os.environ["HOME_DIR"] = str(settings.home_dir)  # the job's own checks read the settings again
    with open_store(settings.home_dir) as store:
        jobs = Jobs(store, settings.home_dir)
        job = jobs.run(kind, spec, title=title, device="exclusive", on_progress=_tell)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    if job.state is not JobState.DONE or job.result is None:
        facts = job.error or {}
        raise JobFailedError(
            facts.get("message") or job.message or f"the job ended as {job.state.value}", value=job.id,
            remedy=facts.get("remedy") or f"Its log: {job.log_path}",
        )  # fmt: skip
    return {**job.result, "job_id": job.id}


def as_text(result: dict[str, Any]) -> str:
    """The figures for people."""
    dataset = result["dataset"]
    lines = [f"{result['a']} → {result['b']} on {dataset['name']} ({dataset['n']} examples)"]
    for name, m in {**result["metrics"], **result["speed"]}.items():
        limits = "no interval" if m["low"] is None else f"{m['low']:+.4g} to {m['high']:+.4g}"
        lines.append(
            f"  {name:22} {m['a']:10.4g} → {m['b']:10.4g}   {m['diff']:+.4g} [{limits}]  n = {m['n']}"
        )
    apart = result.get("divergence")
    if apart is not None:
        limits = "no interval" if apart["low"] is None else f"{apart['low']:.4g} to {apart['high']:.4g}"
        lines.append(
            f"  KL(A || B) {apart['mean_kl']:.4g} nats a token [{limits}], at most {apart['max_kl']:.4g}; "
            f"the same most likely token at {apart['same_top']:.1%} of {apart['num_tokens']} tokens"
        )
    lines.append(f"Verdict: {result['verdict']}")
    lines += [f"  {reason['outcome']:10} {reason['text']}" for reason in result["reasons"]]
    return "\n".join(lines)


def absolute(value: str | Path | None) -> str | None:
    """A path that exists, made absolute for a job that may run in another folder; anything else as it is."""
    if value is None:
        return None
    path = Path(value).expanduser()
    return str(path.absolute()) if isinstance(value, Path) or path.exists() else str(value)


def _tell(fraction: float, message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{fraction:4.0%} {message}", end="", file=sys.stderr, flush=True)
