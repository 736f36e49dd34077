"""Settings: what the environment may say, and what is refused by name before any work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workbench import settings as settings_module
from workbench.errors import HomeDirError, HostRefusedError, SettingsError


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("QUIRE_", "MLFLOW_")) or name in ("PORT", "HOME_DIR"):
            monkeypatch.delenv(name)


def test_defaults_serve_the_bundled_model_on_loopback() -> None:
    settings = settings_module.load()
    assert (settings.host, settings.port, settings.mlflow_port) == ("127.0.0.1", 8501, 5001)
    assert settings.home_dir == Path.cwd() / ".quire"
    assert settings.model_path.endswith("data/models/chat-base")


def test_environment_is_read_and_the_command_line_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("HOME_DIR", str(tmp_path))
    monkeypatch.setenv("QUIRE_DTYPE", "float32")
    monkeypatch.setenv("QUIRE_THREADS", "2")
    monkeypatch.setenv("QUIRE_KV_CACHE_DTYPE", "int8")
    monkeypatch.setenv("QUIRE_QUANTIZATION", "int4")
    settings = settings_module.load(port=9002, dtype=None)
    assert (settings.port, settings.home_dir, settings.dtype) == (9002, tmp_path, "float32")
    assert settings.engine_config().num_threads == 2
    assert settings.engine_config().kv_cache_dtype == "int8"
    assert settings.engine_config().quantization == "int4"


def test_children_get_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = settings_module.load(
        port=9003,
        home_dir=tmp_path,
        model="org/name",
        deterministic=True,
        max_model_len=99,
        mlflow_tracking_uri="http://x",
        follow="",
        demo=False,
        request_text="full",
        speculative_config={"method": "ngram", "num_speculative_tokens": 3},
    )
    assert settings.engine_config().speculative_config.num_speculative_tokens == 3
    for name, value in settings.to_env().items():
        monkeypatch.setenv(name, value)
    assert settings_module.load() == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "99999"), ("PORT", "abc"), ("MLFLOW_PORT", "0"), ("QUIRE_DTYPE", "int7"), ("QUIRE_KV_CACHE_DTYPE", "int4"), ("QUIRE_THREADS", "0"),
     ("QUIRE_LOG_LEVEL", "loud"), ("QUIRE_MAX_BODY_BYTES", "1"), ("QUIRE_FOLLOW", "ticket-extractor"),
     ("QUIRE_FOLLOW", "a@b@c"), ("QUIRE_FOLLOW", "a@champion, @x"), ("QUIRE_REQUEST_TEXT", "some"), ("QUIRE_SPECULATIVE_CONFIG", "{"), ("QUIRE_SPECULATIVE_CONFIG", "3"), ("QUIRE_DEMO", "perhaps"),
     ("QUIRE_SPLIT", "tickets=a:0")],
)  # fmt: skip
def test_a_bad_variable_is_named_with_value_limit_and_remedy(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        settings_module.load()
    error = caught.value
    assert (error.param, str(error.value)) == (name, value)
    assert error.limit
    assert error.remedy
    assert f"{name}={value}" in str(error)


def test_followed_aliases_are_a_list_and_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_module.load().follow_refs == ("ticket-extractor@champion",)
    monkeypatch.setenv("QUIRE_FOLLOW", "models:/a@champion, b@candidate")
    assert settings_module.load().follow_refs == ("a@champion", "b@candidate")
    monkeypatch.setenv("QUIRE_FOLLOW", "")
    assert settings_module.load().follow_refs == ()


@pytest.mark.parametrize(("device", "number"), [("auto", "0"), ("cpu", "0"), ("cuda", "0"), ("cuda:3", "3")])
def test_each_gpu_has_a_lock_of_its_own(device: str, number: str) -> None:
    assert settings_module.load(device=device).device_id == number


def test_a_misspelt_variable_is_refused_and_a_foreign_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_PROOF_SEED", "1")
    settings_module.load()
    monkeypatch.setenv("QUIRE_MODLE", "x")
    with pytest.raises(SettingsError, match="QUIRE_MODEL"):
        settings_module.load()


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org", "::"])
def test_a_host_that_others_could_reach_is_refused(host: str) -> None:
    with pytest.raises(HostRefusedError) as caught:
        settings_module.load(host=host)
    assert (caught.value.value, caught.value.param) == (host, "QUIRE_HOST")
    assert "127.0.0.1" in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_loopback_hosts_are_accepted(host: str) -> None:
    assert settings_module.load(host=host).host == host


def test_one_port_for_two_servers_is_refused() -> None:
    with pytest.raises(SettingsError, match="9004"):
        settings_module.load(port=9004, mlflow_port=9004)


def test_a_home_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(HomeDirError) as caught:
        settings_module.prepare_home(settings_module.load(home_dir=file / "home"))
    assert caught.value.param == "HOME_DIR"
    assert str(file) in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(HomeDirError):
        settings_module.prepare_home(settings_module.load(home_dir=tmp_path / "home"))


def test_workbench_imports_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, workbench.app, workbench.cli, workbench.host, workbench.supervisor, workbench.terminal_chat;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
