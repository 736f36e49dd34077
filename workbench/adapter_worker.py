"""AdapterWorker: an adapter on another worker's engine, as a worker of its own, so that who asks for a model need not know.

Its requests carry the adapter, its live requests and those that its sinks hear of are those that do; statistics, the record
log and health are the engine's, which other models share. Closing it unloads the adapter: requests that carry it run to
their end.

Boundary: which name a request carries. Loading adapters, and deciding which engine serves one, is ``workbench.host``'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine.errors import EngineDeadError
from engine.lora import Lora
from engine.records import EngineStats, Health, Sink
from engine.sampling_params import SamplingParams
from engine.stream import RequestStream
from engine.structured_outputs import StructuredOutputsParams
from engine.worker import EngineWorker


class AdapterWorker(EngineWorker):
    """`adapter`: loaded on `engine`. `version_digest`: of base and adapter together.

    It has no engine and no thread of its own, hence none of its base class's state: every public member is here.
    """

    def __init__(self, engine: EngineWorker, adapter: Lora, version_digest: str) -> None:
        self.config = replace(engine.config, version_digest=version_digest)
        self.tokenizer = engine.tokenizer
        self.vocab_size = engine.vocab_size
        self.pooling = engine.pooling
        self.records = engine.records
        self.lora: str = adapter.name
        self.adapter = adapter
        self._on = engine
        self._own_sinks: tuple[Sink, ...] = ()
        self._gone = False

    def start(self) -> None:
        """Nothing to do: the engine runs."""

    def close(self, timeout_s: float = 10.0) -> None:
        """Take no more requests; the adapter goes when its last one has ended. A second call does nothing."""
        if not self._gone:
            self._gone = True
            with suppress(EngineDeadError):  # gone with its engine
                self._on.remove_lora(self.lora)
            for sink in self._own_sinks:
                self._on.remove_sink(sink)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        lora: str | None = None,
        arrival_ns: int | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> RequestStream:
        """As the engine's worker does, with this adapter unless `lora` names another one."""
        self._refuse_if_gone()
        return self._on.submit(
            prompt, params, request_id=request_id, cache_salt=cache_salt, lora=lora or self.lora, arrival_ns=arrival_ns,
            priority=priority, client=client, timeout_s=timeout_s,
        )  # fmt: skip

    def submit_all(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        loras: Sequence[str | None] | None = None,
        request_ids: Sequence[str] | None = None,
        cache_salt: str = "",
        arrival_ns: int | None = None,
        priority: int = 0,
        client: str = "",
        timeout_s: float | None = None,
    ) -> list[RequestStream]:
        """As the engine's worker does, with this adapter where `loras` names none."""
        self._refuse_if_gone()
        each = [lora or self.lora for lora in loras or [None] * len(prompts)]
        return self._on.submit_all(
            prompts, params, loras=each, request_ids=request_ids, cache_salt=cache_salt, arrival_ns=arrival_ns,
            priority=priority, client=client, timeout_s=timeout_s,
        )  # fmt: skip

    @property
    def num_refused(self) -> int:
        return self._on.num_refused

    @property
    def num_live(self) -> int:
        """Live requests that carry the adapter."""
        return self._on.num_live_of(self.lora)

    def num_live_of(self, lora: str) -> int:
        return self._on.num_live_of(lora)

    def abort(self, request_id: str) -> None:
        self._on.abort(request_id)

    def abort_all(self, reason: str) -> None:
        """Nothing: its engine's requests are ended by the engine's worker."""

    def _refuse_if_gone(self) -> None:
        if self._gone:
            raise EngineDeadError("the adapter was unloaded", value=self.lora, remedy="Load the model again.")

    # ── the engine's ────────────────────────────────────────────────────────────────────────────────────────────────

    def stats(self) -> EngineStats:
        """The whole engine's, under this version's digest."""
        return replace(self._on.stats(), version_digest=self.config.version_digest)

    def health(self) -> Health:
        return self._on.health()

    @property
    def awaited_since_ns(self) -> int | None:
        return self._on.awaited_since_ns

    def give_up(self, error: EngineDeadError) -> None:
        """The whole engine is given up."""
        self._on.give_up(error)

    def compile_grammar(self, structured: StructuredOutputsParams) -> None:
        self._on.compile_grammar(structured)

    def add_sink(self, sink: Sink, *, lora: str | None = None) -> None:
        """Events, and records of the adapter's requests. Steps are the engine's: ask its own worker."""
        self._own_sinks = (*self._own_sinks, sink)
        self._on.add_sink(sink, lora=lora or self.lora)

    def remove_sink(self, sink: Sink) -> None:
        self._on.remove_sink(sink)

    def sleep(self, level: int = 1) -> None:
        """The whole engine sleeps."""
        self._on.sleep(level)

    def wake_up(self) -> None:
        self._on.wake_up()

    @property
    def loras(self) -> tuple[Lora, ...]:
        return self._on.loras

    def add_lora(self, name: str, folder: str | Path) -> Lora:
        return self._on.add_lora(name, folder)

    def remove_lora(self, name: str) -> None:
        self._on.remove_lora(name)
