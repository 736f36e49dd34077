"""Models that transformers' code computes: what is refused and why, how weights find their places, and a whole engine on them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.attention.reference import ReferenceAttention
from engine.build import build_engine, resolve_config
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, CorruptWeightsError, UnsupportedModelError
from engine.llm import LLM
from engine.memory import kv_spec_of
from engine.models.transformers_config import TransformersConfig, read_model_config
from engine.models.transformers_decoder import TransformersDecoder
from engine.models.weights import load_weights
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.engine.models.parity import make_model
from tests.engine.models.transformers_configs import THROUGH_TRANSFORMERS
from tests.engine.runner.test_decode_graphs import GuardedReplay

BUNDLED = Path(__file__).resolve().parents[3] / "data" / "models" / "chat-base"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    make_model(THROUGH_TRANSFORMERS["gpt2"]()).save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(gpt2: Path, tmp_path: Path) -> Callable[..., Path]:
    """``copy_of(**changes)``: the GPT-2 in a folder of its own, with changed keys in its config.json."""

    def copied(**changes: Any) -> Path:
        folder = shutil.copytree(gpt2, tmp_path / "copy")
        values = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps(values))
        return Path(folder)

    return copied


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    values: dict[str, Any] = {
        "dtype": "float64",
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 4,
        "max_model_len": 100,
    }
    return EngineConfig(model=str(folder), device="cpu", num_threads=1, **{**values, **settings})


# An architecture, its config class, values that are not the class's own, and what the refusal says.
REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("MambaForCausalLM", "MambaConfig", {"num_hidden_layers": 2}, "keep a state"),
    ("RwkvForCausalLM", "RwkvConfig", {"num_hidden_layers": 2}, "keep a state"),
    ("JambaForCausalLM", "JambaConfig", {}, "keep a state"),
    ("BartForCausalLM", "BartConfig", {}, "encoder with a decoder"),
    ("BloomForCausalLM", "BloomConfig", {}, "0 of its 2 layers attend through"),
    ("GPTNeoForCausalLM", "GPTNeoConfig", {}, "does not go through transformers' attention interface"),
    ("FalconForCausalLM", "FalconConfig", {"alibi": True}, "alibi"),
    ("GraniteSWAForCausalLM", "GraniteSWAConfig", {}, "s_aux"),
    ("MiniCPM3ForCausalLM", "MiniCPM3Config", {"num_hidden_layers": 2}, r"shapes \(1, 40, 3, 96\), .*\(1, 40, 3, 64\)"),
    ("DiffLlamaForCausalLM", "DiffLlamaConfig", {}, "attends more than once"),
    ("GraniteMoeForCausalLM", "GraniteMoeConfig", {}, "experts"),
    ("BertLMHeadModel", "BertConfig", {}, "neither causal nor a causal window"),
    ("DogeForCausalLM", "DogeConfig", {"num_hidden_layers": 2}, "no mask of transformers' own"),
    ("Gemma4ForCausalLM", "Gemma4TextConfig", {"num_hidden_layers": 2, "num_kv_shared_layers": 0}, "heads of different"),
    ("LlavaForConditionalGeneration", "LlavaConfig", {}, "more than text"),
    ("GPT2ForSequenceClassification", "GPT2Config", {}, "causal LM of its kind is GPT2LMHeadModel"),
    ("GPT2LMHeadModel", "GPT2Config", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized"),
    (
        "StableLmForCausalLM",
        "StableLmConfig",
        {"num_hidden_layers": 2, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        "values on the host",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "kind", "changes", "reason"),
    REFUSED,
    ids=[f"{each[0]}-{each[3][:12]}" for each in REFUSED],
)
def test_what_cannot_run_in_paged_steps_is_refused_by_name_before_weights_are_read(
    architecture: str, kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    values = {**getattr(transformers, kind)(**changes).to_dict(), "architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(
        UnsupportedModelError, match=rf"{architecture} is not supported: .*{reason}"
    ) as caught:
        build_engine(config_of(tmp_path))
    assert "LlamaForCausalLM" in caught.value.limit


def test_an_architecture_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["NewForCausalLM"], "model_type": "new"})
    )
    with pytest.raises(
        UnsupportedModelError, match="NewForCausalLM is not supported: transformers does not take"
    ):
        read_model_config(tmp_path)


OWN_CODE = """
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own"

