"""Scoring of given texts: perplexity in strides as transformers' guide defines it, and exact KL divergence, both in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from engine import LLM, InvalidRequestError, SamplingParams, TokenKL
from engine import scoring as scoring_module
from engine.sampling_params import ALL_LOGPROBS
from engine.scoring import rounds_of, windows_of

# transformers normalises and rotates in float32 even in a float64 model: a few 1e-6 of a nat are left of that.
MARGIN = 1e-5
VOCAB = 61
TEXT = [(7 * i * i + 3 * i) % VOCAB for i in range(203)]
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "eos_token_id": 1, "bos_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip


def saved(folder: Path, seed: int, vocab_size: int = VOCAB) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SHAPE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [saved(tmp_path_factory.mktemp(f"llama-{seed}"), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def pair(folders: list[Path]) -> Iterator[tuple[LLM, LLM]]:
    """Two models in float64, of which a text takes several steps."""
    settings = {
        "dtype": "float64",
        "device": "cpu",
        "num_threads": 1,
        "num_blocks": 40,
        "max_batched_tokens": 48,
    }
    with LLM(folders[0], **settings) as a, LLM(folders[1], **settings) as b:
        yield a, b


@pytest.fixture(scope="module")
def references(folders: list[Path]) -> list[LlamaForCausalLM]:
    return [LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for folder in folders]


def logprobs_of(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """[n - 1, V], of the tokens behind the first."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)


def rows_of(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Logits [n - 1, V] of one request for whole rows."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=ALL_LOGPROBS)
    (done,) = llm.generate(ids, params, use_tqdm=False)
    return torch.stack([torch.from_numpy(entry.logits) for entry in done.prompt_logprobs])


# ── perplexity ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 90), st.integers(2, 40), st.data())
def test_every_token_is_scored_once_with_what_its_window_holds(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length))
    windows = list(windows_of(num_tokens, length, stride))
    scored = [(token, window) for window in windows for token in range(window.first, window.end)]
    tokens = [token for token, _ in scored]
    assert tokens == sorted(set(tokens)), "once, in order"
    assert all(window.begin < token < window.end <= window.begin + length for token, window in scored)
    # Without overlap the first token of each window has nothing before it; else only that of the text has not.
    missing = set(range(num_tokens)) - set(tokens)
    assert missing == ({0} if stride < length else set(range(0, num_tokens, length))) & set(range(num_tokens))


@pytest.mark.parametrize(("max_length", "stride"), [(64, 64), (64, 32), (50, 17), (None, None), (203, 203)])
def test_perplexity_is_that_of_the_guides_loop(
    pair: tuple[LLM, LLM], references: list[LlamaForCausalLM], max_length: int | None, stride: int | None
) -> None:
    texts = [TEXT, TEXT[40:110], TEXT[:1]]
    found = pair[0].perplexity(texts, max_length=max_length, stride=stride, use_tqdm=False)
    length, step = max_length or 256, stride or (max_length or 256) // 2
    for ids, one in zip(texts, found, strict=True):
        total, count, before = 0.0, 0, 0
        for begin in range(0, len(ids), step):
            end = min(begin + length, len(ids))
            inputs = torch.tensor([ids[begin:end]])
            targets = inputs.clone()
            targets[:, : -(end - before)] = -100
            with torch.no_grad():
                logits = references[0](inputs).logits
            # The model's own loss rounds to float32, and says the mean without its number.
            losses = torch.nn.functional.cross_entropy(logits[0, :-1], targets[0, 1:], reduction="none")
            counted = int((targets[:, 1:] != -100).sum())  # exactly: the labels are shifted by one
            total -= float(losses.sum())
            count, before = count + counted, end
            if end == len(ids):
                break
        assert one.num_tokens == count
        assert one.total_logprob == pytest.approx(total, abs=MARGIN * max(1, count))
        if count:
            assert one.perplexity == pytest.approx(math.exp(-total / count), rel=MARGIN)
    assert math.isnan(found[2].perplexity)


@pytest.mark.parametrize(
    ("settings", "param", "value", "limit"),
    [
        ({"max_length": 257}, "max_length", 257, 256),
        ({"max_length": 1}, "max_length", 1, 256),
        ({"max_length": 64, "stride": 65}, "stride", 65, 64),
        ({"stride": 0}, "stride", 0, 256),
        ({"stride": True}, "stride", True, 256),
    ],
)
def test_windows_that_cannot_be_are_refused(
    pair: tuple[LLM, LLM], settings: dict[str, int], param: str, value: int, limit: int
) -> None:
    with pytest.raises(InvalidRequestError, match=f"{param} must be .* to {limit}, got {value}") as caught:
        pair[0].perplexity([TEXT], **settings)
    assert (caught.value.param, caught.value.value, caught.value.limit) == (param, value, limit)


