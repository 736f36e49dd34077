"""What is in front of the pages: login, logout, sessions, trusted proxies, hosts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from workbench import settings as settings_module
from workbench.access.principal import OWNER, SCOPE_KEY, Principal, Right, principal_of
from workbench.access.users import Role, UserFile
from workbench.api.front import front
from workbench.api.login import RequireLogin
from workbench.errors import HostRefusedError
from workbench.services import Services

HOST = "quire.example.org:8501"
ORIGIN = f"https://{HOST}"
STREAM = f"wss://{HOST}/_stcore/stream"
PASSWORD = "four random words"


async def who(request: Request) -> PlainTextResponse:
    return PlainTextResponse(principal_of(request.scope).id)


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    with suppress(WebSocketDisconnect):
        while True:
            await socket.send_text(await socket.receive_text())


ANY = ["GET", "POST", "PATCH", "DELETE"]
ROUTES = [WebSocketRoute("/_stcore/stream", echo), Route("/{path:path}", who, methods=ANY)]


class Site:
    """A site of one route that says who asks, behind the true front."""

    def __init__(self, home: Path, **given: Any) -> None:
        self.users = UserFile(home, n=2**4)
        self.users.add("ada", PASSWORD, Role.ADMIN)
        self.users.add("vic", PASSWORD, Role.VIEWER)
        options = {"host": "0.0.0.0", "allowed_hosts": "quire.example.org", **given}
        self.settings = settings_module.load(home_dir=home, **options)
        self.services = Services(self.settings)
        self.logins = self.services.logins
        self.logins.users = self.users
        self.services.open()
        self.app = Starlette(routes=ROUTES, middleware=front(self.settings, self.services, "the app's token"))

    def visit(self, peer: str = "10.1.2.3", url: str = ORIGIN) -> TestClient:
        return TestClient(self.app, base_url=url, client=(peer, 5), follow_redirects=False)

    def log_in(self, client: TestClient, user: str = "ada", password: str = PASSWORD, **more: Any) -> Any:
        form = {"user": user, "password": password, **more}
        return client.post("/login", data=form, headers={"origin": str(client.base_url)})

    def later(self) -> None:
        """A second later, as far as the password file is concerned."""
        self.users._looked = float("-inf")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def site(**given: Any) -> Site:
        made.append(Site(tmp_path, **given))
        return made[-1]

    yield site
    for each in made:
        each.services.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For tests that leave its users as they are, and guess no more than a few times."""
    made = Site(tmp_path_factory.mktemp("site"))
    yield made
    made.services.close()


PATHS = ["/", "/runs", "/_stcore/health", "/_stcore/upload_file/x/y", "/media/x.png", "/static/js/main.js", "/live/chip",
         "/component/x", "/mlflow/", "/mlflow/api/2.0/mlflow/runs/search", "/metrics", "/openapi.json", "/quire",
         "//", "/login/", "/LOGIN", "/login/..", "/healthz/", "/healthz%2f..%2fruns", "/v1/models", "/tokenize", "/newroute"]  # fmt: skip


def test_nothing_is_shown_before_the_login(site: Site):
    client = site.visit()
    for method, path in product(("GET", "POST", "DELETE"), PATHS):
        answer = client.request(method, path)
        assert answer.status_code == 401, (method, path, answer.text)
        assert answer.json()["error"]["code"] == "unauthorized"


def test_what_is_open_stays_open(site: Site):
    client = site.visit()
    assert {client.get(path).status_code for path in ("/healthz", "/health", "/readyz")} == {200}
    assert client.post("/quire/load").text == "local"  # its own token is asked behind


def test_a_page_leads_to_the_login_and_back(site: Site):
    client = site.visit()
    answer = client.get("/runs?run=7&x=a%26b", headers={"accept": "text/html"})
    assert (answer.status_code, answer.headers["location"]) == (
        303,
        "/login?next=%2Fruns%3Frun%3D7%26x%3Da%2526b",
    )
    page = client.get(answer.headers["location"])
    assert 'name="next" type="hidden" value="/runs?run=7&amp;x=a%26b"' in page.text
    assert "script" not in page.text.lower()
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    done = site.log_in(client, next="/runs?run=7")
    assert (done.status_code, done.headers["location"]) == (303, "/runs?run=7")
    cookie = done.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("quire_session_8501=", "httponly", "samesite=lax", "secure"))
    assert client.get("/runs").text == "user:ada"


