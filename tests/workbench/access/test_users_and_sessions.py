"""Users, sessions and the throttle, without a server."""

from __future__ import annotations

import io
import json
import stat
from pathlib import Path

import pytest

from workbench.access.sessions import Sessions
from workbench.access.throttle import LoginThrottle
from workbench.access.users import Role, UnknownUserError, UserError, UserFile, UserFileError
from workbench.store import open_store

CHEAP = 2**4  # scrypt's cost in tests: the arithmetic is the same
PASSWORD = "four random words"


@pytest.fixture
def users(tmp_path: Path) -> UserFile:
    return UserFile(tmp_path, n=CHEAP)


def test_a_user_is_known_by_the_right_password_alone(users: UserFile):
    users.add("ada", PASSWORD, Role.ADMIN)
    found = users.verify("ada", PASSWORD)
    assert (found.name, found.role) == ("ada", Role.ADMIN)
    assert users.verify("ada", PASSWORD + " ") is None
    assert users.verify("ada", "") is None
    assert users.verify("Ada", PASSWORD) is None
    assert users.verify("nobody", PASSWORD) is None


def test_the_file_is_its_owners_alone_and_holds_no_password(users: UserFile):
    users.add("ada", PASSWORD, Role.USER)
    users.add("bob", PASSWORD, Role.VIEWER)
    assert stat.S_IMODE(users.path.stat().st_mode) == 0o600
    assert PASSWORD not in users.path.read_text()
    stored = json.loads(users.path.read_text())["users"]
    assert stored["ada"]["password"]["digest"] != stored["bob"]["password"]["digest"]  # salted
    assert [path for path in users.path.parent.iterdir() if path.name.startswith(".users-")] == []


def test_another_process_sees_changes_and_a_new_password_has_a_new_stamp(users: UserFile, tmp_path: Path):
    first = users.add("ada", PASSWORD, Role.USER)
    other = UserFile(tmp_path, n=CHEAP)
    assert other.find("ada") == first
    users.set_password("ada", "another long one")
    other._looked = float("-inf")  # a second later
    assert other.find("ada").stamp != first.stamp
    users.remove("ada")
    other._looked = float("-inf")
    assert other.find("ada") is None
    assert users.list() == []


@pytest.mark.parametrize("name", ["", "a b", "../ada", "a\n", "ä", "-a", "x" * 129])
def test_a_name_that_could_be_misread_is_refused(users: UserFile, name: str):
    with pytest.raises(UserError, match="user name"):
        users.add(name, PASSWORD, Role.USER)


def test_bad_input_is_refused_by_name(users: UserFile):
    users.add("ada", PASSWORD, Role.USER)
    with pytest.raises(UserError, match="exists"):
        users.add("ada", PASSWORD, Role.USER)
    with pytest.raises(UserError, match="9 characters") as caught:
        users.add("bob", "too short", Role.USER)
    assert "too short" not in str(caught.value)
    with pytest.raises(UnknownUserError, match="bob"):
        users.remove("bob")


def test_a_broken_file_lets_nobody_in_and_is_not_overwritten(users: UserFile):
    users.path.write_text("{")
    assert users.find("ada") is None
    with pytest.raises(UserFileError, match="cannot be read"):
        users.add("ada", PASSWORD, Role.USER)
    assert users.path.read_text() == "{"


def test_a_session_outlives_a_restart_and_ends_for_good(tmp_path: Path):
    with open_store(tmp_path) as store:
        sessions = Sessions(store)
        kept, ended = (sessions.begin("ada", "s1", 60) for _ in range(2))
        late = sessions.begin("ada", "s1", -1)
        assert sessions.get(kept).user == "ada"
        assert sessions.get(late) is None
        sessions.end(ended)
        again = Sessions(store)
        assert again.get(kept) == sessions.get(kept)
        assert again.get(ended) is None
        assert again.get(kept[:-1]) is None
    assert kept.encode() not in (tmp_path / "quire.db").read_bytes() + b"".join(
        path.read_bytes() for path in tmp_path.glob("quire.db-*")
    )


def test_a_guesser_is_slowed_and_nobody_else():
    now = [0.0]
    throttle = LoginThrottle(lambda: now[0])
    throttle.tried("ada", "10.0.0.9")
    throttle.succeeded("ada", "10.0.0.9")
    for _ in range(5):
        assert throttle.wait_s("ada", "10.0.0.1") == 0
        throttle.tried("ada", "10.0.0.1")
    assert throttle.wait_s("ada", "10.0.0.1") == 1
    assert throttle.wait_s("ada", "10.0.0.2") == 0
    assert throttle.wait_s("bob", "10.0.0.1") == 0
    for place in range(100):  # from everywhere, at everybody
        throttle.tried("ada", f"10.0.1.{place}")
        throttle.tried(f"user{place}", "10.0.0.1")
    assert throttle.wait_s("carol", "10.0.0.1") == 60
    assert throttle.wait_s("ada", "10.0.0.9") == 0  # has logged in from there
    assert 0 < throttle.wait_s("ada", "10.0.0.3") <= 2
    now[0] = 1000
    assert throttle.wait_s("carol", "10.0.0.1") == 0


def test_an_ipv6_host_is_one_peer_whatever_address_it_takes():
    throttle = LoginThrottle(lambda: 0.0)
    for place in range(20):
        throttle.tried("ada", f"2001:db8::{place:x}")
    assert throttle.wait_s("bob", "2001:db8::ffff") > 0
    assert throttle.wait_s("bob", "2001:db8:0:1::1") == 0


def test_the_command_line_adds_lists_and_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from workbench import cli

    monkeypatch.setenv("HOME_DIR", str(tmp_path))
    monkeypatch.setenv("QUIRE_HOST", "0.0.0.0")  # which the first user makes possible

    def run(*arguments: str, password: str = "") -> tuple[int, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{password}\n"))
        code = cli.main(["users", *arguments])
        told = capsys.readouterr()
        assert password not in (told.out + told.err) or not password
        return code, told.out + told.err

    assert run("add", "ada", "--admin", password="short")[0] == 2
    assert run("add", "ada", "--admin", password=PASSWORD) == (0, "ada (admin) may log in.\n")
    assert UserFile(tmp_path).verify("ada", PASSWORD).role is Role.ADMIN  # at the cost that is for use
    assert run("list")[1].startswith("ada  admin  ")
    assert run("remove", "bob")[0] == 2
    assert run("remove", "ada")[0] == 0
    assert run("list") == (0, "No users.\n")
