"""What an intruder tries, and what the server answers: one table for the tests and for ``docs/security.md``.

``python -m tests.workbench.api.intruder_table`` writes the table of the document again; a test compares.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "security.md"
BEGIN, END = "<!-- tries: begin -->", "<!-- tries: end -->"
HOST = "127.0.0.1:8501"  # replaced by the server's own


@dataclass(frozen=True)
class Try:
    """One request, byte for byte; `status`: the answer's, 0 where the connection is closed without one."""

    group: str
    name: str
    status: int
    request: bytes
    code: str = ""  # of the error, where it has one


def http(path: str, body: bytes | None = None, *, method: str = "", host: str | None = HOST, **headers: str) -> bytes:  # fmt: skip
    """A request with these headers (underscores stand for hyphens) and the body's true length unless one is given."""
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
    lines += [f"Host: {host}"] if host is not None else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body is not None:
        names = {name.lower() for name in headers}
        lines += ["content-type: application/json"] if "content_type" not in names else []
        lines += [] if names & {"content_length", "transfer_encoding"} else [f"content-length: {len(body)}"]
    return "\r\n".join([*lines, "connection: close", "", ""]).encode("latin-1") + (body or b"")


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "x"}], **fields}).encode()


def raw_chat(field: bytes) -> bytes:
    """A chat request that asks for one token and has `field` as it stands."""
    return b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, ' + field + b"}"


CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
DEEP = b"[" * 5000 + b"]" * 5000

PATHS = [
    ("a model's name that climbs, encoded", "/v1/models/..%2f..%2f..%2fetc%2fpasswd", 404),
    ("the same, encoded twice", "/v1/models/%252e%252e%252f%252e%252e%252fetc%252fpasswd", 404),
    ("the same with backslashes", "/v1/models/..%5c..%5cetc%5cpasswd", 404),
    ("a null byte in a model's name", "/v1/models/a%00b", 404),
    ("a path that climbs out of /v1", "/v1/../quire/residents", 404),
    ("the internal routes without their token", "/quire/residents", 401),
    ("the internal routes by a path that climbs", "/v1/models/../../quire/residents", 404),
    ("out of /mlflow", "/mlflow/../../etc/passwd", 400),
    ("out of /mlflow, encoded", "/mlflow/%2e%2e/%2e%2e/etc/passwd", 400),
    ("out of /mlflow, with encoded slashes", "/mlflow/..%2f..%2fetc%2fpasswd", 400),
    ("out of /mlflow, encoded twice", "/mlflow/get-artifact/%252e%252e%252fetc", 400),
    ("out of /mlflow, with backslashes", "/mlflow/..%5c..%5cetc", 400),
]
HOSTS: list[tuple[str, str | None]] = [
    ("a foreign name (DNS rebinding)", "evil.example"),
    ("a name that ends like loopback", "127.0.0.1.evil.example"),
    ("a name that begins like loopback", "localhost.evil.example"),
    ("user information before the host", "127.0.0.1@evil.example"),
    ("loopback as user information", "evil.example@127.0.0.1"),
    ("two ports", "127.0.0.1:8501:80"),
    ("a port that is no number", "127.0.0.1:x"),
    ("a trailing dot", "localhost."),
    ("a percent escape", "%6cocalhost"),
    ("a path in it", "127.0.0.1/evil"),
    ("an address as one number", "2130706433"),
    ("an address in hexadecimal", "0x7f000001"),
    ("an IPv6 address of others", "[2001:db8::1]"),
    ("an IPv6 zone", "[::1%25eth0]"),
    ("no host", None),
]
ORIGINS = [
    ("a foreign site", "http://evil.example"),
    ("a sandboxed page", "null"),
    ("another port of this machine", "http://127.0.0.1:1"),
    ("our name as user information", f"http://{HOST}@evil.example"),
    ("a foreign name before ours", f"http://evil.example.{HOST}"),
    ("another scheme", f"ftp://{HOST}"),
    ("brackets that do not close", "http://[::1"),
]
BODIES: list[tuple[str, bytes, int]] = [
    ("nested 5,000 deep", DEEP, 400),
    ("nested 5,000 deep in a field", raw_chat(b'"metadata": ' + DEEP), 400),
    ("nested in a schema", raw_chat(b'"response_format": ' + b'{"a":' * 300 + b"1" + b"}" * 300), 400),
    ("300,000 empty lists", b"[" + b"[]," * 299_999 + b"[]]", 400),
    ("a number of 100,000 digits", raw_chat(b'"seed": ' + b"9" * 100_000), 400),
    ("a number of 4,000 digits", raw_chat(b'"seed": ' + b"9" * 4000), 400),
    ("an exponent that is infinite", raw_chat(b'"temperature": 1e999'), 400),
    ("NaN", raw_chat(b'"temperature": NaN'), 400),
    ("Infinity", raw_chat(b'"temperature": -Infinity'), 400),
    ("bytes that are no UTF-8", raw_chat(b'"user": "\xff\xfe"'), 400),
    ("half a surrogate pair", raw_chat(b'"user": "\\ud800"'), 200),
    ("a template of its own", chat(chat_template="{{ cycler.__init__.__globals__ }}"), 400),
    ("variables that would replace the messages", chat(chat_template_kwargs={"messages": []}), 400),
    ("a model's name that climbs", chat(model="../../../../etc/passwd"), 404),
    ("a model's name that is an address", chat(model="http://169.254.169.254/latest"), 404),
    ("an image from the network", chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]), 400),
    ("a pattern that backtracks for ever elsewhere", chat(max_tokens=1, guided_regex="(a+)+b"), 200),
    ("a pattern that unfolds a billion times", chat(max_tokens=1, guided_regex="((a{1,1000}){1,1000}){1,1000}"), 200),
    ("a bias for a token that there is not", chat(logit_bias={"99999999": 1}), 400),
    ("a million answers", chat(n=1_000_000), 400),
]  # fmt: skip


