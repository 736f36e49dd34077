"""A draft model on real decoders: the tokens of an engine without it, in fewer steps, within the ledger."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotFoundError
from engine.llm import LLM
from engine.models.config import ModelConfig
from engine.models.draft import check_tokenizers, find_draft
from engine.sampling_params import SamplingParams

TARGET = "mistral_window"
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.7, "seed": 3, "logprobs": 2},
    "filtered": {"temperature": 0.9, "seed": 4, "top_p": 0.8, "top_k": 9, "min_p": 0.02},
    "controlled": {"temperature": 0.8, "seed": 5, "logit_bias": {5: 2.0}, "bad_words": ((7, 9), (3,))},
    "stopped": {"temperature": 0.8, "seed": 7, "stop_token_ids": (11, 12), "min_tokens": 12},
    "penalised": {"temperature": 0.8, "seed": 8, "repetition_penalty": 1.2, "max_tokens": 8},
}


def guessed_by(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "draft_model", "model": str(folder), "num_speculative_tokens": 3, "min_gain": 0, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def noisy(tiny_models: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the target whose weights carry some noise: it agrees often, not always."""
    folder = tmp_path_factory.mktemp("noisy") / "model"
    shutil.copytree(tiny_models(TARGET).folder, folder)
    weights, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(1)
    for name, tensor in weights.items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        weights[name] = tensor + 0.03 * tensor.std() * noise
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def asked(prompt_of: Callable[..., list[int]]) -> tuple[dict[str, list[int]], dict[str, SamplingParams]]:
    """Prompts that share their beginning, so that later ones find it in the prefix cache."""
    prompts = {name: prompt_of(25, 0) + prompt_of(9, seed) for seed, name in enumerate(KINDS)}
    return prompts, {name: SamplingParams(**{"max_tokens": 18, **kind}) for name, kind in KINDS.items()}


@pytest.mark.parametrize(
    "settings",
    [
        # The bundled model proves the compiled step by default.
        pytest.param({"dtype": "float32", "deterministic": True}, marks=pytest.mark.full),
        # Prompts and what catches up in pieces, and too few blocks for all.
        {
            "attention_backend": "reference",
            "max_batched_tokens": 16,
            "num_blocks": 20,
            "swap_space_bytes": 1 << 20,
        },
    ],
    ids=["deterministic", "crowded"],
)
def test_tokens_are_those_without_speculation(
    tiny_models: Callable[..., Any], run_engine: Callable[..., Any], noisy: Path,
    asked: tuple[dict[str, list[int]], dict[str, SamplingParams]], settings: dict[str, Any],
) -> None:  # fmt: skip
    folder, arrive_at = tiny_models(TARGET).folder, {"filtered": 5, "stopped": 8}
    without = run_engine(folder, *asked, arrive_at=arrive_at, **settings)
    guessing = run_engine(
        folder, *asked, arrive_at=arrive_at, speculative_config=guessed_by(noisy), **settings
    )
    assert guessing.tokens == without.tokens
    for ours, theirs in zip(guessing.logprobs["sampled"], without.logprobs["sampled"], strict=True):
        # In float64 and in deterministic mode a position's logits do not depend on what the step computes beside them.
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-9)
    drafted = sum(record.num_draft_tokens for record in guessing.records)
    accepted = sum(record.num_accepted_tokens for record in guessing.records)
    assert 0.2 * drafted < accepted < drafted
    assert guessing.prefix_hits
    assert bool(guessing.preempted) == ("num_blocks" in settings)


def test_the_same_weights_guess_everything_rightly(
    tiny_models: Callable[..., Any], run_engine: Callable[..., Any],
    asked: tuple[dict[str, list[int]], dict[str, SamplingParams]],
) -> None:  # fmt: skip
    """In float64: the noise is the target's own, and what was computed before is where it should be, preempted or shared."""
    folder = tiny_models(TARGET).folder
    found = run_engine(
        folder, *asked, attention_backend="reference", num_blocks=36, arrive_at={"filtered": 5},
        speculative_config=guessed_by(folder),
    )  # fmt: skip
    drafted = sum(record.num_draft_tokens for record in found.records)
    assert found.preempted
    assert 0 < drafted == sum(record.num_accepted_tokens for record in found.records)


@pytest.mark.full
def test_a_guessed_place_has_the_models_distribution(
    tiny_models: Callable[..., Any], run_engine: Callable[..., Any], noisy: Path
) -> None:
    """Pearson's statistic of 1,000 seeds against transformers' probabilities, at a place that was guessed and computed."""
    model, num_runs, allowed = tiny_models(TARGET), 1000, (5, 8, 13, 21)
    prompt = [5, 8, 13, 21]
    params = {
        str(seed): SamplingParams(max_tokens=3, temperature=8.0, seed=seed, allowed_token_ids=allowed)
        for seed in range(num_runs)
    }
    found = run_engine(
        model.folder, dict.fromkeys(params, prompt), params, speculative_config=guessed_by(noisy), max_num_seqs=64,
        attention_backend="reference", num_blocks=1024,
    )  # fmt: skip
    first = Counter(tokens[0] for tokens in found.tokens.values()).most_common(1)[0][0]
    counts = Counter(tokens[1] for tokens in found.tokens.values() if tokens[0] == first)
    accepted = sum(record.num_accepted_tokens for record in found.records)
    assert 0 < accepted < sum(record.num_draft_tokens for record in found.records)
    probabilities = (model.logits([*prompt, first])[-1][list(allowed)] / 8.0).softmax(-1)
    expected = probabilities * sum(counts.values())
    assert float(expected.min()) > 5
    statistic = ((torch.tensor([counts[token] for token in allowed]) - expected) ** 2 / expected).sum()
    assert float(statistic) < 16.27  # chi squared with 3 degrees of freedom: 1 in 1,000; seeds are fixed


