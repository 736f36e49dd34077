"""Tokenizers of each decoder kind, built here from a handful of texts; engines and workers on the fake runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from engine import Engine, EngineConfig, EngineWorker
from engine.fake_runner import FakeRunner, FakeTokenizer
from engine.plan import KVSpec

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's 42 times faster!",
    "naïve café – Größe, smörgåsbord; 東京で会いましょう 🙂🙂 👩‍👩‍👧 é",
    "def f(x):\n    return x ** 2  # four spaces, two spaces\n\n\tTab",
    "Привет, мир! שלום עולם नमस्ते दुनिया 🏳️‍🌈",
] * 8
SPECIAL = ["<s>", "</s>", "<|user|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
    "<|user|>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
)


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with a small vocabulary, so that most characters beyond ASCII are split over tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(" two words", normalized=False)])  # characters outside the byte alphabet
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """The Llama 2 kind: metaspace in the vocabulary, one token a byte for what it lacks, leading space stripped."""
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in [*"▁ethané\n東sox", "▁t", "he", "▁the", "▁▁", "▁a"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("▁", "a")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """The T5 kind: a metaspace decoder over a unigram vocabulary."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_piece() -> tokenizers.Tokenizer:
    """A decoder that has no table of its own here: decoded through a window."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=220, special_tokens=["<unk>", *SPECIAL], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "byte_level": byte_level,
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
    "word_piece": word_piece,
}


@pytest.fixture(scope="session")
def wrapped() -> Callable[[str], PreTrainedTokenizerFast]:
    """A transformers tokenizer of the named kind, with BOS, EOS and a chat template."""
    made: dict[str, PreTrainedTokenizerFast] = {}

    def make(kind: str) -> PreTrainedTokenizerFast:
        if kind not in made:
            backend = KINDS[kind]()
            bos = backend.token_to_id("<s>")
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", bos)]
            )
            made[kind] = PreTrainedTokenizerFast(
                tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
            )
        return made[kind]

    return make


@pytest.fixture
def tokenizer_folder(tmp_path: Path, wrapped: Callable[[str], PreTrainedTokenizerFast]) -> Path:
    """A folder as a model has it: tokenizer files, chat template, configuration with two more EOS ids."""
    wrapped("byte_level").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 1}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return tmp_path


MakeEngine = Callable[..., Engine]
MakeWorker = Callable[..., EngineWorker]


@pytest.fixture
def make_engine() -> MakeEngine:
    """An engine on a FakeRunner; keywords are the runner's, those of `config` the engine's."""

    def make(config: dict[str, Any] | None = None, **runner: Any) -> Engine:
        values = {"num_blocks": 512, "max_model_len": 1024, "max_batched_tokens": 512, **(config or {})}
        resolved = EngineConfig(model="fake", dtype="float32", device="cpu", **values)
        tokenizer = FakeTokenizer()
        assert resolved.num_blocks is not None
        return Engine(
            resolved,
            FakeRunner(resolved.num_blocks, resolved.block_size, **runner),
            kv_spec=KVSpec(1, 1, 1, resolved.block_size, 4),
            eos_token_ids=tokenizer.eos_token_ids,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer,
        )

    return make


@pytest.fixture
def make_worker(make_engine: MakeEngine) -> Iterator[MakeWorker]:
    """A started worker on a FakeRunner, closed after the test; `worker` are the EngineWorker's own keywords."""
    made: list[EngineWorker] = []

    def make(
        config: dict[str, Any] | None = None, worker: dict[str, Any] | None = None, **runner: Any
    ) -> EngineWorker:
        made.append(EngineWorker(make_engine(config, **runner), **(worker or {})))
        made[-1].start()
        return made[-1]

    yield make
    for worker in made:
        worker.close()
