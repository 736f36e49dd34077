"""The app's process with a FakeRunner whose answers, speed and death a test decides. Run as a script.

Arguments: port, home folder, seconds a step, a file whose existence makes the device break in the next step, the name of a second
model or nothing; one of the name `thinker` reasons.
"""

from __future__ import annotations

import sys
from pathlib import Path

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pages"))  # page_world

from page_world import FakeHost, ToolTokenizer
from records_world import make_model

from engine.errors import EngineDeadError
from workbench import settings
from workbench.api.metrics import EngineMetrics
from workbench.app import Wiring, build_app

THOUGHT = "<think>Two and two.</think>Four."
SENTENCE = b"The harbour keeps fourteen lamps, and each one answers to the river. "


def main() -> None:
    port, home, delay_s, break_file = (
        int(sys.argv[1]),
        Path(sys.argv[2]),
        float(sys.argv[3]),
        Path(sys.argv[4]),
    )

    def choose(request_id: str, index: int) -> int:
        if break_file.exists():
            raise EngineDeadError("the device is gone")
        return SENTENCE[index % len(SENTENCE)]

    fake = FakeHost(delay_s=delay_s, choose=choose)
    host = fake.host
    if sys.argv[5]:
        host.start()
        host.wait(30)
        tokenizer = ToolTokenizer()
        thought = [*tokenizer.encode(THOUGHT), tokenizer.EOS]
        thinks = {"tokenizer": tokenizer, "choose": lambda request_id, index: thought[index]}
        options = thinks if sys.argv[5] == "thinker" else {"choose": choose}
        fake.load(make_model(home / "models" / sys.argv[5], 1), delay_s=2 * delay_s, **options)
    loaded = settings.load(port=port, mlflow_port=port + 1 if port < 65535 else port - 1, home_dir=home)
    app = build_app(Wiring(loaded, host, EngineMetrics()))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", ws="websockets-sansio")


if __name__ == "__main__":
    main()
