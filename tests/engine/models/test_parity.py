"""Every native family computes what transformers computes: to the token in float64, within a margin in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import EngineError
from engine.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=48, temperature=0.0, ignore_eos=True)
# Largest difference of a logit, where logits spread over about ±20. transformers rounds norms and attention weights to
# float32 even in a float64 model, which is what is left in the first figure.
FLOAT64_MARGIN = 2e-4
FLOAT32_MARGIN = 1e-3
DIFFERS = 0.05  # a wrong config moves some logit by more than this: fifty times the wider margin


def test_the_distributions_are_sharp_enough_to_show_errors(
    tiny_model: Any, prompt_of: Callable[..., list[int]]
) -> None:
    logprobs = tiny_model.logits(prompt_of(120)).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    assert entropy.mean() < 2.0, f"mean entropy {entropy.mean():.2f} nats"


def test_greedy_tokens_equal_transformers_in_float64(
    tiny_model: Any, prompt_of: Callable[..., list[int]], run_engine: Callable[..., Any]
) -> None:
    prompts = {f"p{n}": prompt_of(n) for n in (3, 41, 90)}
    run = run_engine(tiny_model.folder, prompts, GREEDY, max_batched_tokens=64)
    assert run.mixed_steps > 0
    for name, prompt in prompts.items():
        assert len(run.tokens[name]) == 48
        assert run.tokens[name] == tiny_model.greedy_choices(prompt, run.tokens[name]), name


def test_tokens_equal_what_transformers_generates(
    tiny_models: Callable[[str], Any], prompt_of: Callable[..., list[int]], run_engine: Callable[..., Any]
) -> None:
    tiny, prompt = tiny_models("mistral_window"), prompt_of(70)
    assert run_engine(tiny.folder, {"p": prompt}, GREEDY).tokens["p"] == tiny.generate(prompt, 48)


def test_logits_equal_transformers_within_the_margins(
    tiny_model: Any, prompt_of: Callable[..., list[int]], our_logits: Callable[..., Tensor]
) -> None:
    tokens = prompt_of(130)
    expected = tiny_model.logits(tokens)
    for dtype, margin in ((torch.float64, FLOAT64_MARGIN), (torch.float32, FLOAT32_MARGIN)):
        found = our_logits(tiny_model.folder, tiny_model.config_values, tokens, dtype)
        assert (found - expected).abs().max() < margin, dtype


SCORED = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, logprobs=4, prompt_logprobs=4)


def test_scores_of_prompt_and_output_equal_transformers_in_float64(
    tiny_models: Callable[[str], Any], prompt_of: Callable[..., list[int]], run_engine: Callable[..., Any]
) -> None:
    tiny, prompt = tiny_models("llama3_gqa_tied"), prompt_of(50)
    run = run_engine(tiny.folder, {"a": prompt, "b": prompt_of(21, 1)}, SCORED, max_batched_tokens=16)
    text = prompt + run.tokens["a"]
    expected = tiny.logits(text).log_softmax(-1)
    entries = run.prompt_logprobs["a"] + run.logprobs["a"]
    assert [e.token_id for e in entries] == text[1:]
    for position, entry in enumerate(entries):
        row = expected[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=FLOAT64_MARGIN)
        assert entry.rank == int((row > row[entry.token_id]).sum()) + 1
        assert list(entry.top_ids) == row.topk(4).indices.tolist()
        assert list(entry.top_logprobs) == pytest.approx(row.topk(4).values.tolist(), abs=FLOAT64_MARGIN)


def test_scores_equal_transformers_in_float32_on_the_best_path_of_this_machine(
    tiny_model: Any, prompt_of: Callable[..., list[int]], run_engine: Callable[..., Any]
) -> None:
    prompt = prompt_of(110)
    prompts = {"b": prompt_of(21, 1), "a": prompt}
    run = run_engine(tiny_model.folder, prompts, SCORED, max_batched_tokens=48, dtype="float32")
    assert run.mixed_steps > 0
    text = prompt + run.tokens["a"]
    expected = tiny_model.logits(text).log_softmax(-1)
    entries = run.prompt_logprobs["a"] + run.logprobs["a"]
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(
            float(expected[position, text[position + 1]]), abs=FLOAT32_MARGIN
        )
        found = torch.tensor(entry.top_logprobs, dtype=torch.float64)
        assert (found - expected[position, list(entry.top_ids)]).abs().max() < FLOAT32_MARGIN


def rope(family: str, **changes: Any) -> Any:
    """A perturbation of one entry of the family's rope_parameters."""
    return pytest.param(family, {"rope_parameters": changes}, id=f"{family}-rope-{next(iter(changes))}")


def field(family: str, **changes: Any) -> Any:
    return pytest.param(family, changes, id=f"{family}-{'-'.join(changes)}")


