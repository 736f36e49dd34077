"""A peer in a process of its own: ``python cpu_peer_process.py NAME MODEL THREADS``, work on stdin, answers on stdout.

Each line of input is ``{"prompts": [[token ids]], "output_tokens": n}``; each line of output ``{"seconds": s, "lengths": [n]}``, the first
one ``{"ready": version}``. All requests of a line arrive at once; greedy, end-of-text ignored. Imports nothing of this
project, so that a peer which needs other versions of torch or transformers runs in its own Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

Generate = Callable[[list[list[int]], int], list[int]]  # prompts and output tokens -> output tokens of each
MAX_SEQUENCES = 64
CONTEXT = 1024


def openvino(model: str, threads: int) -> tuple[str, Generate]:
    """OpenVINO GenAI's continuous batching on a GGUF file."""
    import numpy as np
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 1
    scheduler.max_num_seqs = MAX_SEQUENCES
    scheduler.enable_prefix_caching = False
    scheduler.dynamic_split_fuse = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = output_tokens
        config.do_sample = False
        config.ignore_eos = True
        inputs = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(prompts))
        return [len(result.m_generation_ids[0]) for result in results]

    return openvino_genai.__version__, generate


def llama_cpp(model: str, threads: int) -> tuple[str, Generate]:
    """llama.cpp on a GGUF file, all sequences in one batch by its own interface."""
    import llama_cpp
    import numpy as np

    api = llama_cpp
    api.llama_backend_init()
    weights = api.llama_model_load_from_file(model.encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = CONTEXT * MAX_SEQUENCES, 8192, 512
    settings.n_seq_max, settings.n_threads, settings.n_threads_batch = MAX_SEQUENCES, threads, threads
    settings.kv_unified = False
    context = api.llama_init_from_model(weights, settings)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(weights))
    batch = api.llama_batch_init(8192, 0, 1)

    def put(place: int, token: int, position: int, sequence: int, samples: bool) -> None:
        batch.token[place], batch.pos[place] = token, position
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.logits[place] = samples

    def run(count: int) -> None:
        batch.n_tokens = count
        if api.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")

    def best(place: int) -> int:
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, place), shape=(vocab,))
        return int(logits.argmax())

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        last: dict[int, int] = {}
        sampling: dict[int, int] = {}  # of a sequence, the place whose logits are wanted
        place = 0
        for sequence, prompt in enumerate(prompts):
            if place + len(prompt) > 8192:
                run(place)
                last |= {s: best(p) for s, p in sampling.items()}
                place, sampling = 0, {}
            for position, token in enumerate(prompt):
                put(place, token, position, sequence, position == len(prompt) - 1)
                place += 1
            sampling[sequence] = place - 1
        run(place)
        last |= {s: best(p) for s, p in sampling.items()}
        for step in range(output_tokens - 1):
            for sequence, prompt in enumerate(prompts):
                put(sequence, last[sequence], len(prompt) + step, sequence, True)
            run(len(prompts))
            last = {sequence: best(sequence) for sequence in range(len(prompts))}
        return [output_tokens] * len(prompts)

    return llama_cpp.__version__, generate


def vllm(model: str, threads: int) -> tuple[str, Generate]:
    """vLLM on a CPU, on a folder of safetensors, in bfloat16 where the CPU multiplies it, else in float32."""
    os.environ.setdefault(
        "VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    )
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    import vllm

    dtype = "bfloat16" if "avx512_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
    llm = vllm.LLM(
        model, skip_tokenizer_init=True, max_num_seqs=MAX_SEQUENCES, max_model_len=CONTEXT, dtype=dtype,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]

    return f"{vllm.__version__}, {dtype}", generate


PEERS: dict[str, Callable[[str, int], tuple[str, Generate]]] = {
    "openvino": openvino,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
}


def main() -> None:
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    version, generate = PEERS[name](model, threads)
    print(json.dumps({"ready": version}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        lengths = generate(asked["prompts"], asked["output_tokens"])
        print(
            json.dumps({"seconds": time.perf_counter() - began, "lengths": lengths}), file=answers, flush=True
        )


if __name__ == "__main__":
    main()
