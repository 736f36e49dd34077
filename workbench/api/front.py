"""What stands in front of every route, in this order: limits, Host and Origin, keys, login.

Boundary: the order. Each part is a module of its own; a part that is off is not there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.middleware import Middleware

from workbench.access.logins import Logins
from workbench.api.auth import RequireKey
from workbench.api.limits import Limits
from workbench.api.login import RequireLogin
from workbench.api.origin import OwnOrigin
from workbench.settings import Settings

if TYPE_CHECKING:
    from workbench.services import Services


def front(settings: Settings, services: Services | None, token: str) -> list[Middleware]:
    """The middleware of an app with these settings, the outermost first. `token`: of the internal routes."""
    names = settings.allowed_host_names + (
        () if settings.is_loopback else (settings.host.strip("[]").lower(),)
    )
    parts = [
        Middleware(Limits),
        Middleware(OwnOrigin, names, not settings.is_loopback),
        Middleware(RequireKey, services=services, token=token, is_required=settings.require_key),
    ]
    if settings.login_required:
        parts.append(Middleware(RequireLogin, Logins(settings) if services is None else services.logins))
    return parts
