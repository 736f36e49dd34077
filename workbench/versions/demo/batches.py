"""The training stream: micro-batches of encoded conversations, a pure function of seed and position.

A pool of episodes and dialogues is sorted by length and cut, so little is padding; the order of the cuts
is shuffled. A stream may start at any (pool, step), which is all that a checkpoint must remember of the
data.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from multiprocessing import get_context
from typing import Any

import torch

from workbench.versions.demo.chat_format import EncodedChat, Tokenizer, encode
from workbench.versions.demo.corpus import DOMAINS, Conversation, ask_for_other_words
from workbench.versions.demo.generator import Stage, make_episode
from workbench.versions.demo.values import Split


@dataclass(frozen=True, slots=True)
class MixConfig:
    """Sizes of the stream. `micro_tokens` counts padding; a step takes `micro_per_step` micro-batches.

    The first `copy_first_pools` pools are of `Stage.COPY`: copying has to be found before anything else can use it.
    """

    seed: int = 0
    episodes_per_pool: int = 640
    dialogues_per_pool: int = 24
    copy_first_pools: int = 10
    copy_first_dialogues: int = 4
    micro_tokens: int = 768
    micro_per_step: int = 3
    max_length: int = 1280


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """ids [S, L] int64 padded with 0 on the right; is_answer [S, L] bool; num_tokens without padding."""

    ids: torch.Tensor
    is_answer: torch.Tensor
    num_tokens: int


@dataclass(frozen=True, slots=True)
class StreamStep:
    """The micro-batches of one optimizer step, and where the stream continues after it."""

    micro_batches: list[MicroBatch]
    next_pool: int
    next_step: int


def collate(chats: list[EncodedChat], max_length: int) -> MicroBatch:
    """Pads on the right: under a causal mask padding changes nothing to its left, so no mask is needed."""
    length = min(max_length, max(len(chat.ids) for chat in chats))
    ids = torch.zeros(len(chats), length, dtype=torch.long)
    is_answer = torch.zeros(len(chats), length, dtype=torch.bool)
    num_tokens = 0
    for row, chat in enumerate(chats):
        size = min(length, len(chat.ids))
        ids[row, :size] = torch.tensor(chat.ids[:size])
        is_answer[row, :size] = torch.tensor(chat.is_answer[:size])
        num_tokens += size
    return MicroBatch(ids, is_answer, num_tokens)


def cut_by_length(chats: list[EncodedChat], micro_tokens: int, max_length: int) -> list[MicroBatch]:
    """Sorts by length and cuts where the padded size would pass `micro_tokens` (one chat may exceed it alone)."""
    batches: list[MicroBatch] = []
    group: list[EncodedChat] = []
    for chat in sorted(chats, key=lambda c: len(c.ids)):
        if group and min(len(chat.ids), max_length) * (len(group) + 1) > micro_tokens:
            batches.append(collate(group, max_length))
            group = []
        group.append(chat)
    return [*batches, collate(group, max_length)] if group else batches


class TrainingStream:
    """Mixes generated episodes with dialogues."""

    def __init__(
        self, tokenizer: Tokenizer, dialogues: dict[str, list[Conversation]], mix: MixConfig
    ) -> None:
        self._tokenizer = tokenizer
        self._dialogues = dialogues
        self._mix = mix

    def steps(
        self, pool: int = 0, step: int = 0, num_processes: int = 0
    ) -> Generator[StreamStep, None, None]:
        """Endless, from the given position; pools are made ahead by `num_processes`, or here where that is 0."""
        pools = _made_ahead(self, pool, num_processes) if num_processes else map(self.pool, count(pool))
        for groups in pools:
            while step < len(groups):
                step += 1
                last = step == len(groups)
                yield StreamStep(groups[step - 1], pool + last, 0 if last else step)
            pool, step = pool + 1, 0

    def pool(self, pool: int) -> list[list[MicroBatch]]:
        """All steps of pool number `pool`."""
        mix = self._mix
        rng = random.Random(f"{mix.seed}/pool/{pool}")
        first = pool * mix.episodes_per_pool
        early = pool < mix.copy_first_pools
        stage = Stage.COPY if early else Stage.FULL
        num_dialogues = mix.copy_first_dialogues if early else mix.dialogues_per_pool
        episodes = (
            make_episode(mix.seed, first + i, Split.TRAIN, stage) for i in range(mix.episodes_per_pool)
        )
        chats = [encode(self._tokenizer, episode.messages, episode.tools) for episode in episodes]
        chats += [encode(self._tokenizer, self._dialogue(rng)) for _ in range(num_dialogues)]
        micro = cut_by_length(chats, mix.micro_tokens, mix.max_length)
        micro = [batch for batch in micro if bool(batch.is_answer[:, 1:].any())]
        rng.shuffle(micro)
        size = mix.micro_per_step
        return [micro[i : i + size] for i in range(0, len(micro) - size + 1, size)] or [micro]

    def _dialogue(self, rng: random.Random) -> Conversation:
        domain = rng.choices(list(DOMAINS), weights=list(DOMAINS.values()))[0]
        messages = rng.choice(self._dialogues[domain])
        return ask_for_other_words(rng, messages) if domain == "story" else messages


_Packed = list[list[tuple[Any, Any, int]]]
_worker_stream: TrainingStream


def _made_ahead(stream: TrainingStream, first: int, num_processes: int) -> Iterator[list[list[MicroBatch]]]:
    """The pools from `first` on, in order, at most two for each process waiting to be taken."""
    context = get_context("spawn")  # the parent has threads and perhaps a GPU: a fork of it could hang
    with ProcessPoolExecutor(num_processes, context, _start_worker, (stream,)) as processes:
        waiting: deque[Future[_Packed]] = deque()
        for pool in count(first):
            waiting.append(processes.submit(_packed_pool, pool))
            if len(waiting) > 2 * num_processes:
                packed = waiting.popleft().result()
                yield [[_unpack(*batch) for batch in group] for group in packed]


def _start_worker(stream: TrainingStream) -> None:
    global _worker_stream
    torch.set_num_threads(1)
    _worker_stream = stream


def _packed_pool(pool: int) -> _Packed:
    """Arrays instead of tensors: tensors would travel through file descriptors, one each."""
    return [[_pack(batch) for batch in group] for group in _worker_stream.pool(pool)]


def _pack(batch: MicroBatch) -> tuple[Any, Any, int]:
    return batch.ids.to(torch.int16).numpy(), batch.is_answer.numpy(), batch.num_tokens


def _unpack(ids: Any, is_answer: Any, num_tokens: int) -> MicroBatch:
    return MicroBatch(torch.from_numpy(ids).long(), torch.from_numpy(is_answer), num_tokens)
