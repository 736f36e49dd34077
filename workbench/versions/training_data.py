"""What a fine-tune learns from: conversations that end in an answer, from the ticket generator or from a JSONL file.

Encoded once, in other processes where asked: the order of examples depends on the data alone. No torch here, so that those
processes start quickly. Batching and shuffling belong to `finetune`.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from workbench.versions.demo.chat_format import ASSISTANT, END, EncodedChat, Message, encode
from workbench.versions.errors import TrainingDataError
from workbench.versions.tickets.generator import TicketData, training_example

_CHUNK = 500


@dataclass(frozen=True, slots=True)
class JsonlData:
    """A JSONL file: a line holds `messages` that end with an assistant's answer, or `messages` and `expected`."""

    path: Path


TrainingData = TicketData | JsonlData


def data_facts(data: TrainingData) -> dict[str, Any]:
    """What identifies the data: the generator's numbers, or the file's name and digest."""
    if isinstance(data, TicketData):
        facts = {"kind": "tickets", **asdict(data), "issue_weights": dict(data.issue_weights)}
        return {**facts, "relabel": dict(data.relabel)} if data.relabel else _without(facts, "relabel")
    return {"kind": "jsonl", "path": str(data.path), "sha256": hashlib.sha256(_read(data.path)).hexdigest()}


def _without(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != name}


def data_from(spec: dict[str, Any]) -> TrainingData:
    """The inverse of `data_facts`, for records from disk or the network.

    Raises:
        TrainingDataError: unknown kind, unknown field, or a value that cannot be.
    """
    fields = dict(spec)
    kind = fields.pop("kind", "tickets")
    try:
        if kind == "jsonl":
            fields.pop("sha256", None)
            return JsonlData(Path(fields.pop("path"), **fields))
        data = TicketData(**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise TrainingDataError(f"training data {spec!r}: {error}", value=spec, param="data") from error
    if kind != "tickets" or not isinstance(data.num_examples, int) or data.num_examples < 1:
        raise TrainingDataError(
            f"training data {spec!r} is not usable", value=spec, param="data",
            limit="kind tickets (num_examples of 1 or more, seed, issue_weights) or jsonl (path)",
            remedy="Name one of the two kinds.",
        )  # fmt: skip
    return data


def load_conversations(data: TrainingData, start: int = 0, stop: int | None = None) -> list[list[Message]]:
    """Conversations number `start` to `stop` (without it: to the end).

    Raises:
        TrainingDataError: the file is missing, a line is not JSON, or a line has no messages or no answer.
    """
    if isinstance(data, TicketData):
        end = data.num_examples if stop is None else min(stop, data.num_examples)
        return [training_example(data, index).conversation() for index in range(start, end)]
    return _parsed(data.path)[start:stop]


def encode_all(data: TrainingData, tokenizer_file: Path, num_processes: int = 0) -> list[EncodedChat]:
    """Every conversation as token ids, in order, with the answers marked.

    Raises:
        TrainingDataError: as `load_conversations`; or the tokenizer has not the chat format that is trained here.
    """
    tokenizer = _tokenizer(tokenizer_file)
    if any(tokenizer.token_to_id(token) is None for token in (ASSISTANT, END)):
        raise TrainingDataError(
            f"{tokenizer_file} lacks the tokens {ASSISTANT} and {END}", value=str(tokenizer_file), param="base",
            limit="a model with Quire's chat format", remedy="Fine-tune the bundled model or one made of it.",
        )  # fmt: skip
    if isinstance(data, JsonlData) or not num_processes:
        return [encode(tokenizer, messages) for messages in load_conversations(data)]
    starts = range(0, data.num_examples, _CHUNK)
    with ProcessPoolExecutor(num_processes, get_context("spawn")) as processes:
        parts = processes.map(_encode_part, [(data, tokenizer_file, start) for start in starts])
        return [EncodedChat(ids, answer) for part in parts for ids, answer in part]


def _encode_part(job: tuple[TicketData, Path, int]) -> list[tuple[list[int], list[bool]]]:
    data, tokenizer_file, start = job
    chats = (encode(_tokenizer(tokenizer_file), m) for m in load_conversations(data, start, start + _CHUNK))
    return [(chat.ids, chat.is_answer) for chat in chats]


@cache
def _tokenizer(path: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingDataError(
            f"{path} cannot be read: {error.strerror}",
            value=str(path),
            param="data",
            remedy="Name a JSONL file.",
        ) from error


def _parsed(path: Path) -> list[list[Message]]:
    lines = _read(path).decode("utf-8", errors="replace").splitlines()
    found = [_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TrainingDataError(
            f"{path} holds no examples", value=str(path), param="data", remedy="Add lines."
        )
    return found


def _conversation(path: Path, number: int, line: str) -> list[Message]:
    try:
        row = json.loads(line)
        messages: list[Message] = list(row["messages"])
        if "expected" in row:
            messages.append({"role": "assistant", "content": _answer(row["expected"])})
        if messages[-1]["role"] != "assistant" or not all(isinstance(m["role"], str) for m in messages):
            raise ValueError("the last message is no assistant's answer, and there is no 'expected'")
    except (ValueError, LookupError, TypeError) as error:
        raise TrainingDataError(
            f"{path}, line {number}: {error}", value=line[:200], param="data",
            limit='{"messages": [...], "expected": ...} or messages that end with an answer',
            remedy="Correct the line.",
        ) from error  # fmt: skip
    return messages


def _answer(expected: Any) -> str:
    return (
        expected
        if isinstance(expected, str)
        else json.dumps(expected, separators=(",", ":"), ensure_ascii=False)
    )
