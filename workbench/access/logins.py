"""Logins: who sent a request that brings a session's cookie or a trusted proxy's header.

The ways to log in are the settings': the password file, a proxy that names the user in a header (``QUIRE_TRUSTED_PROXY_HEADER``,
believed from ``QUIRE_TRUSTED_PROXIES`` alone). Each request asks anew, from memory: a user who was removed, or
an administrator who is none any more, loses their rights at once.

Boundary: headers in, a Principal out. HTTP answers are ``workbench.api.login``'s.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.access.principal import Principal
from workbench.access.throttle import LoginThrottle
from workbench.access.users import NAME, Role, UserFile

if TYPE_CHECKING:
    from workbench.access.sessions import Session, Sessions
    from workbench.settings import Settings
    from workbench.store import Store

Headers = Iterable[tuple[str, str]]  # names in lower case


@dataclass(frozen=True, slots=True)
class Visitor:
    """Who is logged in: the principal, and the session's id where a cookie says so."""

    principal: Principal
    session_id: str | None = None


class Logins:
    """The logins of one app. `open` it before the first request. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.required = settings.login_required
        self.cookie = f"quire_session_{settings.port}"  # cookies know no ports: two servers on one host
        self.users = UserFile(settings.home_dir)
        self.throttle = LoginThrottle()
        self.sessions: Sessions | None = None
        self.user_header = settings.trusted_proxy_header.lower()
        self._proxies = tuple(ipaddress.ip_network(each) for each in settings.trusted_proxy_networks)
        self._admins = frozenset(settings.admin_names)

    def open(self, store: Store) -> None:
        """Read the sessions, if logins are asked for at all. Raises StoreError."""
        if self.required and self.sessions is None:
            from workbench.access.sessions import Sessions

            self.sessions = Sessions(store)

    def is_proxy(self, peer: str) -> bool:
        """Whether headers of this peer that name users and clients are believed."""
        try:
            address = ipaddress.ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)

    def client_of(self, peer: str, headers: Headers) -> str:
        """Who the peer speaks for: itself, or the last client that a trusted proxy names."""
        if not self.is_proxy(peer):
            return peer
        named = [
            part.strip() for name, value in headers if name == "x-forwarded-for" for part in value.split(",")
        ]
        return next((part for part in reversed(named) if part and not self.is_proxy(part)), peer)

    def visitor(self, headers: Headers) -> Visitor | None:
        """Who sends these headers; None: nobody who is logged in. A user header of a peer that is no proxy must be gone by now."""
        given = list(headers)
        named = [value for name, value in given if self.user_header and name == self.user_header]
        if named:
            known = len(named) == 1 and NAME.fullmatch(named[0])
            return Visitor(self._principal(named[0], self._role(named[0]))) if known else None
        for session_id in self._session_ids(given):
            session = self.sessions.get(session_id) if self.sessions else None
            principal = self._owner(session) if session else None
            if principal is not None:
                return Visitor(principal, session_id)
        return None

    def _owner(self, session: Session) -> Principal | None:
        user = self.users.find(session.user)
        return self._principal(user.name, user.role) if user and user.stamp == session.stamp else None

    def _role(self, name: str) -> Role:
        """Of a name that others vouch for."""
        return Role.ADMIN if name in self._admins else Role.USER

    def _principal(self, name: str, role: Role) -> Principal:
        return Principal(f"user:{name}", role.rights)

    def _session_ids(self, headers: Headers) -> Iterator[str]:
        """Of all cookies of our name: another server on this host may have set one beside ours."""
        for name, value in headers:
            if name == "cookie":
                for part in value.split(";"):
                    key, _, content = part.strip().partition("=")
                    if key == self.cookie:
                        yield content.strip('"')
