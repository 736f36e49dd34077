"""The bundled model runs end to end and answers as it does in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.build import build_engine
from engine.config import EngineConfig
from engine.llm import LLM
from engine.sampling_params import SamplingParams

QUESTIONS = (
    "Count the items: fork, lamp, onion.",
    "Context:\n[1] Ventonni lives in Yansu.\n[2] Parase is a judge.\n\nQuestion: Where does Ventonni live?",
    "Hello, how are you today?",
)
FOLDER = Path(__file__).parents[3] / "data" / "models" / "chat-base"


def _asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="data/models/chat-base has no weights"
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_greedy_answers_equal_transformers(deterministic: bool) -> None:
    reference: Any = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, attn_implementation="eager"
    )
    engine = build_engine(
        EngineConfig(model=str(FOLDER), dtype="float32", device="cpu", deterministic=deterministic)
    )
    assert engine.tokenizer is not None
    prompts = {str(i): engine.tokenizer.apply_chat_template(_asked(text)) for i, text in enumerate(QUESTIONS)}
    answers: dict[str, list[int]] = {name: [] for name in prompts}
    for name, prompt in prompts.items():
        engine.add(
            engine.make_request(prompt, SamplingParams(max_tokens=48, temperature=0.0), request_id=name)
        )
    while engine.has_work:
        for delta in engine.step().deltas:
            answers[delta.request_id].extend(delta.token_ids)
    ends = engine.tokenizer.eos_token_ids
    engine.close()
    for name, prompt in prompts.items():
        answer = answers[name]
        assert answer
        assert len(answer) == 48 or answer[-1] in ends
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        # In float32 two tokens may be equal to within rounding; then either is the greedy one.
        assert (logits.amax(-1) - chosen).max() < 1e-3, engine.tokenizer.decode(answer)


@pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="data/models/chat-base has no weights"
)
def test_it_can_guess_for_itself_through_the_compiled_step() -> None:
    """A row's bits depend on nothing beside it there: as its own draft model it is always right, and no token changes."""
    answers: list[list[list[int]]] = []
    for speculative in (None, {"method": "draft_model", "model": str(FOLDER), "min_gain": 0}):
        with LLM(
            str(FOLDER), device="cpu", num_threads=1, max_model_len=512, speculative_config=speculative
        ) as llm:
            params = SamplingParams(max_tokens=24, temperature=0.8, seed=5, ignore_eos=True)
            answers.append([list(answer.token_ids) for answer in llm.generate(list(QUESTIONS), params)])
            stats = llm.stats()
    assert answers[0] == answers[1]
    assert stats.draft_tokens == stats.accepted_tokens > 40
