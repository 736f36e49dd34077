"""Resident memory that an action adds, in a process of its own: ``resident_growth.py {steps,score} BACKEND DTYPE``.

Prints two numbers of bytes: the growth, and what it is to be compared with.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from engine.build import make_attention, prepare_decoder, resolve_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.llm import LLM
from engine.memory import make_kv_spec, torch_dtype, workspace_bytes
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.runner.model_runner import ModelRunner
from engine.runner.profile_run import largest_steps
from engine.worker import EngineWorker

CPU = torch.device("cpu")
MODEL = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4352,
    }
)  # fmt: skip


def make_runner(backend: str, dtype_name: str, **settings: int) -> tuple[ModelRunner, EngineConfig]:
    """A runner with random weights, and its resolved config."""
    config = EngineConfig(
        model="random", device="cpu", dtype=dtype_name, attention_backend=backend, num_threads=1, **settings
    )
    config = resolve_config(config, MODEL)
    dtype = torch_dtype(config)
    torch.set_num_threads(1)
    decoder = Decoder(MODEL, dtype=dtype, device=CPU, max_positions=config.max_model_len or 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    runner = ModelRunner(
        prepare_decoder(decoder, config), make_attention(config), config=config,
        kv_spec=make_kv_spec(MODEL, config.block_size, dtype), eos_token_ids=frozenset(), device=CPU, dtype=dtype,
    )  # fmt: skip
    for (
        cache
    ) in runner._caches:  # its pages become resident when they are written: now, not in what is measured
        cache.k.fill_(0.0)
        cache.v.fill_(0.0)
    return runner, config


def growth(action: Callable[[], object]) -> int:
    """Bytes by which resident memory at its highest exceeds what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest is now
    before = _status("VmRSS")
    action()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, key
    return 1024 * int(found[1])


def steps(backend: str, dtype_name: str) -> tuple[int, int]:
    """The largest steps, against the estimate of their workspace."""
    runner, config = make_runner(
        backend, dtype_name, num_blocks=256, max_num_seqs=128, max_batched_tokens=1024, max_model_len=2048
    )
    small = EngineConfig(model="m", max_num_seqs=1, max_batched_tokens=4, max_model_len=8)

    def run(of: EngineConfig) -> None:
        for plan in largest_steps(of, MODEL.vocab_size):
            runner.submit(plan)
            runner.collect()

    run(small)  # libraries are loaded, threads started
    runner.reset_rows()
    return growth(lambda: run(config)), workspace_bytes(config, MODEL, torch_dtype(config), CPU)


def score(backend: str, dtype_name: str) -> tuple[int, int]:
    """``LLM.score`` of a text that is one step, against its logits in float32."""
    length = 4096
    runner, config = make_runner(
        backend, dtype_name, num_blocks=280, max_num_seqs=4, max_batched_tokens=length, max_model_len=4352
    )
    engine = Engine(
        config, runner, kv_spec=make_kv_spec(MODEL, config.block_size, torch_dtype(config)),
        eos_token_ids=frozenset(), vocab_size=MODEL.vocab_size,
    )  # fmt: skip
    worker = EngineWorker(engine)
    worker.start()
    llm = LLM.from_worker(worker)
    llm.score([1, 2, 3], use_tqdm=False)
    text = torch.randint(0, MODEL.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    grown = growth(lambda: llm.score(text, use_tqdm=False))
    worker.close()
    return grown, 4 * length * MODEL.vocab_size


if __name__ == "__main__":
    print(*{"steps": steps, "score": score}[sys.argv[1]](*sys.argv[2:]))
