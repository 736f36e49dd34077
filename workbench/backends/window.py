"""A window of calls: so many at once, results in order, ended together when one of them must not be waited for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def in_window(
    calls: Sequence[Callable[[], T]], max_concurrency: int, on_abort: Callable[[], None]
) -> list[T]:
    """Run `calls` in threads, `max_concurrency` at a time; their results in order.

    When one raises, or the waiting thread is interrupted, those that have not begun are dropped, `on_abort` is called to end
    those that run, and the error is raised.
    """
    if not calls:
        return []
    executor = ThreadPoolExecutor(min(max_concurrency, len(calls)), thread_name_prefix="quire-backend")
    futures: list[Future[T]] = [executor.submit(call) for call in calls]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        on_abort()
        raise
    finally:
        executor.shutdown(wait=True)
    return [future.result() for future in futures]
