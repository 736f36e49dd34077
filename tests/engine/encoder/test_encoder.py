"""Encoders: vectors and scores are transformers', whatever shares a batch; what cannot be loaded is refused by name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.embedding import cosine
from engine.encoder.engine import EncoderEngine
from engine.errors import (
    ConfigError,
    CorruptWeightsError,
    InvalidRequestError,
    PromptTooLongError,
    UnsupportedModelError,
)
from engine.llm import LLM
from engine.pooling import ModelPooling, Pooling, PoolingParams
from engine.sampling_params import SamplingParams
from tests.engine.encoder.conftest import ENCODERS

# float64 sums in another order, with padding of another length, through two layers whose states reach 100.
EXACT = 1e-10
SETTINGS = {"dtype": "float64", "num_threads": 1}
LENGTHS = (3, 30, 1, 9, 30, 2, 17)
Make = Callable[..., PreTrainedModel]
Words = Callable[..., str]


def by_default(*names: str, of: Iterable[str]) -> list[Any]:
    """All of them as parameters; but for `names` they belong to the long proofs."""
    return [name if name in names else pytest.param(name, marks=pytest.mark.full) for name in of]


def states_of(model: PreTrainedModel, ids: list[int]) -> NDArray[np.float64]:
    """transformers' last hidden states [n, hidden] of one text alone, without padding."""
    with torch.no_grad():
        states = model.base_model(torch.tensor([ids])).last_hidden_state[0]
    found: NDArray[np.float64] = states.numpy()
    return found


