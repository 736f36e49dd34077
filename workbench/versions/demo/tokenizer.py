"""The bundled model's tokenizer: byte-level BPE, trained on the dialogues and on generated text.

Digits are single tokens, so that numbers can be copied digit by digit. Byte-level: any text survives a
round trip. JSON's punctuation (`":"`, `","`, `{"`) becomes tokens of its own because generated tool calls
hold much of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workbench.versions.demo.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_TOKENS, render
from workbench.versions.demo.corpus import Conversation
from workbench.versions.demo.generator import make_episode
from workbench.versions.demo.values import Split

VOCAB_SIZE = 4096
_NUM_EPISODES = 12_000


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE over texts; special tokens take the first ids. Deterministic for the same texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return tokenizer


def training_texts(
    dialogues: dict[str, list[Conversation]], seed: int, num_episodes: int = _NUM_EPISODES
) -> Iterator[str]:
    """Text pieces between special tokens: a third of the dialogues, and generated episodes of the training split."""
    for conversations in dialogues.values():
        for messages in conversations[::3]:
            yield from _pieces(messages)
    for index in range(num_episodes):
        episode = make_episode(seed, index, Split.TRAIN)
        yield from (segment.text for segment in render(episode.messages, episode.tools))


def _pieces(messages: Conversation) -> Iterator[str]:
    return (segment.text for segment in render(messages))


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json with the chat template, loadable offline by AutoTokenizer."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(folder), save_jinja_files=False)