def tries(max_body_bytes: int) -> list[Try]:
    found = [Try("Paths", name, status, http(path)) for name, path, status in PATHS]
    found += [Try("Host", name, 403, http("/v1/models", host=host), "origin_refused") for name, host in HOSTS]
    found += [
        Try("Host", "X-Forwarded-Host beside a foreign one", 403, http("/v1/models", host="evil.example", x_forwarded_host=HOST)),
        Try("Host", "two of them", 400, http("/v1/models", host=f"{HOST}\r\nHost: {HOST}")),
        Try("Host", "capital letters of ours are ours", 200, http("/v1/models", host=HOST.replace("127.0.0.1", "LOCALHOST"))),
        Try("Host", "IPv6 loopback is ours", 200, http("/v1/models", host="[::1]:8501")),
    ]  # fmt: skip
    found += [Try("Origin", name, 403, http("/v1/models", origin=o), "origin_refused") for name, o in ORIGINS]
    found += [Try("Origin", "our own", 200, http("/v1/models", origin=f"http://{HOST}"))]
    found += [Try("Bodies", name, status, http(CHAT, body)) for name, body, status in BODIES]
    large = str(max_body_bytes + 1)
    found += [
        Try("Bodies", "larger than allowed, as it says", 413, http(CHAT, b"", content_length=large), "body_too_large"),
        Try("Bodies", "a form of another site", 415, http(CHAT, b"{}", content_type="text/plain")),
        Try("Bodies", "an adapter's folder that climbs", 403, http("/v1/load_lora_adapter", b'{"lora_name": "a", "lora_path": "../../etc"}')),
        Try("Bodies", "a token that there is not", 400, http(COMPLETE, b'{"prompt": [99999999]}')),
        Try("Bodies", "a token below zero", 400, http(COMPLETE, b'{"prompt": [-1]}')),
        Try("Bodies", "a token beyond 64 bits", 400, http(COMPLETE, b'{"prompt": [18446744073709551616]}')),
        Try("Bodies", "tokens to text that there are not", 400, http("/detokenize", b'{"tokens": [99999999]}')),
        Try("Requests", "a length and chunks (smuggling)", 400, http(CHAT, b"0\r\n\r\n", content_length="5", transfer_encoding="chunked")),
        Try("Requests", "two lengths", 400, http(CHAT, b"{}", content_length="2\r\ncontent-length: 3")),
        Try("Requests", "a length below zero", 400, http(CHAT, b"{}", content_length="-1")),
        Try("Requests", "a length with a sign", 400, http(CHAT, b"{}", content_length="+2")),
        Try("Requests", "an encoding that is not the last", 400, http(CHAT, b"0\r\n\r\n", transfer_encoding="chunked, identity")),
        Try("Requests", "two encodings", 400, http(CHAT, b"0\r\n\r\n", transfer_encoding="chunked\r\ntransfer-encoding: chunked")),
        Try("Requests", "a chunk size that is no number", 400, http(CHAT, b"zz\r\n{}\r\n0\r\n\r\n", transfer_encoding="chunked")),
        Try("Requests", "a space before the colon", 400, b"GET /v1/models HTTP/1.1\r\nHost : " + HOST.encode() + b"\r\n\r\n"),
        Try("Requests", "a null byte in a header", 400, http("/v1/models", x="a\x00b")),
        Try("Requests", "no HTTP at all", 400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello"),
        Try("Requests", "a header of 40 KiB", 431, http("/v1/models", x="a" * 40_960), "headers_too_large"),
        Try("Requests", "a header of 200 KiB without an end", 431, b"GET / HTTP/1.1\r\nx: " + b"a" * 200_000),
        Try("Requests", "200 headers", 431, http("/v1/models", **{f"x{n}": "1" for n in range(200)}), "headers_too_large"),
        Try("Requests", "an address of 40 KiB", 431, http("/v1/models?" + "a" * 40_960), "headers_too_large"),
    ]  # fmt: skip
    return found


def table() -> str:
    """The tries as Markdown, in their groups."""
    lines = []
    group = ""
    for each in tries(8 << 20):
        if each.group != group:
            group = each.group
            lines += ["", f"| {group}: what is tried | answer |", "|---|---|"]
        lines.append(f"| {each.name} | {each.status}{f' `{each.code}`' if each.code else ''} |")
    return "\n".join([BEGIN, *lines, "", END])


def main() -> None:
    before, _, rest = DOCUMENT.read_text("utf-8").partition(BEGIN)
    DOCUMENT.write_text(before + table() + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
