"""What `import engine` offers, and what it does not drag in."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import engine
from engine import errors

ROOT = Path(__file__).resolve().parents[3]


def test_every_public_name_is_there_once_and_explained() -> None:
    assert len(set(engine.__all__)) == len(engine.__all__)
    for name in engine.__all__:
        assert inspect.getdoc(getattr(engine, name)), f"{name} has no docstring"
    public = {
        name
        for name, value in vars(engine).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(engine.__all__)


def test_every_error_that_a_caller_may_catch_is_public() -> None:
    tree = {
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.EngineError)
    }
    assert {error.__name__ for error in tree} <= set(engine.__all__)
    for error in tree:
        assert error.__name__ in (errors.__doc__ or ""), f"{error.__name__} is not drawn in the tree"


def test_importing_the_engine_brings_nothing_heavy_in() -> None:
    code = (
        "import engine, sys; heavy = {'torch', 'triton', 'transformers', 'tokenizers', 'tqdm', 'streamlit', 'mlflow'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_fake_engine_serves_without_torch() -> None:
    code = """
import sys
from engine import LLM, Engine, EngineConfig, EngineWorker, SamplingParams
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec
config = EngineConfig(model="fake", num_blocks=64, max_model_len=256, max_batched_tokens=256)
engine = Engine(config, FakeRunner(64), kv_spec=KVSpec(1, 1, 1, 16, 4), eos_token_ids=frozenset({256}), vocab_size=261,
                tokenizer=FakeTokenizer())
worker = EngineWorker(engine)
worker.start()
print(LLM.from_worker(worker).generate("hi", SamplingParams(max_tokens=3), use_tqdm=False)[0].num_output_tokens)
worker.close()
print(sorted({'torch', 'transformers'} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "[]"]
