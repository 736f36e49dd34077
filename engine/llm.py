"""LLM: the front of the engine for notebooks and scripts: prompts in, completions out, in the caller's thread.

Builds an engine for one model, runs it on an EngineWorker, and gives its memory back on ``close()``, at the end of a ``with``
block, or when the object is no longer referenced. Streaming and serving many callers is ``engine.worker``'s.
"""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from engine import embedding, scoring
from engine.best_of import choose_best
from engine.chat_messages import Message
from engine.config import EngineConfig
from engine.embedding import Embedding, Relevance
from engine.errors import EngineDeadError, InvalidRequestError
from engine.lora import Lora
from engine.pooling import PoolingParams
from engine.prompts import Prompt, as_prompts, one_each, params_of
from engine.records import Completion, EngineStats, HealthState
from engine.sampling_params import SamplingParams
from engine.scoring import Perplexity
from engine.token_kl import TokenKL
from engine.tokenizer import TokenizerLike
from engine.waiting import finished
from engine.worker import EngineWorker


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
        many = as_prompts(prompts)
        return self._run(many, params_of(params, len(many)), use_tqdm, lora)

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
        return self._run(prompts, params_of(params, len(prompts)), use_tqdm, lora)

    def score(self, texts_or_token_ids: Prompt | Sequence[Prompt], *, use_tqdm: bool = True) -> list[Score]:
        """Log-probabilities of given texts under the model, token by token.

        Raises:
            InvalidRequestError: a text that does not fit.
            StepFailedError: scoring failed on the way.
            EngineDeadError: the engine died or is closed.
        """
        many = as_prompts(texts_or_token_ids)
        done = self._run(many, [scoring.scoring_params()] * len(many), use_tqdm)
        return [_score(completion) for completion in done]

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        params: PoolingParams | None = None,
        *,
        lora: str | None = None,
        use_tqdm: bool = True,
    ) -> list[Embedding]:
        """One vector for each text: of a model that generates, or of an encoder, pooled as it was trained unless `params` say how.

        Raises:
            InvalidRequestError: the model has no embeddings, or a text does not fit; nothing ran.
            StepFailedError: a step failed on the way.
            EngineDeadError: the engine died or is closed.
        """
        return embedding.embed(self.worker, as_prompts(texts), params, lora=lora, use_tqdm=use_tqdm)

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        params: PoolingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[Relevance]:
        """Documents by how well they fit the query, the best first: rated by a cross-encoder, else by the cosine of embeddings.

        Raises:
            InvalidRequestError: a classifier of several labels, or a text that does not fit; nothing ran.
            StepFailedError, EngineDeadError: as `embed`.
        """
        return embedding.rerank(self.worker, query, documents, params, use_tqdm=use_tqdm)

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
        return scoring.perplexity(
            self, as_prompts(texts), stride=stride, max_length=max_length, lora=lora, use_tqdm=use_tqdm
        )

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
        return scoring.token_kl(self, other, as_prompts(texts), lora=lora, other_lora=other_lora)

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
        loras = one_each(lora, str, len(prompts), param="lora", what="adapters")
        streams = self.worker.submit_all(prompts, params, loras=loras)
        completions = finished(streams, use_tqdm)
        failed = [c for c in completions if c.finish_reason.is_failure]
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


def _score(completion: Completion) -> Score:
    logprobs = tuple([entry.logprob for entry in scoring.entries_of(completion)])
    assert len(logprobs) == completion.num_prompt_tokens - 1, (len(logprobs), completion.num_prompt_tokens)
    total = math.fsum(logprobs)
    return Score(completion.prompt_token_ids, logprobs, total, scoring.perplexity_of(total, len(logprobs)))
