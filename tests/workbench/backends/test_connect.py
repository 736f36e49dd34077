"""connect(): attaches to the running app, owns the device where there is none, and never loads a second copy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import workbench
from engine.errors import ConfigError
from engine.sampling_params import SamplingParams
from workbench.backends.local import LocalBackend
from workbench.connect import AppSettingsError, connect
from workbench.device_lock import DeviceBusyError, DeviceLock
from workbench.run_state import RunState

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)
ASK = """
import json, sys, workbench
from engine.sampling_params import SamplingParams
with workbench.connect() as backend:
    done = backend.generate("the cat reads", SamplingParams(max_tokens=8, temperature=0.0))[0]
    print(json.dumps({"name": backend.name, "models": backend.models(), "ids": done.token_ids,
                      "torch": "torch" in sys.modules}))
"""


@pytest.mark.full
def test_a_second_process_attaches_to_the_app_and_loads_nothing(app: Any, child_environment: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=child_environment(app.home), capture_output=True, text=True, timeout=120,
        cwd=app.home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    running = RunState(app.home / "run").read()
    assert running is not None
    assert found["name"] == f"app {running.url}"
    assert found["models"] == ["tiny-llama"], "one model is resident"
    assert found["torch"] is False, "the second process has no engine of its own"


def test_without_an_app_the_caller_owns_the_device(home: Path) -> None:
    with workbench.connect(home) as backend:
        assert backend.name == "local"
        with pytest.raises(DeviceBusyError):
            DeviceLock(home / "run").acquire()
        (done,) = backend.generate("the cat reads", GREEDY)
        assert len(done.token_ids) == 8
    with DeviceLock(home / "run"):  # given back
        pass


def test_local_and_app_give_the_same_tokens(app: Any, home: Path) -> None:
    with connect(app.home) as there, connect(home) as here:
        assert type(there) is not type(here)
        prompts = ["the cat reads", "a large house under", [5, 6, 7]]
        params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
        for a, b in zip(there.generate(prompts, params), here.generate(prompts, params), strict=True):
            assert a.token_ids == b.token_ids
            assert a.prompt_token_ids == b.prompt_token_ids
            assert [p.top_ids for p in a.logprobs] == [p.top_ids for p in b.logprobs]


def test_a_busy_device_is_a_typed_error_that_names_the_owner(home: Path, child_environment: Any) -> None:
    (home / "run").mkdir(parents=True)
    code = "import sys, pathlib; from workbench.device_lock import DeviceLock; DeviceLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(home / "run")], env=child_environment(home), stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    ) as owner:  # fmt: skip
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(DeviceBusyError) as caught:
            connect(home)
        assert caught.value.pid == owner.pid
        assert owner.stdin is not None
        owner.stdin.close()
        owner.wait(10)
    with connect(home) as backend:  # the kernel gave it back
        assert backend.models() == ["tiny-llama"]


def test_engine_settings_belong_to_the_owner(app: Any, home: Path) -> None:
    with pytest.raises(AppSettingsError, match="max_num_seqs"):
        connect(app.home, max_num_seqs=4)
    with pytest.raises(ConfigError, match="blok_size"):
        connect(home, blok_size=16)
    with DeviceLock(home / "run") if (home / "run").exists() else connect(home):
        pass


def test_a_failed_load_gives_the_device_back(home: Path, tmp_path: Path) -> None:
    from engine.errors import ModelLoadError

    with pytest.raises(ModelLoadError):
        connect(home, model=str(tmp_path / "nothing-here"))
    with DeviceLock(home / "run"):
        pass


def test_the_package_s_connect_can_be_called_however_it_was_imported(home: Path) -> None:
    import importlib

    import workbench.connect as by_module

    assert importlib.import_module("workbench.connect") is by_module
    with workbench.connect(home) as one:
        assert isinstance(one, LocalBackend)


def test_importing_it_brings_no_torch() -> None:
    code = "import workbench, workbench.connect, workbench.backends.local, workbench.backends.app, workbench.jobs, sys; assert callable(workbench.connect); print([m for m in ('torch', 'mlflow', 'streamlit') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_app_that_is_killed_leaves_the_device_free(
    start_app: Callable[..., Any], tmp_path: Path, home: Path
) -> None:
    running = start_app(tmp_path / "killed", QUIRE_FAKE="1")
    with connect(running.home) as backend:
        assert backend.name.startswith("app ")
    running.process.kill()
    running.process.wait(10)
    with connect(running.home) as backend:
        assert backend.name == "local"