class OwnForCausalLM(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_of_a_checkpoint_runs_only_if_it_is_trusted(
    copy_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    folder = copy_of(architectures=["OwnForCausalLM"], model_type="own", auto_map=auto_map)
    (folder / "own.py").write_text(OWN_CODE)
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        read_model_config(folder)
    assert read_model_config(folder, trust_remote_code=True).architecture == "OwnForCausalLM"


@pytest.mark.parametrize(
    "setting", [{"quantization": "int8"}, {"enable_lora": True}, {"deterministic": True}]
)
def test_settings_of_the_native_decoder_are_refused_by_name(gpt2: Path, setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name} needs the native decoder; GPT2LMHeadModel") as caught:
        resolve_config(config_of(gpt2, **setting))
    assert caught.value.param == name


def test_sizes_are_counted_in_the_model(gpt2: Path) -> None:
    model = read_model_config(gpt2)
    assert isinstance(model, TransformersConfig)
    hidden, inner, layers, vocab, positions = 48, 80, 2, 97, 256
    products = layers * (4 * hidden * hidden + 2 * hidden * inner)
    others = layers * (4 * hidden + inner + hidden + 4 * hidden) + 2 * hidden
    assert model.num_layer_products == products
    assert model.num_parameters == products + others + (vocab + positions) * hidden
    assert (
        model.num_step_parameters == products + others + vocab * hidden
    )  # the head is tied to the embedding
    assert (model.num_kv_heads, model.head_size, model.max_context) == (4, 12, positions)
    # Layer 1 of this one divides its scores by 2.
    assert [layer.scale for layer in model.attention_layers] == [12**-0.5, 12**-0.5 / 2]
    decoder = TransformersDecoder(model, gpt2, dtype=torch.bfloat16, device=CPU)
    weights = decoder.step_weights()
    assert weights.layers == 2 * (products + others)
    assert (weights.head, weights.embedding_row) == (2 * vocab * hidden, 2 * 2 * hidden)


def test_a_context_ends_with_the_learned_positions(gpt2: Path) -> None:
    with pytest.raises(ConfigError, match="context of 256"):
        resolve_config(config_of(gpt2, max_model_len=257, num_blocks=None))


def decoder_of(folder: Path) -> TransformersDecoder:
    model = read_model_config(folder)
    assert isinstance(model, TransformersConfig)
    decoder = TransformersDecoder(model, folder, dtype=torch.float64, device=CPU)
    load_weights(decoder, folder)
    return decoder


def test_a_model_is_built_before_its_weights_take_memory(tmp_path: Path) -> None:
    """200 MiB of embeddings and matrices in float32, which no step of building touches."""
    config = transformers.GPT2Config(
        vocab_size=40_000, n_embd=1024, n_layer=1, n_head=8, architectures=["GPT2LMHeadModel"]
    )
    config.save_pretrained(tmp_path)
    model = read_model_config(tmp_path)
    assert isinstance(model, TransformersConfig)
    before = resident_bytes()
    TransformersDecoder(model, tmp_path, dtype=torch.bfloat16, device=CPU)
    assert model.num_parameters * 4 > 200 << 20
    assert resident_bytes() - before < 20 << 20


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors) or tensors, path)


def test_every_tensor_lands_in_its_place_and_tied_ones_are_one(gpt2: Path) -> None:
    decoder, stored = decoder_of(gpt2), load_file(gpt2 / "model.safetensors")
    targets = dict(decoder.weight_targets())
    assert targets.keys() == stored.keys()
    for name, tensor in targets.items():
        assert torch.equal(tensor, stored[name]), name
    assert decoder.model.lm_head.weight.data_ptr() == decoder.embedding.data_ptr()


def test_the_older_form_of_a_checkpoint_is_the_same_model(gpt2: Path, copy_of: Callable[..., Path]) -> None:
    """Names without the body's prefix, causal masks as tensors, a tied head beside its embedding."""

    def older(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256) for i in range(2)}
        return {**renamed, **masks, "lm_head.weight": renamed["wte.weight"].clone()}

    folder = copy_of()
    change_tensors(folder, older)
    for (name, a), (_, b) in zip(
        decoder_of(gpt2).weight_targets(), decoder_of(folder).weight_targets(), strict=True
    ):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if "h.1.mlp.c_fc.bias" not in k}, CorruptWeightsError, r"h\.1\.mlp\.c_fc\.bias"),
        (lambda t: {**t, "transformer.h.0.attn.gate": torch.ones(3)}, UnsupportedModelError, r"h\.0\.attn\.gate"),
        (lambda t: {**t, "transformer.ln_f.bias": torch.ones(47)}, CorruptWeightsError, r"\(47,\).*\(48,\)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fill_the_model_is_refused(
    change: Any, error: type[Exception], said: str, copy_of: Callable[..., Path]
) -> None:
    folder = copy_of()
    change_tensors(folder, change)
    with pytest.raises(error, match=said):
        decoder_of(folder)


