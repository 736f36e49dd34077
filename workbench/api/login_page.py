"""The login page and the logout page: plain HTML, light and dark, without a script and without anything from elsewhere.

Boundary: text. What is shown in it was typed by whoever asks and is escaped here.
"""

from __future__ import annotations

import html

from starlette.responses import HTMLResponse

_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "referrer-policy": "same-origin",  # under no-referrer a form's Origin would be null
    "x-content-type-options": "nosniff",
}
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title} · Quire</title>
<style>
:root {{ --bg: #F5F7F8; --card: #FFFFFF; --text: #1B2127; --muted: #59636E; --line: #DDE2E6; --act: #0B6E7F; --on: #FFFFFF; --bad: #C0292B }}
@media (prefers-color-scheme: dark) {{
  :root {{ --bg: #14171C; --card: #1C2128; --text: #E6E9ED; --muted: #9AA4B0; --line: #323943; --act: #2290A8; --on: #0B0E11; --bad: #F2706E }}
}}
* {{ box-sizing: border-box }}
body {{ margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--bg); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }}
main {{ width: min(24rem, calc(100vw - 2rem)); padding: 2rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px }}
h1 {{ margin: 0 0 1rem; font-size: 1.25rem }}
p {{ margin: 0 0 1rem; color: var(--muted) }}
p.bad {{ color: var(--bad) }}
label {{ display: block; margin: 0 0 1rem; font-size: .875rem }}
input {{ display: block; width: 100%; margin-top: .25rem; padding: .5rem .75rem; font: inherit; color: inherit; background: var(--bg);
  border: 1px solid var(--line); border-radius: 8px }}
button {{ display: block; width: 100%; padding: .5rem .75rem; font: inherit; font-weight: 600; text-align: center;
  color: var(--on); background: var(--act); border: 0; border-radius: 8px; cursor: pointer }}
a {{ color: var(--act) }}
:focus-visible {{ outline: 2px solid var(--act); outline-offset: 2px }}
</style>
<main>
<h1>{title}</h1>
{content}
</main>
</html>
"""


def login_page(
    *, user: str = "", following: str = "/", problem: str = "", password: bool = True,
    status: int = 200, headers: dict[str, str] | None = None,
) -> HTMLResponse:  # fmt: skip
    """The form, or without passwords where to log in instead. `following`: a path of ours, to go to afterwards."""
    parts = [f'<p class="bad" role="alert">{html.escape(problem)}</p>'] if problem else []
    if password:
        at_user, at_password = ("", " autofocus") if user else (" autofocus", "")
        parts.append(
            '<form method="post" action="/login">'
            f'<label>Name<input name="user" autocomplete="username" autocapitalize="none" spellcheck="false" maxlength="128" required '
            f'value="{html.escape(user)}"{at_user}></label>'
            f'<label>Password<input name="password" type="password" autocomplete="current-password" maxlength="1024" required{at_password}></label>'
            f'<input name="next" type="hidden" value="{html.escape(following)}">'
            "<button>Log in</button></form>"
        )
    else:
        parts.append("<p>The proxy in front of this server says who you are: log in there.</p>")
    return _response("Log in", "\n".join(parts), status, headers)


def logout_page(user: str, can: bool) -> HTMLResponse:
    """One button, as a POST; `can`: false where the proxy says who it is."""
    told = f"<p>You are logged in as {html.escape(user)}.</p>"
    if not can:
        return _response("Log out", told + "<p>The proxy in front of this server says so: log out there.</p>")
    form = '<form method="post" action="/logout"><button autofocus>Log out</button></form>'
    return _response("Log out", f'{told}{form}<p></p><a href="/">Back</a>')


def own_path(text: str) -> str:
    """`text` where it is a path of this server, else "/": nobody is sent to another site after the login."""
    is_own = text.startswith("/") and not text.startswith("//") and text.isprintable() and "\\" not in text
    return text if is_own and not text.startswith(("/login", "/logout")) else "/"


def _response(
    title: str, content: str, status: int = 200, headers: dict[str, str] | None = None
) -> HTMLResponse:
    return HTMLResponse(_PAGE.format(title=title, content=content), status, {**_HEADERS, **(headers or {})})