def formula(states: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """sentence-transformers' pooling and normalizing."""
    picks = {"cls": states[0], "last": states[-1], "mean": states.mean(0), "max": states.max(0)}
    return picks[kind] / np.sqrt((picks[kind] ** 2).sum())


def configure(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("family", by_default("bert", "roberta", of=ENCODERS))
def test_embeddings_are_those_of_transformers_alone_and_unpadded(
    family: str, encoder: Make, words: Words, tmp_path: Path
) -> None:
    model = encoder(family, tmp_path)
    texts = [words(length, seed) for seed, length in enumerate(LENGTHS)]
    with LLM(tmp_path, **SETTINGS) as llm:
        expected = [states_of(model, llm.tokenizer.encode(text)) for text in texts]
        for kind in ("cls", "mean", "max", "last"):
            found = llm.embed(texts, PoolingParams(pooling=kind), use_tqdm=False)
            for embedding, states in zip(found, expected, strict=True):
                np.testing.assert_allclose(embedding.vector, formula(states, kind), rtol=0, atol=EXACT)
        widths = [len(step.rows) for step in llm.worker.records.steps()]
        assert max(widths) == len(texts), "no batch held texts of several lengths: nothing is proven"


@pytest.mark.full
def test_batches_keep_to_the_budget_and_the_oldest_is_never_passed_by(
    encoder: Make, words: Words, tmp_path: Path
) -> None:
    encoder("bert", tmp_path)
    texts = [words(length, seed) for seed, length in enumerate(LENGTHS * 3)]
    with (
        LLM(tmp_path, max_batched_tokens=70, **SETTINGS) as llm,
        LLM(tmp_path, deterministic=True, **SETTINGS) as single,
    ):
        found = llm.embed(texts, use_tqdm=False)
        alone = single.embed(texts, use_tqdm=False)
        steps = llm.worker.records.steps()
        assert all(len(step.rows) == 1 for step in single.worker.records.steps())
    order = {
        record.request_id: i
        for i, record in enumerate(sorted(llm.worker.records.requests(), key=lambda r: r.arrival_ns))
    }
    done: set[int] = set()
    for step in steps:
        rows = [order[name] for name, _ in step.rows]
        assert len(rows) * max(n for _, n in step.rows) <= 70
        assert min(set(order.values()) - done) in rows
        done.update(rows)
    assert len(steps) < len(texts)
    for one, other in zip(found, alone, strict=True):
        np.testing.assert_allclose(one.vector, other.vector, rtol=0, atol=EXACT)


@pytest.mark.parametrize(
    "family",
    by_default("bert", of=("bert", "electra", "xlm-roberta", "deberta", "modernbert", "distilbert", "mpnet")),
)
def test_rerank_is_the_sigmoid_of_the_one_logit(
    family: str, encoder: Make, words: Words, tmp_path: Path
) -> None:
    changes = {"classifier_pooling": "cls"} if family == "modernbert" else {}
    model = encoder(family, tmp_path, "ForSequenceClassification", num_labels=1, **changes)
    query, documents = words(5, 1), [words(length, 2) for length in (4, 25, 11, 1)]
    with LLM(tmp_path, **SETTINGS) as llm:
        found = llm.rerank(query, documents, use_tqdm=False)
        expected = {}
        for i, document in enumerate(documents):
            first = llm.tokenizer.encode(query)
            ids = first + llm.tokenizer.encode(document)[1:]
            types = {"token_type_ids": torch.tensor([[0] * len(first) + [1] * (len(ids) - len(first))])}
            has_types = family in ("bert", "electra")
            with torch.no_grad():
                logit = model(torch.tensor([ids]), **(types if has_types else {})).logits
            assert logit.shape == (1, 1)
            expected[i] = 1 / (1 + np.exp(-float(logit)))
        with pytest.raises(InvalidRequestError, match="rates pairs"):
            llm.embed(query, use_tqdm=False)
    assert [each.index for each in found] == sorted(expected, key=lambda i: (-expected[i], i))
    for each in found:
        assert each.score == pytest.approx(expected[each.index], abs=EXACT)
    assert len({round(each.score, 6) for each in found}) > 1, "all the same: nothing is proven"


def test_cross_encoder_says_in_its_config_what_becomes_of_the_logit(
    encoder: Make, words: Words, tmp_path: Path
) -> None:
    encoder("bert", tmp_path, "ForSequenceClassification", num_labels=1)
    documents = [words(4), words(9)]
    with LLM(tmp_path, **SETTINGS) as llm:
        scores = {each.index: each.score for each in llm.rerank("w1", documents, use_tqdm=False)}
    configure(tmp_path, sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"})
    with LLM(tmp_path, **SETTINGS) as llm:
        for each in llm.rerank("w1", documents, use_tqdm=False):
            assert 1 / (1 + np.exp(-each.score)) == pytest.approx(scores[each.index], abs=EXACT)
    configure(tmp_path, sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(UnsupportedModelError, match="Tanh"):
        LLM(tmp_path, **SETTINGS)


@pytest.mark.full
def test_embedding_model_reranks_by_cosine(encoder: Make, words: Words, tmp_path: Path) -> None:
    encoder("mpnet", tmp_path)
    query, documents = words(6, 1), [words(9, 3), words(6, 1), words(20, 4)]
    with LLM(tmp_path, **SETTINGS) as llm:
        vectors = [each.vector for each in llm.embed([query, *documents], use_tqdm=False)]
        found = llm.rerank(query, documents, use_tqdm=False)
    cosines = [float(vectors[0] @ vector) for vector in vectors[1:]]
    assert found[0].index == 1
    assert {each.index: each.score for each in found} == pytest.approx(dict(enumerate(cosines)), abs=EXACT)


def test_checkpoint_with_a_pretraining_head_and_old_names_is_read_by_its_body(
    encoder: Make, words: Words, tmp_path: Path
) -> None:
    """As the first BERT's files are: a prefix, LayerNorms with gamma and beta, heads that nobody asks for."""
    model = encoder("bert", tmp_path, "ForPreTraining")
    tensors = load_file(tmp_path / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    assert any(name.startswith("cls.") for name in old)
    save_file({**old, "bert.embeddings.position_ids": torch.arange(64)[None]}, tmp_path / "model.safetensors")
    text = words(9)
    with LLM(tmp_path, **SETTINGS) as llm:
        (found,) = llm.embed(text, use_tqdm=False)
        np.testing.assert_allclose(
            found.vector, formula(states_of(model, llm.tokenizer.encode(text)), "cls"), rtol=0, atol=EXACT
        )


def test_folder_of_sentence_transformers_says_pooling_length_and_norm(
    encoder: Make, words: Words, tmp_path: Path
) -> None:
    model = encoder("bert", tmp_path)
    listed = [
        {"type": f"sentence_transformers.models.{kind}", "path": path}
        for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))
    ]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    (tmp_path / "1_Pooling").mkdir()
    flags = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    (tmp_path / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 12, "do_lower_case": True})
    )
    prompts = {"query": "w8 w9 ", "document": "w7 "}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    with LLM(tmp_path, **SETTINGS) as llm:
        (found,) = llm.embed(words(10).upper(), use_tqdm=False)
        ids = llm.tokenizer.encode(words(10))
        query, document, first = llm.embed(["w8 w9 w1", "w7 w2 w3", "w8 w9 w5"], use_tqdm=False)
        (named,) = llm.embed("w1", PoolingParams(prompt_name="query"), use_tqdm=False)
        np.testing.assert_allclose(named.vector, query.vector, rtol=0, atol=EXACT * 100)
        (ranked,) = llm.rerank("w1", ["w2 w3"], use_tqdm=False)
        assert ranked.score == pytest.approx(cosine(query.vector, document.vector), abs=EXACT)
        assert ranked.score != pytest.approx(cosine(first.vector, document.vector), abs=1e-6)
        np.testing.assert_allclose(found.vector, states_of(model, ids).mean(0), rtol=0, atol=EXACT * 100)
        with pytest.raises(PromptTooLongError, match="13 tokens, the model reads 12"):
            llm.embed(words(11), use_tqdm=False)
        long = words(11)
        (cut,) = llm.embed(long, PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)
        ids = llm.tokenizer.encode(long)
        expected = states_of(model, [*ids[:11], ids[-1]]).mean(0)  # the end stays, as transformers cuts
        np.testing.assert_allclose(cut.vector, expected, rtol=0, atol=EXACT * 100)
        with pytest.raises(InvalidRequestError, match="no room"):
            llm.embed(long, PoolingParams(truncate_prompt_tokens=2), use_tqdm=False)
    (tmp_path / "modules.json").write_text(
        json.dumps([{"type": "sentence_transformers.models.Dense", "path": "2"}])
    )
    with pytest.raises(UnsupportedModelError, match="Dense"):
        LLM(tmp_path, **SETTINGS)


@pytest.mark.full
def test_positions_of_the_roberta_family_begin_behind_the_padding(
    encoder: Make, words: Words, tmp_path: Path
) -> None:
    model = encoder("roberta", tmp_path)  # 64 rows of positions, padding 0: 63 tokens
    with LLM(tmp_path, **SETTINGS) as llm:
        assert llm.config.max_model_len == 63
        (found,) = llm.embed(words(61), PoolingParams(pooling="mean"), use_tqdm=False)
        ids = llm.tokenizer.encode(words(61))
        np.testing.assert_allclose(found.vector, formula(states_of(model, ids), "mean"), rtol=0, atol=EXACT)
        with pytest.raises(PromptTooLongError):
            llm.embed(words(62), use_tqdm=False)


def test_texts_that_waited_too_long_are_not_computed() -> None:
    class Zeros:
        def encode(self, texts: Any, poolings: Any) -> list[NDArray[np.float64]]:
            return [np.zeros(2) for _ in texts]

    config = EngineConfig(model="m", max_model_len=8, max_batched_tokens=8, max_queue_seconds=60)
    engine = EncoderEngine(
        config, Zeros(), pooling=ModelPooling(task="embed", poolings=("mean",)), vocab_size=9, tokenizer=None
    )  # fmt: skip
    now = time.monotonic_ns()
    for name, age_s, timeout_s in (
        ("late", 61, None),
        ("over", 3, 2.0),
        ("new", 0, None),
        ("in time", 3, 50.0),
    ):
        params = SamplingParams(max_tokens=0, pooling=Pooling("mean"))
        arrival_ns = now - age_s * 1_000_000_000
        request = engine.make_request(
            [1, 2], params, request_id=name, arrival_ns=arrival_ns, timeout_s=timeout_s
        )
        engine.add(request)
    ended = {delta.request_id: delta for delta in engine.step().deltas}
    reasons = {name: delta.finish_reason.value for name, delta in ended.items()}
    assert reasons == {"late": "timeout", "over": "timeout", "new": "length", "in time": "length"}
    assert "at most 60 s are allowed" in ended["late"].error
    assert ended["over"].error == "its 2 s were over while it waited for its turn"
    assert not engine.backlog.num_requests


def test_what_an_encoder_does_not_do_is_refused_by_name(encoder: Make, words: Words, tmp_path: Path) -> None:
    encoder("bert", tmp_path / "encoder")
    encoder("bert", tmp_path / "labels", "ForSequenceClassification", num_labels=3)
    with LLM(tmp_path / "encoder", **SETTINGS) as llm:
        with pytest.raises(InvalidRequestError, match="generates nothing"):
            llm.generate(words(3), SamplingParams(max_tokens=2))
        with pytest.raises(InvalidRequestError, match="generates nothing"):
            llm.score(words(3))
        with pytest.raises(ConfigError, match="does not sleep"):
            llm.sleep()
        with pytest.raises(InvalidRequestError, match="adapters"):
            llm.embed(words(3), lora="a", use_tqdm=False)
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            llm.embed([5, 84], use_tqdm=False)
    with LLM(tmp_path / "labels", **SETTINGS) as llm, pytest.raises(InvalidRequestError, match="3 labels"):
        llm.rerank("w1", ["w2"], use_tqdm=False)
    for setting in ({"quantization": "int8"}, {"enable_lora": True}, {"max_model_len": 65}):
        with pytest.raises(ConfigError) as refused:
            LLM(tmp_path / "encoder", **SETTINGS, **setting)
        assert refused.value.param == next(iter(setting))


def test_files_that_are_not_the_model_are_refused_before_anything_is_served(
    encoder: Make, tmp_path: Path
) -> None:
    encoder("bert", tmp_path / "good")

    def spoiled(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    def refused(folder: Path, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            LLM(folder, **SETTINGS)

    weights = "model.safetensors"
    tensors = load_file(tmp_path / "good" / weights)
    folder = spoiled("truncated")
    (folder / weights).write_bytes((tmp_path / "good" / weights).read_bytes()[:-100])
    refused(folder, CorruptWeightsError, "truncated")
    folder = spoiled("missing")
    save_file({k: v for k, v in tensors.items() if "layer.1.output.dense" not in k}, folder / weights)
    refused(folder, CorruptWeightsError, "in no weight file")
    folder = spoiled("more")
    save_file({**tensors, "encoder.layer.2.output.dense.weight": torch.zeros(2, 2)}, folder / weights)
    refused(folder, UnsupportedModelError, "does not have")
    folder = spoiled("shard")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, CorruptWeightsError, "model-00001-of-00002.safetensors is missing")
    folder = spoiled("pickle")
    (folder / weights).rename(folder / "pytorch_model.bin")
    refused(folder, UnsupportedModelError, "only pickled weights")
    folder = spoiled("head")
    configure(folder, architectures=["BertForTokenClassification"])
    refused(folder, UnsupportedModelError, "BertForTokenClassification is not computed")
    folder = spoiled("causal")
    configure(folder, is_decoder=True)
    refused(folder, UnsupportedModelError, "not computed here")
