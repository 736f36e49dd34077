"""Penalties, biases, bad words and allowed tokens choose what transformers' logits processors choose, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from engine.build import build_engine
from engine.config import EngineConfig
from engine.errors import InvalidParamsError, InvalidRequestError
from engine.sampling_params import SamplingParams

FOLDER = Path(__file__).parents[3] / "data" / "models" / "chat-base"
QUESTION = [{"role": "user", "content": "Hello, how are you today?"}]
# transformers computes norms and attention weights in float32 even in a float64 model: logits differ by this at most.
MARGIN = 2e-4


def processed(logits: Tensor, text: list[int], num_prompt: int, params: SamplingParams) -> Tensor:
    """The logits [V] of the token behind `text`, by transformers' processors and OpenAI's formula for the other two."""
    processors = LogitsProcessorList()
    if params.bad_words:  # in outputs alone
        processors.append(
            _InOutput(NoBadWordsLogitsProcessor([list(w) for w in params.bad_words]), num_prompt)
        )
    if params.logit_bias:
        biases = {(token,): bias for token, bias in params.logit_bias.items()}
        processors.append(SequenceBiasLogitsProcessor(biases))
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    found = processors(torch.tensor([text]), logits[None].clone())
    for token, count in Counter(text[num_prompt:]).items():
        found[0, token] -= params.frequency_penalty * count + params.presence_penalty
    if params.allowed_token_ids is not None:
        others = sorted(set(range(len(logits))) - set(params.allowed_token_ids))
        found = SuppressTokensLogitsProcessor(others)(torch.tensor([text]), found)
    return found[0]


class _InOutput:
    def __init__(self, processor: Any, num_prompt: int) -> None:
        self._processor, self._num_prompt = processor, num_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        output = input_ids[:, self._num_prompt :]
        return self._processor(torch.cat((torch.full((1, 1), -1), output), 1), scores)  # never empty


@pytest.mark.skipif(
    not (FOLDER / "model.safetensors").is_file(), reason="data/models/chat-base has no weights"
)
def test_greedy_answers_of_the_bundled_model_equal_transformers() -> None:
    engine = build_engine(EngineConfig(model=str(FOLDER), dtype="float64", device="cpu", num_blocks=256))
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.apply_chat_template(QUESTION)
    plain = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[int]] = {}

    def ask(asked: dict[str, SamplingParams]) -> dict[str, SamplingParams]:
        sent = {}
        for name, params in asked.items():
            request = engine.make_request(prompt, params, request_id=name)
            sent[name] = request.params
            engine.add(request)
        while engine.has_work:
            for delta in engine.step().deltas:
                answers.setdefault(delta.request_id, []).extend(delta.token_ids)
        return sent

    ask({"plain": plain})
    free = answers["plain"]
    word = engine.tokenizer.decode(free[:4]).split()[0]
    sent = ask(
        {
            "repetition": plain.with_(repetition_penalty=1.3),
            "encouraged": plain.with_(repetition_penalty=0.4, frequency_penalty=-2.0),
            "frequency": plain.with_(frequency_penalty=0.9),
            "presence": plain.with_(presence_penalty=2.0),
            "biased": plain.with_(logit_bias={free[0]: -100.0, free[3]: 4.0, free[5]: -3.5}),
            "bad words": plain.with_(bad_words=(word, tuple(free[2:5]), (free[7],))),
            "allowed": plain.with_(allowed_token_ids=tuple(range(0, engine.tokenizer.vocab_size, 2))),
            "all": plain.with_(
                repetition_penalty=1.1,
                frequency_penalty=0.3,
                presence_penalty=0.2,
                logit_bias={free[1]: 2.0},
                bad_words=(word,),
                allowed_token_ids=tuple(range(5, engine.tokenizer.vocab_size)),
            ),
        }
    )
    engine.close()
    reference: Any = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float64)
    for name, params in sent.items():
        assert answers[name] != free, f"{name} changes nothing"
        text = prompt + answers[name]
        with torch.no_grad():
            logits = reference(torch.tensor([text])).logits[0]
        for place in range(len(prompt), len(text)):
            scores = processed(logits[place - 1], text[:place], len(prompt), params)
            assert scores[text[place]] >= scores.max() - MARGIN, f"{name}, token {place - len(prompt)}"


def test_drawn_tokens_follow_the_processed_distribution(
    tiny_models: Callable[[str], Any], prompt_of: Callable[..., list[int]], run_engine: Callable[..., Any]
) -> None:
    tiny, prompt, draws = tiny_models("qwen2_full"), prompt_of(9), 3000
    common = tiny.logits(prompt)[-1].topk(12).indices.tolist()
    params = SamplingParams(
        max_tokens=1, temperature=1.3, ignore_eos=True, repetition_penalty=1.2, logit_bias={common[0]: -1.0, common[4]: 0.5},
        allowed_token_ids=(*common, *prompt), bad_words=((common[1],),),
    )  # fmt: skip
    seeds = {str(seed): params.with_(seed=seed) for seed in range(draws)}
    run = run_engine(tiny.folder, dict.fromkeys(seeds, prompt), seeds, max_num_seqs=256, num_blocks=2048)
    counts = torch.bincount(torch.tensor([run.tokens[seed][0] for seed in seeds]), minlength=97).double()
    expected = (processed(tiny.logits(prompt)[-1], prompt, 9, params) / 1.3).softmax(-1) * draws
    assert counts[expected == 0].sum() == 0
    is_common = expected > 5
    rest = expected[~is_common].sum()
    statistic = float(((counts - expected)[is_common] ** 2 / expected[is_common]).sum())
    degrees = int(is_common.sum())
    assert degrees >= 4
    assert rest < 20
    assert abs(float(counts[~is_common].sum() - rest)) < 5 * max(1.0, float(rest) ** 0.5)
    # The 0.1 % point of chi-square lies below mean + 4 standard deviations + 4.
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"presence_penalty": 2.1}, "presence_penalty must be at least -2 and at most 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"logit_bias": {3: 100.5}}, "at most 100"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias must be an integer of at least 0"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "at most 1024"),
        ({"logit_bias": [3]}, "must map token ids"),
        ({"bad_words": ["a", ""]}, "empty"),
        ({"bad_words": [list(range(17))]}, "at most 16 tokens"),
        ({"bad_words": ["a"] * 257}, "at most 256"),
        ({"allowed_token_ids": []}, "empty"),
        ({"min_tokens": 1, "stop_token_ids": range(257)}, "at most 256"),
        ({"n": 0}, "n must be an integer between 1 and 16"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParamsError, match=words) as caught:
        SamplingParams(**changes)
    assert caught.value.param in [*changes]


def test_bad_words_need_a_tokenizer_and_ids_a_place_in_the_vocabulary(
    tiny_models: Callable[[str], Any],
) -> None:
    engine = build_engine(EngineConfig(model=str(tiny_models("qwen2_full").folder), num_blocks=16))
    for params, param in (
        (SamplingParams(bad_words=("no",)), "bad_words"),
        (SamplingParams(bad_words=((97,),)), "bad_words"),
        (SamplingParams(logit_bias={97: 1.0}), "logit_bias"),
        (SamplingParams(allowed_token_ids=(1, 97)), "allowed_token_ids"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            engine.make_request([1], params)
        assert caught.value.param == param
    engine.close()


def test_params_of_other_forms_are_equal() -> None:
    given = SamplingParams(logit_bias={"5": 1}, bad_words=["a", [1, 2]], allowed_token_ids=[3])  # type: ignore[arg-type, dict-item]
    assert given == SamplingParams(logit_bias={5: 1.0}, bad_words=("a", (1, 2)), allowed_token_ids=(3,))
    assert hash(given) == hash(given.with_())
