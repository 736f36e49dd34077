"""Choosing tokens on a CPU as one compiled call a step (``cpu_sampler.cpp``), for float32 logits.

Besides the arithmetic it saves what costs most beside other Python threads: torch gives the interpreter away at each of the
hundred operations of a draw, and has to wait each time until it gets it back. Tokens equal `sampler.sample`'s but where
two tokens' sums are within the rounding of a logarithm; a row's token never depends on the batch.

Boundary: `make_sampler` picks; ``engine.runner.sampler`` is the oracle and serves every other device and type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kernels import cpu_library
from engine.kernels.cpu_library import CpuLibrary
from engine.runner.sampler import (
    NO_TOKEN,
    LogitEdits,
    LogprobTensors,
    Masks,
    Sampled,
    SampleSettings,
    sample,
)

Sampler = Callable[[Tensor, SampleSettings], Sampled]


class _Sampling(ctypes.Structure):
    """``quire::Sampling`` of cpu_sampler.cpp."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("temperature", ctypes.c_void_p),
        ("top_p", ctypes.c_void_p),
        ("min_p", ctypes.c_void_p),
        ("typical_p", ctypes.c_void_p),
        ("top_k", ctypes.c_void_p),
        ("seed", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("edits", ctypes.c_void_p),
        ("num_edits", ctypes.c_int64),
        ("masked", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("num_masks", ctypes.c_int64),
        ("num_threads", ctypes.c_int64),
        ("chosen", ctypes.c_void_p),
    ]


class _Edit(ctypes.Structure):
    """``quire::Edit`` of cpu_sampler.cpp."""

    _fields_ = [
        ("row", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("marks", ctypes.c_void_p),
        ("repetition", ctypes.c_double),
        ("frequency", ctypes.c_double),
        ("presence", ctypes.c_double),
        ("banned", ctypes.c_void_p),
        ("num_banned", ctypes.c_int64),
    ]


class _Wanted(ctypes.Structure):
    """``quire::Wanted`` of cpu_sampler.cpp."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("num_top", ctypes.c_int64),
        ("logprobs", ctypes.c_void_p),
        ("rank", ctypes.c_void_p),
        ("top_ids", ctypes.c_void_p),
        ("top_logprobs", ctypes.c_void_p),
    ]


def make_sampler(device: torch.device, *, deterministic: bool) -> Sampler:
    """The compiled sampler where it can be built and serves, else torch's."""
    library = cpu_library.load() if device.type == "cpu" else None
    if library is None:
        return partial(sample, invariant=deterministic)
    return CpuSampler(library, deterministic=deterministic)


class CpuSampler:
    """Samples logits [L, V]; float64 ones, which only tests use, go to torch."""

    def __init__(self, library: CpuLibrary, *, deterministic: bool = False) -> None:
        self._functions = library.functions
        self._invariant = deterministic

    def __call__(self, logits: Tensor, settings: SampleSettings) -> Sampled:
        if logits.dtype != torch.float32:
            return sample(logits, settings, invariant=self._invariant)
        logits = logits.contiguous()
        rows, vocab = logits.shape
        chosen = np.empty(rows, dtype=np.int64)
        banned = [
            np.array(edit.banned, dtype=np.int64) for edit in settings.edits
        ]  # live until the call is over
        edits = (_Edit * len(banned))(*map(_edit_of, settings.edits, banned))
        call = _Sampling(
            logits.data_ptr(), rows, vocab,
            _of(settings.temperature, np.float64), _of(settings.top_p, np.float64), _of(settings.min_p, np.float64),
            _of(settings.typical_p, np.float64),
            _of(settings.top_k, np.int64), _of(settings.seed, np.int64), _of(settings.position, np.int64),
            ctypes.addressof(edits), len(edits), *_mask_fields(settings.masks), torch.get_num_threads(),
            _of(chosen, np.int64),
        )  # fmt: skip
        self._functions.quire_sample(ctypes.byref(call))
        wanted = np.nonzero((settings.num_logprobs >= 0) & (chosen != NO_TOKEN))[0]
        logprobs = self._logprobs(logits, wanted, chosen[wanted], settings) if len(wanted) else None
        return Sampled(torch.from_numpy(chosen), logprobs, tuple(wanted.tolist()))

    def _logprobs(
        self, logits: Tensor, rows: NDArray[np.int64], ids: NDArray[np.int64], settings: SampleSettings
    ) -> LogprobTensors:
        n, vocab = len(rows), logits.shape[1]
        num_top = min(int(settings.num_logprobs.max()), vocab)
        logprobs, top_logprobs = np.empty(n, dtype=np.float32), np.empty((n, num_top), dtype=np.float32)
        rank, top_ids = np.empty(n, dtype=np.int64), np.empty((n, num_top), dtype=np.int64)
        call = _Wanted(
            logits.data_ptr(), _of(rows, np.int64), _of(ids, np.int64), n, vocab, num_top,
            _of(logprobs, np.float32), _of(rank, np.int64), _of(top_ids, np.int64), _of(top_logprobs, np.float32),
        )  # fmt: skip
        self._functions.quire_logprobs(ctypes.byref(call))
        return LogprobTensors(
            *(torch.from_numpy(each) for each in (ids, logprobs, rank, top_ids, top_logprobs))
        )


def _edit_of(edit: LogitEdits, banned: NDArray[np.int64]) -> _Edit:
    bias = None if edit.bias is None else _of(edit.bias, np.float32)
    marks = None if edit.marks is None else _of(edit.marks, np.int16)
    return _Edit(edit.row, bias, marks, *edit.penalties, _of(banned, np.int64), len(banned))


def _mask_fields(masks: Masks | None) -> tuple[int | None, int | None, int]:
    return (
        (None, None, 0)
        if masks is None
        else (_of(masks.rows, np.int64), _of(masks.bits, np.int32), len(masks.rows))
    )


def _of(array: NDArray[Any], kind: type[np.generic]) -> int:
    """Where its values are, for as long as it lives."""
    assert array.dtype == kind, (array.dtype, kind)
    assert array.flags.c_contiguous, array.strides
    address: int = array.__array_interface__["data"][0]
    return address
