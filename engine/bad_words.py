"""Bad words as token ids: what an output must not hold, as the model's tokenizer would write it.

As vLLM has it: a text counts as it is tokenized at the beginning of a text, and behind a space where that is another word
of as many tokens. Boundary: texts to ids; whether one is about to be completed is known to the runner.
"""

from __future__ import annotations

from engine.errors import InvalidRequestError
from engine.sampling_params import SamplingParams
from engine.tokenizer import TokenizerLike


def with_bad_word_ids(params: SamplingParams, tokenizer: TokenizerLike | None) -> SamplingParams:
    """The same parameters, with the texts among the bad words as token ids.

    Raises:
        InvalidRequestError: there is no tokenizer for a text.
        InvalidParamsError: too many words or tokens.
    """
    if not any(isinstance(word, str) for word in params.bad_words):
        return params
    words: list[tuple[int, ...]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(word)
        elif tokenizer is None:
            raise InvalidRequestError(
                "bad words as texts need a tokenizer, and this engine has none", value=word, param="bad_words",
                remedy="Give their token ids.",
            )  # fmt: skip
        else:
            words += _ids_of(word.lstrip(), tokenizer)
    return params.with_(bad_words=tuple(words))


def _ids_of(text: str, tokenizer: TokenizerLike) -> list[tuple[int, ...]]:
    alone, behind = (tuple(tokenizer.encode(space + text, add_special_tokens=False)) for space in ("", " "))
    is_other = len(behind) == len(alone) and behind[:1] != alone[:1]
    return [alone, behind] if is_other else [alone]