# ── exact KL divergence ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("rows_at_once", [None, 40, 16, 3])
def test_divergence_is_exact_over_steps_and_pieces(
    pair: tuple[LLM, LLM],
    references: list[LlamaForCausalLM],
    monkeypatch: pytest.MonkeyPatch,
    rows_at_once: int | None,
) -> None:
    if rows_at_once is not None:
        monkeypatch.setattr(scoring_module, "ROW_VALUES_AT_ONCE", rows_at_once * VOCAB)
    texts = [TEXT, TEXT[5:40], TEXT[:1]]
    found = pair[0].token_kl(pair[1], texts)
    for ids, one in zip(texts[:2], found[:2], strict=True):
        own, other = (logprobs_of(model, ids) for model in references)
        targets = torch.tensor(ids[1:])[:, None]
        assert one.token_ids == tuple(ids)
        # The same of our own rows of the whole text: float64 throughout, only the order of sums differs.
        whole = [rows_of(llm, ids).log_softmax(-1) for llm in pair]
        exact = torch.nn.functional.kl_div(whole[1], whole[0], log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(torch.tensor(one.kl, dtype=torch.float64), exact, rtol=1e-10, atol=1e-12)
        close = {"rtol": 0, "atol": MARGIN}
        expected = torch.nn.functional.kl_div(other, own, log_target=True, reduction="none").sum(-1)
        torch.testing.assert_close(torch.tensor(one.kl, dtype=torch.float64), expected, **close)
        for logprobs, model in ((one.logprobs, own), (one.other_logprobs, other)):
            wanted = model.gather(1, targets)[:, 0]
            torch.testing.assert_close(torch.tensor(logprobs, dtype=torch.float64), wanted, **close)
        assert list(one.same_top) == (own.argmax(-1) == other.argmax(-1)).tolist()
        assert one.mean_kl == pytest.approx(float(expected.mean()))
    assert found[2] == TokenKL(tuple(TEXT[:1]), (), (), (), ())


def test_a_model_does_not_differ_from_itself(pair: tuple[LLM, LLM]) -> None:
    (found,) = pair[0].token_kl(pair[0], [TEXT])
    assert set(found.kl) == {0.0}
    assert found.logprobs == found.other_logprobs
    assert all(found.same_top)


def test_deterministic_figures_do_not_depend_on_pieces(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "num_blocks": 40,
        "deterministic": True,
    }
    with LLM(folders[0], **settings) as a, LLM(folders[1], **settings) as b:
        whole = a.token_kl(b, [TEXT[:90], TEXT[90:]])
        monkeypatch.setattr(scoring_module, "ROW_VALUES_AT_ONCE", 20 * VOCAB)
        assert a.token_kl(b, [TEXT[:90], TEXT[90:]]) == whole


@given(st.lists(st.integers(0, 60), max_size=6), st.integers(1, 40), st.sampled_from([1, 4, 16]))
def test_rounds_hold_bounded_rows_and_every_token_once(
    lengths: list[int], rows_at_once: int, block_size: int
) -> None:
    done = [1] * len(lengths)
    for pieces in rounds_of(lengths, rows_at_once, block_size):
        assert sum(piece.end - piece.first for piece in pieces) <= rows_at_once
        assert len({piece.text for piece in pieces}) == len(pieces), "what a piece needs was computed before"
        for piece in pieces:
            assert piece.first == done[piece.text] < piece.end
            done[piece.text] = piece.end
            is_last = piece.end == lengths[piece.text]
            assert is_last or rows_at_once < block_size or (piece.end - 1) % block_size == 0
    assert done == [max(1, length) for length in lengths]


def test_models_that_cannot_be_compared_are_refused(pair: tuple[LLM, LLM], tmp_path: Path) -> None:
    own = pair[0]
    folder = saved(tmp_path, 3, VOCAB + 2)
    small = LLM(folder, device="cpu", num_threads=1, num_blocks=8, max_model_len=64)
    with small as other, pytest.raises(InvalidRequestError, match="61 and 63") as caught:
        own.token_kl(other, [TEXT])
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("other", 63, 61)
    with pytest.raises(
        InvalidRequestError, match="text 1 has 257 tokens, the shorter context holds 256"
    ) as caught:
        own.token_kl(pair[1], [TEXT, [1] * 257])
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("texts", 257, 256)


def test_whole_rows_are_refused_where_they_would_fill_the_memory(
    pair: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.admission.MAX_ROW_VALUES", 100 * VOCAB)
    params = SamplingParams(max_tokens=0, prompt_logprobs=-1)
    with pytest.raises(InvalidRequestError, match=r"202 tokens .* at most 100") as caught:
        pair[0].generate(TEXT, params)
    assert (caught.value.param, caught.value.value, caught.value.limit) == ("prompt_logprobs", 202, 100)
    (done,) = pair[0].generate(TEXT, params.with_(logprob_start_len=103), use_tqdm=False)
    assert len(done.prompt_logprobs) == 100
    with pytest.raises(InvalidRequestError, match="logprob_start_len is 203, the prompt has 203") as caught:
        pair[0].generate(TEXT, params.with_(logprob_start_len=203))
    assert (caught.value.param, caught.value.limit) == ("logprob_start_len", 202)
