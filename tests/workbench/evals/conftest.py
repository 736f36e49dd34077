"""A backend whose versions answer from tables, and datasets to ask them about."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pytest

from engine.llm import Score
from engine.plan import TokenLogprobs
from engine.records import Completion
from engine.request import FinishReason
from engine.token_kl import TokenKL
from workbench.evals.datasets import Dataset, load_dataset
from workbench.settings import Settings

Answers = Callable[[str, int], str]  # (question, seed) -> answer


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("QUIRE_", "MLFLOW_")) or name == "PORT":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME_DIR", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One HOME_DIR for all tests that record: making MLflow's tables takes seconds."""
    folder = tmp_path_factory.mktemp("shared") / "home"
    (folder / "run").mkdir(parents=True)
    return folder


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    made = Settings(home_dir=tmp_path / "home")
    made.run_dir.mkdir(parents=True)
    return made


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write lines (objects, or texts as they are) to a file."""

    def write(lines: Sequence[Any], name: str = "set.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", "utf-8")
        return path

    return write


def sums(count: int, slices: int = 2) -> list[dict[str, Any]]:
    """Examples "i + i" whose expected answer is an object."""
    return [
        {
            "id": f"s{i:04}",
            "messages": [{"role": "user", "content": f"{i} + {i}"}],
            "expected": {"sum": 2 * i},
            "tags": {"slice": f"part{i % slices}"},
        }
        for i in range(count)
    ]


class TableBackend:
    """Versions that answer by a function; everything is counted, nothing is computed."""

    name = "table"

    def __init__(
        self, versions: Mapping[str, Answers], *, ms_per_token: Mapping[str, float] | None = None
    ) -> None:
        self.versions = dict(versions)
        self.ms_per_token = dict(ms_per_token or {})
        self.loads: list[tuple[str, bool]] = []
        self.unloads: list[str] = []
        self.calls: list[tuple[str, int, int]] = []  # model, requests, concurrency
        self.fail: str | None = None  # a question whose request fails
        self._resident: list[str] = []

    def models(self) -> list[str]:
        return list(self._resident)

    def load(self, ref: str, *, deterministic: bool = False) -> str:
        model = f"{ref}#deterministic" if deterministic else ref
        self.loads.append((ref, deterministic))
        if model not in self._resident:
            self._resident.append(model)
        return model

    def unload(self, model: str) -> None:
        self._resident.remove(model)
        self.unloads.append(model)

    def chat(
        self, messages: Any, params: Any = None, *, model: str | None = None, tools: Any = None,
        max_concurrency: int = 16,
    ) -> list[Completion]:  # fmt: skip
        assert model in self._resident
        self.calls.append((model, len(messages), max_concurrency))
        each = params if isinstance(params, list) else [params] * len(messages)
        return [self._answer(model, chat, p) for chat, p in zip(messages, each, strict=True)]

    def score(self, texts: Any, *, model: str | None = None) -> list[Score]:
        """Every character is a token; BOS (1) stands before a text. The log-probability is -1/4 of a token's last digit, and -1 more
        for "2" at an even place, for the version v2."""
        many = [texts] if isinstance(texts, str) else list(texts)
        scores = []
        for text in many:
            ids = [1, *text.encode()] if isinstance(text, str) else list(text)
            v2 = (model or "").startswith("v2")
            logprobs = tuple(
                -(token % 10) / 4 - (v2 and token == ord("2") and i % 2 == 0)
                for i, token in enumerate(ids[1:])
            )
            scores.append(Score(tuple(ids), logprobs, sum(logprobs), 1.0))
        return scores

    def token_kl(self, texts: Any, *, other: str, model: str | None = None) -> list[TokenKL]:
        """Versions lie 0.25 nats apart at each token that is a "2", and a text's first tokens, its request, 9 nats."""
        assert {model, other} <= set(self._resident), "both are in memory at once"
        self.calls.append((f"{model} || {other}", len(texts), 0))
        found = []
        for ids in texts:
            start = len(ids) - len(bytes(i for i in ids if i > 1).decode().partition("{")[2]) - 1
            kl = tuple(
                0.0 if model == other else 9.0 if i < start else 0.25 * (token == ord("2"))
                for i, token in enumerate(ids[1:], 1)
            )
            found.append(TokenKL(tuple(ids), kl, kl, kl, tuple(p == 0 for p in kl)))
        return found

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def _answer(self, model: str, chat: Sequence[Mapping[str, Any]], params: Any) -> Completion:
        ref = model.removesuffix("#deterministic")
        question = str(chat[-1]["content"])
        if params.ignore_eos:
            text = "x" * params.max_tokens
        else:
            text = self.versions[ref](question, params.seed)
        ids = tuple(text.encode())
        per_token = self.ms_per_token.get(ref, 1.0)
        failed = question == self.fail
        return Completion(
            request_id="r", prompt_token_ids=(1, *question.encode()), token_ids=ids, text=text,
            finish_reason=FinishReason.ERROR if failed else FinishReason.STOP, stop_reason=None,
            logprobs=tuple(TokenLogprobs(token, -0.5, 1, (), ()) for token in ids), prompt_logprobs=(),
            num_cached_tokens=0, seed=params.seed or 0, ttft_ms=2 * per_token, tpot_ms=per_token,
            e2e_ms=per_token * (len(ids) + 1), error="the step failed" if failed else None,
        )  # fmt: skip


@pytest.fixture
def table_backend() -> type[TableBackend]:
    return TableBackend


@pytest.fixture
def make_sums(write_dataset: Callable[..., Path]) -> Callable[..., Dataset]:
    """A dataset of sums."""
    return lambda count, slices=2: load_dataset(write_dataset(sums(count, slices), f"sums{count}.jsonl"))


@pytest.fixture
def answers() -> Callable[..., Answers]:
    return adder


def adder(wrong: Callable[[int], bool] = lambda _i: False) -> Answers:
    """Answers "i + i" with its sum, off by one where `wrong`."""

    def answer(question: str, _seed: int) -> str:
        i = int(question.split()[0])
        return json.dumps({"sum": 2 * i + (1 if wrong(i) else 0)})

    return answer
