"""``python -m workbench.jobs run JOB_ID``: the process of one job."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workbench.jobs")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="run one queued job in this process")
    run.add_argument("job_id")
    run.add_argument("--parent", type=int, help="the process that has claimed it and hands it over")
    arguments = parser.parse_args()
    from workbench.jobs.child import main as run_job

    return run_job(arguments.job_id, arguments.parent)


if __name__ == "__main__":
    sys.exit(main())
