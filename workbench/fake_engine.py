"""An engine without a model, for tests and work on pages: everything but the arithmetic is the true thing."""

from __future__ import annotations

from dataclasses import replace

from engine.config import EngineConfig
from engine.engine import Engine
from engine.fake_runner import FakeRunner, FakeTokenizer, scripted
from engine.plan import KVSpec
from workbench.settings import FAKE_MODEL


def build_fake_engine(
    config: EngineConfig | None,
    *,
    answer: str,
    num_blocks: int,
    max_model_len: int,
    delay_s: float,
    fail_at: dict[int, Exception] | None,
) -> Engine:
    """An engine that answers every request with `answer`, one byte a token; automatic settings get small values."""
    tokenizer = FakeTokenizer()
    config = config or EngineConfig(model=FAKE_MODEL)
    blocks = config.num_blocks or num_blocks
    resolved = replace(
        config,
        num_blocks=blocks,
        max_model_len=config.max_model_len or max_model_len,
        max_batched_tokens=config.max_batched_tokens or 512,
        dtype="float32",
        device="cpu",
        kv_cache_dtype="float32",
        attention_backend="reference",
        num_threads=1,
    )
    kv_spec = KVSpec(1, 1, 1, resolved.block_size, 8)
    runner = FakeRunner(
        blocks, resolved.block_size, num_host_blocks=kv_spec.num_blocks_in(resolved.swap_space_bytes), delay_s=delay_s,
        choose=scripted(answer, tokenizer.EOS), fail_at=fail_at,
    )  # fmt: skip
    return Engine(
        resolved,
        runner,
        kv_spec=kv_spec,
        eos_token_ids=tokenizer.eos_token_ids,
        vocab_size=tokenizer.vocab_size,
        tokenizer=tokenizer,
    )
