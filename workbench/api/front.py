"""What stands in front of every route, in this order: limits, Host and Origin, login.

Boundary: the order. Each part is a module of its own; a part that is off is not there.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from workbench.access.logins import Logins
from workbench.api.limits import Limits
from workbench.api.login import RequireLogin
from workbench.api.origin import OwnOrigin
from workbench.settings import Settings


def front(settings: Settings, logins: Logins | None) -> list[Middleware]:
    """The middleware of an app with these settings, the outermost first."""
    names = settings.allowed_host_names + (
        () if settings.is_loopback else (settings.host.strip("[]").lower(),)
    )
    parts = [Middleware(Limits), Middleware(OwnOrigin, names, not settings.is_loopback)]
    if settings.login_required:
        parts.append(Middleware(RequireLogin, logins or Logins(settings)))
    return parts
