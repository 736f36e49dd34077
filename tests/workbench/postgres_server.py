"""A real PostgreSQL server for tests: a cluster of its own in a temporary folder, reached through a Unix socket there.

PostgreSQL refuses root: where tests run as root, it runs as its own user (`postgres`), and the folder is that user's.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Self
from urllib.parse import quote

import sqlalchemy as sa

from workbench.guard import die_with_parent

_START_S = 30
_SUPERUSER = "quire"


def why_missing() -> str:
    """Why no server can be started here; empty where one can."""
    if _program("initdb") is None:
        return "no PostgreSQL server (apt-get install postgresql)"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no psycopg (pip install 'quire[postgres]')"
    if os.getuid() == 0 and _server_user() is None:
        return "PostgreSQL does not run as root, and there is no user `postgres`"
    return ""


class PostgresServer:
    """One cluster, started; as a context manager it is ended and removed."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self.folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(prefix="quire-pg-")))
        self._data = self.folder / "data"
        self._process: subprocess.Popen[bytes] | None = None
        self._num_databases = 0
        user = _server_user() if os.getuid() == 0 else None
        if user is not None:
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self._as_user = (
            {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        )
        subprocess.run(
            [_program("initdb"), "-D", self._data, "-U", _SUPERUSER, "-A", "trust", "--no-sync", "--locale=C", "-E", "UTF8"],
            check=True, stdout=subprocess.DEVNULL, cwd=self.folder, **self._as_user,
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        settings = {
            "listen_addresses": "", "unix_socket_directories": str(self.folder), "fsync": "off",  # processes die, no machine
            "max_connections": "60", "shared_buffers": "16MB",
        }  # fmt: skip
        options = [f"--{name}={value}" for name, value in settings.items()]
        with (self.folder / "log").open("ab") as output:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", self._data, *options], stdout=output, stderr=output, cwd=self.folder,
                preexec_fn=partial(die_with_parent, os.getpid(), signal.SIGINT), **self._as_user,
            )  # fmt: skip
        deadline = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, (self.folder / "log").read_text()
            assert time.monotonic() < deadline, (self.folder / "log").read_text()
            time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it: SIGINT ("fast") ends sessions and transactions, SIGQUIT ("immediate") is a crash."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(_START_S)

    def new_database(self) -> str:
        """The address of an empty database."""
        self._num_databases += 1
        name = f"test_{self._num_databases}"
        self._run(lambda connection: connection.exec_driver_sql(f"CREATE DATABASE {name}"))
        return self.url(name)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{_SUPERUSER}@/{database}?host={quote(str(self.folder))}"

    def _answers(self) -> bool:
        try:
            self._run(lambda connection: connection.exec_driver_sql("SELECT 1"))
        except sa.exc.OperationalError:
            return False
        return True

    def _run(self, act: Callable[[sa.Connection], object]) -> None:
        engine = sa.create_engine(self.url("postgres"), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with engine.connect() as connection:
            act(connection)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGQUIT)  # nobody needs the data
        self._held.close()


def _program(name: str) -> str | None:
    """The path of one of the server's programs; Debian keeps them off the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(found[-1]) if found else None)


def _server_user() -> pwd.struct_passwd | None:
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return None