PROMPT = [5, 9, 2, 61, 17, 30, 44, 8, 3, 71] * 2
PARAMS = SamplingParams(max_tokens=12, temperature=0.8, seed=3, ignore_eos=True)


def answer(engine: Engine, name: str, prompt: list[int] = PROMPT) -> list[int]:
    engine.add(engine.make_request(tuple(prompt), PARAMS, request_id=name))
    tokens: list[int] = []
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None, delta.error
            tokens.extend(delta.token_ids)
    return tokens


def test_an_engine_sleeps_and_wakes_and_gives_its_memory_back(gpt2: Path) -> None:
    engine = build_engine(config_of(gpt2, dtype="float32"))
    expected = answer(engine, "before")
    for level in (1, 2):
        engine.sleep(level)
        engine.wake_up()
        assert answer(engine, f"after {level}") == expected
    engine.close()


@pytest.mark.parametrize("settings", [{"dtype": "bfloat16"}, {"kv_cache_dtype": "int8"}])
def test_other_dtypes_and_caches_run(gpt2: Path, settings: dict[str, Any]) -> None:
    engine = build_engine(config_of(gpt2, **{"dtype": "float32", **settings}))
    assert len(answer(engine, "x")) == 12
    engine.close()


@pytest.mark.parametrize("name", ["gpt2", pytest.param("cohere2", marks=pytest.mark.full)])
def test_decode_steps_can_be_captured(name: str, tmp_path: Path) -> None:
    """GPT-2 has a padding token here, for which transformers looks at token ids on the host where it gets no mask."""
    make_model(THROUGH_TRANSFORMERS[name]()).save_pretrained(tmp_path)
    config = resolve_config(config_of(tmp_path, attention_backend="reference", max_num_seqs=1))
    decoder = decoder_of(tmp_path)
    assert not config.enforce_eager
    kv_spec = kv_spec_of(config, decoder.config)

    def run(replay: GuardedReplay | None) -> list[int]:
        runner = ModelRunner(
            decoder, ReferenceAttention(), config=config, kv_spec=kv_spec, eos_token_ids=frozenset(), device=CPU,
            dtype=torch.float64, replay=replay,
        )  # fmt: skip
        runner.capture()
        engine = Engine(
            config, runner, kv_spec=kv_spec, eos_token_ids=frozenset(), vocab_size=decoder.config.vocab_size
        )
        tokens = answer(engine, "x")
        engine.close()
        return tokens

    replay = GuardedReplay()
    assert run(replay) == run(None)
    assert replay.num_replays > 0


def test_steps_that_copy_from_the_host_are_not_captured(
    copy_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    def copying(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.tensor([2.0], device=hidden.device)

    folder = copy_of()
    monkeypatch.setattr(GPT2MLP, "forward", copying)
    assert resolve_config(config_of(folder)).enforce_eager


def test_an_llm_on_a_folder_with_a_tokenizer(tmp_path: Path) -> None:
    vocab_size = json.loads((BUNDLED / "config.json").read_text())["vocab_size"]
    config = THROUGH_TRANSFORMERS["gpt2"]()
    config.vocab_size = vocab_size
    make_model(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, tmp_path / name)
    with LLM(str(tmp_path), dtype="float32", device="cpu", num_blocks=64, max_model_len=200) as llm:
        params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        one, same, other = llm.generate(["Hello there", "Hello there", "Type 42"], params)
        assert one.text == same.text
        assert len(one.token_ids) == len(other.token_ids) == 8
        assert one.text == llm.tokenizer.decode(one.token_ids)
        [chat] = llm.chat([{"role": "user", "content": "Hello!"}], params)
        assert chat.num_prompt_tokens > 1
        stats = llm.stats()
    assert stats.memory.weights_bytes > 4 * vocab_size * 48
