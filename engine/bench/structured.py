"""What grammars cost: 64 requests whose outputs follow one over the same requests without, on the same engine, in alternation.

The grammar is a list of JSON records that never ends, so that both sides give as many tokens; every row is at another place in
it. The vocabulary has as many tokens as the model's: bytes, and made-up words.

Engines: one on a FakeRunner whose steps take as long as a GPU's, where masks are filled while the device works, and the device's
own: of Qwen3-8B's shape on a GPU; on a CPU, where nothing overlaps, of Qwen3-0.6B's and of the bundled model's, whose steps are
so short that masks are a larger part of them than of any model that people serve. A cost is the median of the rounds' own: each
is a run with the grammar over the run without that came just before it, less one.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from engine.bench.cpu import BUNDLED
from engine.bench.parts.random_engine import random_engine
from engine.bench.parts.report import Bar, print_table
from engine.bench.parts.session import CPU_BUDGET_S, Session, add_arguments, open_session
from engine.bench.parts.shapes import QWEN3_8B, QWEN3_600M, TINY, Shape
from engine.bench.parts.throughput import warm_up
from engine.bench.parts.workload import Workload, equal_requests, run_workload
from engine.config import EngineConfig
from engine.device_limits import measure_limits
from engine.engine import Engine
from engine.fake_runner import FakeRunner
from engine.fake_tokenizer import FakeTokenizer
from engine.grammar import GrammarCompiler
from engine.plan import KVSpec
from engine.structured_outputs import StructuredOutputsParams

__all__ = ["add_arguments", "measure", "run"]

BAR = Bar("structured, throughput that a grammar costs", 0.03, 0.01, is_lower_better=True)
FAKE_STEP_S = 0.008
BUNDLED_SHAPE = Shape("bundled", BUNDLED | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"})
EOS = frozenset({FakeTokenizer.EOS})
RECORDS = StructuredOutputsParams(
    grammar="""root ::= "[" record
record ::= "{\\"name\\": \\"" [a-zA-Z ]* "\\", \\"age\\": " [0-9]+ ", \\"tags\\": [" tag ("," tag)* "]}, " record
tag ::= "\\"" [a-z]+ "\\""
"""
)


class Words(FakeTokenizer):
    """A vocabulary of `size` tokens: FakeTokenizer's, and words of two to nine letters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        draw = random.Random(0)
        self._words = [
            "".join(draw.choices("etaoinshrdlucmfwypvbgkjqxz ", k=draw.randint(2, 9))).encode()
            for _ in range(size - self.vocab_size)
        ]
        self._first = self.vocab_size
        self.vocab_size = size

    def token_bytes(self, token_id: int) -> bytes:
        return (
            self._words[token_id - self._first] if token_id >= self._first else super().token_bytes(token_id)
        )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Also without a GPU, on the CPU's own engine."""
    if options.tiny or torch.cuda.is_available():
        return measure(open_session(options), options)
    device, ends_at = torch.device("cpu"), time.monotonic() + options.seconds
    limits = measure_limits(device, torch.float32, budget_s=CPU_BUDGET_S)
    return measure(Session(device, limits, False, ends_at), options)


def measure(session: Session, options: argparse.Namespace) -> dict[str, Any]:
    """Measure in an open session; prints a table, returns figures.

    Raises:
        OutOfTime: the session's budget ended.
    """
    rounds = 2 if session.is_tiny else 7
    rows = [_measure_fake(session, rounds)]
    if session.is_tiny:
        rows.append(_measure_model(session, TINY, rounds))
    elif session.device.type == "cuda":
        rows.append(_measure_model(session, QWEN3_8B, rounds))
    else:
        rows += [_measure_model(session, BUNDLED_SHAPE, rounds), _measure_model(session, QWEN3_600M, 3)]
    print_table("64 rows that follow a grammar, beside the same without", rows)
    return {
        **session.figures(), "engines": rows,
        "verdicts": [BAR.judge(row["cost"], is_tiny=session.is_tiny) for row in rows],
    }  # fmt: skip


def _workload(
    session: Session, vocab_size: int, prompt_tokens: int = 16, output_tokens: int = 128
) -> Workload:
    requests, output_tokens = (4, 8) if session.is_tiny else (64, output_tokens)
    equal = equal_requests("records", requests, prompt_tokens, output_tokens, vocab_size)
    return replace(equal, temperature=1.0)


def _measure_fake(session: Session, rounds: int) -> dict[str, Any]:
    vocab_size, step_s = (512, 0.0) if session.is_tiny else (QWEN3_8B.model.vocab_size, FAKE_STEP_S)
    workload = _workload(session, vocab_size)
    num_blocks = len(workload.prompts) * (workload.max_model_len // 16 + 1)
    runner = FakeRunner(num_blocks, vocab_size=vocab_size, delay_s=step_s, verify=False)
    config = EngineConfig(
        model="fake", num_blocks=num_blocks, max_batched_tokens=4096, max_num_seqs=len(workload.prompts),
        max_model_len=workload.max_model_len, enable_prefix_cache=False,
    )  # fmt: skip
    engine = Engine(config, runner, kv_spec=KVSpec(1, 1, 16, 16, 2), eos_token_ids=EOS, vocab_size=vocab_size)
    try:
        return {"engine": f"FakeRunner, {step_s * 1e3:g} ms a step"} | _compare(
            session, engine, workload, vocab_size, rounds
        )
    finally:
        engine.close()


def _measure_model(session: Session, shape: Shape, rounds: int) -> dict[str, Any]:
    is_slow = shape is QWEN3_600M  # on a CPU: a prompt would take as long as many steps
    workload = _workload(session, shape.model.vocab_size, *((1, 24) if is_slow else (16, 128)))
    settings: dict[str, Any] = {
        "max_num_seqs": len(workload.prompts),
        "max_model_len": workload.max_model_len,
    }
    if session.device.type == "cpu" and not session.is_tiny:
        settings |= {"dtype": "auto", "attention_backend": "auto", "num_threads": None}
    with random_engine(shape, session.device, enable_prefix_cache=False, **settings) as engine:
        warm_up(engine, workload)
        return {"engine": f"{shape.name} on {session.device.type}"} | _compare(
            session, engine, workload, shape.model.vocab_size, rounds
        )


def _compare(
    session: Session, engine: Engine, workload: Workload, vocab_size: int, rounds: int
) -> dict[str, Any]:
    """Seconds without and with, in alternation; the engine's grammars are of a vocabulary of its size."""
    engine.grammars = GrammarCompiler(
        Words(vocab_size), vocab_size=vocab_size, eos_token_ids=EOS, max_seconds=120.0
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(-1, rounds):  # the first one warms up
        for follows in (False, True):
            ran = run_workload(
                engine, workload, ends_at=session.ends_at, structured=RECORDS if follows else None
            )
            if number >= 0:
                seconds[follows].append(ran.seconds)
    costs = [b / a - 1.0 for a, b in zip(seconds[False], seconds[True], strict=True)]
    return {
        "vocabulary": vocab_size, "seconds": median(seconds[False]), "with_grammar": median(seconds[True]),
        "cost": median(costs), "lowest": min(costs), "highest": max(costs), "rounds": rounds,
    }  # fmt: skip
