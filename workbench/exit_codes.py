"""What a Quire process's exit code says."""

from __future__ import annotations

FAILURE = 1
BAD_INPUT = 2  # a value that somebody gave: trying again changes nothing
ENGINE_DEAD = 75  # the engine cannot go on in this process: the supervisor starts another
INTERRUPTED = 130
