"""With which key this process asks a server: the running app's own token where it is at hand, else QUIRE_API_KEY.

The key stays in the environment: no setting, no argument and no record holds it.

Boundary: a client's headers. What a server makes of them is `workbench.api.auth`'s.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

API_KEY_VARIABLE = "QUIRE_API_KEY"


def authorization(url: str, token: str = "", *, otherwise: str | None = None) -> dict[str, str]:
    """The headers for a server at `url`; none where there is no key for it. `token`: that app's own; `otherwise`: the last resort."""
    given = token or os.environ.get(API_KEY_VARIABLE) or otherwise
    return {"authorization": f"Bearer {given}"} if given and _may_have_key(url) else {}


def _may_have_key(url: str) -> bool:
    """A key goes over TLS, or to this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("127.0.0.1", "localhost", "::1")
