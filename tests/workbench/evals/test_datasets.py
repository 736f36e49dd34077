"""Datasets: what is read, and that anything else is refused by line, before it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workbench.evals import datasets, errors
from workbench.settings import Settings

MESSAGES = [{"role": "user", "content": "hi"}]
GOOD: dict[str, Any] = {"id": "a", "messages": MESSAGES, "expected": "ho", "tags": {"slice": "x"}}
Write = Callable[..., Path]


def test_reads_every_field(write_dataset: Write) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    lines = [GOOD, "", {"id": "b", "messages": MESSAGES, "expected": {"x": [1]}, "tools": [tool]}]
    read = datasets.load_dataset(write_dataset(lines))
    assert (read.name, len(read)) == ("set", 2)
    first, second = read.examples
    assert (first.id, first.expected, first.tags, first.question) == ("a", "ho", {"slice": "x"}, "hi")
    assert (second.expected, second.tools, dict(second.tags)) == ({"x": [1]}, (tool,), {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2: is not one JSON object"),
        ("[1, 2]", "line 2: must be a JSON object, got list"),
        ('{"id": "b"}', "line 2: lacks the field 'messages'"),
        ({"messages": MESSAGES}, "line 2: lacks the field 'id'"),
        ({**GOOD, "id": 7}, "line 2: id must be a text"),
        ({**GOOD, "id": "b", "messages": []}, "line 2: messages must be a list with at least one"),
        ({**GOOD, "id": "b", "messages": "hi"}, "line 2: messages must be a list"),
        (
            {**GOOD, "id": "b", "messages": [{"role": "boss", "content": ""}]},
            "line 2: each message needs a role",
        ),
        ({**GOOD, "id": "b", "messages": [{"role": "user"}]}, "line 2: each message needs content"),
        ({**GOOD, "id": "b", "tags": ["x"]}, "line 2: tags must be an object"),
        ({**GOOD, "id": "b", "tools": {}}, None),
        ({**GOOD, "id": "b", "tools": [1]}, "line 2: tools must be a list of objects"),
        ({**GOOD, "id": "b", "expected": 3.5}, "line 2: expected must be"),
        ({**GOOD, "id": "b", "answer": "x"}, "line 2: has the unknown field 'answer'"),
        ('{"id": "b", "messages": NaN}', "line 2: is not one JSON object"),
        (GOOD, "line 2: id 'a' was already used in line 1"),
    ],
)
def test_refuses_a_broken_line_by_its_number(write_dataset: Write, line: Any, message: str | None) -> None:
    path = write_dataset([GOOD, line, {**GOOD, "id": "z"}])
    if message is None:  # an empty object of tools is no tools
        assert len(datasets.load_dataset(path)) == 3
        return
    with pytest.raises(errors.DatasetFormatError) as caught:
        datasets.load_dataset(path)
    assert message in str(caught.value)
    assert caught.value.value == 2


def test_refuses_a_file_that_is_no_text_or_has_no_examples(write_dataset: Write, tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(errors.DatasetFormatError, match="line 2: is not UTF-8"):
        datasets.load_dataset(tmp_path / "raw.jsonl")
    with pytest.raises(errors.DatasetEmptyError):
        datasets.load_dataset(write_dataset(["", "  "]))


def test_finds_datasets_by_name_and_names_those_there_are(settings: Settings) -> None:
    own = settings.home_dir / "datasets"
    own.mkdir()
    (own / "mine.jsonl").write_text(json.dumps(GOOD))
    assert datasets.load_dataset("mine", settings).name == "mine"
    assert "mine" in datasets.dataset_names(settings)
    with pytest.raises(errors.DatasetNotFoundError, match="mine"):
        datasets.load_dataset("nobody", settings)
    with pytest.raises(errors.DatasetNotFoundError):
        datasets.load_dataset("../mine", settings)


def test_digest_follows_the_content_and_the_sample_ignores_the_order(write_dataset: Write) -> None:
    lines = [{**GOOD, "id": f"e{i}", "tags": {"slice": f"s{i % 3}"}} for i in range(50)]
    read = datasets.load_dataset(write_dataset(lines))
    spaced = datasets.load_dataset(write_dataset([json.dumps(line, indent=None) + "  " for line in lines]))
    turned = datasets.load_dataset(write_dataset(lines[::-1]))
    changed = datasets.load_dataset(write_dataset([*lines[:-1], {**lines[-1], "expected": "other"}]))
    assert read.digest == spaced.digest
    assert len({read.digest, turned.digest, changed.digest}) == 3
    assert {e.id for e in read.sample(20).examples} == {e.id for e in turned.sample(20).examples}
    assert len(read.sample(20)) == 20
    assert read.sample(None) is read
    assert {name: len(ids) for name, ids in read.slices().items()} == {
        "slice=s0": 17,
        "slice=s1": 17,
        "slice=s2": 16,
    }


def test_is_an_mlflow_evaluation_dataset_with_every_row(write_dataset: Write, shared_home: Path) -> None:
    """A real store (SQLite). Recording twice adds nothing; the process's own MLflow settings stay as they were."""
    import mlflow

    from workbench import tracking

    lines = [{**GOOD, "id": f"e{i}", "expected": {"i": i}} for i in range(450)]
    settings, read = Settings(home_dir=shared_home), datasets.load_dataset(write_dataset(lines))
    before = mlflow.get_tracking_uri()
    identity = datasets.log_dataset(read, settings)
    assert datasets.log_dataset(read, settings) == identity
    assert mlflow.get_tracking_uri() == before
    client = tracking.client(settings)
    with datasets.current_store(client.tracking_uri):
        frame = client.get_dataset(identity).to_df()
    assert len(frame) == 450
    assert {row["id"] for row in frame["inputs"]} == {f"e{i}" for i in range(450)}
    assert sorted(row["expected"]["i"] for row in frame["expectations"]) == list(range(450))
