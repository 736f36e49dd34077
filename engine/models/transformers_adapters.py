"""Attention modules for architectures of transformers that choose theirs from a table of their own, not through the interface.

Each does what the class that it derives from does up to the scores, and calls the interface's function there. Registered in
that table under our names.

Boundary: two architectures that are widely used. Others with attention code of their own are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Attend = Callable[..., tuple[Tensor, None]]


def register_adapter(model_type: str, names: tuple[str, ...], attend: Attend) -> None:
    """Make the attention implementations `names` known to the architectures that need a module of their own for it."""
    adapter = {"falcon": _falcon, "gptj": _gptj}.get(model_type)
    if adapter is not None:
        adapter(names, attend)


def _falcon(names: tuple[str, ...], attend: Attend) -> None:
    from transformers.models.falcon import modeling_falcon as falcon

    class PagedFalconAttention(falcon.FalconAttention):  # type: ignore[misc]
        """FalconAttention; KV heads that its checkpoints share between queries are stored once."""

        def forward(
            self,
            hidden_states: Tensor,
            alibi: Tensor | None,
            attention_mask: Tensor | None,
            position_embeddings: tuple[Tensor, Tensor] | None = None,
            **_: Any,
        ) -> tuple[Tensor, None]:
            query, key, value = (
                heads.transpose(1, 2) for heads in self._split_heads(self.query_key_value(hidden_states))
            )
            shared = key.shape[1] // self.num_kv_heads
            key, value = key[:, ::shared], value[:, ::shared]
            if position_embeddings is not None:
                query, key = falcon.apply_rotary_pos_emb(query, key, *position_embeddings)
            mixed, weights = attend(self, query, key, value, attention_mask, alibi=alibi)
            return self.dense(mixed.flatten(2)), weights

    falcon.FALCON_ATTENTION_CLASSES.update(dict.fromkeys(names, PagedFalconAttention))


def _gptj(names: tuple[str, ...], attend: Attend) -> None:
    from transformers.models.gptj import modeling_gptj as gptj

    class PagedGPTJAttention(gptj.GPTJAttention):  # type: ignore[misc]
        """GPTJAttention, whose scores have the usual scale."""

        def _attn(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
        ) -> tuple[Tensor, None]:
            mixed, weights = attend(self, query, key, value, attention_mask)
            return mixed.transpose(1, 2), weights

    gptj.GPTJ_ATTENTION_CLASSES.update(dict.fromkeys(names, PagedGPTJAttention))
