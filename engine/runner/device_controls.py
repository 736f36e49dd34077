"""DeviceControls: what rows ask for that changes their logits, in the device's memory.

Made when the first row asks; its bytes are part of what the profile run measures. A row's place is filled with its
admission, by the step's one copy. Boundary: filling tables; what they do is ``engine.kernels.logit_controls``'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.kernels.logit_controls import (
    LENGTH,
    PREFIX,
    UNTIL,
    ControlTables,
    control_logits,
    control_logits_ref,
)
from engine.plan import Int32
from engine.runner.controls import Controls
from engine.runner.structured import token_bits
from engine.sampling_params import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_LATE_STOPS, MAX_LOGIT_BIASES

MAX_BANS = MAX_BAD_WORDS + MAX_LATE_STOPS + 64  # 64: end-of-sequence ids, of which a model has a few
NUM_NUMBERS = 9  # of a row, in the order of ControlTables
NOTHING = Controls(0)


class DeviceControls:
    """The tables of `num_rows` rows."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(num_rows, *shape, dtype=dtype, device=device)

        self._device = device
        self._numbers = torch.zeros(NUM_NUMBERS, num_rows, dtype=torch.int32, device=device)
        self._numbers[0].view(torch.float32).fill_(1.0)
        repetition, frequency, presence = (row.view(torch.float32) for row in self._numbers[:3])
        counts_tokens, is_limited, num_biases, num_bans, num_prompt, marked = self._numbers[3:]
        self.tables = ControlTables(
            repetition,
            frequency,
            presence,
            counts_tokens,
            is_limited,
            num_biases,
            num_bans,
            num_prompt,
            marked,
            marks=zeros(vocab_size, dtype=torch.int16),
            allowed=zeros(-(-vocab_size // 32)),
            bias_ids=zeros(MAX_LOGIT_BIASES),
            biases=zeros(MAX_LOGIT_BIASES, dtype=torch.float32),
            bans=zeros(MAX_BANS, PREFIX + MAX_BAD_WORD_TOKENS - 1),
        )

    def apply(self, logits: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
        """Float32 logits [n, V] as their rows ask for them."""
        function = control_logits if self._device.type == "cuda" else control_logits_ref
        return function(logits, rows, positions, tokens, self.tables)

    def parts(self, controls: Controls | None, token_ids: Sequence[int]) -> list[Int32]:
        """What has to be sent of a row that is admitted with these tokens: its numbers, and more where it asks."""
        asked = controls or NOTHING
        numbers = np.zeros(NUM_NUMBERS, dtype=np.int32)
        numbers[:3] = np.array([asked.repetition, asked.frequency, asked.presence], dtype=np.float32).view(
            np.int32
        )
        numbers[3:] = (
            asked.counts_tokens, asked.is_limited, len(asked.biases), len(asked.bans), asked.num_prompt_tokens,
            len(token_ids),
        )  # fmt: skip
        if controls is None:
            return [numbers]
        ids, marks = asked.marks(token_ids) if asked.counts_tokens else (np.zeros(0), np.zeros(0))
        return [
            numbers,
            np.array(list(asked.biases), dtype=np.int32),
            np.array(list(asked.biases.values()), dtype=np.float32).view(np.int32),
            _ban_words(asked),
            ids.astype(np.int32),
            marks.astype(np.int32),
            np.zeros(0, np.int32)
            if asked.allowed is None
            else token_bits(asked.allowed, self.tables.allowed.shape[1]),
        ]

    def put(self, row: int, sent: Sequence[Tensor]) -> None:
        """Write what `parts` said to the place of `row`."""
        numbers, *more = sent
        self._numbers[:, row] = numbers
        if not more:
            return
        tables = self.tables
        ids, biases, bans, marked_ids, marks, allowed = more
        tables.bias_ids[row, : len(ids)] = ids
        tables.biases[row, : len(ids)] = biases.view(torch.float32)
        width = tables.bans.shape[2]
        tables.bans[row, : len(bans) // width] = bans.view(-1, width)
        if len(marked_ids):
            tables.marks[row].zero_()
            tables.marks[row, marked_ids] = marks.to(torch.int16)
        tables.allowed[row, : len(allowed)] = allowed


def _ban_words(controls: Controls) -> Int32:
    """The bans in the layout of ``ControlTables.bans``, flat."""
    assert len(controls.bans) <= MAX_BANS, len(controls.bans)
    words = np.zeros((len(controls.bans), PREFIX + MAX_BAD_WORD_TOKENS - 1), dtype=np.int32)
    for word, ban in zip(words, controls.bans, strict=True):
        word[0], word[UNTIL], word[LENGTH] = ban.token_id, ban.until, len(ban.prefix)
        word[PREFIX : PREFIX + len(ban.prefix)] = ban.prefix
    return words.ravel()
