"""A runner on a tiny random model, driven by hand-made plans."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.attention.reference import ReferenceAttention
from engine.config import EngineConfig
from engine.memory import make_kv_spec
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.plan import RowAdmission, StepPlan
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams

MODEL = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }
)  # fmt: skip
BLOCK_SIZE = 4
END = 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_decoder(dtype: torch.dtype = torch.float64) -> Decoder:
    decoder = Decoder(MODEL, dtype=dtype, device=torch.device("cpu"), max_positions=64)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in decoder.named_parameters():
        spread = 1.0 if "embedding" in name or "norm" in name else parameter.shape[-1] ** -0.5
        parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return decoder


@pytest.fixture
def make_runner() -> Callable[..., ModelRunner]:
    """A float64 runner of 4 rows and 24 blocks; `decoder` replaces the tiny random one, `replay` captures decode steps."""

    def make(decoder: Any = None, replay: Any = None, load_decoder: Any = None) -> ModelRunner:
        config = EngineConfig(
            model="tiny", dtype="float64", device="cpu", num_blocks=24, block_size=BLOCK_SIZE, max_num_seqs=4,
            max_model_len=40, max_batched_tokens=64, attention_backend="reference",
        )  # fmt: skip
        return ModelRunner(
            decoder or random_decoder(), ReferenceAttention(), config=config,
            kv_spec=make_kv_spec(MODEL, BLOCK_SIZE, torch.float64), eos_token_ids=frozenset({END}),
            device=torch.device("cpu"), dtype=torch.float64,
            replay=replay, load_decoder=load_decoder,
        )  # fmt: skip

    return make


@pytest.fixture
def oracle() -> Callable[[Sequence[int]], torch.Tensor]:
    """Logits [n, V] of a whole text, in one prefill of a runner's own."""
    decoder = random_decoder()

    def logits(tokens: Sequence[int]) -> torch.Tensor:
        from engine.attention.interface import AttentionMetadata
        from engine.runner.model_runner import allocate_caches

        n = len(tokens)
        caches = allocate_caches(
            make_kv_spec(MODEL, 64, torch.float64), 1, torch.float64, torch.device("cpu")
        )
        meta = AttentionMetadata(
            query_start=torch.tensor([0, n], dtype=torch.int32), seq_lens=torch.tensor([n], dtype=torch.int32),
            block_tables=torch.zeros(1, 1, dtype=torch.int32), slot_mapping=torch.arange(n),
            max_query_len=n, max_seq_len=n, num_decode_rows=0,
        )  # fmt: skip
        with torch.inference_mode():
            hidden = decoder(torch.tensor(tokens), torch.arange(n), caches, meta, ReferenceAttention())
            return decoder.logits(hidden)

    return logits


def plan_of(
    step_id: int,
    rows: Sequence[tuple[int, int, int]],
    *,
    samples: Sequence[int] = (),
    new_blocks: dict[int, list[int]] | None = None,
    admitted: Sequence[RowAdmission] = (),
    finished: Sequence[int] = (),
) -> StepPlan:
    """`rows`: (row, start, number of tokens); `samples`: indices that sample; `new_blocks` by index."""
    added = [(new_blocks or {}).get(i, []) for i in range(len(rows))]

    def ints(values: Any) -> Any:
        return np.array(list(values), dtype=np.int32)

    return StepPlan(
        step_id=step_id,
        rows=ints(row for row, _, _ in rows),
        start=ints(start for _, start, _ in rows),
        num_tokens=ints(n for _, _, n in rows),
        num_draft=ints(0 for _ in rows),
        logit_rows=ints(samples),
        new_block_offsets=(ints(np.cumsum([0, *(len(a) for a in added)])),),
        new_block_ids=(ints(i for a in added for i in a),),
        admitted=tuple(admitted),
        finished=tuple(finished),
    )


def admit(row: int, tokens: Sequence[int], blocks: Sequence[int], **params: Any) -> RowAdmission:
    seed = params.pop("row_seed", 0)
    num_prompt = params.pop("num_prompt", len(tokens))
    values = {"temperature": 0.0, **params}
    return RowAdmission(
        row, f"r{row}", tuple(tokens), num_prompt, 0, (tuple(blocks),), SamplingParams(**values), seed
    )


@pytest.fixture
def plans() -> Any:
    """``plans.plan_of`` and ``plans.admit``."""

    class Plans:
        plan_of = staticmethod(plan_of)
        admit = staticmethod(admit)

    return Plans


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Decoder]:
    return random_decoder
