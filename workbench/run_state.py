"""``HOME_DIR/run/app.json``: where the running app is, for the CLI, notebooks and scripts.

Written atomically by the app when it listens, removed when it leaves. A file whose process is gone counts as none. It holds
the token of the internal routes, so only its owner may read it (mode 0600).
"""

from __future__ import annotations

import json
import os
import ssl
import tempfile
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunningApp:
    """The app that owns this HOME_DIR."""

    url: str
    pid: int
    started_at: str  # UTC, ISO 8601
    model: str
    token: str = ""  # of the internal routes (``/quire/*``); "" where there are none
    certfile: str = ""  # of an app that speaks TLS

    @property
    def trust(self) -> ssl.SSLContext | bool:
        """What clients check its certificate by: it is the very one that the app loaded, whatever name it was made for."""
        if not self.certfile:
            return True
        end = "-----END CERTIFICATE-----"
        own = Path(self.certfile).read_text("ascii").partition(end)[0] + end + "\n"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # nobody else's, so no chain is needed
        context.load_verify_locations(cadata=own)
        return context


class RunState:
    """The file of one HOME_DIR. `run_dir` must exist."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "app.json"

    def write(self, url: str, *, model: str, token: str = "", certfile: Path | None = None) -> None:
        """Publish this process. The file is new each time and its owner's alone, as mkstemp makes it."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        app = RunningApp(url, os.getpid(), started, model, token, str(certfile or ""))
        handle, temporary = tempfile.mkstemp(dir=self._file.parent, prefix=".app-")
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump(asdict(app), opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, self._file)

    def read(self) -> RunningApp | None:
        """The running app, or None."""
        try:
            app = RunningApp(**json.loads(self._file.read_text("utf-8")))
            os.kill(app.pid, 0)
        except (OSError, ValueError, TypeError, OverflowError):
            return None
        return app

    def remove(self) -> None:
        """Forget this process; another's file is left alone."""
        app = self.read()
        if app is not None and app.pid == os.getpid():
            self._file.unlink(missing_ok=True)
