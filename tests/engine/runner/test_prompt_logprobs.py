"""Log-probabilities of a long prompt: part by part the same figures as at once, and never all logits in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.attention.interface import AttentionMetadata
from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.runner.model_runner import PROMPT_LOGPROB_ROWS, ModelRunner, allocate_caches

VOCAB, LENGTH, BLOCK_SIZE = 997, 700, 16
CPU = torch.device("cpu")
MODEL = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    }
)  # fmt: skip


class MostRows(TorchDispatchMode):
    """The most rows of vocabulary width that an operation gave."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[-1] == VOCAB:
                self.most = max(self.most, leaf.numel() // VOCAB)
        return out


def random_decoder() -> Decoder:
    decoder = Decoder(MODEL, dtype=torch.float64, device=CPU, max_positions=1024)
    generator = torch.Generator().manual_seed(4)
    for parameter in decoder.parameters():
        parameter.normal_(
            0.0, 1.0 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5, generator=generator
        )
    return decoder


def all_at_once(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [n, V] from one product over the whole text."""
    n = len(tokens)
    meta = AttentionMetadata(
        query_start=torch.tensor([0, n], dtype=torch.int32), seq_lens=torch.tensor([n], dtype=torch.int32),
        block_tables=torch.zeros(1, 1, dtype=torch.int32), slot_mapping=torch.arange(n), max_query_len=n,
        max_seq_len=n, num_decode_rows=0,
    )  # fmt: skip
    caches = allocate_caches(make_kv_spec(MODEL, 1024, torch.float64), 1, torch.float64, CPU)
    hidden = decoder.forward(torch.tensor(tokens), torch.arange(n), caches, meta, ReferenceAttention())
    return decoder.logits(hidden).log_softmax(-1)


def test_parts_of_a_prompt_give_the_figures_of_the_whole(plans: Any) -> None:
    decoder = random_decoder()
    tokens = torch.randint(0, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(5)).tolist()
    config = EngineConfig(
        model="m", dtype="float64", device="cpu", num_blocks=64, block_size=BLOCK_SIZE, max_num_seqs=1,
        max_model_len=1000, max_batched_tokens=1000, attention_backend="reference",
    )  # fmt: skip
    runner = ModelRunner(
        decoder, ReferenceAttention(), config=config, kv_spec=make_kv_spec(MODEL, BLOCK_SIZE, torch.float64),
        eos_token_ids=frozenset(), device=CPU, dtype=torch.float64,
    )  # fmt: skip
    admitted = plans.admit(0, tokens, range(44), prompt_logprobs=2)
    with MostRows() as seen:
        runner.submit(plans.plan_of(0, [(0, 0, LENGTH)], samples=[0], admitted=[admitted]))
        (entries,) = runner.collect().prompt_logprobs.values()
    assert seen.most == PROMPT_LOGPROB_ROWS < LENGTH / 2, "the prompt takes several parts"
    with torch.inference_mode():
        expected = all_at_once(decoder, tokens)[:-1]
    own = expected.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    # Products of other shapes sum in another order: some units in the last place of float64.
    assert [entry.logprob for entry in entries] == pytest.approx(own.tolist(), rel=1e-12, abs=1e-12)
    assert [entry.token_id for entry in entries] == tokens[1:]
    assert [entry.rank for entry in entries] == ((expected > own[:, None]).sum(-1) + 1).tolist()
    assert [entry.top_ids for entry in entries] == [tuple(ids) for ids in expected.topk(2).indices.tolist()]
