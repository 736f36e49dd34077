"""Waiting for many streams in the caller's thread: output is taken in as it comes, beside a progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence

from engine.records import Completion
from engine.stream import RequestStream

REFRESH_S = 0.1  # how often output is taken in and the progress bar moves
ABORT_WAIT_S = 5.0


def finished(streams: Sequence[RequestStream], use_tqdm: bool = False) -> list[Completion]:
    """The completions of all streams, in their order. Whoever interrupts the wait ends them."""
    try:
        wait_for_all(streams, use_tqdm)
    except BaseException:
        abort_all(streams)
        raise
    return [stream.result() for stream in streams]


def wait_for_all(streams: Sequence[RequestStream], use_tqdm: bool) -> None:
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


def abort_all(streams: Sequence[RequestStream]) -> None:
    """End what runs and see it end, so that the next call finds an idle engine."""
    for stream in streams:
        stream.abort()
    deadline = time.monotonic() + ABORT_WAIT_S
    for stream in streams:
        stream.wait(max(0.0, deadline - time.monotonic()))
