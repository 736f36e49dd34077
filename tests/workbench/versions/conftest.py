"""A registry of its own for every test (a real MLflow SQLite store, made once and copied), and tiny adapters of a tiny model."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from workbench.settings import Settings
from workbench.versions.finetune import LoraConfig, finetune
from workbench.versions.registry import Registry
from workbench.versions.training_data import JsonlData

NAME = "extractor"
LINES = [
    {"messages": [{"role": "user", "content": f"repeat {word}"}], "expected": word}
    for word in ("cat", "dog", "tree", "house", "small", "large", "over", "under")
]


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A HOME_DIR with a new MLflow database: making one takes seconds."""
    from workbench import tracking

    home = tmp_path_factory.mktemp("empty") / "home"
    settings = settings_of(home)
    for name in tracking.EXPERIMENTS:
        tracking.experiment(settings, name)
    return home


@pytest.fixture(scope="session")
def filled_home(
    empty_home: Path,
    tiny_model: Path,
    make_adapter: Callable[[int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The same with three versions of one name, no alias set."""
    home = tmp_path_factory.mktemp("filled") / "home"
    shutil.copytree(empty_home, home)
    registry = Registry(settings_of(home))
    for seed in (1, 2, 3):
        registry.register(
            NAME, base=tiny_model, adapter=make_adapter(seed), metrics={"exact_match": seed / 10}
        )
    return home


def settings_of(home: Path) -> Settings:
    """Settings of a HOME_DIR whose registry no server serves."""
    (home / "mlflow").mkdir(parents=True, exist_ok=True)
    return Settings(home_dir=home, mlflow_tracking_uri=f"sqlite:///{home / 'mlflow' / 'mlflow.db'}")


@pytest.fixture
def settings(empty_home: Path, tmp_path: Path) -> Iterator[Settings]:
    """A HOME_DIR of the test's own with an empty registry."""
    shutil.copytree(empty_home, tmp_path / "home")
    settings = settings_of(tmp_path / "home")
    yield settings
    _close(str(settings.mlflow_tracking_uri))


@pytest.fixture
def three(filled_home: Path, settings: Settings) -> Registry:
    """A registry with three versions of one name."""
    shutil.rmtree(settings.home_dir)
    shutil.copytree(filled_home, settings.home_dir)
    return Registry(settings)


def _close(uri: str) -> None:
    """Ends the store's pooled connections: left to the collector, each would warn in some later test."""
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as RegistryStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as TrackingStore

    for store in (RegistryStore, TrackingStore):
        for engines in (
            getattr(store, name, None) for name in ("_engine_map", "_db_uri_sql_alchemy_engine_map")
        ):
            if isinstance(engines, dict) and uri in engines:
                engines[uri].dispose()


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(settings)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> JsonlData:
    path = tmp_path_factory.mktemp("data") / "repeat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return JsonlData(path)


@pytest.fixture(scope="session")
def config(tiny_model: Path, data: JsonlData, tmp_path_factory: pytest.TempPathFactory) -> LoraConfig:
    """A fine-tune that takes a fraction of a second."""
    return LoraConfig(
        base=tiny_model, out=tmp_path_factory.mktemp("run"), data=data, rank=4, alpha=8.0, steps=6, batch_tokens=64,
        warmup_steps=1, peak_lr=1e-2, dtype="float32", device="cpu",
    )  # fmt: skip


@pytest.fixture(scope="session")
def make_adapter(config: LoraConfig, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The adapter of a seed; the same folder each time."""
    root = tmp_path_factory.mktemp("adapters")

    def make(seed: int) -> Path:
        adapter = finetune(replace(config, out=root / f"seed-{seed}", seed=seed))
        assert adapter is not None
        return adapter

    return make


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """Within it, writing a file beyond so many bytes fails, as on a full disk."""

    @contextmanager
    def limited(max_bytes: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited
