"""UserFile: the people who log in with a password, in ``HOME_DIR/users.json``, each with a role and a slow hash.

The file is its owner's alone (mode 0600) and replaced as a whole, so that a reader sees one state or the next. Who asks often
(`find`) gets a snapshot that is read again once the file has changed, looked at once a second at most: a user who was removed is
out within that second.

Boundary: names, roles and hashes. Sessions, headers and cookies are others'.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from workbench.access.principal import Right
from workbench.errors import WorkbenchError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}")
MIN_PASSWORD, MAX_PASSWORD = 10, 1024  # characters; the longest that is worth hashing
_LOOK_EVERY_S = 1.0


class Role(StrEnum):
    """What a person may do, in one word."""

    ADMIN = "admin"
    USER = "user"
    VIEWER = "viewer"

    @property
    def rights(self) -> frozenset[Right]:
        return _RIGHTS[self]


_RIGHTS: Mapping[Role, frozenset[Right]] = {
    Role.ADMIN: frozenset(Right),
    Role.USER: frozenset({Right.INFER, Right.READ}),
    Role.VIEWER: frozenset({Right.READ}),
}


class UserError(WorkbenchError, ValueError):
    """A name or password that cannot be used."""

    code = "invalid_user"


class UnknownUserError(WorkbenchError, LookupError):
    """Nobody of that name is in the password file."""

    code = "unknown_user"


class UserFileError(WorkbenchError):
    """The password file cannot be read or written."""

    code = "user_file"


@dataclass(frozen=True, slots=True)
class ScryptHash:
    """A password's hash, with the parameters that it was made with, so that they may rise later.

    The defaults need 32 MiB and about 0.3 s. Source: OWASP's password storage cheat sheet (N=2^15, r=8, p=3).
    """

    salt: str
    digest: str = ""
    n: int = 2**15
    r: int = 8
    p: int = 3

    @classmethod
    def of(cls, password: str, *, n: int = 2**15) -> ScryptHash:
        made = cls(secrets.token_hex(16), n=n)
        return cls(made.salt, made._digest(password), n=n)

    def matches(self, password: str) -> bool:
        """Whether it is the password; takes as long either way."""
        return hmac.compare_digest(self._digest(password), self.digest)

    def _digest(self, password: str) -> str:
        return hashlib.scrypt(
            password.encode(), salt=bytes.fromhex(self.salt), n=self.n, r=self.r, p=self.p,
            maxmem=256 * self.n * self.r, dklen=32,
        ).hex()  # fmt: skip


@dataclass(frozen=True, slots=True)
class User:
    """One line of the file. `stamp` changes with the password: sessions of an earlier one have ended."""

    name: str
    role: Role
    password: ScryptHash
    stamp: str
    changed_at: str  # UTC, ISO 8601


class UserFile:
    """The password file of one HOME_DIR. Thread-safe; several processes may change it. `n`: scrypt's cost of new hashes."""

    def __init__(self, home_dir: Path, *, n: int = 2**15) -> None:
        self.path = home_dir / "users.json"
        self._n = n
        self._nobody = ScryptHash("00" * 16, n=n)  # hashed with where there is no such user: same time
        self._lock = threading.Lock()
        self._snapshot: dict[str, User] = {}
        self._version: tuple[int, int, int] | None = None
        self._looked = float("-inf")

    def list(self) -> list[User]:
        """Everybody, by name. Raises UserFileError."""
        return sorted(self._read().values(), key=lambda user: user.name)

    def find(self, name: str) -> User | None:
        """The user as of a second ago at most. A file that cannot be read counts as empty: nobody gets in."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= _LOOK_EVERY_S:
                self._looked = now
                self._look()
            return self._snapshot.get(name)

    def verify(self, name: str, password: str) -> User | None:
        """The user if the password is theirs. Slow; as slow where there is no such user."""
        user = self.find(name)
        right = (user.password if user else self._nobody).matches(password[: MAX_PASSWORD + 1])
        return user if right else None

    def add(self, name: str, password: str, role: Role) -> User:
        """Raises UserError (name, password, or the name is there), UserFileError."""
        if not NAME.fullmatch(name):
            raise UserError(
                f"{name!r} is no user name", value=name, param="name",
                limit="letters, digits and . _ @ + -, at most 128, the first a letter or digit",
            )  # fmt: skip
        made = self._user(name, password, role)
        with self._change() as users:
            if name in users:
                raise UserError(
                    f"the user {name!r} exists", value=name, param="name",
                    remedy=f"Use `quire users passwd {name}`, or remove it first.",
                )  # fmt: skip
            users[name] = made
        return made

    def set_password(self, name: str, password: str) -> User:
        """Sessions of the earlier password end. Raises UnknownUserError, UserError, UserFileError."""
        with self._change() as users:
            users[name] = made = self._user(name, password, self._known(users, name).role)
        return made

    def remove(self, name: str) -> None:
        """Raises UnknownUserError, UserFileError."""
        with self._change() as users:
            del users[self._known(users, name).name]

    def _user(self, name: str, password: str, role: Role) -> User:
        if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
            raise UserError(
                f"the password has {len(password)} characters", limit=f"{MIN_PASSWORD} to {MAX_PASSWORD}",
                param="password", remedy="Choose a longer one, such as four random words.",
            )  # fmt: skip
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return User(name, role, ScryptHash.of(password, n=self._n), secrets.token_hex(8), now)

    def _known(self, users: Mapping[str, User], name: str) -> User:
        if name not in users:
            raise UnknownUserError(
                f"there is no user {name!r}", value=name, limit=sorted(users), param="name",
                remedy="See `quire users list`.",
            )  # fmt: skip
        return users[name]

    def _look(self) -> None:
        try:
            found = self.path.stat()
            version = found.st_mtime_ns, found.st_size, found.st_ino
            if version != self._version:
                self._snapshot = self._read()
                self._version = version
        except (OSError, UserFileError):
            self._snapshot, self._version = {}, None

    def _read(self) -> dict[str, User]:
        try:
            told = json.loads(self.path.read_text("utf-8"))
            return {
                name: User(
                    name, Role(one["role"]), ScryptHash(**one["password"]), one["stamp"], one["changed_at"]
                )
                for name, one in told["users"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserFileError(
                f"the password file {self.path} cannot be read: {error}", value=str(self.path),
                remedy="Restore it, or remove it and add the users again.",
            ) from error  # fmt: skip

    @contextlib.contextmanager
    def _change(self) -> Iterator[dict[str, User]]:
        """The users, to be changed inside; written when the block ends well. One process at a time."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (self.path.parent / ".users.lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                users = self._read()
                yield users
                self._write(users)
        except OSError as error:
            raise UserFileError(
                f"the password file {self.path} cannot be written: {error}", value=str(self.path), param="HOME_DIR"
            ) from error  # fmt: skip
        with self._lock:
            self._looked = float("-inf")

    def _write(self, users: Mapping[str, User]) -> None:
        told = {user.name: {name: v for name, v in asdict(user).items() if name != "name"} for user in users.values()}  # fmt: skip
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".users-")  # mode 0600
        with os.fdopen(handle, "w", encoding="utf-8") as opened:
            json.dump({"users": told}, opened, indent=1)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, self.path)
