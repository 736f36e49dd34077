"""Request (what was asked, immutable) and Sequence (how far it is, owned by the scheduler).

A Sequence is the one mutable object of the flow. Only the scheduler writes to it; a runner never sees one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from engine.grammar import Grammar
from engine.lora import Lora
from engine.sampling_params import SamplingParams


class FinishReason(str, enum.Enum):
    """Why a request ended; the first two are OpenAI's names."""

    STOP = "stop"  # end-of-sequence token, stop token or stop text
    LENGTH = "length"  # max_tokens or the context's end
    ABORT = "abort"  # the caller, or the caller's connection, went away
    ERROR = "error"  # the step that served it failed
    TIMEOUT = "timeout"  # it waited too long for its turn, or its own deadline was over

    @property
    def is_failure(self) -> bool:
        """Whether the server is why there is no whole output."""
        return self in (FinishReason.ERROR, FinishReason.TIMEOUT)


class SequenceStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class Request:
    """One generation request, tokenized and checked."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int = 0  # always set: the caller's, or drawn by the engine
    arrival_ns: int = 0  # time.monotonic_ns() at submission
    deadline_ns: int | None = (
        None  # when it ends with TIMEOUT, as far as it is; None: it may take what it takes
    )
    cache_salt: str = ""  # requests share prefix blocks only under the same salt
    priority: int = 0  # lower runs earlier; ties by the clients' shares, then by arrival
    client: str = ""  # whom it counts for: clients get equal or weighted shares
    lora: Lora | None = None  # the adapter that computes it; None: the base alone
    grammar: Grammar | None = None  # of params.structured_outputs, compiled
    grammar_compile_ms: float = 0.0  # that were spent on it for this request


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's progress. Written by the scheduler alone.

    `token_ids` are the tokens that the host knows; those that steps in flight are choosing are counted by the scheduler alone
    (``Scheduler.num_scheduled``). `num_computed` of them have their KV by steps that have been committed; while the sequence
    decodes, this is brought up to date with each full block.
    """

    request: Request
    token_ids: list[int]  # prompt, then output
    num_prompt_tokens: int
    max_total_tokens: int  # prompt + max_tokens, clipped to max_model_len
    status: SequenceStatus = SequenceStatus.WAITING
    row: int = -1  # the runner's row while RUNNING
    is_decoding: bool = False  # runs, and computes one token in each step to come
    epoch: int = 0  # raised by preemption: how often it has to be admitted again
    num_computed: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache at first admission
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # guessed for it
    num_accepted_tokens: int = 0  # rightly
    block_ids: list[int] = field(
        default_factory=list
    )  # its block table; only grows, and is replaced when given back
    block_hashes: list[bytes] = field(default_factory=list)  # digest chain of the full blocks known so far
    finish_reason: FinishReason | None = None

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """Tokens chosen so far and known on the host."""
        return self.token_ids[self.num_prompt_tokens :]
