"""Who uses this page, and what they may do: the one place where pages ask.

Streamlit keeps the headers of the browser's WebSocket; `workbench.api.login` has let it in and taken out what was not to be
believed. They are judged anew at each run, so that a user who was removed can do nothing more.

Buttons that need a right are off without it (`lacks`), and their act asks again (`require`): what stands in the browser may be
older than the loss of a right, and a browser sends what it likes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import streamlit as st

from workbench.access.principal import OWNER, Principal, Right
from workbench.errors import WorkbenchError
from workbench.ui import markup, resources

T = TypeVar("T")
_REASONS = {
    Right.ADMIN: "Only administrators of this server may do this.",
    Right.INFER: "Your login may look at models, not ask them.",
}


class NotAllowedError(WorkbenchError):
    """The person who is logged in lacks the right."""

    code = "forbidden"


def principal() -> Principal:
    """Who asks; OWNER where no login is asked for. Nobody has any right whose session has ended."""
    logins = resources.logins()
    if logins is None or not logins.required:
        return OWNER
    headers = st.context.headers
    given = [(name.lower(), value) for name in headers for value in headers.get_all(name)]
    visitor = logins.visitor(given)
    return visitor.principal if visitor else Principal("nobody", frozenset())


def lacks(right: Right = Right.ADMIN) -> str | None:
    """Why an act that needs `right` is off, for the button's help; None: it is not."""
    return None if principal().may(right) else _REASONS.get(right, "Your login does not allow this.")


def require(right: Right = Right.ADMIN) -> None:
    """Raises NotAllowedError."""
    asks = principal()
    if not asks.may(right):
        raise NotAllowedError(
            _REASONS.get(right, "not allowed").rstrip("."), value=asks.id, limit=right.value,
            remedy="Ask one of them, or log in as another user.",
        )  # fmt: skip


def as_html() -> str:
    """The name and the way out; empty where no login is asked for."""
    asks = principal()
    if asks is OWNER:
        return ""
    name = markup.text(asks.id.partition(":")[2] or asks.id)
    return f'<span class="q-muted">{name} · <a href="/logout" target="_self">Log out</a></span>'


def button(label: str, *, help: str | None = None, disabled: bool = False, **options: Any) -> bool:
    """A button for administrators: for others it is off, with the reason."""
    refused = lacks()
    pressed: bool = st.button(
        label, help=refused or help, disabled=disabled or refused is not None, **options
    )
    return pressed


def guarded(act: Callable[[], T], right: Right = Right.ADMIN) -> Callable[[], T]:
    """`act` for who asks now; for others what raises NotAllowedError in its place."""
    try:
        require(right)
    except NotAllowedError as error:
        refusal = error

        def refused() -> T:
            raise refusal

        return refused
    return act
