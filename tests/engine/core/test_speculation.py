"""Guessing tokens: what is guessed, when it is worth it, and that nobody can tell from the tokens."""

from __future__ import annotations

import random

import pytest

from engine.config import EngineConfig, SpeculativeConfig
from engine.errors import ConfigError
from engine.fake_runner import expected_tokens
from engine.ngram import MAX_NEW_TOKENS, NgramIndex
from engine.speculation import (
    FIRST_GUESSED_STEPS,
    FIRST_PAUSE_STEPS,
    FIRST_PLAIN_STEPS,
    LONGEST_PAUSE_STEPS,
    REFRESH_STEPS,
    GainMeter,
)

EAGER = SpeculativeConfig(prompt_lookup_min=1, prompt_lookup_max=2, min_gain=0)


def brute_force(text: list[int], limit: int, shortest: int, longest: int) -> list[int]:
    """Look at every place of the text, longest n-gram first, latest place first."""
    for size in range(min(longest, len(text) - 1), shortest - 1, -1):
        for place in range(len(text) - 1, size - 1, -1):
            if text[place - size : place] == text[-size:]:
                behind = text[place:]
                return (behind * limit)[:limit]
    return []


@pytest.mark.parametrize("seed", range(40))
def test_the_index_finds_what_looking_everywhere_finds(seed: int) -> None:
    rng = random.Random(seed)
    shortest = rng.randint(1, 3)
    longest = shortest + rng.randint(0, 3)
    index = NgramIndex(shortest, longest)
    text = [rng.randint(0, 3) for _ in range(rng.randint(1, 30))]
    for _ in range(40):
        assert index.guess(text, 4) == brute_force(text, 4, shortest, longest)
        text += [rng.randint(0, 3) for _ in range(rng.randint(1, 3))]


def test_a_long_text_is_taken_in_over_several_calls() -> None:
    text = [*range(3 * MAX_NEW_TOKENS), 5, 6]
    index = NgramIndex(2, 2)
    guesses = [index.guess(text, 3) for _ in range(4)]
    assert guesses == [[], [], [], [7, 8, 9]]


def test_steps_with_guesses_compute_several_tokens_of_a_row(make_rig) -> None:
    rig = make_rig(speculative_config=EAGER, runner={"choose": lambda name, i: (10, 11, 12)[i % 3]})
    rig.add("a", [1, 2, 3], max_tokens=20, ignore_eos=True)
    rig.run()
    assert rig.tokens("a") == [(10, 11, 12)[i % 3] for i in range(20)]
    record = rig.requests["a"]
    # The text is known to repeat from its 4th token on: from then on five tokens a step, but for the last.
    assert (record.num_draft_tokens, record.num_accepted_tokens) == (12, 12)
    assert [n for step in rig.steps for _, n in step.rows] == [3, 1, 1, 1, 5, 5, 5, 1]
    assert sum(step.num_accepted_tokens for step in rig.steps) == 12
    assert rig.engine.stats().output_tokens == 20
    assert record.num_output_tokens == len(record.token_ns) == 20


def test_an_end_amid_right_guesses_ends_the_output_there(make_rig) -> None:
    cycle = (10, 11, 12)
    for ends in ({"stop_token_ids": (12,), "min_tokens": 8}, {"stop": ("\x0c",), "min_tokens": 8}):
        rig = make_rig(speculative_config=EAGER, runner={"choose": lambda name, i: cycle[i % 3]})
        rig.add("a", [1, 2, 3], max_tokens=20, ignore_eos=True, **ends)
        rig.run()
        assert rig.tokens("a") == [10, 11, 12, 10, 11, 12, 10, 11, 12]
        assert rig.last("a").finish_reason == "stop"
        assert rig.engine.stats().output_tokens == 9
        assert rig.requests["a"].num_accepted_tokens > 0


def test_a_row_with_penalties_is_not_guessed(make_rig) -> None:
    rig = make_rig(speculative_config=EAGER, runner={"choose": lambda name, i: i % 2})
    rig.add("plain", [1, 2, 3], max_tokens=12, ignore_eos=True)
    rig.add("penalised", [1, 2, 3], max_tokens=12, ignore_eos=True, presence_penalty=0.5)
    rig.run()
    assert rig.tokens("plain") == rig.tokens("penalised")
    assert rig.requests["plain"].num_accepted_tokens > 0
    assert rig.requests["penalised"].num_draft_tokens == 0


