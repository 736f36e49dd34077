"""Engines on a FakeRunner follow grammars: what comes out, how it ends, beside what, and what is recorded."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import jsonschema
import pytest

from engine import LLM, InvalidParamsError, SamplingParams
from engine.fake_runner import scripted
from engine.request import FinishReason
from engine.structured_outputs import StructuredOutputsParams

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 3}, "age": {"type": "integer", "minimum": 18}},
    "required": ["name", "age"],
}


def structured(max_tokens: int = 100, **kind: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, structured_outputs=StructuredOutputsParams(**kind))


def test_an_answer_that_fits_is_left_as_it_is(make_worker):
    text = '{"name": "Ada", "age": 36}'
    worker = make_worker(runner={"choose": scripted(text)})
    found = worker.submit("hi", structured(json=SCHEMA)).result()
    assert (found.text, found.finish_reason) == (text, FinishReason.STOP)


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ({"regex": "[a-c]{2,4}-[0-9]"}, "[a-c]{2,4}-[0-9]"),
        ({"choice": ("maybe", "perhaps")}, "maybe|perhaps"),
        ({"grammar": 'root ::= "a"+ "." '}, "a+[.]"),
        ({"json_object": True}, r"\{.*\}"),
        ({"json": SCHEMA}, r"\{.*\}"),
    ],
)
def test_an_answer_that_does_not_fit_becomes_one_that_does(make_worker, kind, pattern):
    worker = make_worker(runner={"choose": scripted("I would rather say something else!")})
    found = worker.submit("hi", structured(**kind)).result()
    assert found.finish_reason is FinishReason.STOP
    assert re.fullmatch(pattern, found.text), found.text
    if "json" in kind:
        jsonschema.validate(json.loads(found.text), SCHEMA)


def test_an_output_that_is_cut_says_so(make_worker):
    worker = make_worker()
    found = worker.submit("hi", structured(5, json=SCHEMA)).result()
    assert (found.finish_reason, found.num_output_tokens) == (FinishReason.LENGTH, 5)


def test_grammars_beside_free_rows_and_across_preemption(make_worker):
    alone = make_worker(enable_prefix_cache=False)
    kinds = [{"json": SCHEMA}, {"regex": "(ab){30}"}, {"grammar": 'root ::= "x" root | "y"'}]
    asked = [structured(60, **kinds[i % 3]) if i % 4 else SamplingParams(max_tokens=60) for i in range(12)]
    prompts = [[i, *range(20)] for i in range(12)]
    expected = [alone.submit(p, a).result().token_ids for p, a in zip(prompts, asked, strict=True)]
    crowded = make_worker(num_blocks=24, enable_prefix_cache=False)
    streams = crowded.submit_all(prompts, asked)
    assert [stream.result().token_ids for stream in streams] == expected
    assert crowded.stats().preemptions > 0


def test_n_completions_follow_one_grammar(make_worker):
    llm = LLM.from_worker(make_worker())
    params = structured(choice=("yes", "no")).with_(n=3, seed=1)
    assert {c.text for c in llm.generate("hi", params, use_tqdm=False)} <= {"yes", "no"}


def test_no_token_that_is_possible_ends_the_request_with_the_reason(make_worker):
    """After `a`, nothing that this grammar wants exists."""
    worker = make_worker()
    beside = worker.submit("other", SamplingParams(max_tokens=30))
    found = worker.submit("hi", structured(grammar='root ::= "a" never\nnever ::= "b" never')).result()
    assert found.finish_reason is FinishReason.LENGTH  # endless, and says so
    dead = worker.submit("hi", structured(grammar='root ::= "a" never\nnever ::= never')).result()
    assert dead.finish_reason is FinishReason.ERROR
    assert dead.text == "a"
    assert "no token can follow" in (dead.error or "")
    assert beside.result().num_output_tokens == 30
    assert worker.health().ok


def test_time_of_compilation_is_told_once(make_worker):
    worker = make_worker()
    kind = StructuredOutputsParams(json=SCHEMA)
    worker.compile_grammar(kind)
    for _ in range(2):
        worker.submit("hi", SamplingParams(max_tokens=4, structured_outputs=kind)).result()
    worker.submit("hi", SamplingParams(max_tokens=4)).result()
    first, second, free = worker.records.requests()
    assert first.grammar_compile_ms > 0
    assert second.grammar_compile_ms == free.grammar_compile_ms == 0


def test_what_cannot_be_followed_is_refused_before_it_is_queued(make_worker):
    worker = make_worker()
    with pytest.raises(InvalidParamsError, match="parenthesis") as caught:
        worker.submit("hi", structured(regex="(a"))
    assert (caught.value.param, caught.value.value) == ("structured_outputs.regex", "(a")
    with pytest.raises(InvalidParamsError, match="EBNF") as caught:
        worker.compile_grammar(StructuredOutputsParams(grammar="root ::= nothing"))
    assert caught.value.param == "structured_outputs.grammar"
    with pytest.raises(InvalidParamsError, match="ignore_eos"):
        worker.submit("hi", structured(regex="a").with_(ignore_eos=True))
    with pytest.raises(InvalidParamsError, match="tokenizer"):
        make_worker(tokenizer=None).submit([1], structured(regex="a"))
    assert worker.num_live == 0


def test_an_engine_without_grammars_never_imports_xgrammar():
    code = (
        "import sys; from engine import *; from engine.fake_runner import *; from engine.plan import KVSpec\n"
        "engine = Engine(EngineConfig(model='f', num_blocks=8, max_batched_tokens=64, max_num_seqs=2, max_model_len=64),\n"
        "    FakeRunner(8), kv_spec=KVSpec(1, 1, 16, 16, 4), eos_token_ids=frozenset({0}), vocab_size=256, tokenizer=FakeTokenizer())\n"
        "engine.add(engine.make_request([1, 2], SamplingParams(max_tokens=4)))\n"
        "while engine.has_work: engine.step()\n"
        "print([name for name in ('xgrammar', 'tvm_ffi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
