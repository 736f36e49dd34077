"""Random LoRA adapters of the tiny model in PEFT's files, and hosts over the real engine in float64."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import EngineConfig
from workbench.host import EngineHost
from workbench.versions.adapter import read_adapter
from workbench.versions.digest import folder_digest
from workbench.versions.merge import merge, merged_digest
from workbench.versions.ref import ResolvedVersion, VersionRef

SIZES = {  # outputs, inputs
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64), "mlp.down_proj": (64, 128),
}  # fmt: skip


def write_adapter(
    folder: Path,
    seed: int,
    *,
    rank: int = 4,
    targets: tuple[str, ...] = tuple(SIZES),
    base_digest: str = "",
    **config: Any,
) -> Path:
    """A and B large enough that no prompt is answered as the base or another seed answers it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(1000 + seed)
    tensors = {}
    for layer in range(2):
        for name in targets:
            size_out, size_in = SIZES[name]
            stem = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{stem}.lora_A.weight"] = (
                generator.standard_normal((rank, size_in)).astype(np.float32) * 0.1
            )
            tensors[f"{stem}.lora_B.weight"] = (
                generator.standard_normal((size_out, rank)).astype(np.float32) * 0.1
            )
    save_file(
        tensors, folder / "adapter_model.safetensors", metadata={"format": "pt", "base_digest": base_digest}
    )
    values = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank, "lora_alpha": 2 * rank,
        "target_modules": sorted({name.split(".")[1] for name in targets}), "bias": "none", **config,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


class Versions:
    """A registry in memory: versions of the name ``t`` are adapters of one base. Merged folders go to `cache`."""

    def __init__(self, base: Path, adapters: dict[int, Path], cache: Path) -> None:
        self.base, self.adapters, self.cache = base, adapters, cache
        self.base_digest = folder_digest(base)
        self.champion = 1

    def __call__(self, ref: str) -> ResolvedVersion:
        what = ref.removeprefix("models:/").removeprefix("t").lstrip("/")
        version = self.champion if what == "@champion" else int(what)
        folder = self.adapters[version]
        adapter = read_adapter(folder)
        digest = merged_digest(self.base_digest, adapter.digest)
        alias = "champion" if "@" in what else None
        return ResolvedVersion(
            VersionRef("t", version, alias, digest, self.base_digest, adapter.digest), self.base, folder,
            lambda: merge(self.base, folder, self.cache / digest),
        )  # fmt: skip


def config(folder: Path, **more: Any) -> EngineConfig:
    values = {
        "dtype": "float64", "device": "cpu", "num_blocks": 256, "num_threads": 1, "max_model_len": 512, "max_num_seqs": 32,
        **more,
    }  # fmt: skip
    return EngineConfig(model=str(folder), **values)


@pytest.fixture(scope="session")
def adapter_folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Eight adapters of different ranks and targets."""
    root, digest = tmp_path_factory.mktemp("lora"), folder_digest(tiny_model)
    some = tuple(name for name in SIZES if "attn" in name)
    return {
        seed: write_adapter(
            root / f"a{seed}",
            seed,
            rank=2 + seed,
            targets=some if seed % 2 else tuple(SIZES),
            base_digest=digest,
        )
        for seed in range(1, 9)
    }


@pytest.fixture
def versions(tiny_model: Path, adapter_folders: dict[int, Path], tmp_path: Path) -> Versions:
    return Versions(tiny_model, dict(adapter_folders), tmp_path / "merged")


@pytest.fixture
def hosted(tiny_model: Path, versions: Versions) -> Iterator[Callable[..., EngineHost]]:
    """Ready hosts whose default model is the tiny one; closed with the test."""
    made: list[EngineHost] = []

    def make(
        *, enable_lora: bool | None = None, on_ready: Any = None, on_closed: Any = None, **settings: Any
    ) -> EngineHost:
        host = EngineHost(
            config(tiny_model, **settings), resolver=versions, enable_lora=enable_lora, on_ready=on_ready,
            on_closed=on_closed,
        )  # fmt: skip
        made.append(host)
        host.start()
        assert host.wait(120).ready, host.state().message
        return host

    yield make
    for host in made:
        host.close()


@pytest.fixture(scope="session")
def eventually() -> Callable[..., bool]:
    def wait(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                return True
            time.sleep(0.02)
        return False

    return wait


@pytest.fixture(scope="session")
def adapter() -> Callable[..., Path]:
    """``adapter(folder, seed, rank=…, targets=…, base_digest=…, **config)``."""
    return write_adapter
