"""How far a draft model is: what it computed counts wherever it is found again, and no further."""

from __future__ import annotations

from engine.draft_progress import DraftProgress
from engine.request import Request, Sequence
from engine.sampling_params import SamplingParams


def sequence(block_ids: list[int], digests: list[bytes], num_tokens: int) -> Sequence:
    request = Request("a", tuple(range(num_tokens)), SamplingParams())
    return Sequence(
        request, list(range(num_tokens)), num_tokens, 99, block_ids=block_ids, block_hashes=digests
    )


def computed(progress: DraftProgress, seq: Sequence, num_tokens: int) -> None:
    progress.commit([progress.row(seq, num_tokens, 0)], {})


def test_full_blocks_are_found_by_block_and_content() -> None:
    progress = DraftProgress(block_size=4)
    computed(progress, sequence([7, 3, 5], [b"x", b"y"], 11), 10)
    assert progress.lag(sequence([7, 3, 6], [b"x", b"y", b"z"], 13), 13) == 5
    assert progress.lag(sequence([7, 3], [b"x", b"other"], 9), 9) == 5
    assert progress.lag(sequence([3, 7], [b"x", b"y"], 9), 9) == 9
    # The last known token is computed again: what follows it is guessed from there.
    assert progress.lag(sequence([7, 3], [b"x", b"y"], 8), 8) == 1


def test_a_block_that_is_written_to_counts_for_nobody_until_that_is_done() -> None:
    progress = DraftProgress(block_size=4)
    computed(progress, sequence([0, 1], [b"x", b"y"], 9), 9)
    progress.row(sequence([1], [], 4), 2, 0)  # somebody else's now, by a step that then fails
    assert progress.lag(sequence([0, 1], [b"x", b"y"], 9), 9) == 5


def test_nothing_is_left_when_the_blocks_are_emptied() -> None:
    progress = DraftProgress(block_size=4)
    computed(progress, sequence([0, 1], [b"x", b"y"], 9), 9)
    progress.forget_blocks()
    assert progress.lag(sequence([0, 1], [b"x", b"y"], 9), 9) == 9


def test_a_preempted_sequence_goes_on_where_its_blocks_are_found() -> None:
    progress = DraftProgress(block_size=4)
    seq = sequence([0, 1, 2], [b"x", b"y"], 11)
    computed(progress, seq, 11)
    assert progress.lag(seq, 11) == 0
    seq.epoch, seq.block_ids = 1, [0, 9, 8]
    assert progress.lag(seq, 11) == 7


def test_what_was_guessed_wrongly_is_computed_again() -> None:
    progress = DraftProgress(block_size=4)
    for num_right, lag in ((0, 1), (1, 1), (2, 1), (3, 2)):  # the third guess itself is not computed
        seq = sequence([0, 1, 2], [], 5)
        row = progress.row(seq, 5, 3)
        seq.token_ids += range(num_right + 1)
        progress.commit([row], {seq: num_right})
        assert progress.lag(seq, len(seq.token_ids)) == lag