def config_of(folder: Path, draft: Path, **settings: Any) -> EngineConfig:
    values = {
        "dtype": "float64",
        "device": "cpu",
        "block_size": 4,
        "num_blocks": 64,
        "num_threads": 1,
        **settings,
    }
    return EngineConfig(model=str(folder), speculative_config=guessed_by(draft), **values)


def test_the_ledger_and_the_pool_count_the_draft_model(tiny_models: Callable[..., Any]) -> None:
    folder = tiny_models(TARGET).folder
    ledgers = []
    for config in (EngineConfig(model=str(folder), **_plain()), config_of(folder, folder)):
        engine = build_engine(config)
        ledgers.append(engine.stats().memory)
        engine.close()
    alone, both = ledgers
    assert (both.weights_bytes, both.kv_bytes) == (2 * alone.weights_bytes, 2 * alone.kv_bytes)
    # The same bytes hold fewer blocks, because each has two models' keys and values.
    num_bytes = 1 << 20
    wide = {"num_blocks": None, "kv_memory_bytes": num_bytes, "max_model_len": 64}
    blocks = resolve_config(config_of(folder, folder, **wide)).num_blocks
    assert blocks == num_bytes // (both.kv_bytes // 64)


def _plain() -> dict[str, Any]:
    return {"dtype": "float64", "device": "cpu", "block_size": 4, "num_blocks": 64, "num_threads": 1}


def test_a_draft_model_sleeps_and_wakes_with_its_target(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    folder, params = tiny_models(TARGET).folder, SamplingParams(max_tokens=9, temperature=0.8, seed=2)
    speculative = guessed_by(folder)
    with LLM(str(folder), speculative_config=speculative, attention_backend="reference", **_plain()) as llm:
        (before,) = llm.generate([prompt_of(30, 1)], params)
        llm.sleep(2)
        llm.wake_up()
        (after,) = llm.generate([prompt_of(30, 1)], params)
        assert after.token_ids == before.token_ids
        llm.generate([prompt_of(30, 1)], params.with_(n=3))  # share what was computed, by both models
        stats = llm.stats()
    assert stats.speculation_method == "draft_model"
    assert 0 < stats.draft_tokens == stats.accepted_tokens, "all right: nothing is read that was lost"


def other_vocabulary(folder: Path, into: Path) -> Path:
    """The model with one token more."""
    model = ModelConfig.from_folder(folder)
    shutil.copytree(folder, into)
    text = (
        (into / "config.json")
        .read_text()
        .replace(f'"vocab_size": {model.vocab_size}', f'"vocab_size": {model.vocab_size + 1}')
    )
    (into / "config.json").write_text(text)
    return into


def test_a_draft_model_that_does_not_fit_is_refused_before_anything_is_loaded(
    tiny_models: Callable[..., Any], tmp_path: Path
) -> None:
    target = tiny_models(TARGET)
    wider = other_vocabulary(target.folder, tmp_path / "wider")
    with pytest.raises(ConfigError, match="another vocabulary") as caught:
        resolve_config(config_of(target.folder, wider))
    assert (caught.value.param, caught.value.value, caught.value.limit) == (
        "speculative_config.model",
        98,
        97,
    )
    shorter = target.copy(tmp_path / "shorter", max_position_embeddings=64)
    with pytest.raises(ConfigError, match="the draft model's context of 64") as caught:
        resolve_config(config_of(target.folder, shorter, max_model_len=65))
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("max_model_len", 65, 64)
    assert resolve_config(config_of(target.folder, shorter)).max_model_len == 64
    with pytest.raises(ModelNotFoundError) as missing:
        resolve_config(config_of(target.folder, tmp_path / "nothing"))
    assert missing.value.param == "speculative_config.model"
    config = config_of(target.folder, target.folder)
    with pytest.raises(ConfigError, match="do not run on cuda:0 yet") as caught:
        find_draft(config, ModelConfig.from_folder(target.folder), torch.device("cuda:0"))
    assert caught.value.remedy


def test_ids_that_mean_other_tokens_are_refused(tiny_models: Callable[..., Any], tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    def with_tokenizer(name: str, tokens: list[str]) -> Path:
        folder = tiny_models(TARGET).copy(tmp_path / name)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0])).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        return folder

    target, same, other = (
        with_tokenizer(name, tokens)
        for name, tokens in (("target", ["a", "b", "c"]), ("same", ["a", "b", "c"]), ("other", ["a", "c", "b"]))
    )  # fmt: skip
    model = ModelConfig.from_folder(target)

    def check(draft: Path) -> None:
        found = find_draft(config_of(target, draft), model, torch.device("cpu"))
        assert found is not None
        check_tokenizers(found, target)

    check(same)
    with pytest.raises(ConfigError, match="token 1 is 'c' to the draft model and 'b' to its target"):
        build_engine(config_of(target, other))
    with pytest.raises(ConfigError, match="has no tokenizer"):
        check(tiny_models(TARGET).folder)