def test_guesses_leave_budget_and_blocks_to_others(make_rig) -> None:
    """Nobody is preempted for a guess, and a prompt that waits goes on although everybody guesses."""
    rig = make_rig(
        speculative_config=EAGER, num_blocks=12, block_size=2, max_batched_tokens=8, max_num_seqs=4, max_model_len=24,
        runner={"choose": lambda name, i: 9},
    )  # fmt: skip
    for name in "ab":
        rig.add(name, [1, 1, 1], max_tokens=8, ignore_eos=True)
    for _ in range(3):
        rig.step()
    rig.add("c", [2] * 6, max_tokens=2, ignore_eos=True)
    rig.run()
    assert not any(step.preempted for step in rig.steps)
    assert all(sum(n for _, n in step.rows) <= 8 for step in rig.steps)
    assert all(rig.tokens(name) == [9] * n for name, n in (("a", 8), ("b", 8), ("c", 2)))


def test_tokens_are_those_without_speculation(make_rig) -> None:
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    rig = make_rig(speculative_config=EAGER, runner={"vocab_size": 4})
    rig.add("a", prompt, max_tokens=60, ignore_eos=True)
    rig.run()
    assert rig.tokens("a") == expected_tokens(prompt, 60, 4)
    record = rig.requests["a"]
    assert 0 < record.num_accepted_tokens < record.num_draft_tokens


def play(meter: GainMeter, steps: int, *, plain_s: float, guessed_s: float, tokens: float) -> list[bool]:
    """Whether each of so many steps had guesses, when steps take so long and bring so much."""
    taken = []
    for _ in range(steps):
        guessed = meter.wants()
        meter.observe(tokens if guessed else 1.0, guessed_s if guessed else plain_s, guessed=guessed)
        taken.append(guessed)
    return taken


def test_guessing_stops_where_it_does_not_pay() -> None:
    meter = GainMeter(min_gain=1.0)
    first = FIRST_PLAIN_STEPS + FIRST_GUESSED_STEPS
    taken = play(meter, first + FIRST_PAUSE_STEPS, plain_s=1.0, guessed_s=2.0, tokens=1.5)
    assert taken == [False] * FIRST_PLAIN_STEPS + [True] * FIRST_GUESSED_STEPS + [False] * FIRST_PAUSE_STEPS
    assert meter.gain == pytest.approx(0.75)
    taken = play(
        meter, FIRST_GUESSED_STEPS + 2 * FIRST_PAUSE_STEPS + 1, plain_s=1.0, guessed_s=2.0, tokens=1.5
    )
    assert taken == [True] * FIRST_GUESSED_STEPS + [False] * 2 * FIRST_PAUSE_STEPS + [True]
    taken = play(meter, 100_000, plain_s=1.0, guessed_s=2.0, tokens=1.5)
    assert sum(taken) / len(taken) < 1.2 * FIRST_GUESSED_STEPS / LONGEST_PAUSE_STEPS * 2
    taken = play(meter, 2 * LONGEST_PAUSE_STEPS, plain_s=1.0, guessed_s=1.1, tokens=1.5)
    assert (
        taken[-2 * REFRESH_STEPS :].count(False) <= 3
    )  # it pays now, but for looking what a step without costs


def test_where_it_pays_a_step_without_guesses_comes_now_and_then() -> None:
    meter = GainMeter(min_gain=1.0)
    taken = play(meter, 1000, plain_s=1.0, guessed_s=1.5, tokens=3.0)
    assert meter.gain == pytest.approx(2.0)
    assert taken.count(False) == FIRST_PLAIN_STEPS + (1000 - FIRST_PLAIN_STEPS) // (REFRESH_STEPS + 1)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"method": "eagle"}, "method"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens"),
        ({"num_speculative_tokens": 33}, "num_speculative_tokens"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_max"),
        ({"min_gain": -1}, "min_gain"),
        ({"draft": "x"}, "draft"),
        ({"method": "draft_model"}, "model"),
        ({"model": "small"}, "model"),
    ],
)
def test_bad_settings_are_named(given: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="m", speculative_config=given)
    assert caught.value.param == f"speculative_config.{param}"
    assert caught.value.limit is not None


BY_DRAFT_MODEL = SpeculativeConfig(method="draft_model", model="small", num_speculative_tokens=2, min_gain=0)


