"""The runners of a tensor-parallel engine: TensorParallelRunner is the engine's, a FollowerRunner serves each other rank.

Every step goes to all ranks as it is planned, and each runs it on its own part of the model. Rank 0 alone computes logits and
chooses; the others get the chosen tokens within the step (``ModelRunner``), so that their rows never differ, whatever a request
asks for.

A rank that is gone takes the engine: what the others hold of a step in flight fits nothing any more. So does a step that fails,
because where the ranks stand then is not known.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.errors import EngineDeadError, EngineError
from engine.parallel.messages import Reset, Sleep, for_followers
from engine.parallel.processes import RankProcesses
from engine.parallel.ranks import Ranks
from engine.plan import StepPlan, StepResult
from engine.runner.model_runner import ModelRunner


class TensorParallelRunner:
    """Implements the Runner protocol: rank 0's own runner, and the processes of the others."""

    def __init__(self, runner: ModelRunner, ranks: Ranks, processes: RankProcesses) -> None:
        self._runner = runner
        self._ranks = ranks
        self._processes = processes
        self._level = 0  # of the sleep
        self.on_lost: Callable[[EngineDeadError], None] | None = None  # told once, on a thread of its own
        processes.on_lost = self._rank_ended

    @property
    def max_inflight(self) -> int:
        return self._runner.max_inflight

    def submit(self, plan: StepPlan) -> None:
        """Start the step on all ranks.

        Raises:
            EngineDeadError: the runner is closed, or a rank is gone.
        """
        self._processes.send(for_followers(plan))
        self._runner.submit(plan)

    def collect(self) -> StepResult:
        """Wait for the oldest step.

        Raises:
            EngineDeadError: a rank is gone, or the step failed on one.
        """
        try:
            return self._runner.collect()
        except Exception as error:  # whatever it was, the ranks do not stand at the same place any more
            raise self._processes.reason(error) from error

    def reset_rows(self) -> None:
        """Forget every row and every step in flight, on all ranks.

        Raises:
            EngineDeadError: a rank is gone.
        """
        self._runner.reset_rows()
        self._processes.send(Reset())
        self._processes.await_all()

    def sleep(self, level: int) -> None:
        """Give weights and KV cache of all ranks back. See ``ModelRunner.sleep``.

        Raises:
            ConfigError, EngineDeadError: as there, or a rank is gone.
        """
        self._runner.sleep(level)
        self._level = level
        self._processes.send(Sleep(level))
        self._processes.await_all()

    def wake_up(self) -> None:
        """Be as before `sleep` on all ranks. If it raises, all sleep on.

        Raises:
            OutOfMemoryError, CorruptWeightsError, EngineDeadError: as ``ModelRunner.wake_up``, of any rank.
        """
        self._processes.send(Sleep(0))
        failed: EngineError | None = None
        try:
            self._runner.wake_up()
        except EngineError as error:
            failed = error
        try:
            self._processes.await_all()
        except EngineDeadError:
            raise
        except EngineError as error:
            if failed is None:
                self._runner.sleep(self._level)
            failed = failed or error
        if failed is not None:
            self._processes.send(Sleep(self._level))
            self._processes.await_all()
            raise failed

    def _rank_ended(self, lost: EngineDeadError) -> None:
        self._ranks.abort()  # so that a step in flight does not wait for it
        if self.on_lost is not None:
            self.on_lost(lost)

    def close(self) -> None:
        """End the other ranks and give rank 0's memory back. A second call does nothing."""
        self.on_lost = None  # it leads back here
        self._processes.close()
        self._ranks.close()
        self._runner.close()


class FollowerRunner:
    """The runner of a rank that is not the first: it keeps up with the steps, and gives their results to nobody."""

    def __init__(self, runner: ModelRunner, ranks: Ranks) -> None:
        self._runner = runner
        self._ranks = ranks
        self._num_inflight = 0
        self._is_asleep = False

    def step(self, plan: StepPlan) -> None:
        """Run the step, or start it where another may run beside it. What it raises, this or a later call raises."""
        self._runner.submit(plan)
        self._num_inflight += 1
        self._drain(self._runner.max_inflight - 1)

    def reset_rows(self) -> None:
        """Forget every row and every step in flight."""
        self._runner.reset_rows()
        self._num_inflight = 0

    def sleep(self, level: int) -> None:
        """As ``ModelRunner.sleep``. Asleep already, because it could not wake up: nothing happens."""
        if not self._is_asleep:
            self._drain(0)
            self._runner.sleep(level)
            self._is_asleep = True

    def wake_up(self) -> None:
        """As ``ModelRunner.wake_up``."""
        self._runner.wake_up()
        self._is_asleep = False

    def close(self) -> None:
        """Leave the other ranks and give the memory back."""
        self._ranks.close()
        self._runner.close()

    def _drain(self, most: int) -> None:
        while self._num_inflight > most:
            self._num_inflight -= 1
            self._runner.collect()
