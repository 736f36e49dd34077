"""Folders that PEFT itself wrote, served over a resident base: tokens are those of PEFT's own model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.sampling_params import SamplingParams
from workbench.versions.errors import AdapterError

PROMPT = [20, 40, 60, 7, 33, 51]
NUM_TOKENS = 12
KINDS = {
    "lora": {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": "all-linear"},
    "ranks": {"r": 4, "rank_pattern": {"o_proj": 8}, "alpha_pattern": {"o_proj": 64}, "target_modules": ["o_proj", "up_proj"]},
}  # fmt: skip


@pytest.mark.full
@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning"
)  # PEFT's own use of transformers
def test_adapters_that_peft_wrote_answer_as_peft_does(hosted: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Most likely tokens in float64 from logits of whole sequences: no cache and no batch on PEFT's side."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    expected = {}
    for seed, (kind, options) in enumerate(KINDS.items()):
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float64)
        torch.manual_seed(seed)
        made = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", lora_alpha=16, **options))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:  # PEFT's own B is zero
                    parameter.normal_(std=0.2)
            ids = list(PROMPT)
            for _ in range(NUM_TOKENS):
                ids.append(int(made(torch.tensor([ids])).logits[0, -1].argmax()))
        made.save_pretrained(tmp_path / kind)
        expected[kind] = tuple(ids[len(PROMPT) :])
    assert len(set(expected.values())) == len(KINDS)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with hosted(dtype="float64", deterministic=False) as host:
        for kind in KINDS:
            host.load_adapter(kind, str(tmp_path / kind))
        streams = {kind: host.worker(kind).submit(PROMPT, params) for kind in KINDS}
        assert {kind: stream.result(60).token_ids for kind, stream in streams.items()} == expected
        refused = get_peft_model(
            AutoModelForCausalLM.from_pretrained(tiny_model),
            LoraConfig(task_type="CAUSAL_LM", use_dora=True, target_modules=["q_proj"]),
        )
        refused.save_pretrained(tmp_path / "dora")
        with pytest.raises(AdapterError, match="use_dora"):
            host.load_adapter("dora", str(tmp_path / "dora"))
