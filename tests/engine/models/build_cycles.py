"""Builds, uses and closes the bundled model some times, in a process of its own: ``build_cycles.py NUM_CYCLES``.

Prints a line of JSON a cycle: what the process holds after it was closed.
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
from pathlib import Path

import torch

from engine import LLM, SamplingParams

FOLDER = Path(__file__).parents[3] / "data" / "models" / "chat-base"


def held() -> dict[str, object]:
    gc.collect()
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return {
        "resident_bytes": 1024 * int(found[1]),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "files": len(os.listdir("/proc/self/fd")),
    }


def main(num_cycles: int) -> None:
    print(json.dumps(held()))
    for i in range(num_cycles):
        llm = LLM(FOLDER, device="cpu")
        llm.generate("Hello, how are you?", SamplingParams(max_tokens=16), use_tqdm=False)
        if i == num_cycles - 1:
            llm.sleep(2)
            llm.wake_up()
        llm.close()
        del llm
        print(json.dumps(held()))


if __name__ == "__main__":
    main(int(sys.argv[1]))
