"""CPU throughput: our engine against transformers' static-batch ``generate``, batched and one stream, in one run.

The bundled model's shape with random weights (speed does not depend on their values; they are rounded to bfloat16 as
checkpoints are): 32 requests of 64 to 256 prompt tokens and 128 output tokens, greedy, end-of-text ignored; and one
such request alone. The peer gets the same prompts as one left-padded batch, the same number of threads, and its better
dtype; the engine runs as the app runs it, with scheduler, streams and records.

Variants are interleaved round by round, so that what else the machine does hits all alike; a figure is the median of its
rounds beside the lowest and highest, a ratio the median of the rounds' own ratios. Ablations turn one thing off:
the prefix cache; the fused step (attention compiled, the rest torch's operations); all that is compiled.

What is left per step outside the forward pass comes from the engine's own step records.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine.build import build_engine, make_attention, resolve_config, torch_dtype
from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
BATCHED_BAR, SINGLE_BAR = 1.5, 1.0
OURS = "engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=None, help="of every variant; default: the cores at hand"
    )
    parser.add_argument("--quick", action="store_true", help="one small round: a check that everything runs")
    parser.add_argument("--no-ablations", action="store_true")


@dataclass(frozen=True)
class Workload:
    """Prompts and how far each is to be continued."""

    prompts: list[list[int]]
    output_tokens: int

    @property
    def total_output_tokens(self) -> int:
        return len(self.prompts) * self.output_tokens


@dataclass
class Variant:
    """One way to continue prompts; the lists grow by one tokens-per-second figure a round."""

    name: str
    generate: Callable[[Workload], list[list[int]]]
    batched: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark, print its tables, return its figures."""
    requests, output_tokens, rounds = options.requests, options.output_tokens, options.rounds
    if options.quick:
        requests, output_tokens, rounds = 4, 8, 1
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder, ExitStack() as opened:
        write_model(Path(folder))
        ours = opened.enter_context(_engine(folder, threads))
        variants = [Variant(OURS, ours.generate), *_peers(folder)]
        if not options.no_ablations:
            variants += _ablations(folder, threads, opened)
        for variant in variants:  # first calls allocate and compile
            variant.generate(make_workload(2, 4, seed=-1))
        for number in range(rounds):
            batched = make_workload(requests, output_tokens, seed=2 * number)
            single = make_workload(1, output_tokens, seed=2 * number + 1)
            for variant in variants:
                variant.batched.append(_tokens_per_s(variant, batched))
                variant.single.append(_tokens_per_s(variant, single))
        figures: dict[str, Any] = {
            "dtype": ours.worker.config.dtype,
            "attention_backend": ours.worker.config.attention_backend,
            "threads": threads,
            "rounds": rounds,
            "requests": requests,
            "output_tokens": output_tokens,
            "tokens_per_s": {
                v.name: {"batched": _spread(v.batched), "single": _spread(v.single)} for v in variants
            },
            "ratio": _ratios(variants),
            "step_shares": {
                "batched": ours.step_shares(make_workload(requests, output_tokens, seed=2 * rounds)),
                "single": ours.step_shares(make_workload(1, output_tokens, seed=2 * rounds + 1)),
            },
        }
    _print_tables(figures)
    return figures


def make_workload(requests: int, output_tokens: int, *, seed: int) -> Workload:
    """Prompts of 64 to 256 random tokens; lengths depend on `requests` alone, tokens on `seed`: no prefix is seen twice."""
    lengths = random.Random(requests)
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(1, SHAPE["vocab_size"]) for _ in range(lengths.randint(64, 256))]
        for _ in range(requests)
    ]
    return Workload(prompts, output_tokens)