@pytest.mark.parametrize("target", ["//evil.org", "https://evil.org", "/\\evil.org", "\\\\evil.org", "/a\r\nset-cookie: x=1",
                                    "javascript:alert(1)", "", "/login?next=/"])  # fmt: skip
def test_nobody_is_sent_elsewhere_after_the_login(site: Site, target: str):
    assert site.log_in(site.visit(), next=target).headers["location"] == "/"


def test_the_login_page_shows_what_was_typed_as_text(site: Site):
    answer = site.log_in(site.visit(), user='"><script>alert(1)</script>', password="x")
    assert answer.status_code == 401
    assert "<script>" not in answer.text
    assert "&lt;script&gt;" in answer.text


def test_a_form_of_another_site_neither_logs_in_nor_out(site: Site):
    client = site.visit()
    form = {"user": "ada", "password": PASSWORD}
    assert client.post("/login", data=form).status_code == 403
    for origin in ("https://evil.org", "null", "https://quire.example.org"):
        assert client.post("/login", data=form, headers={"origin": origin}).status_code == 403
    site.log_in(client)
    assert client.post("/logout").status_code == 403
    assert client.post("/logout", headers={"origin": "https://evil.org"}).status_code == 403
    assert client.get("/").text == "user:ada"


def test_a_logout_ends_the_session_itself(site: Site):
    client = site.visit()
    site.log_in(client)
    stolen = dict(client.cookies)
    assert "ada" in client.get("/logout").text
    assert client.post("/logout", headers={"origin": ORIGIN}).headers["location"] == "/login"
    assert client.get("/").status_code == 401
    again = site.visit()
    again.cookies.update(stolen)
    assert again.get("/").status_code == 401


def test_a_second_login_takes_the_place_of_the_first(site: Site):
    client = site.visit()
    site.log_in(client)
    first = dict(client.cookies)
    site.log_in(client, "vic")
    assert client.get("/").text == "user:vic"
    client.cookies.clear()
    client.cookies.update(first)
    assert client.get("/").status_code == 401


@pytest.mark.parametrize("change", ["remove", "password", "again"])
def test_a_changed_user_is_out_at_once(make, change: str):
    site = make()
    client = site.visit()
    site.log_in(client)
    if change == "password":
        site.users.set_password("ada", "another long one")
    else:
        site.users.remove("ada")
        if change == "again":
            site.users.add("ada", PASSWORD, Role.ADMIN)
    site.later()
    assert client.get("/").status_code == 401


@pytest.mark.parametrize("cookie", ["quire_session_8501=", "quire_session_8501=" + "A" * 43, "quire_session_8502={id}", "quire_session_8501={id}x",
                                    'quire_session_8501="', "=;=;quire_session_8501", "quire_session_8501=\xff"])  # fmt: skip
def test_a_cookie_that_is_not_ours_opens_nothing(site: Site, cookie: str):
    client = site.visit()
    site.log_in(client)
    session_id = next(iter(client.cookies.values()))
    client.cookies.clear()
    given = cookie.format(id=session_id).encode("latin-1")
    assert client.get("/", headers=[(b"cookie", given)]).status_code == 401
    both = b"quire_session_8501=bad; quire_session_8501=" + session_id.encode()
    assert client.get("/", headers=[(b"cookie", both)]).text == "user:ada"  # a neighbour's beside ours


def test_a_web_socket_needs_the_login_and_ends_with_it(site: Site):
    client = site.visit()
    with pytest.raises(WebSocketDenialResponse) as denied:  # noqa: SIM117
        with client.websocket_connect(STREAM):
            pass
    assert denied.value.status_code == 401
    site.log_in(client)
    with pytest.raises(WebSocketDisconnect) as refused:  # noqa: SIM117
        with client.websocket_connect(STREAM, headers={"origin": "https://evil.org"}):
            pass
    assert refused.value.code == 1008
    with client.websocket_connect(STREAM, headers={"origin": ORIGIN}) as socket:
        socket.send_text("hello")
        assert socket.receive_text() == "hello"
        client.post("/logout", headers={"origin": ORIGIN})
        with pytest.raises(WebSocketDisconnect) as ended:
            socket.receive_text()
        assert ended.value.code == 1008


def test_guessing_is_answered_with_a_wait(make):
    site = make()
    client = site.visit()
    for _ in range(5):
        assert site.log_in(client, password="wrong").status_code == 401
    slowed = site.log_in(client)
    assert slowed.status_code == 429
    assert int(slowed.headers["retry-after"]) >= 1
    assert site.log_in(site.visit("10.9.9.9")).status_code == 303  # elsewhere nobody is locked out


