"""Login and logout in a real browser, against the product's own process."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from workbench.access.users import Role, UserFile

PASSWORD = "four random words"

pytestmark = pytest.mark.full


def log_in(page, user: str) -> None:
    page.get_by_label("Name").fill(user)
    page.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")


def test_login_page_rights_and_logout(start_app, visit, tmp_path, screenshots):
    users = UserFile(tmp_path / "home", n=2**4)
    users.add("ada", PASSWORD, Role.ADMIN)
    users.add("vic", PASSWORD, Role.VIEWER)
    with start_app(HOME_DIR=str(tmp_path / "home"), QUIRE_REQUIRE_LOGIN="true", QUIRE_FAKE="true") as url:
        for scheme in ("light", "dark"):
            page = visit(url, scheme).open("/runs")
            expect(page.get_by_label("Name")).to_be_focused()
            page.screenshot(path=screenshots / f"login-{scheme}.png")

        admin = visit(url)
        page = admin.open("/benchmark")
        log_in(page, "ada")
        expect(page).to_have_url(f"{url}/benchmark")
        expect(page.get_by_text("ada · Log out")).to_be_visible()
        expect(page.get_by_role("button", name="Run the benchmark")).to_be_enabled()

        viewer = visit(url).open("/benchmark")
        log_in(viewer, "vic")
        expect(viewer.get_by_text("vic · Log out")).to_be_visible()
        expect(viewer.get_by_role("button", name="Run the benchmark")).to_be_disabled()
        viewer.screenshot(path=screenshots / "viewer.png")

        closed = []
        other = admin.context.new_page()
        other.on("websocket", lambda socket: socket.on("close", lambda: closed.append(socket.url)))
        other.goto(f"{url}/runs")
        expect(other.get_by_text("ada · Log out")).to_be_visible()
        page.get_by_role("link", name="Log out").click()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Name")).to_be_visible()
        other.wait_for_timeout(3000)  # the session is looked at once a second
        assert any("/_stcore/stream" in each for each in closed)
        other.goto(f"{url}/runs")
        expect(other.get_by_label("Name")).to_be_visible()
        expect(viewer.get_by_text("vic · Log out")).to_be_visible()  # another's session is another's
