"""Limits of time and TLS, over true sockets."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from workbench import settings as settings_module
from workbench.api.http_protocol import BoundedHttp
from workbench.api.limits import Limits
from workbench.backends.app_client import AppClient
from workbench.backends.protocol import BackendLostError
from workbench.errors import CertificateError
from workbench.ports import bind
from workbench.run_state import RunState


async def length(scope: Any, receive: Any, send: Any) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


class HastyHttp(BoundedHttp):
    head_s = 0.3


@contextmanager
def listening(app: Any, **options: Any) -> Iterator[int]:
    listener = bind("127.0.0.1", 0)
    config = uvicorn.Config(app, log_level="error", lifespan="off", http=HastyHttp, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def answer_to(port: int, *pieces: bytes, pause_s: float = 0.0) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except ConnectionError:
                break
            time.sleep(pause_s)
        answer = b""
        try:
            while piece := connection.recv(65536):
                answer += piece
        except ConnectionError:
            pass
        return answer


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\ncontent-length: 10\r\n"


def test_who_is_slow_is_cut_and_who_is_not_is_answered():
    with listening(Limits(length, slow_body_s=0.3)) as port:
        whole = HEAD + b"connection: close\r\n\r\n"
        assert answer_to(port, whole, b"12345", b"67890", pause_s=0.1).endswith(b"\r\n\r\n10")
        slow_body = answer_to(port, HEAD + b"\r\n12345")
        assert slow_body.startswith(b"HTTP/1.1 408")
        assert b"slow_body" in slow_body
        assert answer_to(port, b"").startswith(b"HTTP/1.1 408")  # says nothing
        assert answer_to(port, *(b"%c" % byte for byte in HEAD), pause_s=0.05).startswith(b"HTTP/1.1 408")
        kept = HEAD + b"\r\n1234567890"
        twice = answer_to(port, kept + HEAD)  # the second request of a connection never comes whole
        assert twice.count(b"HTTP/1.1 200") == 1
        assert b"HTTP/1.1 408" in twice


def test_more_connections_than_allowed_are_told_so():
    with listening(length, limit_concurrency=2) as port:
        first = socket.create_connection(("127.0.0.1", port), timeout=20)
        first.sendall(HEAD)
        time.sleep(0.1)
        assert answer_to(port, HEAD + b"\r\n1234567890").startswith(b"HTTP/1.1 503")
        first.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``certificate(name)``: a self-made certificate of that host, and its key."""

    def make(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("certificate")
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(
                x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
            )
            .sign(key, hashes.SHA256())
        )  # fmt: skip
        files = folder / "cert.pem", folder / "key.pem"
        files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files

    return make


async def residents(scope: Any, receive: Any, send: Any) -> None:
    from workbench.api.errors import json_response

    await json_response({"scheme": scope["scheme"]})(scope, receive, send)


def test_our_own_programs_trust_the_apps_certificate_and_no_other(certificate, tmp_path: Path):
    cert, key = certificate("quire.example.org")
    other, _ = certificate("quire.example.org")
    with listening(residents, ssl_certfile=cert, ssl_keyfile=key) as port:
        url, state = f"https://127.0.0.1:{port}", RunState(tmp_path)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url)
        state.write(url, model="x", token="t", certfile=cert)
        client = AppClient(state.read())
        assert client.residents() == {"scheme": "https"}
        client.close()
        state.write(url, model="x", token="t", certfile=other)
        client = AppClient(state.read())
        with pytest.raises(BackendLostError, match="CERTIFICATE_VERIFY_FAILED"):
            client.residents()
        client.close()


def test_files_for_https_are_checked_before_the_start(certificate, tmp_path: Path):
    (cert, key), (_, other_key) = certificate("a"), certificate("b")
    assert settings_module.load(ssl_certfile=cert, ssl_keyfile=key).url.startswith("https://")
    (tmp_path / "text.pem").write_text("no certificate")
    wrong = [
        (cert, None, "QUIRE_SSL_KEYFILE is missing"),
        (None, key, "QUIRE_SSL_CERTFILE is missing"),
        (tmp_path / "none.pem", key, "none.pem cannot be read: No such file"),
        (cert, other_key, "KEY_VALUES_MISMATCH"),
        (tmp_path / "text.pem", key, "cannot be used"),
    ]
    for given_cert, given_key, told in wrong:
        with pytest.raises(CertificateError, match=told):
            settings_module.load(ssl_certfile=given_cert, ssl_keyfile=given_key)