def test_a_viewer_sees_and_changes_nothing(site: Site):
    client = site.visit()
    site.log_in(client, "vic")
    mlflow = "/mlflow/ajax-api/2.0/mlflow"
    assert client.get(f"{mlflow}/registered-models/get?name=x").text == "user:vic"
    assert client.post(f"{mlflow}/runs/search").text == "user:vic"
    for method, path in (("POST", "registered-models/alias"), ("DELETE", "registered-models/delete"), ("PATCH", "runs/x"), ("POST", "runs/delete")):  # fmt: skip
        answer = client.request(method, f"{mlflow}/{path}", headers={"origin": ORIGIN})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    site.log_in(client, "ada")
    assert client.post(f"{mlflow}/registered-models/alias", headers={"origin": ORIGIN}).text == "user:ada"


def test_who_a_key_was_found_for_needs_no_login(site: Site):
    """As the middleware of API keys leaves its principal before the login is asked for."""
    for principal in (OWNER, Principal("key:1", frozenset({Right.INFER}))):

        async def with_key(scope: Any, receive: Any, send: Any, principal: Principal = principal) -> None:
            await RequireLogin(Starlette(routes=ROUTES), site.logins)(
                {**scope, SCOPE_KEY: principal}, receive, send
            )

        client = TestClient(with_key, base_url=ORIGIN)
        assert client.post("/v1/chat/completions").text == principal.id


def test_a_session_is_no_api_key(site: Site):
    client = site.visit()
    site.log_in(client)
    assert client.post("/v1/chat/completions", json={}).status_code == 401


PROXY = {"trusted_proxy_header": "X-Forwarded-User", "trusted_proxies": "10.1.0.0/16,::1", "admins": "root"}


@pytest.mark.parametrize(
    ("peer", "name", "told"),
    [("10.1.2.3", b"eve", "user:eve"), ("::1", b"eve", "user:eve"), ("10.2.2.3", b"eve", None), ("", b"eve", None),
     ("10.1.2.3", b"", None), ("10.1.2.3", b"a b", None), ("10.1.2.3", b"\xff", None)],
)  # fmt: skip
def test_a_user_header_is_believed_from_the_proxy_alone(make, peer: str, name: bytes, told: str | None):
    client = make(**PROXY).visit(peer)
    for header in (b"x-forwarded-user", b"X-FORWARDED-USER"):
        answer = client.get("/", headers=[(header, name), (b"x-forwarded-for", b"10.1.9.9")])
        assert (answer.status_code, answer.text) == (200, told) if told else answer.status_code == 401


def test_two_user_headers_are_nobody_and_admins_are_named(make):
    site = make(**PROXY)
    client = site.visit()
    name = b"x-forwarded-user"
    assert client.get("/", headers=[(name, b"root"), (name, b"eve")]).status_code == 401
    path = "/mlflow/api/2.0/mlflow/registered-models/alias"
    assert client.post(path, headers=[(name, b"eve"), (b"origin", ORIGIN.encode())]).status_code == 403
    assert client.post(path, headers=[(name, b"root"), (b"origin", ORIGIN.encode())]).text == "user:root"


def test_behind_a_proxy_the_client_is_slowed_and_not_the_proxy(make):
    site = make(**PROXY)
    client = site.visit()
    form = {"user": "ada", "password": "wrong"}
    for peer, expected in (("9.9.9.9", 401), ("9.9.9.9", 429), ("8.8.8.8, 9.9.9.9", 429), ("8.8.8.8", 401)):
        for _ in range(5 if expected == 401 else 1):
            answer = client.post("/login", data=form, headers={"origin": ORIGIN, "x-forwarded-for": peer})
        assert answer.status_code == expected, peer


def test_an_address_for_others_needs_a_way_to_log_in(tmp_path: Path):
    load = partial(settings_module.load, home_dir=tmp_path, host="0.0.0.0")
    with pytest.raises(HostRefusedError, match="quire users add"):
        load()
    UserFile(tmp_path, n=2**4).add("ada", PASSWORD, Role.ADMIN)
    assert load().login_required
    assert load().url == "http://127.0.0.1:8501"
    assert load().mlflow_url == "http://127.0.0.1:5001/mlflow"  # which has no login


def test_loopback_asks_for_no_login_unless_told(tmp_path: Path):
    assert not settings_module.load(home_dir=tmp_path).login_required
    assert len(front(settings_module.load(home_dir=tmp_path), None, "")) + 1 == len(
        front(settings_module.load(home_dir=tmp_path, require_login=True), None, "")
    )
