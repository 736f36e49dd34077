"""LLM: the front of the engine for notebooks and scripts: prompts in, completions out, in the caller's thread.

Builds an engine for one model, runs it on an EngineWorker, and gives its memory back on ``close()``, at the end of a ``with``
block, or when the object is no longer referenced. Streaming and serving many callers is ``engine.worker``'s.
"""

from __future__ import annotations

import gc
import math
import operator
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from engine.best_of import choose_best
from engine.chat_messages import Message
from engine.config import EngineConfig
from engine.errors import EngineDeadError, InvalidRequestError, StepFailedError
from engine.lora import Lora
from engine.plan import TokenLogprobs
from engine.records import Completion, EngineStats, HealthState
from engine.request import FinishReason
from engine.sampling_params import ALL_LOGPROBS, SamplingParams
from engine.scoring import (
    ROW_VALUES_AT_ONCE,
    TOKENS_AT_ONCE,
    KLBuilder,
    Perplexity,
    Piece,
    TokenKL,
    perplexity_of,
    rounds_of,
    windows_of,
)
from engine.stream import RequestStream
from engine.tokenizer import TokenizerLike
from engine.worker import EngineWorker

Prompt = str | Sequence[int]

REFRESH_S = 0.1  # how often output is taken in and the progress bar moves
ABORT_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a given text is, in nats. The first token has nothing before it and is not scored."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of token_ids[1:]
    total_logprob: float
    perplexity: float  # per scored token; NaN when there is none


