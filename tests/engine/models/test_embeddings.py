"""Embeddings of models that generate: transformers' hidden states, whatever the engine did to compute them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import InvalidParamsError, InvalidRequestError, PromptTooLongError, UnsupportedModelError
from engine.llm import LLM
from engine.pooling import Pooling, PoolingParams
from engine.sampling_params import SamplingParams
from tests.engine.models.parity import make_model
from tests.engine.models.transformers_configs import THROUGH_TRANSFORMERS

# transformers rounds each norm to float32 in a float64 model, and so does nothing of ours: a few 1e-7 of a state near 1.
CLOSE = 1e-5
# Sums of some hundred float64 values in another order.
EXACT = 1e-12
SETTINGS = {"dtype": "float64", "num_blocks": 128, "block_size": 4, "max_num_seqs": 8, "num_threads": 1}
RAW = PoolingParams(normalize=False)


def states_of(reference: Any, tokens: Sequence[int]) -> NDArray[np.float64]:
    """transformers' last hidden states [n, hidden], after the final norm."""
    with torch.no_grad():
        states = reference.base_model(torch.tensor([list(tokens)])).last_hidden_state
    found: NDArray[np.float64] = states[0].double().numpy()
    return found


def pooled(states: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    return states[-1] if kind == "last" else states.mean(0)


@pytest.mark.parametrize(
    "family",
    [
        "llama3_gqa_tied",
        *(
            pytest.param(name, marks=pytest.mark.full)
            for name in ("mistral_window", "qwen3_norm_window", "gpt2")
        ),
    ],
)
def test_pooled_states_are_those_of_transformers(
    family: str, tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path
) -> None:
    """In chunks of 16 tokens, beside each other, by a decoder of ours and by one of transformers."""
    if family == "gpt2":
        folder, reference = tmp_path, make_model(THROUGH_TRANSFORMERS["gpt2"]())
        reference.save_pretrained(folder)
    else:
        tiny = tiny_models(family)
        folder, reference = tiny.folder, tiny.reference
    texts = [prompt_of(length) for length in (1, 16, 45)]
    with LLM(folder, max_batched_tokens=16, **SETTINGS) as llm:
        for kind in ("last", "mean"):
            found = llm.embed(texts, PoolingParams(pooling=kind, normalize=False), use_tqdm=False)
            for text, embedding in zip(texts, found, strict=True):
                expected = pooled(states_of(reference, text), kind)
                np.testing.assert_allclose(embedding.vector, expected, rtol=CLOSE, atol=CLOSE)
                assert embedding.num_prompt_tokens == len(text)
        steps = [step for step in llm.worker.records.steps() if step.num_prefill_tokens]
        assert max(step.num_prefill_tokens for step in steps) == 16


@pytest.mark.full
def test_embedding_does_not_depend_on_chunks_cache_or_what_else_runs(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    tiny = tiny_models("llama3_gqa_tied")
    text = prompt_of(60)
    alone = {}
    with LLM(tiny.folder, **SETTINGS) as llm:
        for kind in ("last", "mean"):
            (found,) = llm.embed(text, PoolingParams(pooling=kind), use_tqdm=False)
            alone[kind] = found.vector
    with LLM(tiny.folder, max_batched_tokens=8, **SETTINGS) as llm:
        streams = llm.worker.submit_all(
            [prompt_of(30, 1), prompt_of(9, 2)], [SamplingParams(max_tokens=40, ignore_eos=True)] * 2
        )
        for _ in range(2):  # the second time with the text in the prefix cache
            for kind in ("last", "mean"):
                (found,) = llm.embed(text, PoolingParams(pooling=kind), use_tqdm=False)
                np.testing.assert_allclose(found.vector, alone[kind], rtol=0, atol=EXACT)
        assert [len(stream.result().token_ids) for stream in streams] == [40, 40]
        hits = {name: n for step in llm.worker.records.steps() for name, n in step.prefix_hits}
        assert 56 in hits.values(), "no last-token request came from the cache: nothing is proven of it"


def test_preempted_text_is_pooled_anew(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    """A mean whose first chunks were computed, lost and computed again counts them once."""
    tiny, text = tiny_models("llama3_gqa_tied"), prompt_of(40)
    small = {**SETTINGS, "num_blocks": 16, "max_batched_tokens": 8, "enable_prefix_cache": False}
    engine = build_engine(EngineConfig(model=str(tiny.folder), **small))
    mean = SamplingParams(max_tokens=0, pooling=Pooling("mean"))
    preempted: list[str] = []
    found = None
    engine.add(engine.make_request(prompt_of(4, 7), SamplingParams(max_tokens=40, ignore_eos=True)))
    for step in range(200):
        if step == 18:  # what runs then needs blocks that the text was promised
            engine.add(engine.make_request(text, mean, request_id="text"))
        output = engine.step()
        preempted += output.record.preempted if output.record else ()
        found = next((d.pooled for d in output.deltas if d.request_id == "text"), found)
        if step > 18 and not engine.has_work:
            break
    engine.check_integrity()
    engine.close()
    assert preempted == ["text"], "it was not preempted: nothing is proven"
    np.testing.assert_allclose(found, states_of(tiny.reference, text).mean(0), rtol=CLOSE, atol=CLOSE)


@pytest.mark.full
def test_float32_step_of_the_compiled_decoder_pools_the_same(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    tiny, text = tiny_models("llama3_gqa_tied"), prompt_of(33)
    with LLM(tiny.folder, **{**SETTINGS, "dtype": "float32"}) as llm:
        (found,) = llm.embed(text, RAW, use_tqdm=False)
    expected = states_of(tiny.reference, text)[-1]
    # Three layers in float32: some hundred roundings of 6e-8 each, of states around 1.
    np.testing.assert_allclose(found.vector, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_vector_is_cut_then_normalized(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    tiny, text = tiny_models("llama3_gqa_tied"), prompt_of(12)
    with LLM(tiny.folder, **SETTINGS) as llm:
        (raw,) = llm.embed(text, RAW, use_tqdm=False)
        (short,) = llm.embed(text, PoolingParams(dimensions=8), use_tqdm=False)
        head = raw.vector[:8]
        np.testing.assert_allclose(short.vector, head / np.sqrt((head**2).sum()), rtol=1e-14)
        with pytest.raises(InvalidRequestError, match="49 dimensions") as refused:
            llm.embed(text, PoolingParams(dimensions=49), use_tqdm=False)
        assert refused.value.limit == 48


def test_files_of_sentence_transformers_say_how_it_is_pooled(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]], tmp_path: Path
) -> None:
    tiny, text = tiny_models("qwen3_norm_window"), prompt_of(20)
    folder = shutil.copytree(tiny.folder, tmp_path / "model")
    modules = ["models.Transformer", "models.Pooling"]
    (folder / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.{m}", "path": "1_Pooling"} for m in modules])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, folder / "model.safetensors")  # as the model without its head is saved
    with LLM(folder, **SETTINGS) as llm:
        (found,) = llm.embed(text, use_tqdm=False)
        with pytest.raises(PromptTooLongError) as refused:
            llm.embed(prompt_of(25), use_tqdm=False)
        assert refused.value.limit == 24
        cut = PoolingParams(truncate_prompt_tokens=-1)
        assert llm.embed(prompt_of(25), cut, use_tqdm=False)[0].num_prompt_tokens == 24
    expected = states_of(tiny.reference, text).mean(0)
    np.testing.assert_allclose(found.vector, expected, rtol=CLOSE, atol=CLOSE)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_weightedmean_tokens": True}))
    with pytest.raises(UnsupportedModelError, match="weightedmean"):
        LLM(folder, **SETTINGS)


@pytest.mark.full
def test_what_no_decoder_pools_is_refused(
    tiny_models: Callable[..., Any], prompt_of: Callable[..., list[int]]
) -> None:
    with LLM(tiny_models("llama3_gqa_tied").folder, **SETTINGS) as llm:
        with pytest.raises(InvalidRequestError, match="'cls'"):
            llm.embed(prompt_of(3), PoolingParams(pooling="cls"), use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="'max'"):
            llm.worker.submit(prompt_of(3), SamplingParams(max_tokens=0, pooling=Pooling("max")))
    with pytest.raises(InvalidParamsError, match="without output"):
        SamplingParams(max_tokens=1, pooling=Pooling("last"))
    with pytest.raises(InvalidParamsError, match="pooling must be one of"):
        PoolingParams(pooling="median")
