"""The table of docs/architectures.md, a row an architecture, made by the parity tests' own cases.

`python -m tests.engine.models.architecture_table` runs every case and rewrites the table; the parity tests compare each
case with its row. What an engine refuses for an architecture is asked of the engine.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.build import resolve_config
from engine.config import EngineConfig
from engine.errors import EngineError
from engine.models.config import ModelConfig
from engine.models.transformers_config import TransformersConfig, read_model_config
from tests.engine.models.native_configs import NATIVE
from tests.engine.models.parity import EXACT, InFloat64, Parity, compare, exact_logits, make_model
from tests.engine.models.transformers_configs import THROUGH_TRANSFORMERS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "architectures.md"
BEGIN = "<!-- table: begin (python -m tests.engine.models.architecture_table) -->\n"
END = "<!-- table: end -->"
HEADINGS = (
    "architecture", "computed by", "differs by less than", "window", "soft cap", "captured", "quantized", "LoRA"
)  # fmt: skip
# Differences seen lie ten times below these: they may be another machine's, whose sums have another order.
CLASSES = (1e-11, EXACT)
LENGTHS = (5, 60)  # tokens of the prompts; the windows are of 20

Case = Callable[[], PretrainedConfig]
Row = tuple[str, ...]


def architecture_of(config: PretrainedConfig) -> str:
    """The causal LM that transformers has for a config."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    assert isinstance(name, str), name
    return name


def parity_through_transformers(case: Case, folder: Path) -> Parity:
    """What `parity.compare` finds for a model whose own code both sides run: the engine's too is kept in float64."""
    model = make_model(case())
    model.save_pretrained(folder)
    with InFloat64():
        return compare(folder, lambda tokens: exact_logits(model, tokens), lengths=LENGTHS)


def features(config: PretrainedConfig) -> Row:
    """What the engine says of an architecture: who computes it, and the columns of its features."""
    with tempfile.TemporaryDirectory() as folder:
        values = {**config.to_dict(), "architectures": [architecture_of(config)]}
        (Path(folder) / "config.json").write_text(json.dumps(values))
        model = read_model_config(folder)
        answers = [
            model.attention_softcap is not None,
            not isinstance(model, TransformersConfig) or model.is_capturable,
            _takes(folder, model, quantization="int8"),
            _takes(folder, model, enable_lora=True),
        ]
    path = "transformers" if isinstance(model, TransformersConfig) else "native"
    window = any(window is not None for window in model.sliding_windows)
    return (path, *("yes" if answer else "" for answer in (window, *answers)))


def _takes(folder: str, model: ModelConfig, **setting: Any) -> bool:
    config = EngineConfig(
        model=folder, device="cpu", dtype="float32", num_blocks=32, max_model_len=128, **setting
    )
    try:
        resolve_config(config, model)
    except EngineError:
        return False
    return True


def row_of(found: Parity, config: PretrainedConfig) -> Row:
    """The row of one case."""
    bound = next(bound for bound in CLASSES if found.error < bound)
    path, *rest = features(config)
    return (found.architecture, path, f"{bound:g}", *rest)


def merged(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by architecture: what one of its cases has, it has; the largest difference counts."""
    table: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row[1], row[0])):
        known = table.get(row[0], row)
        widest = max(known[2], row[2], key=float)
        table[row[0]] = (*row[:2], widest, *(a or b for a, b in zip(known[3:], row[3:], strict=True)))
    return table


def read_table() -> dict[str, Row]:
    """The rows of the page, by architecture."""
    text = PAGE.read_text(encoding="utf-8")
    lines = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    rows = [tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")) for line in lines]
    return {row[0]: row for row in rows}


def write_table(table: dict[str, Row]) -> None:
    """Replace the rows of the page."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    lines += [re.sub(" +", " ", f"| `{row[0]}` | " + " | ".join(row[1:]) + " |") for row in table.values()]
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main() -> int:
    torch.set_num_threads(1)
    rows = []
    for name, native in NATIVE.items():
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(native.config())
            model.save_pretrained(folder)
            found = compare(
                Path(folder), lambda tokens, model=model: exact_logits(model, tokens), lengths=native.lengths, **native.settings
            )  # fmt: skip
        assert found.holds, (name, found)
        rows.append(row_of(found, native.config()))
    for name, case in THROUGH_TRANSFORMERS.items():
        with tempfile.TemporaryDirectory() as folder:
            found = parity_through_transformers(case, Path(folder))
        assert found.holds, (name, found)
        rows.append(row_of(found, case()))
    write_table(merged(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
