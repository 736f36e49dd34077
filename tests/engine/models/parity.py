"""Parity: what an engine says beside what transformers says of the same small random checkpoint, both in float64.

`check_parity` writes a checkpoint of a config, runs an engine on it as it is (chunked prefill, mixed steps, decode through the
paged cache) and compares every log-probability and greedy token with transformers. Weights are drawn so that the next
token's entropy is under 2 nats: flat distributions would hide errors.

transformers rounds norms, softmaxes and routers to float32 whatever the model's dtype. That is taken out here, so that
what is left is the rounding of float64 sums in another order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from engine.build import build_engine
from engine.config import EngineConfig
from engine.plan import TokenLogprobs
from engine.sampling_params import SamplingParams

Logits = Callable[[Sequence[int]], Tensor]
# Sums of a few hundred float64 values in another order differ by some 1e-15 of logits up to 100; a layer's norm or softmax
# may pass on a hundred times as much. A part that is computed in float32 shows as 1e-6 and more.
EXACT = 1e-9
MOST_ENTROPY = 2.0  # nats
MAX_TOKENS = 12
CHUNK = 48  # tokens of a step: the longest prompt goes in pieces, beside others that decode
TOP = 5


@dataclass(frozen=True, slots=True)
class Parity:
    """What a comparison found."""

    architecture: str
    entropy: float  # nats; the reference's mean over all positions
    error: float  # the largest difference of a log-probability: of each position's token and of its TOP most likely ones
    num_compared: int  # positions
    num_wrong_tokens: int  # greedy tokens that are not the reference's
    context: int  # tokens of the longest text

    @property
    def holds(self) -> bool:
        return self.error < EXACT and self.num_wrong_tokens == 0 and self.entropy < MOST_ENTROPY


class InFloat64(TorchFunctionMode):
    """Float64 tensors stay what they are where code asks for float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (
                func is Tensor.to and torch.float32 in (*args[1:], kwargs.get("dtype"))
            ):
                return args[0]
            if kwargs.get("dtype") is torch.float32:  # a softmax's
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def exact_logits(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """transformers' logits [n, V] of one text, float64 throughout but for the angles of the rotary embedding."""
    with torch.no_grad(), InFloat64():
        logits: Tensor = model(torch.tensor([list(tokens)])).logits[0]
    return logits


def make_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of random float64 weights whose next token has an entropy under 2 nats."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    angles = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    model = model.double().eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for name, buffer in angles.items():  # checkpoints were trained with float32 angles
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, buffer.float())
    _fill(model)
    tokens = random_tokens(120, config.get_text_config().vocab_size)
    head = model.get_output_embeddings().weight
    for _ in range(20):
        if entropy_of(exact_logits(model, tokens).log_softmax(-1)) < 0.75 * MOST_ENTROPY:
            return model
        with torch.no_grad():
            head *= 1.3
    raise AssertionError("no scale of the output head makes the distributions sharp")


def _fill(model: PreTrainedModel) -> None:
    """Weights that let no part of a layer vanish. A norm that multiplies by 1 + weight is drawn around 0."""
    offset = {
        id(p)
        for m in model.modules()
        if "Gemma" in type(m).__name__ and "Norm" in type(m).__name__
        for p in m.parameters()
    }
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                low = -0.5 if id(parameter) in offset else 0.5
                parameter.uniform_(low, low + 1.0)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.3)
            elif id(parameter) in embeddings:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 1.5 / parameter.shape[-1] ** 0.5)


def random_tokens(length: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, vocab_size, (length,), generator=generator).tolist()


def entropy_of(logprobs: Tensor) -> float:
    """Nats; the mean over positions of log-probabilities [n, V]."""
    return float(-(logprobs.exp() * logprobs).sum(-1).mean())


def check_parity(
    config: PretrainedConfig, folder: Path, *, lengths: Sequence[int] = (5, 70), **settings: Any
) -> Parity:
    """Write a checkpoint of the config to the folder and compare an engine on it with transformers.

    `lengths`: tokens of the prompts, to which the engine adds MAX_TOKENS. `settings`: of the engine.

    Raises:
        AssertionError: parity does not hold.
    """
    model = make_model(config)
    model.save_pretrained(folder)
    found = compare(folder, lambda tokens: exact_logits(model, tokens), lengths=lengths, **settings)
    assert found.holds, found
    return found


def compare(
    folder: Path, reference: Logits, *, lengths: Sequence[int], adapter: Path | None = None, **settings: Any
) -> Parity:
    """An engine on the folder's checkpoint beside a reference that gives the logits [n, V] of a text, in float64.

    `adapter`: a LoRA folder that all requests use.
    """
    defaults = {"dtype": "float64", "num_blocks": 128, "block_size": 8, "max_num_seqs": 8, "num_threads": 1}
    chunk = {"max_batched_tokens": CHUNK, "enable_prefix_cache": False}
    engine = build_engine(EngineConfig(model=str(folder), **{**defaults, **chunk, **settings}))
    lora = None if adapter is None else engine.add_lora("adapter", adapter).name
    params = SamplingParams(
        max_tokens=MAX_TOKENS, temperature=0.0, ignore_eos=True, logprobs=TOP, prompt_logprobs=TOP
    )
    vocab_size = reference([0]).shape[-1]
    texts = {f"{length} tokens": random_tokens(length, vocab_size) for length in lengths}
    of_prompt: dict[str, Sequence[TokenLogprobs]] = {}
    of_output: dict[str, list[TokenLogprobs]] = {name: [] for name in texts}
    try:
        for name, prompt in texts.items():
            engine.add(engine.make_request(tuple(prompt), params, request_id=name, lora=lora))
        while engine.has_work:
            for delta in engine.step().deltas:
                assert delta.error is None, delta.error
                texts[delta.request_id].extend(delta.token_ids)
                of_output[delta.request_id].extend(delta.logprobs)
                of_prompt[delta.request_id] = delta.prompt_logprobs or of_prompt.get(delta.request_id, ())
        engine.check_integrity()
    finally:
        engine.close()
    errors, entropies, wrong = [], [], 0
    for name, text in texts.items():
        expected = reference(text).log_softmax(-1)
        entries = [*of_prompt[name], *of_output[name]]
        assert [entry.token_id for entry in entries] == text[1:], name
        wrong += sum(
            text[i + 1] != int(expected[i].argmax()) for i in range(len(text) - 1 - MAX_TOKENS, len(text) - 1)
        )
        entropies.append(entropy_of(expected))
        for row, entry in zip(expected, entries, strict=False):
            ids = torch.tensor([entry.token_id, *entry.top_ids])
            errors.append(
                float(
                    (row[ids] - torch.tensor([entry.logprob, *entry.top_logprobs], dtype=torch.float64))
                    .abs()
                    .max()
                )
            )
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    return Parity(
        architecture,
        sum(entropies) / len(entropies),
        max(errors),
        len(errors),
        wrong,
        max(map(len, texts.values())),
    )
