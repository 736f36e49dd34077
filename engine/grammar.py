"""GrammarCompiler: what an output must look like, compiled into what tells the tokens that may come next, once per content.

Compiling takes milliseconds to seconds, so it happens in the thread that asks, never on the engine's. What is compiled is kept
under its content, the least recently used given up beyond `max_bytes`.

xgrammar compiles and follows grammars; it is imported with the first one. Boundary: no rows, no masks
(``engine.runner.structured``). Which schemas are taken is ``engine.json_schema``'s.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.errors import InvalidParamsError
from engine.grammar_process import MAX_BLANKS, MAX_SECONDS, GrammarProcess, Job, TooCostly, compile_job
from engine.json_schema import enforceable, is_small
from engine.regex_syntax import check_regex
from engine.structural_tag import SPECIAL, checked_tag, is_small_tag, markers_in, with_special_tokens

if TYPE_CHECKING:
    from engine.sampling_params import SamplingParams
    from engine.structured_outputs import StructuredOutputsParams
    from engine.tokenizer import TokenizerLike

MAX_BYTES = 64 << 20
MAX_VOCABULARIES = 6  # kept in the forms that grammars need
MAX_TEXT_BYTES = 64 << 10  # of one schema, expression, grammar, or all choices together
_CONTROL = re.compile(rb"[\x00-\x09\x0b-\x1f]")  # but the line break, which JSON has between its parts
JSON_OBJECT = '{"type":"object","additionalProperties":true}'


@dataclass(frozen=True, slots=True, eq=False)
class Grammar:
    """A compiled grammar; any number of rows and threads may follow it."""

    compiled: Any  # xgrammar.CompiledGrammar
    stop_token_ids: frozenset[int]  # that end an output where the grammar may end
    num_bytes: int
    vocab_size: int  # tokens that its masks have a bit for


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar, and the time that its compilation took; 0 if somebody was told of it before."""

    grammar: Grammar
    compile_ms: float


