"""GrammarCompiler: what an output must look like, compiled into what tells the tokens that may come next, once per content.

Compiling takes milliseconds to seconds, so it happens in the thread that asks, never on the engine's. What is compiled is kept
under its content, the least recently used given up beyond `max_bytes`.

xgrammar compiles and follows grammars; it is imported with the first one. Boundary: no rows, no masks
(``engine.runner.structured``). Which schemas are taken is ``engine.json_schema``'s.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidParamsError
from engine.json_schema import enforceable

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs import StructuredOutputsParams
    from engine.tokenizer import TokenizerLike

MAX_BYTES = 64 << 20
MAX_TEXT_BYTES = 64 << 10  # of one schema, expression, grammar, or all choices together
MAX_BLANKS = 20  # between two parts of a JSON text: a sampled one would else be all blanks once in a while
JSON_OBJECT = '{"type":"object","additionalProperties":true}'


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar; any number of rows and threads may follow it."""

    compiled: Any  # xgrammar.CompiledGrammar
    stop_token_ids: frozenset[int]  # that end an output where the grammar may end
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar, and the time that its compilation took; 0 if somebody was told of it before."""

    grammar: Grammar
    compile_ms: float


class GrammarCompiler:
    """Compiles for one model's tokenizer. Safe to call from any thread.

    `vocab_size`: the model's, which may be larger than the tokenizer's: ids behind it are never allowed.
    """

    def __init__(
        self,
        tokenizer: TokenizerLike | None,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._known: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._untold: dict[StructuredOutputsParams, float] = {}
        self._lock = threading.Lock()  # of the two above
        self._compiling = threading.Lock()  # one at a time: a flood of new grammars takes one core
        self._xgrammar: Any = None  # the compiler of xgrammar

    def compile(self, structured: StructuredOutputsParams) -> None:
        """Have the grammar ready for requests to come.

        Raises:
            InvalidParamsError: naming what cannot be compiled or would not be enforced, before any work.
        """
        if self._get(structured) is not None:
            return
        with self._compiling:
            if self._get(structured) is not None:
                return
            began = time.perf_counter()
            grammar = self._compile(structured)
            elapsed_ms = (time.perf_counter() - began) * 1e3
        with self._lock:
            self._known[structured] = grammar
            self._untold[structured] = elapsed_ms
            self._num_bytes += grammar.num_bytes
            while self._num_bytes > self._max_bytes and len(self._known) > 1:
                oldest, dropped = self._known.popitem(last=False)
                self._untold.pop(oldest, None)
                self._num_bytes -= dropped.num_bytes

    def grammar_of(self, params: SamplingParams) -> Compiled | None:
        """The grammar that a request with these params follows; None if it follows none.

        Raises:
            InvalidParamsError: as `compile`, or params that leave an output no end.
        """
        structured = params.structured_outputs
        if structured is None:
            return None
        if params.ignore_eos:
            raise InvalidParamsError(
                "ignore_eos would leave a structured output no end", value=True, limit=False, param="ignore_eos",
                remedy="Leave ignore_eos out.",
            )  # fmt: skip
        while (grammar := self._get(structured)) is None:  # again, if others' have pushed it out already
            self.compile(structured)
        with self._lock:
            return Compiled(grammar, self._untold.pop(structured, 0.0))

    def _get(self, structured: StructuredOutputsParams) -> Grammar | None:
        with self._lock:
            grammar = self._known.get(structured)
            if grammar is not None:
                self._known.move_to_end(structured)
            return grammar

    def _compile(self, structured: StructuredOutputsParams) -> Grammar:
        _check_size(structured)
        kind = structured.kind
        text = enforceable(structured.json) if structured.json is not None else None
        compiler = self._compiler()
        try:
            if text is not None or structured.json_object:
                compiled = _compile_json(compiler, text or JSON_OBJECT, structured.any_whitespace)
            elif structured.regex is not None:
                compiled = compiler.compile_regex(structured.regex)
            else:
                compiled = compiler.compile_grammar(structured.grammar or _choice_grammar(structured.choice))
        except RuntimeError as error:  # what xgrammar raises for everything that it does not take
            raise InvalidParamsError(
                f"structured_outputs.{kind} cannot be compiled: {_reason(error)}",
                value=getattr(structured, kind),
                param=f"structured_outputs.{kind}",
            ) from error
        return Grammar(compiled, self._eos, int(compiled.memory_size_bytes))

    def _compiler(self) -> Any:
        """xgrammar's compiler, made for the first grammar."""
        if self._xgrammar is None:
            if self._tokenizer is None or not self._eos:
                missing = "tokenizer" if self._tokenizer is None else "end-of-sequence token"
                raise InvalidParamsError(
                    f"structured outputs need a {missing}, and this engine has none",
                    param="structured_outputs",
                )
            import xgrammar

            special = self._tokenizer.special_token_ids
            count = min(self._vocab_size, self._tokenizer.vocab_size)
            # A token without bytes is never allowed.
            vocabulary = [b"" if i in special else self._tokenizer.token_bytes(i) for i in range(count)]
            info = xgrammar.TokenizerInfo(
                vocabulary, xgrammar.VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=sorted(self._eos)
            )  # fmt: skip
            self._xgrammar = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        return self._xgrammar


def _compile_json(compiler: Any, schema: str, any_whitespace: bool) -> Any:
    if any_whitespace:
        return compiler.compile_json_schema(schema, max_whitespace_cnt=MAX_BLANKS)
    return compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))


def _choice_grammar(choice: tuple[str, ...] | None) -> str:
    """EBNF of one of the texts; its string literals are JSON's."""
    assert choice is not None, "no kind of structured output"
    return "root ::= " + " | ".join(json.dumps(text, ensure_ascii=False) for text in choice)


def _check_size(structured: StructuredOutputsParams) -> None:
    given = getattr(structured, structured.kind)
    texts = given if isinstance(given, tuple) else (given,)
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str))
    if size > MAX_TEXT_BYTES:
        raise InvalidParamsError(
            f"structured_outputs.{structured.kind} has {size} bytes, at most {MAX_TEXT_BYTES} are taken",
            value=size,
            limit=MAX_TEXT_BYTES,
            param=f"structured_outputs.{structured.kind}",
        )


def _reason(error: RuntimeError) -> str:
    """xgrammar's message without the place in its own source."""
    return str(error).strip().rpartition(".cc:")[2].partition(": ")[2] or str(error).strip()
