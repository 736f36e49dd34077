"""Kernels that change logits against their reference: rows of all kinds, edges of parts and of marks, done twice."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kernels.logit_controls import control_logits, control_logits_ref
from engine.kernels.penalties import FULL
from engine.kernels.sampling_filters import TILE
from engine.runner.controls import Ban, Controls
from engine.runner.device_controls import DeviceControls

LENGTH, PROMPT = 12, 5
# A row's controls, by what it asks for; its text ends with 2, 4, 2.
ASKED: tuple[Controls | None, ...] = (
    None,
    Controls(PROMPT, repetition=1.3),
    Controls(PROMPT, frequency=0.4, presence=-0.3),
    Controls(PROMPT, biases={0: 3.0, 2: -1.5, 7: 100.0, 60: -100.0}),
    Controls(PROMPT, allowed=(2, 31, 32, 60)),
    Controls(
        PROMPT, bans=(Ban(3), Ban(5, (4, 2)), Ban(6, (2, 2)), Ban(9, until=LENGTH), Ban(10, until=LENGTH + 1))
    ),
    Controls(LENGTH - 1, bans=(Ban(5, (4, 2)), Ban(6, (2,)))),  # the output is one token long
    Controls(PROMPT, 0.8, 0.1, 0.2, {2: 1.0, 4: -1.0}, (1, 2, 4, 60), (Ban(4, (2,)), Ban(1))),
)


def step_of(asked: tuple[Controls | None, ...], vocab: int) -> tuple[Any, ...]:
    """Arguments of `control_logits`: a row for each, in reversed places, and tables that do not count the newest token."""
    random = np.random.default_rng(vocab)
    texts = random.integers(0, min(vocab, 61), (len(asked) + 1, LENGTH + 3)).astype(np.int32)
    texts[:, LENGTH - 3 : LENGTH] = (2, 4, 2)
    tables = DeviceControls(len(asked) + 1, vocab, torch.device("cpu"))
    rows = torch.arange(len(asked), 0, -1, dtype=torch.int32)
    for controls, row in zip(asked, rows.tolist(), strict=True):
        known = texts[row, : LENGTH - 1].tolist()
        tables.put(row, [torch.from_numpy(part) for part in tables.parts(controls, known)])
    logits = 3 * torch.randn(len(asked), vocab, generator=torch.Generator().manual_seed(vocab))
    positions = torch.full((len(asked),), LENGTH, dtype=torch.int32)
    return logits, rows, positions, torch.from_numpy(texts), tables.tables


def copied(step: tuple[Any, ...]) -> tuple[Any, ...]:
    *inputs, tables = step
    return *inputs, replace(tables, **{f.name: getattr(tables, f.name).clone() for f in fields(tables)})


def assert_same(found: Tensor, expected: Tensor) -> None:
    # A division, a product and two sums, of which the kernel may join two: 3 units in the last place of values below 128.
    torch.testing.assert_close(found, expected, rtol=3 * 2.0**-23, atol=2e-5)


@pytest.mark.parametrize("vocab", [61, TILE + 61])
def test_rows_of_all_kinds(vocab: int) -> None:
    step = step_of(ASKED, vocab)
    other, before = copied(step), step[0].clone()
    found, expected = control_logits(*step), control_logits_ref(*other)
    assert_same(found, expected)
    assert torch.equal(found[0], before[0]), "a row that asks for nothing is copied"
    assert torch.equal(step[0], before)
    assert torch.equal(step[-1].marks, other[-1].marks)
    marks = step[-1].marks.clone()
    assert torch.equal(control_logits(*step), found), "the newest token is counted once"
    assert torch.equal(control_logits_ref(*other), expected)
    assert torch.equal(step[-1].marks, marks)
    assert torch.equal(other[-1].marks, marks)
    for i in (1, 7):
        alone = (step[0][i : i + 1], step[1][i : i + 1], step[2][i : i + 1], *copied(step)[3:])
        assert torch.equal(control_logits(*alone), found[i : i + 1]), "whatever shares the batch"


def test_what_each_kind_does() -> None:
    step = step_of(ASKED, 61)
    logits, found = step[0], control_logits(*step)
    gone = [set(torch.nonzero(row == float("-inf")).flatten().tolist()) for row in found]
    assert gone[4] == set(range(61)) - {2, 31, 32, 60}
    assert gone[5] == {3, 5, 10}
    assert gone[6] == {6}, "a prefix lies in the output"
    assert gone[7] == set(range(61)) - {2, 60}
    assert float(found[3, 7]) == float(logits[3, 7] + 100.0)
    assert int((found[3] != logits[3]).sum()) == 4
    text = step[3][int(step[1][2]), PROMPT:LENGTH].tolist()
    assert float(found[2, 2]) == pytest.approx(float(logits[2, 2]) - 0.4 * text.count(2) + 0.3, abs=1e-5)


def test_many_bans_and_biases_and_full_marks() -> None:
    many = Controls(
        PROMPT,
        frequency=1.0,
        biases=dict.fromkeys(range(300), 0.5),
        bans=tuple(Ban(i) for i in range(300, 500)),
    )
    step = step_of((many, many), 512)
    step[-1].marks[1, 2] = FULL
    other = copied(step)
    found = control_logits(*step)
    assert_same(found, control_logits_ref(*other))
    assert int((found == float("-inf")).sum()) == 400
    assert int(step[-1].marks[1, 2]) == FULL
    assert torch.equal(step[-1].marks, other[-1].marks)
    assert control_logits(*(x[:0] for x in step[:3]), *step[3:]).shape == (0, 512)
