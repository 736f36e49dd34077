"""MLflow's own judges with this server's model: their strict schema holds for each type of value, whatever the model knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter

from engine.config import EngineConfig

pytestmark = pytest.mark.full  # its import takes longer than the tests
MODEL = Path(__file__).parents[3] / "data" / "models" / "chat-base"


@pytest.fixture(scope="module")
def chat_base(serve: Any) -> Iterator[Any]:
    """A server over the bundled model, whose tokenizer has an id for each sign."""
    from workbench.host import load_worker

    config = EngineConfig(model=str(MODEL), dtype="float32", device="cpu", num_blocks=512, num_threads=1)
    with serve(load_worker, config) as running:
        yield running


@pytest.mark.parametrize(
    "kind", [bool, int, float, str, Literal["good", "bad"], list[str], dict[str, bool]], ids=str
)
def test_feedback_has_a_value_of_the_judges_type_and_a_reason(
    kind: Any, chat_base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.genai.judges import make_judge

    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_API_BASE", f"{chat_base.url}/v1")
    [quote], [comma] = (chat_base.worker.tokenizer.encode(sign, add_special_tokens=False) for sign in '",')
    ends = {str(quote): 8, str(comma): -8}  # a model this small would go on within a text or list
    judge = make_judge(
        name="polite", instructions="Is this answer polite? {{ outputs }}", model=f"openai:/{chat_base.model}",
        feedback_value_type=kind,
        inference_params={"temperature": 0, "max_tokens": 500, "frequency_penalty": 1, "logit_bias": ends},
    )  # fmt: skip
    before = chat_base.worker.stats().finished
    feedback = judge(outputs={"answer": "You are welcome."})
    TypeAdapter(kind).validate_python(feedback.value, strict=True)
    assert feedback.error is None
    assert feedback.rationale
    # Refused with the schema, MLflow would have asked again without one, and said nothing.
    assert chat_base.worker.stats().finished == {"stop": 1 + sum(before.values())}
