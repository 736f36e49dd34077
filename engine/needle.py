"""The needle test: does deterministic mode hold on this very device?

One request, the needle, is answered alone, then beside others that share its steps, cut its prompt into other chunks and
come and go while it decodes, and then from the prefix cache. Its tokens and log-probabilities must be the same to the bit.
Kernels, libraries and devices change: that they promise it is no proof, so an engine in deterministic mode is tested when
it is built, and says what came out.

Boundary: drives an engine that has no request yet, step by step; the caller makes a new one on the same runner after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from engine.engine import Engine
from engine.plan import TokenLogprobs
from engine.sampling_params import SamplingParams

PROMPT_TOKENS = 700  # more than one split of attention, where the engine takes as many
OUTPUT_TOKENS = 12
OTHERS = 7
MAX_STEPS = 10_000
NEEDLE = "needle"


@dataclass(frozen=True, slots=True)
class Proof:
    """What the needle test found. `difference` is None when every bit was the same."""

    difference: str | None

    @property
    def holds(self) -> bool:
        return self.difference is None


def find_needle(engine: Engine, vocab_size: int) -> Proof:
    """Run the test. It takes about as long as `OTHERS` + 2 short requests.

    Raises:
        EngineDeadError: the device broke meanwhile.
    """
    random, config = Random(0), engine.config
    assert config.num_blocks is not None
    assert config.max_model_len is not None
    assert config.max_batched_tokens is not None
    pool = config.num_blocks * config.block_size
    length = max(1, min(PROMPT_TOKENS, config.max_model_len - OUTPUT_TOKENS, pool - OUTPUT_TOKENS))
    prompt = [random.randrange(vocab_size) for _ in range(length)]
    # The others fit beside the needle and in the context; their prompts fill more than a step, so that the needle's is cut
    # elsewhere.
    each = OUTPUT_TOKENS + config.block_size  # what one of them takes beside its prompt, at most
    room = min(
        (pool - length - each) // OTHERS - each,
        2 * config.max_batched_tokens // OTHERS,
        config.max_model_len - OUTPUT_TOKENS,
    )
    others = [[random.randrange(vocab_size) for _ in range(room - i)] for i in range(OTHERS) if room > i]
    alone = _run(engine, prompt, [], salt="alone")
    for name, beside, salt in (
        ("beside other requests", others, "beside"),
        ("from the prefix cache", [], "beside"),
    ):
        difference = _difference(alone, _run(engine, prompt, beside, salt=salt))
        if difference is not None:
            return Proof(f"{name}: {difference}")
    return Proof(None)


def _run(engine: Engine, prompt: list[int], others: list[list[int]], *, salt: str) -> list[TokenLogprobs]:
    """The needle's figures; half of the others are there before it, the other half come one by one while it decodes."""
    needle = SamplingParams(max_tokens=OUTPUT_TOKENS, temperature=1.0, seed=1, ignore_eos=True, logprobs=2)
    params = SamplingParams(max_tokens=OUTPUT_TOKENS // 2, temperature=0.0, ignore_eos=True)
    before, later = others[: len(others) // 2], others[len(others) // 2 :]
    for place, tokens in enumerate(before):
        engine.add(engine.make_request(tokens, params, request_id=f"before {place}"))
    engine.add(engine.make_request(prompt, needle, request_id=NEEDLE, cache_salt=salt))
    found: list[TokenLogprobs] = []
    for _ in range(MAX_STEPS):
        if not engine.has_work:
            return found
        for delta in engine.step().deltas:
            if delta.request_id != NEEDLE:
                continue
            found.extend(delta.logprobs)
            if later and delta.logprobs:
                engine.add(engine.make_request(later.pop(), params, request_id=f"later {len(later)}"))
    raise AssertionError("the engine makes no progress")


def _difference(expected: list[TokenLogprobs], found: list[TokenLogprobs]) -> str | None:
    """The first place where the two differ in a token or in a bit of a log-probability."""
    for place, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            return f"output token {place} is {right.token_id} ({right.logprob!r}), alone {left.token_id} ({left.logprob!r})"
    if len(expected) != len(found):
        return f"{len(found)} output tokens, alone {len(expected)}"
    return None