@dataclass(frozen=True, slots=True)
class _Tools:
    """What compiles, for one form of the vocabulary."""

    vocabulary: Any  # xgrammar.TokenizerInfo
    compiler: Any  # xgrammar.GrammarCompiler
    process: GrammarProcess


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
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = frozenset(token for token in eos_token_ids if 0 <= token < vocab_size)
        self._max_bytes, self._max_seconds = max_bytes, max_seconds
        self._num_bytes = 0
        self._known: OrderedDict[StructuredOutputsParams, Grammar] = OrderedDict()
        self._untold: dict[StructuredOutputsParams, float] = {}
        self._lock = threading.Lock()  # of the three above
        self._here = threading.Lock()  # held while one compiles in this process
        self._apart = threading.Lock()  # and in the other
        # By whether it is for JSON, and the special tokens that it knows: each made for the first that needs it.
        self._tools: OrderedDict[tuple[bool, frozenset[int]], _Tools] = OrderedDict()

    def compile(self, structured: StructuredOutputsParams) -> None:
        """Have the grammar ready for requests to come.

        Raises:
            InvalidParamsError: naming what cannot be compiled or would not be enforced, before any work.
        """
        if self._get(structured) is not None:
            return
        _check_size(structured)
        job, named = self._with_special_tokens(_job_of(structured))
        with self._here:
            tools = self._tools_for(job, named)
        is_quick = _is_quick(structured, job)
        with self._here if is_quick else self._apart:
            if self._get(structured) is not None:  # by somebody who asked at the same time
                return
            began = time.perf_counter()
            grammar = self._compile(structured, job, tools, is_quick)
            self._keep(structured, grammar, (time.perf_counter() - began) * 1e3)

    def _keep(self, structured: StructuredOutputsParams, grammar: Grammar, compile_ms: float) -> None:
        with self._lock:
            self._known[structured] = grammar
            self._untold[structured] = compile_ms
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

    def close(self) -> None:
        """End the processes that compile, where there are any."""
        for tools in list(self._tools.values()):
            tools.process.close()

    def _compile(
        self, structured: StructuredOutputsParams, job: Job, tools: _Tools, is_quick: bool
    ) -> Grammar:
        kind = structured.kind
        try:
            if is_quick:
                compiled = compile_job(tools.compiler, job)
            else:
                compiled = xgrammar().CompiledGrammar.deserialize_json(
                    tools.process.compile(job), tools.vocabulary
                )
        except RuntimeError as error:  # what xgrammar raises for everything that it does not take
            raise InvalidParamsError(
                f"structured_outputs.{kind} cannot be compiled: {_reason(error)}",
                value=getattr(structured, kind),
                param=f"structured_outputs.{kind}",
            ) from error
        except TooCostly as error:
            raise InvalidParamsError(
                f"structured_outputs.{kind} takes more than {self._max_seconds:g} s, or too much memory, to compile",
                value=getattr(structured, kind),
                limit=self._max_seconds,
                remedy="Nest and repeat less in it.",
                param=f"structured_outputs.{kind}",
            ) from error
        self._check_beginning(compiled, structured)
        return Grammar(compiled, self._eos, int(compiled.memory_size_bytes), self._vocab_size)

    def _check_beginning(self, compiled: Any, structured: StructuredOutputsParams) -> None:
        """Refuse what no output can begin with."""
        mask = np.zeros((1, -(-self._vocab_size // 32)), np.int32)
        xgrammar().GrammarMatcher(compiled).fill_next_token_bitmask(mask)
        if not mask.any():
            raise InvalidParamsError(
                f"no output matches structured_outputs.{structured.kind}",
                value=getattr(structured, structured.kind),
                param=f"structured_outputs.{structured.kind}",
            )

    def _tools_for(self, job: Job, named: frozenset[int]) -> _Tools:
        """What compiles jobs of this kind, for which the special tokens `named` have a text."""
        # Tags too, whose free text does without control characters: SPECIAL is one.
        is_json = job.language in ("json", "tag")
        if (is_json, named) in self._tools:
            self._tools.move_to_end((is_json, named))
            return self._tools[is_json, named]
        tokenizer = self._checked_tokenizer()
        count = min(self._vocab_size, tokenizer.vocab_size)
        special = tokenizer.special_token_ids
        texts = [b"" if i in special else tokenizer.token_bytes(i) for i in range(count)]
        if is_json:  # xgrammar lets them into texts of limited length, where JSON has them as escapes
            texts = [b"" if _CONTROL.search(text) else text for text in texts]
        for i in named:
            texts[i] = (SPECIAL + tokenizer.token_text(i)).encode()
        vocabulary = xgrammar().TokenizerInfo(  # a token without bytes is never allowed
            texts, xgrammar().VocabType.RAW, vocab_size=self._vocab_size, stop_token_ids=sorted(self._eos)
        )  # fmt: skip
        compiler = xgrammar().GrammarCompiler(vocabulary, max_threads=1, cache_enabled=False)
        process = GrammarProcess(vocabulary.serialize_json(), self._max_seconds)
        if len(self._tools) == MAX_VOCABULARIES:
            _, oldest = self._tools.popitem(last=False)
            oldest.process.close()
        self._tools[is_json, named] = _Tools(vocabulary, compiler, process)
        return self._tools[is_json, named]

    def _checked_tokenizer(self) -> TokenizerLike:
        if self._tokenizer is None or not self._eos:
            missing = "tokenizer" if self._tokenizer is None else "end-of-sequence token"
            raise InvalidParamsError(
                f"structured outputs need a {missing}, and this engine has none", param="structured_outputs"
            )
        return self._tokenizer

    def _with_special_tokens(self, job: Job) -> tuple[Job, frozenset[int]]:
        """A tag whose markers may be special tokens, and those: as its markers they are allowed, all others never."""
        if job.language != "tag":
            return job, frozenset()
        tokenizer, tag = self._checked_tokenizer(), json.loads(job.text)
        markers = "\n".join(markers_in(tag))
        known = min(
            self._vocab_size, tokenizer.vocab_size
        )  # a tokenizer may know more than the model can say
        texts = {i: tokenizer.token_text(i) for i in tokenizer.special_token_ids - self._eos if i < known}
        named = {i: text for i, text in texts.items() if text and text in markers}
        if not named:
            return job, frozenset()
        marked = with_special_tokens(tag, named.values())
        return replace(job, text=json.dumps(marked, ensure_ascii=False)), frozenset(named)


def xgrammar() -> Any:
    """The module, imported when it is asked for: it brings torch in."""
    import xgrammar

    return xgrammar


def _job_of(structured: StructuredOutputsParams) -> Job:
    if structured.json is not None:
        return Job("json", enforceable(structured.json), structured.any_whitespace)
    if structured.json_object:
        return Job("json", JSON_OBJECT, structured.any_whitespace)
    if structured.regex is not None:
        check_regex(structured.regex, where="structured_outputs.regex")
        return Job("regex", structured.regex)
    if structured.structural_tag is not None:
        return Job("tag", checked_tag(structured.structural_tag, MAX_BLANKS))
    return Job("ebnf", structured.grammar or _choice_grammar(structured.choice))


def _is_quick(structured: StructuredOutputsParams, job: Job) -> bool:
    """Whether its size alone promises that compiling ends soon: then no process is started for it."""
    if job.language == "tag":
        return is_small_tag(job.text)
    return structured.choice is not None or (job.language == "json" and is_small(job.text))


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
