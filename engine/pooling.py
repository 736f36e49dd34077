"""Pooling: a text's hidden states as one vector, its embedding, instead of an output.

What a request asks for (`PoolingParams`), what a model was trained with (`ModelPooling`), what the runner does (`Pooling`), and
what is done to the vector on the host.

Boundary: values and NumPy. Running requests is ``engine.embedding``'s; the files that say what a model was trained with are read
by ``engine.pooling_files``. Source of names: vLLM's PoolingParams, sentence-transformers' modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import InvalidParamsError, InvalidRequestError

Vector = NDArray[np.float64]
DECODER_POOLINGS = ("last", "mean")  # hidden states that see only what is before them
ENCODER_POOLINGS = ("cls", "mean", "max", "last")
SCORE = "score"  # the one logit of a classification head instead of hidden states
EMBED_TASKS = ("generate", "embed")  # models of these tasks have embeddings


@dataclass(frozen=True, slots=True)
class Pooling:
    """What a runner makes of a request's hidden states. `kind`: one of the poolings above, or SCORE."""

    kind: str
    second_segment: int = 0  # of a pair of texts: where the second one's tokens begin; 0: one text


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How a text becomes a vector; None is what the model was trained with.

    Raises:
        InvalidParamsError: naming the parameter, its value and what is accepted.
    """

    pooling: str | None = None
    normalize: bool | None = None  # to length 1
    dimensions: int | None = (
        None  # keep the first so many, for models trained so (Matryoshka); before normalizing
    )
    prompt_name: str | None = None  # of the model's own prompts, such as "query": it stands before the text
    truncate_prompt_tokens: int | None = None  # the first so many tokens; -1: as many as the model takes

    def __post_init__(self) -> None:
        known = tuple(dict.fromkeys((*DECODER_POOLINGS, *ENCODER_POOLINGS)))
        if self.pooling is not None and self.pooling not in known:
            raise _invalid("pooling", self.pooling, f"one of {', '.join(known)}")
        if self.normalize is not None and not isinstance(self.normalize, bool):
            raise _invalid("normalize", self.normalize, "true or false")
        if self.dimensions is not None and not _is_count(self.dimensions):
            raise _invalid("dimensions", self.dimensions, "an integer of at least 1")
        cut = self.truncate_prompt_tokens
        if cut is not None and cut != -1 and not _is_count(cut):
            raise _invalid("truncate_prompt_tokens", cut, "-1 or an integer of at least 1")


@dataclass(frozen=True, slots=True)
class ModelPooling:
    """What a loaded model is for, and how it was trained to embed. The default is a chat model, embedded as vLLM does."""

    task: str = "generate"  # "generate": also embeds; "embed": an encoder; "score": rates pairs of texts; "classify": more labels
    kind: str = "last"
    normalize: bool = True
    poolings: tuple[str, ...] = DECODER_POOLINGS  # that it can compute
    max_length: int | None = None  # tokens of a text, where training says fewer than the context
    prompts: Mapping[str, str] = field(
        default_factory=dict, hash=False
    )  # texts to put before others, by what these are
    lower_case: bool = False  # texts are read so
    num_labels: int = 1
    has_sigmoid: bool = (
        True  # a pair's score is the logit's sigmoid; False: the logit, as the model was trained
    )
    size: int | None = None  # of its vectors, where it is known

    @property
    def can_embed(self) -> bool:
        return self.task in EMBED_TASKS

    def kind_for(self, params: PoolingParams) -> str:
        """Raises InvalidRequestError: this model does not pool so, or has fewer dimensions."""
        if self.size is not None:
            _check_dimensions(params, self.size)
        kind = params.pooling or self.kind
        if kind not in self.poolings:
            raise InvalidRequestError(
                f"this model is not pooled by {kind!r}", value=kind, limit=self.poolings, param="pooling",
                remedy=f"Use {', '.join(self.poolings)}.",
            )  # fmt: skip
        return kind

    def prompt_for(self, params: PoolingParams) -> str:
        """Raises InvalidRequestError: the model has no such prompt."""
        if params.prompt_name is None:
            return ""
        if params.prompt_name not in self.prompts:
            raise InvalidRequestError(
                f"this model has no prompt {params.prompt_name!r}", value=params.prompt_name, limit=sorted(self.prompts),
                param="prompt_name", remedy="Write it before the text, or use one of these." if self.prompts else "Leave it out.",
            )  # fmt: skip
        return self.prompts[params.prompt_name]

    def require_generation(self) -> None:
        """Raises InvalidRequestError: the model generates nothing."""
        if self.task != "generate":
            routes = "/v1/embeddings" if self.can_embed else "/v1/rerank or /v1/score"
            raise InvalidRequestError(
                "this model is an encoder and generates nothing", value=self.task, limit="generate", param="model",
                remedy=f"Use {routes}, or name a model that generates.",
            )  # fmt: skip

    def require_embeddings(self) -> None:
        """Raises InvalidRequestError: the model has none."""
        if not self.can_embed:
            what = (
                "rates pairs of texts" if self.task == SCORE else f"tells {self.num_labels} labels of a text"
            )
            raise InvalidRequestError(
                f"this model {what} and has no embeddings", value=self.task, limit=EMBED_TASKS, param="model",
                remedy="Use /v1/rerank or /v1/score, or an embedding model." if self.task == SCORE else "Use an embedding model.",
            )  # fmt: skip

    def require_scores(self) -> None:
        """Raises InvalidRequestError: the model neither rates pairs of texts nor has embeddings to compare."""
        if self.task == "classify":
            raise InvalidRequestError(
                f"this model tells {self.num_labels} labels apart: which of them is relevance is not known",
                value=self.num_labels, limit=1, param="model", remedy="Use a cross-encoder with one label, or an embedding model.",
            )  # fmt: skip


def finish(vector: Vector, params: PoolingParams, model: ModelPooling) -> Vector:
    """The embedding of a pooled vector [hidden]: cut to `dimensions`, then normalized where asked.

    Raises:
        InvalidRequestError: more dimensions than the model has.
    """
    if params.dimensions is not None:
        _check_dimensions(params, len(vector))
        vector = vector[: params.dimensions]
    if model.normalize if params.normalize is None else params.normalize:
        vector = vector / max(
            float(np.linalg.norm(vector)), 1e-12
        )  # the least length is torch.nn.functional.normalize's
    return vector


def _check_dimensions(params: PoolingParams, size: int) -> None:
    if params.dimensions is not None and params.dimensions > size:
        raise InvalidRequestError(
            f"{params.dimensions} dimensions were asked for, the model has {size}", value=params.dimensions, limit=size,
            param="dimensions", remedy="Ask for at most as many as the model has.",
        )  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _invalid(name: str, value: Any, limit: str) -> InvalidParamsError:
    return InvalidParamsError(f"{name} must be {limit}, got {value!r}", value=value, limit=limit, param=name)
