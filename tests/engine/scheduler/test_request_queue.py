"""RequestQueue: the order in which sequences run, by priority, by fair shares and by arrival, against a plain sorted list."""

from __future__ import annotations

import random

import pytest

from engine.fair_shares import FairShares
from engine.request import Request, Sequence, SequenceStatus
from engine.request_queue import RequestQueue
from engine.sampling_params import SamplingParams


def sequence(name: str, *, tokens: int = 10, priority: int = 0, client: str = "") -> Sequence:
    request = Request(
        name, tuple(range(tokens)), SamplingParams(max_tokens=10), priority=priority, client=client
    )
    return Sequence(request, list(range(tokens)), tokens, tokens + 10)


def queue_of(*sequences: Sequence, **weights: float) -> RequestQueue:
    queue = RequestQueue(weights)
    for seq in sequences:
        queue.add(seq)
    return queue


def run_next(queue: RequestQueue, num_output: int = 10) -> Sequence:
    """Admit the head and let it run to its end."""
    seq = queue.head
    queue.admit(seq)
    seq.status = SequenceStatus.RUNNING
    seq.token_ids += [0] * num_output
    queue.end(seq)
    queue.check_integrity()
    return seq


def test_one_client_is_served_in_order_of_arrival_whatever_the_sizes() -> None:
    queue = queue_of(*(sequence(f"r{i}", tokens=1 + 97 * i % 50) for i in range(20)))
    assert list(queue) == [f"r{i}" for i in range(20)]


def test_lower_priority_comes_first_and_ties_are_broken_by_arrival() -> None:
    queue = queue_of(
        sequence("late", priority=3), sequence("a"), sequence("urgent", priority=-1), sequence("b")
    )
    assert list(queue) == ["urgent", "a", "b", "late"]


def test_one_that_was_put_back_is_before_all_others() -> None:
    queue = queue_of(sequence("a"), sequence("b"), sequence("c", priority=-5))
    ran = queue.head
    queue.admit(ran)
    ran.epoch = 1
    queue.put_back(ran)
    queue.add(sequence("d", priority=-9))
    assert list(queue) == ["c", "d", "a", "b"]


def test_who_asks_for_little_is_not_behind_all_of_who_asks_for_much() -> None:
    queue = queue_of(*(sequence(f"much{i}", client="much") for i in range(50)))
    run_next(queue)
    queue.add(sequence("little", client="little"))
    order = list(queue)
    assert order.index("little") <= 1


def test_clients_get_tokens_by_their_weights() -> None:
    queue = RequestQueue({"big": 3.0})
    for i in range(200):
        queue.add(sequence(f"big{i}", client="big"))
        queue.add(sequence(f"small{i}", client="small", tokens=30))
    served = {"big": 0, "small": 0}
    for _ in range(120):
        seq = run_next(queue)
        served[seq.request.client] += len(seq.token_ids)
    assert served["big"] == pytest.approx(3 * served["small"], rel=0.1)  # a request is 3 % of the smaller one


def test_outputs_that_got_longer_than_expected_are_charged_later() -> None:
    """Both ask alike and always have four in the queue, but the outputs of one are ten times as long."""
    queue = RequestQueue()
    served = {"long": 0, "short": 0}
    for client in [*served] * 4:
        queue.add(sequence(f"{client}{len(queue)}", client=client))
    for i in range(2000):
        seq = queue.head
        client = seq.request.client
        served[client] += len(run_next(queue, 500 if client == "long" else 50).token_ids)
        queue.add(sequence(f"next{i}", client=client))
    # A debt is charged to what comes behind the four that wait already: they are 2 % of what each was served, twice.
    assert served["long"] == pytest.approx(served["short"], rel=0.1)


def test_newcomers_overtake_one_that_waits_for_a_bounded_time_only() -> None:
    queue = queue_of(sequence("first", client="a", tokens=400), sequence("waits", client="a", tokens=10))
    run_next(queue)
    for i in range(100):
        queue.add(sequence(f"new{i}", client=f"new{i}"))
        if run_next(queue).request_id == "waits":
            return
    raise AssertionError("newcomers overtook it a hundred times")


def test_clients_that_are_gone_are_forgotten() -> None:
    shares = FairShares()
    waits = shares.begin("stays", 10, 10)
    for i in range(5000):
        share = shares.begin(f"c{i}", 10, 10)
        shares.admit(share)
        shares.end(f"c{i}", share, 20, 10)
        assert len(shares) < 300
    shares.end("stays", waits, 0, None)
    assert len(shares) == 0


def test_random_operations_keep_order_and_counts() -> None:
    """Against sorted(): the queue yields by (priority, start of the share, arrival), whatever was removed before."""
    rng = random.Random(7)
    queue = RequestQueue({"b": 2.0})
    alive: list[Sequence] = []
    for i in range(3000):
        if not alive or rng.random() < 0.52:
            seq = sequence(
                f"r{i}", tokens=rng.randint(1, 40), priority=rng.randint(-1, 1), client=rng.choice("abc")
            )
            queue.add(seq)
            alive.append(seq)
        elif rng.random() < 0.6:
            alive.remove(run_next(queue, rng.randint(0, 10)))
        else:
            victim = alive.pop(rng.randrange(len(alive)))
            queue.end(victim)  # aborted while it waits
        if i % 20 == 0:
            queue.check_integrity()
            keys = {
                s.request_id: (s.request.priority, queue._share_of[s.request_id].start, n)
                for n, s in enumerate(alive)
            }
            assert list(queue) == sorted(keys, key=lambda name: keys[name])
    assert len(queue._heap) <= 2 * len(queue) + 65
