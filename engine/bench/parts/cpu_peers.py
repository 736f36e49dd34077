"""Peers on a CPU: OpenVINO GenAI, llama.cpp and vLLM, each in a process of its own, on the same weights and prompts.

They are optional (`pip install 'quire[peers]'`; vLLM pins torch and transformers, so it gets a Python of its own): one that
is not there is named with the reason. OpenVINO GenAI and llama.cpp read GGUF, vLLM the checkpoint's folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

PROCESS = Path(__file__).with_name("cpu_peer_process.py")
MODULES = {"openvino": "openvino_genai", "llama.cpp": "llama_cpp"}
TYPES = {"f16": 1, "bf16": 32, "q8_0": 7}  # GGUF's numbers of a file's type


class Peer:
    """A running peer."""

    def __init__(self, process: subprocess.Popen[str], log: IO[str]) -> None:
        self._process, self._log = process, log
        self.version = str(self._answer()["ready"])

    def generate(self, prompts: list[list[int]], output_tokens: int) -> tuple[float, list[int]]:
        """Seconds for all prompts, as the peer's process measured them, and the output tokens of each."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"prompts": prompts, "output_tokens": output_tokens}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        return float(answer["seconds"]), [int(n) for n in answer["lengths"]]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(10)
            self._log.seek(0)
            raise RuntimeError(f"the peer ended: {self._log.read()[-800:].strip()}")
        found: dict[str, Any] = json.loads(line)
        return found


def missing(name: str, python: str | None = None) -> str | None:
    """Why this peer cannot run here; None where it can. `python`: the one to run it with."""
    if name == "vllm":
        return None if python else "no --vllm-python given"
    for module in (MODULES[name], "gguf"):
        if find_spec(module) is None:
            return f"{module} is not installed"
    return None


@contextmanager
def running(name: str, model: str | Path, threads: int, python: str | None = None) -> Iterator[Peer]:
    """A started peer on a GGUF file, or for vLLM on a folder. Raises RuntimeError with its last words when it ends early."""
    command = [python or sys.executable, str(PROCESS), name, str(model), str(threads)]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
        with subprocess.Popen(command, text=True, **pipes) as process:
            try:
                yield Peer(process, log)
            finally:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def write_gguf(folder: Path, path: Path, kind: str, tokenizer_json: Path) -> None:
    """A Llama checkpoint as a GGUF file of this type.

    The vocabulary is that of a byte-pair tokenizer, filled up to the model's size: no text is tokenized, but loaders
    refuse one that they cannot make a tokenizer of. Llama's rotary embedding pairs neighbouring values in GGUF and halves in transformers: rows of q and k are reordered.
    """
    import gguf
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokenizer = json.loads(tokenizer_json.read_text())
    size, known = (
        config["vocab_size"],
        {number: token for token, number in tokenizer["model"]["vocab"].items()},
    )
    special = {added["id"]: added["content"] for added in tokenizer["added_tokens"]}
    known |= special
    writer.add_token_list([known.get(i, f"filler {i}") for i in range(size)])
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(size)]
    )
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    writer.add_file_type(TYPES[kind])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    quantized = gguf.GGMLQuantizationType[kind.upper()]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, count in heads.items():
            if f"{part}.weight" in name:
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        values = tensor.float().numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        if values.ndim == 1:
            writer.add_tensor(target, values)
        else:
            writer.add_tensor(target, gguf.quants.quantize(values, quantized), raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