def test_a_draft_model_catches_up_within_the_token_budget_and_then_guesses(make_rig) -> None:
    rig = make_rig(speculative_config=BY_DRAFT_MODEL, max_batched_tokens=24, block_size=4)
    prompt = list(range(60))
    rig.add("a", prompt, max_tokens=20, ignore_eos=True)
    rig.run()
    assert rig.tokens("a") == expected_tokens(prompt, 20, 256)
    drafting = [plan.drafting for plan in rig.runner.plans if plan.drafting is not None]
    # 61 tokens are known when the first was chosen; beside a token of the target's each, in pieces of 24.
    assert [plan.num_tokens.tolist() for plan in drafting[:3]] == [[24], [24], [15]]
    assert [plan.num_guesses.tolist() for plan in drafting[:4]] == [[0], [0], [2], [2]]
    # From then on what is computed again is what followed a wrong guess, or a last guess that was right.
    assert all(plan.num_tokens.max() <= 2 for plan in drafting[3:])
    record = rig.requests["a"]
    assert 0 < record.num_accepted_tokens < record.num_draft_tokens
    assert rig.engine.stats().speculation_method == "draft_model"


def test_a_draft_model_computes_no_more_known_tokens_than_the_budget(make_rig) -> None:
    rig = make_rig(speculative_config=BY_DRAFT_MODEL, max_batched_tokens=40, block_size=4)
    prompts = {name: [place] * 12 for place, name in enumerate("abcdef")}
    for name, prompt in prompts.items():
        rig.add(name, prompt, max_tokens=16, ignore_eos=True)
    rig.run()
    assert all(rig.tokens(name) == expected_tokens(prompt, 16, 256) for name, prompt in prompts.items())
    totals = [int(plan.drafting.num_tokens.sum()) for plan in rig.runner.plans if plan.drafting is not None]
    assert 36 < max(totals) <= 40, "all six at once would be 78 and more"


def test_what_a_draft_model_computed_is_found_in_the_prefix_cache(make_rig) -> None:
    rig = make_rig(speculative_config=BY_DRAFT_MODEL, block_size=4)
    prompt = list(range(40))
    for name, ending in (("a", [1, 2]), ("b", [3, 4])):
        rig.add(name, prompt + ending, max_tokens=8, ignore_eos=True)
        rig.run()
        assert rig.tokens(name) == expected_tokens(prompt + ending, 8, 256)
    firsts = {int(plan.drafting.start[0]) for plan in rig.runner.plans if plan.drafting is not None}
    assert 40 in firsts, "the second one's draft goes on behind the shared blocks"
    rig.engine.sleep()
    rig.engine.wake_up()
    rig.add("c", [*prompt, 5], max_tokens=8, ignore_eos=True)
    rig.run()
    assert rig.tokens("c") == expected_tokens([*prompt, 5], 8, 256)


def test_a_draft_model_that_costs_more_than_it_brings_is_left_alone(make_rig) -> None:
    """Its guesses take twice the time that they save: it computes nothing while it pauses."""
    slow = SpeculativeConfig(method="draft_model", model="small", num_speculative_tokens=2)
    rig = make_rig(speculative_config=slow, runner={"delay_s": 0.002, "draft_delay_s": 0.005})
    rig.add("a", [1, 2, 3], max_tokens=70, ignore_eos=True)
    rig.run()
    assert rig.tokens("a") == expected_tokens([1, 2, 3], 70, 256)
    drafted = [plan.drafting is not None for plan in rig.runner.plans]
    assert sum(drafted) == FIRST_GUESSED_STEPS
    assert not any(drafted[-20:])
    assert rig.engine.stats().speculation_gains[1] < 1.0


def test_catching_up_is_spread_over_the_steps_that_it_serves() -> None:
    meter = GainMeter(min_gain=1.0)
    play(meter, FIRST_PLAIN_STEPS + 20, plain_s=1.0, guessed_s=1.5, tokens=3.0)
    assert meter.gain == pytest.approx(2.0)
    # Prompts that a draft model computes every 32 steps, for as long as 32 steps: each step costs one more.
    for step in range(600):
        if step % 32 == 0:
            assert meter.put_off(33.5, guessed=True) == pytest.approx(meter.guessed_s)
        if meter.wants():
            meter.observe(3.0, 1.5, guessed=True)
        else:
            meter.observe(1.0, 1.0, guessed=False)
    assert meter.gain == pytest.approx(3.0 / 2.5, rel=0.15)  # the seconds put off ebb away between prompts


def test_a_pause_is_long_beside_what_was_caught_up_in_vain() -> None:
    meter = GainMeter(min_gain=1.0)
    play(meter, FIRST_PLAIN_STEPS, plain_s=1.0, guessed_s=2.0, tokens=1.5)
    assert meter.put_off(101.0, guessed=False) == pytest.approx(1.0)
    play(meter, FIRST_GUESSED_STEPS, plain_s=1.0, guessed_s=2.0, tokens=1.5)
    assert meter.pause > 25 * 100
    assert meter.put_off_s == 0.0
