"""LoadedDraft: a draft model whose weights are in memory, and what guesses with it beside a runner.

Boundary: it is handed how decoders and attention backends are made (``engine.build``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from engine.attention.interface import AttentionBackend
from engine.config import EngineConfig
from engine.kernels.kv_quantization import cache_dtype
from engine.memory import kv_spec_of, torch_dtype
from engine.models.decoder import StepDecoder
from engine.models.draft import Draft
from engine.runner.draft import DraftModel
from engine.runner.model_runner import allocate_caches


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model with its decoder."""

    draft: Draft
    decoder: StepDecoder
    load_decoder: Callable[[], StepDecoder]  # makes another one of it
    make_attention: Callable[[EngineConfig], AttentionBackend]

    def beside(self, config: EngineConfig) -> DraftModel:
        """What guesses for a runner of this resolved config, with a cache of as many blocks."""
        assert config.num_blocks is not None, "the config is not resolved"
        settings, dtype = self.draft.settings(config), torch_dtype(config)
        spec, stored = kv_spec_of(settings, self.draft.model), cache_dtype(config.kv_cache_dtype, dtype)
        make_caches = partial(allocate_caches, spec, config.num_blocks, stored, torch.device(config.device))
        return DraftModel(
            self.decoder, self.make_attention(settings), kv_spec=spec, make_caches=make_caches,
            load_decoder=self.load_decoder,
        )  # fmt: skip