def write_model(folder: Path) -> None:
    """A checkpoint of the shape with random weights, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    model.to(torch.bfloat16).save_pretrained(folder)


@dataclass(frozen=True)
class OurEngine:
    """An engine on its worker thread, as the app runs it."""

    worker: EngineWorker

    def generate(self, workload: Workload) -> list[list[int]]:
        params = SamplingParams(max_tokens=workload.output_tokens, temperature=0.0, ignore_eos=True)
        streams = self.worker.submit_all(workload.prompts, [params] * len(workload.prompts))
        return [list(stream.result().token_ids) for stream in streams]

    def step_shares(self, workload: Workload) -> dict[str, float]:
        """Where the time of a run goes, by part of a step; `between` is what no step accounts for."""
        began = time.monotonic_ns()
        self.generate(workload)
        steps = self.worker.records.steps(since_ns=began)
        total_ms = (steps[-1].ended_ns - steps[0].started_ns) / 1e6
        parts = {
            name: sum(getattr(step, f"{name}_ms") for step in steps) / total_ms
            for name in ("schedule", "prepare", "forward", "sample")
        }
        parts["between"] = 1.0 - sum(parts.values())
        return {name: round(share, 4) for name, share in parts.items()} | {
            "steps": len(steps),
            "ms_per_step": round(total_ms / len(steps), 3),
        }


@contextmanager
def _engine(folder: str, threads: int, **settings: Any) -> Iterator[OurEngine]:
    worker = EngineWorker(
        build_engine(EngineConfig(model=folder, device="cpu", num_threads=threads, **settings))
    )
    worker.start()
    try:
        yield OurEngine(worker)
    finally:
        worker.close()


def _peers(folder: str) -> list[Variant]:
    return [Variant(f"transformers {name}", _transformers(folder, name)) for name in ("float32", "bfloat16")]


def _transformers(folder: str, dtype: str) -> Callable[[Workload], list[list[int]]]:
    """Static-batch generation, left-padded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(workload: Workload) -> list[list[int]]:
        longest = max(map(len, workload.prompts))
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in workload.prompts]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in workload.prompts]
        with torch.inference_mode():
            output = model.generate(
                torch.tensor(padded),
                attention_mask=torch.tensor(seen),
                max_new_tokens=workload.output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [row[longest:] for row in output.tolist()]

    return generate


def _ablations(folder: str, threads: int, opened: ExitStack) -> list[Variant]:
    uncached = opened.enter_context(_engine(folder, threads, enable_prefix_cache=False))
    unfused = opened.enter_context(_unfused_engine(folder, threads))
    by_torch = opened.enter_context(_engine(folder, threads, attention_backend="reference"))
    return [
        Variant("engine, no prefix cache", uncached.generate),
        Variant("engine, torch layers", unfused.generate),
        Variant("engine, torch attention too", by_torch.generate),
    ]


@contextmanager
def _unfused_engine(folder: str, threads: int) -> Iterator[OurEngine]:
    """The engine with the backend's attention, but with torch's layers instead of the fused step."""
    config = EngineConfig(model=folder, device="cpu", num_threads=threads)
    model = ModelConfig.from_folder(folder)
    resolved = resolve_config(config, model)
    device, dtype = torch.device(resolved.device), torch_dtype(resolved)
    assert resolved.max_model_len is not None
    decoder = Decoder(model, dtype=dtype, device=device, max_positions=resolved.max_model_len)
    load_weights(decoder, folder)
    kv_spec = make_kv_spec(model, resolved.block_size, dtype)
    runner = ModelRunner(
        decoder,
        make_attention(resolved),
        config=resolved,
        kv_spec=kv_spec,
        eos_token_ids=frozenset(),
        device=device,
        dtype=dtype,
    )
    engine = Engine(resolved, runner, kv_spec=kv_spec, eos_token_ids=frozenset(), vocab_size=model.vocab_size)
    worker = EngineWorker(engine)
    worker.start()
    try:
        yield OurEngine(worker)
    finally:
        worker.close()


def _tokens_per_s(variant: Variant, workload: Workload) -> float:
    began = time.perf_counter()
    outputs = variant.generate(workload)
    elapsed = time.perf_counter() - began
    lengths = [len(output) for output in outputs]
    assert lengths == [workload.output_tokens] * len(workload.prompts), (variant.name, lengths)
    return workload.total_output_tokens / elapsed


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def _ratios(variants: list[Variant]) -> dict[str, Any]:
    """Ours over the peer's better dtype, round by round, and whether the bars are met."""
    ours, peers = variants[0], [v for v in variants if v.name.startswith("transformers")]
    found: dict[str, Any] = {}
    for load, bar in (("batched", BATCHED_BAR), ("single", SINGLE_BAR)):
        best = max(peers, key=lambda peer: median(getattr(peer, load)))
        rounds = [a / b for a, b in zip(getattr(ours, load), getattr(best, load), strict=True)]
        found[load] = {**_spread(rounds), "peer": best.name, "bar": bar, "met": median(rounds) >= bar}
    return found


def _print_tables(figures: dict[str, Any]) -> None:
    print(
        f"{figures['requests']} requests x {figures['output_tokens']} tokens, {figures['rounds']} interleaved rounds, "
        f"{figures['threads']} threads, {figures['dtype']}, attention {figures['attention_backend']}"
    )
    print(
        f"\n{'output tokens/s':30}{'batched':>10}{'low':>8}{'high':>8}{'one stream':>14}{'low':>8}{'high':>8}"
    )
    for name, loads in figures["tokens_per_s"].items():
        cells = [f"{name:30}"]
        for load, width in (("batched", 10), ("single", 14)):
            cells += [
                f"{loads[load][key]:{size}.0f}"
                for key, size in (("median", width), ("lowest", 8), ("highest", 8))
            ]
        print("".join(cells))
    for load, ratio in figures["ratio"].items():
        verdict = "met" if ratio["met"] else "NOT MET"
        print(
            f"\n{load}: {ratio['median']:.2f} x {ratio['peer']} ({ratio['lowest']:.2f} to {ratio['highest']:.2f}); "
            f"bar {ratio['bar']}: {verdict}"
        )
        shares = figures["step_shares"][load]
        parts = ", ".join(
            f"{name} {shares[name]:.1%}" for name in ("forward", "sample", "prepare", "schedule", "between")
        )
        print(f"  {shares['steps']} steps of {shares['ms_per_step']:.2f} ms: {parts}")
