"""What must be set up before others than this machine may connect: a way to log in, hosts and proxies that can be read, a certificate.

Boundary: checks of settings, before a port is opened. It decides nothing about a request.
"""

from __future__ import annotations

import ipaddress
import ssl
from typing import TYPE_CHECKING

from workbench.errors import CertificateError, HostRefusedError, SettingsError

if TYPE_CHECKING:
    from workbench.settings import Settings


def check(settings: Settings) -> None:
    """Raises HostRefusedError, SettingsError or CertificateError, each with what to do. `home_dir` must be absolute."""
    _check_proxies(settings)
    check_certificate(settings)
    if not settings.is_loopback and not (can_log_in(settings) or any_key(settings)):
        raise HostRefusedError(
            f"host {settings.host!r} is refused: nobody could log in there", value=settings.host, param="QUIRE_HOST",
            limit="127.0.0.1, ::1 or localhost, until there is a way to log in",
            remedy="Add a user (`quire users add NAME --admin`), for `quire serve` a key (`quire keys create`), or set QUIRE_TRUSTED_PROXY_HEADER and QUIRE_TRUSTED_PROXIES, "
            "or stay on 127.0.0.1 and forward the port: ssh -L 8501:127.0.0.1:8501 this-machine.",
        )  # fmt: skip


def check_pages(settings: Settings) -> None:
    """Raises HostRefusedError where pages would ask for a login that nobody has."""
    if settings.login_required and not can_log_in(settings):
        raise HostRefusedError(
            "a login is asked for, and there is no way to log in", value=settings.host, param="QUIRE_HOST",
            limit="a user, or a trusted proxy", remedy="Add a user: `quire users add NAME --admin`.",
        )  # fmt: skip


def can_log_in(settings: Settings) -> bool:
    """Whether there is a way to log in: a user in the password file, or a trusted proxy."""
    from workbench.access.users import UserFile

    return bool(settings.trusted_proxy_header) or bool(UserFile(settings.home_dir).list())


def any_key(settings: Settings) -> bool:
    """Whether there is an API key that opens something, as servers without pages need."""
    from workbench.access.keys import listed
    from workbench.store import open_store, utc_now

    now = utc_now()
    with open_store(settings.home_dir) as store:
        return any(key.is_valid(now) for key in listed(store))


def check_certificate(settings: Settings) -> None:
    """Raises CertificateError unless both files or none are given, can be read, and belong together."""
    certificate, key = settings.ssl_certfile, settings.ssl_keyfile
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        missing = "QUIRE_SSL_CERTFILE" if certificate is None else "QUIRE_SSL_KEYFILE"
        raise CertificateError(
            f"{missing} is missing", param=missing, limit="both --ssl-certfile and --ssl-keyfile, or none",
            remedy="Name the certificate and its key, both as PEM files.",
        )  # fmt: skip
    for file, name in ((certificate, "QUIRE_SSL_CERTFILE"), (key, "QUIRE_SSL_KEYFILE")):
        try:
            with file.open("rb"):
                pass
        except OSError as error:
            raise CertificateError(
                f"{name}={file} cannot be read: {error.strerror}", value=str(file), param=name,
                remedy="Name a PEM file that this user can read.",
            ) from None  # fmt: skip
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise CertificateError(
            f"{certificate} and {key} cannot be used: {getattr(error, 'reason', None) or error}", value=str(certificate),
            param="QUIRE_SSL_CERTFILE", limit="a certificate and its own key, PEM, the key without a password",
        ) from None  # fmt: skip


def _no_password() -> str:
    raise ValueError("the key has a password")


def _check_proxies(settings: Settings) -> None:
    for each in settings.trusted_proxy_networks:
        try:
            ipaddress.ip_network(each)
        except ValueError as error:
            raise SettingsError(
                f"QUIRE_TRUSTED_PROXIES={settings.trusted_proxies} is not accepted: {error}", value=each,
                limit="addresses or networks such as 10.0.0.0/8, separated by commas", param="QUIRE_TRUSTED_PROXIES",
            ) from None  # fmt: skip
    if settings.trusted_proxy_header and not settings.trusted_proxy_networks:
        raise SettingsError(
            f"QUIRE_TRUSTED_PROXY_HEADER={settings.trusted_proxy_header} would be believed from nobody",
            value=settings.trusted_proxy_header, param="QUIRE_TRUSTED_PROXIES",
            remedy="Set QUIRE_TRUSTED_PROXIES to the proxy's address, such as 127.0.0.1.",
        )  # fmt: skip