PERTURBED = [
    rope("llama2_mha_untied", rope_theta=9000.0),
    field("llama2_mha_untied", rms_norm_eps=1e-2),
    field("llama2_mha_untied", tie_word_embeddings=True),
    field("llama2_mha_untied", num_attention_heads=2, num_key_value_heads=2, head_dim=24),
    field("llama2_mha_untied", num_attention_heads=8, num_key_value_heads=8, head_dim=6),
    rope("llama3_gqa_tied", factor=2.0),
    rope("llama3_gqa_tied", low_freq_factor=2.0),
    rope("llama3_gqa_tied", high_freq_factor=8.0),
    rope("llama3_gqa_tied", original_max_position_embeddings=96),
    rope("llama3_gqa_tied", rope_theta=4000.0),
    rope("llama3_gqa_tied", rope_type="default"),
    field("llama3_gqa_tied", num_attention_heads=2, num_key_value_heads=1, head_dim=24),
    rope("llama_linear_mqa", factor=2.0),
    rope("llama_linear_mqa", rope_type="default"),
    rope("llama_yarn_biased", factor=2.0),
    rope("llama_yarn_biased", beta_fast=2.0),
    rope("llama_yarn_biased", beta_slow=3.0),
    rope("llama_yarn_biased", original_max_position_embeddings=128),
    rope("llama_yarn_biased", attention_factor=1.0),
    rope("llama_yarn_biased", truncate=False),
    field("mistral_window", sliding_window=21),
    field("mistral_window", sliding_window=None),
    field("qwen2_bias_window", sliding_window=19),
    field("qwen2_bias_window", use_sliding_window=False, layer_types=None),
    field("qwen2_bias_window", max_window_layers=2, layer_types=None),
    field("qwen3_norm_window", layer_types=["sliding_attention", "full_attention", "full_attention"]),
    field("qwen3_norm_window", rms_norm_eps=1e-2),
    rope("qwen3_norm_window", rope_theta=9000.0),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), PERTURBED)
def test_a_changed_config_field_breaks_parity(
    family: str,
    changes: dict[str, Any],
    tiny_models: Callable[[str], Any],
    prompt_of: Callable[..., list[int]],
    our_logits: Callable[..., Tensor],
) -> None:
    tiny, tokens = tiny_models(family), prompt_of(130)
    values = tiny.config_values
    if "rope_parameters" in changes:
        changes = {"rope_parameters": {**values["rope_parameters"], **changes["rope_parameters"]}}
    # A changed key that is None is null in the file, but for layer_types, which old checkpoints do not have.
    values = {k: v for k, v in {**values, **changes}.items() if not (k == "layer_types" and v is None)}
    found = our_logits(tiny.folder, values, tokens, torch.float64)
    assert (found - tiny.logits(tokens)).abs().max() > DIFFERS


REFUSED = [
    field("llama3_gqa_tied", num_key_value_heads=1),
    field("llama3_gqa_tied", num_key_value_heads=4),
    field("llama3_gqa_tied", head_dim=16),
    field("llama3_gqa_tied", num_attention_heads=8),
    field("llama3_gqa_tied", hidden_size=64),
    field("llama3_gqa_tied", intermediate_size=81),
    field("llama3_gqa_tied", vocab_size=98),
    field("llama3_gqa_tied", num_hidden_layers=4),
    field("llama3_gqa_tied", num_hidden_layers=2),
    field("llama3_gqa_tied", tie_word_embeddings=False),
    field("llama_yarn_biased", attention_bias=False),
    field("llama_yarn_biased", mlp_bias=False),
    field("llama3_gqa_tied", attention_bias=True),
    field("qwen2_bias_window", architectures=["LlamaForCausalLM"]),
    field("qwen3_norm_window", architectures=["LlamaForCausalLM"]),
    field("llama3_gqa_tied", architectures=["Qwen3ForCausalLM"]),
]


@pytest.mark.parametrize(("family", "changes"), REFUSED)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    family: str, changes: dict[str, Any], tiny_models: Callable[[str], Any], our_logits: Callable[..., Tensor]
) -> None:
    tiny = tiny_models(family)
    with pytest.raises(EngineError):
        our_logits(tiny.folder, {**tiny.config_values, **changes}, [1, 2, 3], torch.float64)


def test_the_older_spelling_of_the_rotary_embedding_is_the_same_model(
    tiny_models: Callable[[str], Any], prompt_of: Callable[..., list[int]], our_logits: Callable[..., Tensor]
) -> None:
    tokens = prompt_of(100)
    for family in ("llama3_gqa_tied", "llama_linear_mqa", "llama_yarn_biased", "llama2_mha_untied"):
        tiny = tiny_models(family)
        values = dict(tiny.config_values)
        scaling = dict(values.pop("rope_parameters"))
        values["rope_theta"] = scaling.pop("rope_theta")
        kind = scaling.pop("rope_type")
        values["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
        found = our_logits(tiny.folder, values, tokens, torch.float64)
        assert (found - tiny.logits(tokens)).abs().max() < FLOAT64_MARGIN, family
