"""A process that logs requests as fast as it can and says which are acknowledged, until it is killed.

``python log_writer.py HOME_DIR TEXT``. Each line on stdout: an acknowledged request id.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from engine.records import RequestRecord
from engine.request import FinishReason
from workbench.observe.request_log import RequestLog


def main() -> None:
    log = RequestLog(Path(sys.argv[1]), text=sys.argv[2], max_segment_rows=40)
    sink = log.sink("m/1", "d1")
    for number in range(1_000_000):
        request_id = f"{os.getpid()}-{number}"
        ticket = log.expect(request_id)
        now = time.monotonic_ns()
        sink.on_request(
            RequestRecord(request_id, now - 5_000_000, now - 4_000_000, now - 3_000_000, now, 7, 2, 3, 0,
                          FinishReason.STOP, (now - 3_000_000, now - 1_000_000, now))
        )  # fmt: skip
        log.add_text(request_id, f"prompt {number}", f"output {number}")
        if number % 7 == 6:
            assert ticket.wait(5)
            sys.stdout.write(request_id + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