class LLM:
    """One model, ready to generate.

    `model`: a folder or a hub id. `settings`: any field of EngineConfig by name (dtype, device, block_size, num_blocks,
    max_num_seqs, max_model_len, enable_prefix_cache, deterministic, …).

    Raises:
        ConfigError: an unknown setting, or a value out of its range.
        ModelLoadError: the model cannot be loaded.
        OutOfMemoryError: the device has fewer bytes than the settings need.
    """

    _finalizer: weakref.finalize[..., Any] | None  # None: the worker belongs to someone else

    def __init__(self, model: str | Path, **settings: Any) -> None:
        config = EngineConfig.from_dict({"model": str(model), **settings})
        from engine.build import build_engine  # below the line: brings torch in

        worker = EngineWorker(build_engine(config))
        self._attach(worker)
        self._finalizer = weakref.finalize(self, worker.close)
        self._finalizer.atexit = False  # the worker ends itself at exit
        worker.start()

    @classmethod
    def from_worker(cls, worker: EngineWorker) -> Self:
        """An LLM over a worker that someone else started and will close."""
        llm = cls.__new__(cls)
        llm._attach(worker)
        llm._finalizer = None
        return llm

    def _attach(self, worker: EngineWorker) -> None:
        self.worker = worker
        self.config = worker.config  # resolved: no None left

    @property
    def tokenizer(self) -> TokenizerLike:
        if self.worker.tokenizer is None:
            raise InvalidRequestError("this engine has no tokenizer", remedy="Use token ids.", param="prompt")
        return self.worker.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Completion]:
        """Complete one prompt or many, batched by the engine; completions in the order of the prompts.

        Where params ask for n completions, a prompt's n stand side by side; with a seed, the i-th has the seed plus i. With
        best_of they are the n of so many with the highest mean log-probability a token, the best first.
        `lora`: the name of an adapter that `add_lora` loaded, one for all or one for each prompt; None: the base alone.

        A request that fails while it runs comes back with finish reason ERROR and its `error`, with a RuntimeWarning; the
        others are not lost. KeyboardInterrupt aborts all of them.

        Raises:
            InvalidRequestError: a prompt that can never run, an adapter that is not loaded, or as many params or adapters as
                prompts were not given; nothing ran.
            EngineDeadError: the engine died or is closed.
        """
        many = _as_prompts(prompts)
        return self._run(many, _params_of(params, len(many)), use_tqdm, lora)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        lora: str | Sequence[str | None] | None = None,
        use_tqdm: bool = True,
    ) -> list[Completion]:
        """Answer one conversation or a list of them, written down by the model's chat template.

        Raises:
            InvalidRequestError: no chat template, malformed messages, and what ``generate`` refuses.
            EngineDeadError: the engine died or is closed.
        """
        if isinstance(messages, (str, bytes, Mapping)):
            raise InvalidRequestError(
                "messages must be a list of {role, content} objects, or a list of such lists",
                value=messages,
                param="messages",
            )
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("list[Sequence[Message]]", [messages] if one else list(messages))
        prompts: list[Prompt] = [
            self.tokenizer.apply_chat_template(chat, tools=tools) for chat in conversations
        ]
        return self._run(prompts, _params_of(params, len(prompts)), use_tqdm, lora)

    def score(self, texts_or_token_ids: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[Score]:
        """Log-probabilities of given texts under the model, token by token.

        Raises:
            InvalidRequestError: a text that does not fit.
            StepFailedError: scoring failed on the way.
            EngineDeadError: the engine died or is closed.
        """
        many = _as_prompts(texts_or_token_ids)
        params = _scoring()
        return [_score(completion) for completion in self._run(many, [params] * len(many), use_tqdm)]

    def perplexity(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        stride: int | None = None,
        max_length: int | None = None,
        lora: str | None = None,
        use_tqdm: bool = True,
    ) -> list[Perplexity]:
        """Perplexity of texts of any length: windows of `max_length` tokens (None: the context), each `stride` tokens on.

        Each token is scored once, in the first window that holds it, with all of that window before it. `stride` None is half
        a window: the smaller it is, the more each token has before it, and the longer it takes. See `engine.scoring.windows_of`.

        Raises:
            InvalidRequestError: a window beyond the context, or a stride beyond the window; nothing ran.
            StepFailedError: scoring failed on the way.
            EngineDeadError: the engine died or is closed.
        """
        assert self.config.max_model_len is not None
        most = self.config.max_model_len
        length = _int_between("max_length", most if max_length is None else max_length, 2, most)
        step = _int_between("stride", length // 2 if stride is None else stride, 1, length)
        many = [self._ids_of(text) for text in _as_prompts(texts)]
        windows = [(i, window) for i, ids in enumerate(many) for window in windows_of(len(ids), length, step)]
        logprobs: list[list[float]] = [[] for _ in many]
        at_once = max(1, TOKENS_AT_ONCE // length)
        for begin in range(0, len(windows), at_once):
            part = windows[begin : begin + at_once]
            prompts = [many[i][window.begin : window.end] for i, window in part]
            params = [_scoring(window.first - window.begin) for _, window in part]
            for (i, _), done in zip(part, self._run(prompts, params, use_tqdm, lora), strict=True):
                logprobs[i].append(math.fsum(_scored(done)))
        counts = [sum(w.end - w.first for i, w in windows if i == text) for text in range(len(many))]
        return [Perplexity(n, math.fsum(parts)) for n, parts in zip(counts, logprobs, strict=True)]

    def token_kl(
        self,
        other: LLM,
        texts: Prompt | Sequence[Prompt],
        *,
        lora: str | None = None,
        other_lora: str | None = None,
    ) -> list[TokenKL]:
        """How far `other` is from this model, at every token of given texts: exact KL divergence over the whole vocabulary.

        Rows of logits are held for a few tokens at a time, whatever the texts' lengths, and compared in float64. With
        ``deterministic=True`` in both, the figures do not depend on batch or step. `other` may be this very LLM, with another
        adapter.

        Raises:
            InvalidRequestError: the vocabularies or the tokens of a text differ, or a text is beyond a context; nothing ran.
            StepFailedError: scoring failed on the way.
            EngineDeadError: an engine died or is closed.
        """
        many = [self._ids_of(text) for text in _as_prompts(texts)]
        self._check_comparable(other, _as_prompts(texts), many)
        rows_at_once = max(1, ROW_VALUES_AT_ONCE // self.worker.vocab_size)
        builders = [KLBuilder(ids) for ids in many]
        for pieces in rounds_of([len(ids) for ids in many], rows_at_once, self.config.block_size):
            streams = [
                *self._submit_pieces(many, pieces, lora), *other._submit_pieces(many, pieces, other_lora)
            ]  # fmt: skip
            try:
                _wait_for_all(streams, use_tqdm=False)
            except BaseException:
                _abort_all(streams)
                raise
            rows = [_entries(stream.result()) for stream in streams]
            for piece, own, others in zip(pieces, rows[: len(pieces)], rows[len(pieces) :], strict=True):
                builders[piece.text].add(own, others)
        return [builder.build() for builder in builders]

    def _submit_pieces(
        self, texts: Sequence[list[int]], pieces: Sequence[Piece], lora: str | None
    ) -> list[RequestStream]:
        prompts = [texts[piece.text][: piece.end] for piece in pieces]
        params = [_scoring(piece.first, ALL_LOGPROBS) for piece in pieces]
        return self.worker.submit_all(prompts, params, loras=[lora] * len(pieces))

    def _ids_of(self, text: Prompt) -> list[int]:
        return self.tokenizer.encode(text) if isinstance(text, str) else list(text)

    def _check_comparable(self, other: LLM, texts: Sequence[Prompt], ids: Sequence[list[int]]) -> None:
        own_size, other_size = self.worker.vocab_size, other.worker.vocab_size
        if own_size != other_size:
            raise InvalidRequestError(
                f"the models' vocabularies differ: {own_size} and {other_size} tokens", value=other_size, limit=own_size,
                param="other", remedy="Compare models with the same tokenizer.",
            )  # fmt: skip
        most = min(llm.config.max_model_len or 0 for llm in (self, other))
        for i, (text, tokens) in enumerate(zip(texts, ids, strict=True)):
            if len(tokens) > most:
                raise InvalidRequestError(
                    f"text {i} has {len(tokens)} tokens, the shorter context holds {most}", value=len(tokens), limit=most,
                    param="texts", remedy="Cut it into shorter ones.",
                )  # fmt: skip
            if isinstance(text, str) and other.tokenizer.encode(text) != tokens:
                raise InvalidRequestError(
                    f"the models read text {i} as different tokens", value=i, param="texts",
                    remedy="Compare models with the same tokenizer, or give token ids.",
                )  # fmt: skip

    def add_lora(self, name: str, folder: str | Path) -> Lora:
        """Load a PEFT LoRA adapter, for `lora=name`; the engine needs the setting `enable_lora`.

        Raises:
            InvalidRequestError, ModelLoadError, OutOfMemoryError, EngineDeadError: as ``EngineWorker.add_lora``.
        """
        return self.worker.add_lora(name, folder)

    def remove_lora(self, name: str) -> None:
        """Unload an adapter.

        Raises:
            InvalidRequestError, EngineDeadError: as ``EngineWorker.remove_lora``.
        """
        self.worker.remove_lora(name)

    def stats(self) -> EngineStats:
        """Counters since start and gauges of now."""
        return self.worker.stats()

    def sleep(self, level: int = 1) -> None:
        """Give the device's memory back until `wake_up`: 1 keeps the weights in host memory, 2 loads them again then.

        Raises:
            EngineBusyError: requests run.
            ConfigError: no such level.
            EngineDeadError: the engine died or is closed.
        """
        self.worker.sleep(level)

    def wake_up(self) -> None:
        """Take requests again after `sleep`.

        Raises:
            OutOfMemoryError: the device does not have the memory any more; the engine sleeps on.
            EngineDeadError: the engine died or is closed.
        """
        self.worker.wake_up()

    def close(self) -> None:
        """Abort what runs, end the thread and give the device's memory back. A second call does nothing."""
        if self._finalizer is not None and self._finalizer.alive:
            self._finalizer()
            gc.collect()  # weights may sit in reference cycles, which would hold device memory until some later time

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = self.worker.health().state.value
        return f"LLM(model={self.config.model!r}, dtype={self.config.dtype}, device={self.config.device}, {state})"

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        use_tqdm: bool,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Completion]:
        loras = _one_each(lora, str, len(prompts), param="lora", what="adapters")
        streams = self.worker.submit_all(prompts, params, loras=loras)
        try:
            _wait_for_all(streams, use_tqdm)
        except BaseException:
            _abort_all(streams)
            raise
        completions = [stream.result() for stream in streams]
        failed = [c for c in completions if c.finish_reason is FinishReason.ERROR]
        if failed and self.worker.health().state is HealthState.DEAD:
            raise EngineDeadError(failed[0].error or "the engine died", remedy="Load the model again.")
        if failed:
            warnings.warn(
                f"{len(failed)} of {len(completions)} requests failed: {failed[0].error}",
                RuntimeWarning,
                stacklevel=3,
            )
        places = iter(completions)
        return [
            chosen for each in params for chosen in choose_best([next(places) for _ in each.each()], each)
        ]


def _wait_for_all(streams: Sequence[RequestStream], use_tqdm: bool) -> None:
    """Wait for the end of all streams, taking their output in as it comes."""
    from tqdm.auto import tqdm

    started = time.monotonic()
    with tqdm(total=len(streams), desc="requests", unit="req", disable=not use_tqdm, leave=False) as bar:
        pending = list(streams)
        done_tokens = 0
        while pending:
            pending[0].wait(REFRESH_S)
            left = []
            tokens = done_tokens
            for stream in pending:
                tokens += stream.drain()
                if stream.completion is None:
                    left.append(stream)
                else:
                    done_tokens += stream.completion.num_output_tokens
            bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-6):.0f} tok/s", refresh=False)
            bar.update(len(pending) - len(left))
            pending = left


def _abort_all(streams: Sequence[RequestStream]) -> None:
    """End what runs and see it end, so that the next call finds an idle engine."""
    for stream in streams:
        stream.abort()
    deadline = time.monotonic() + ABORT_WAIT_S
    for stream in streams:
        stream.wait(max(0.0, deadline - time.monotonic()))


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or many were given; checked as far as types go."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not hasattr(prompts, "__iter__"):
        raise _no_prompt(prompts)
    items: list[Any] = list(prompts)
    if items and hasattr(items[0], "__index__") and not hasattr(items[0], "__iter__"):
        return [_as_ids(items)]
    return [item if isinstance(item, str) else _as_ids(item) for item in items]


def _as_ids(prompt: Any) -> list[int]:
    """Plain integers, whatever kind of integers came (NumPy's too)."""
    if isinstance(prompt, (bytes, Mapping)):
        raise _no_prompt(prompt)
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise _no_prompt(prompt) from error


def _no_prompt(value: Any) -> InvalidRequestError:
    return InvalidRequestError(
        f"a prompt must be text or a list of token ids, got {type(value).__name__}",
        value=value,
        remedy="Give a str, a list[int], or a list of them.",
        param="prompt",
    )


def _params_of(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
    given = SamplingParams() if params is None else params
    return _one_each(given, SamplingParams, count, param="params", what="sampling params")


def _one_each(given: Any, kind: type, count: int, *, param: str, what: str) -> list[Any]:
    """`given` for each of `count` prompts: one of its kind, or None, for all of them; else as many as there are prompts."""
    if given is None or isinstance(given, kind):
        return [given] * count
    each = list(given)
    if len(each) != count:
        raise InvalidRequestError(
            f"{len(each)} {what} were given for {count} prompts",
            value=len(each),
            limit=count,
            remedy="Give one for all, or one for each prompt.",
            param=param,
        )
    return each


def _int_between(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
        return value
    raise InvalidRequestError(
        f"{name} must be an integer from {low} to {high}, got {value!r}", value=value, limit=high, param=name
    )


def _scoring(start: int = 0, num_logprobs: int = 0) -> SamplingParams:
    """Params of a request that generates nothing and scores its prompt from token `start` on."""
    return SamplingParams(max_tokens=0, prompt_logprobs=num_logprobs, logprob_start_len=start)


def _entries(completion: Completion) -> tuple[TokenLogprobs, ...]:
    if completion.finish_reason is not FinishReason.LENGTH:
        raise StepFailedError(completion.error or "scoring failed", value=completion.request_id)
    return completion.prompt_logprobs


def _scored(completion: Completion) -> tuple[float, ...]:
    return tuple([entry.logprob for entry in _entries(completion)])


def _score(completion: Completion) -> Score:
    logprobs = _scored(completion)
    assert len(logprobs) == completion.num_prompt_tokens - 1, (len(logprobs), completion.num_prompt_tokens)
    total = math.fsum(logprobs)
    return Score(completion.prompt_token_ids, logprobs, total, perplexity_of(total, len(logprobs)))
