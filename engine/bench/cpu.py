"""CPU throughput: our engine against its peers, batched and one stream, in one run.

The bundled model's shape, or one of 15.7 M parameters, with random weights (speed does not depend on their values; they are
rounded to bfloat16 as checkpoints are): 32 requests of 64 to 256 prompt tokens and 128 output tokens, greedy, end-of-text
ignored; and one such request alone. Peers get the same prompts and the same number of threads: transformers' static-batch
``generate`` (one left-padded batch, its better dtype counts), and those of ``engine.bench.parts.cpu_peers`` that are
installed. The engine runs as the app runs it, with scheduler, streams and records.

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

from engine.bench.parts import cpu_peers
from engine.build import build_engine, make_attention, resolve_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.memory import kv_spec_of, torch_dtype
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.worker import EngineWorker

BUNDLED: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
SHAPES = {
    "bundled": BUNDLED,
    "16m": BUNDLED
    | {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6},
}
TOKENIZER = Path("data/models/chat-base/tokenizer.json")  # GGUF files want one
GGUF_TYPES = {"openvino": ("f16",), "llama.cpp": ("bf16", "q8_0")}
BATCHED_BAR, SINGLE_BAR = 1.5, 1.0
OURS = "engine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=None, help="of every variant; default: the cores at hand"
    )
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="bundled", help="default: the bundled model's"
    )
    parser.add_argument("--no-peers", action="store_true", help="transformers only")
    parser.add_argument("--vllm-python", help="a Python that has vLLM for CPUs")
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
    measure: Callable[[Workload], float]  # seconds
    batched: list[float] = field(default_factory=list)
    single: list[float] = field(default_factory=list)
    is_peer: bool = False


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark, print its tables, return its figures."""
    requests, output_tokens, rounds = options.requests, options.output_tokens, options.rounds
    if options.quick:
        requests, output_tokens, rounds = 4, 8, 1
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    shape = SHAPES[options.shape]

    def workload(requests: int, tokens: int, seed: int) -> Workload:
        return make_workload(requests, tokens, seed=seed, vocab_size=shape["vocab_size"])

    with tempfile.TemporaryDirectory(prefix="quire-bench-") as folder, ExitStack() as opened:
        write_model(Path(folder), shape)
        ours = opened.enter_context(_engine(folder, threads))
        variants = [Variant(OURS, _timed(ours.generate)), *_transformers_variants(folder)]
        absent = (
            {}
            if options.no_peers
            else _start_peers(variants, Path(folder), threads, options.vllm_python, opened)
        )
        if not options.no_ablations:
            variants += _ablations(folder, threads, opened)
        for variant in variants:  # first calls allocate and compile
            variant.measure(workload(2, 4, -1))
        for number in range(rounds):
            batched = workload(requests, output_tokens, 2 * number)
            single = workload(1, output_tokens, 2 * number + 1)
            for variant in variants:
                for load, measured in ((batched, variant.batched), (single, variant.single)):
                    measured.append(load.total_output_tokens / variant.measure(load))
        figures: dict[str, Any] = {
            "shape": options.shape,
            "absent": absent,
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
                "batched": ours.step_shares(workload(requests, output_tokens, 2 * rounds)),
                "single": ours.step_shares(workload(1, output_tokens, 2 * rounds + 1)),
            },
        }
    _print_tables(figures)
    return figures


def make_workload(
    requests: int, output_tokens: int, *, seed: int, vocab_size: int = BUNDLED["vocab_size"]
) -> Workload:
    """Prompts of 64 to 256 random tokens; lengths depend on `requests` alone, tokens on `seed`: no prefix is seen twice."""
    lengths = random.Random(requests)
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(1, vocab_size) for _ in range(lengths.randint(64, 256))] for _ in range(requests)
    ]
    return Workload(prompts, output_tokens)


def write_model(folder: Path, shape: dict[str, Any] = BUNDLED) -> None:
    """A checkpoint of the shape with random weights, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape))
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


def _timed(generate: Callable[[Workload], list[list[int]]]) -> Callable[[Workload], float]:
    """Seconds of a call, whose answers must have the length that was asked for."""

    def measure(workload: Workload) -> float:
        began = time.perf_counter()
        outputs = generate(workload)
        elapsed = time.perf_counter() - began
        _check_lengths(workload, [len(output) for output in outputs])
        return elapsed

    return measure


def _check_lengths(workload: Workload, lengths: list[int]) -> None:
    assert lengths == [workload.output_tokens] * len(workload.prompts), lengths


def _transformers_variants(folder: str) -> list[Variant]:
    return [
        Variant(f"transformers {name}", _timed(_transformers(folder, name)), is_peer=True)
        for name in ("float32", "bfloat16")
    ]


def _start_peers(
    variants: list[Variant], folder: Path, threads: int, vllm_python: str | None, opened: ExitStack
) -> dict[str, str]:
    """Add a variant for each peer that runs here; why the others do not."""
    absent: dict[str, str] = {}
    for name, kinds in {**GGUF_TYPES, "vllm": ("",)}.items():
        python = vllm_python if name == "vllm" else None
        reason = cpu_peers.missing(name, python)
        for kind in kinds if reason is None else ():
            model = folder
            if name != "vllm":
                model = folder / f"{kind}.gguf"
                cpu_peers.write_gguf(folder, model, kind, TOKENIZER)
            try:
                peer = opened.enter_context(cpu_peers.running(name, model, threads, python))
            except RuntimeError as error:
                reason = str(error)
                break
            variants.append(
                Variant(f"{name} {kind}".strip() + f" ({peer.version})", _ask(peer), is_peer=True)
            )
        if reason is not None:
            absent[name] = reason
            print(f"{name}: absent, {reason}")
    return absent


def _ask(peer: cpu_peers.Peer) -> Callable[[Workload], float]:
    def measure(workload: Workload) -> float:
        seconds, lengths = peer.generate(workload.prompts, workload.output_tokens)
        _check_lengths(workload, lengths)
        return seconds

    return measure


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
        Variant("engine, no prefix cache", _timed(uncached.generate)),
        Variant("engine, torch layers", _timed(unfused.generate)),
        Variant("engine, torch attention too", _timed(by_torch.generate)),
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
    kv_spec = kv_spec_of(resolved, model)
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


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 2),
        "lowest": round(min(values), 2),
        "highest": round(max(values), 2),
    }


def _ratios(variants: list[Variant]) -> dict[str, Any]:
    """Ours over each peer, round by round; the bars are for transformers' better dtype."""
    ours, peers = variants[0], [v for v in variants if v.is_peer]
    found: dict[str, Any] = {}
    for load, bar in (("batched", BATCHED_BAR), ("single", SINGLE_BAR)):
        rounds = {
            p.name: [a / b for a, b in zip(getattr(ours, load), getattr(p, load), strict=True)] for p in peers
        }
        static = min(
            (name for name in rounds if name.startswith("transformers")), key=lambda n: median(rounds[n])
        )
        found[load] = {
            **_spread(rounds[static]), "peer": static, "bar": bar, "met": median(rounds[static]) >= bar,
            "each": {name: _spread(values) for name, values in rounds.items()},
        }  # fmt: skip
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
        for name, each in ratio["each"].items():
            print(f"  {each['median']:.2f} x {name} ({each['lowest']:.2f} to {each['highest']:.2f})")
        shares = figures["step_shares"][load]
        parts = ", ".join(
            f"{name} {shares[name]:.1%}" for name in ("forward", "sample", "prepare", "schedule", "between")
        )
        print(f"  {shares['steps']} steps of {shares['ms_per_step']:.2f} ms: {parts}")
