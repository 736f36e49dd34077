"""One peer in a process of its own: reads a job as JSON from its input, ends with {output_tokens, seconds} as one line.

Time counts from a warm engine: models are made, and kernels compiled or captured by a first short call, before the clock starts.
A peer that would take longer than the job allows is ended early where it can be, and counts what it has made until then.

Boundary: peers as their documentation tells to use them, with random weights; no engine of ours.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATIC, COMPILED = "transformers static", "transformers static, compiled"
CONTINUOUS, VLLM = "transformers continuous", "vllm"
SHARE = 0.5  # of the job's seconds for the timed part; the rest is for imports, weights and the warm-up


@dataclass(frozen=True)
class Job:
    """What `engine.bench.parts.peers` asks for."""

    peer: str
    shape: dict[str, Any]
    device: str
    dtype: str
    prompts: list[list[int]]
    output_tokens: list[int]
    seconds: float


def main() -> None:
    job = Job(**json.load(sys.stdin))
    tokens, seconds = PEERS[job.peer](job)
    print(json.dumps({"output_tokens": tokens, "seconds": seconds}))


def transformers_static(job: Job, *, compiled: bool = False) -> tuple[int, float]:
    """One left-padded batch through ``generate``; (output tokens that were asked for, seconds).

    `compiled`: with a static cache, for which ``generate`` compiles the forward pass on a GPU.
    """
    import torch

    model = _transformers_model(job)
    longest = max(map(len, job.prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in job.prompts], device=job.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in job.prompts], device=job.device)
    extra = {"cache_implementation": "static"} if compiled else {}

    def generate(num_tokens: int, max_time: float | None) -> int:
        with torch.inference_mode():
            output = model.generate(
                padded, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0,
                max_time=max_time, **extra,
            )  # fmt: skip
        return int(output.shape[1]) - longest

    # A static cache is as long as the request, and its compiled form is for that length: its warm-up is the whole request.
    most = max(job.output_tokens)
    generate(most if compiled else min(4, most), None)
    began = time.perf_counter()
    made = generate(most, SHARE * job.seconds)
    seconds = time.perf_counter() - began
    return sum(min(made, asked) for asked in job.output_tokens), seconds


def transformers_compiled(job: Job) -> tuple[int, float]:
    return transformers_static(job, compiled=True)


def transformers_continuous(job: Job) -> tuple[int, float]:
    """transformers' own continuous batching, each request with its own number of tokens."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max(job.output_tokens), do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model = _transformers_model(job)
    with model.continuous_batching_context_manager(
        generation_config=config, block=True, timeout=5
    ) as manager:
        _collect(manager, job.prompts[:1], [2], job.seconds)
        began = time.perf_counter()
        tokens = _collect(manager, job.prompts, job.output_tokens, SHARE * job.seconds)
        return tokens, time.perf_counter() - began


def _collect(manager: Any, prompts: list[list[int]], output_tokens: list[int], seconds: float) -> int:
    """Tokens of the requests that ended within the time."""
    ends_at = time.monotonic() + seconds
    for prompt, count in zip(prompts, output_tokens, strict=True):
        manager.add_request(prompt, max_new_tokens=count)
    tokens = ended = 0
    while ended < len(prompts) and time.monotonic() < ends_at:
        result = manager.get_result(timeout=1)
        if result is not None and result.is_finished():
            assert result.error is None, result.error
            tokens += len(result.generated_tokens)
            ended += 1
    return tokens


def vllm_offline(job: Job) -> tuple[int, float]:
    """vLLM's offline engine with dummy weights and its own defaults."""
    vllm = importlib.import_module("vllm")

    def params(count: int) -> Any:
        return vllm.SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True, detokenize=False)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(job.shape), encoding="utf-8")
        longest = max(len(p) + n for p, n in zip(job.prompts, job.output_tokens, strict=True))
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=job.dtype,
            max_model_len=longest,
        )
        llm.generate([{"prompt_token_ids": job.prompts[0][::-1]}], [params(4)], use_tqdm=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in job.prompts]
        began = time.perf_counter()
        answers = llm.generate(prompts, [params(n) for n in job.output_tokens], use_tqdm=False)
        seconds = time.perf_counter() - began
    return sum(len(answer.outputs[0].token_ids) for answer in answers), seconds


def _transformers_model(job: Job) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in job.shape.items() if key != "model_type"}
    config = AutoConfig.for_model(job.shape["model_type"], **values)
    config.eos_token_id = None
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, job.dtype))
    return model.eval()


PEERS: dict[str, Callable[[Job], tuple[int, float]]] = {
    STATIC: transformers_static,
    COMPILED: transformers_compiled,
    CONTINUOUS: transformers_continuous,
    VLLM: vllm_offline,
}

if __name__ == "__main__":
    main()
