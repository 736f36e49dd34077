"""Training resumes to the same weights, survives being killed, and learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from workbench.versions.demo.batches import MixConfig, TrainingStream, cut_by_length
from workbench.versions.demo.chat_format import EncodedChat
from workbench.versions.demo.corpus import DOMAINS
from workbench.versions.demo.model import answer_loss, demo_config
from workbench.versions.demo.muon import Muon, orthogonalize
from workbench.versions.demo.tokenizer import train_tokenizer, training_texts
from workbench.versions.demo.train import CHECKPOINT, TrainConfig, Trainer, lr_factor

MIX = MixConfig(
    seed=1,
    episodes_per_pool=12,
    dialogues_per_pool=2,
    copy_first_pools=1,
    micro_tokens=300,
    micro_per_step=2,
    max_length=300,
)
CONFIG = TrainConfig(total_tokens=6_000, warmup_steps=2, seed=1)
TALK = [
    {"role": "user", "content": "Hi, how are you?"},
    {"role": "assistant", "content": "I am well, I had tea and a walk."},
]


@pytest.fixture(scope="module")
def dialogues() -> dict[str, list[Any]]:
    return {domain: [TALK, TALK * 2] for domain in DOMAINS}


@pytest.fixture(scope="module")
def tokenizer(dialogues: dict[str, list[Any]]) -> Tokenizer:
    return train_tokenizer(training_texts(dialogues, seed=0, num_episodes=100), vocab_size=600)


def new_trainer(tokenizer: Tokenizer, dialogues: dict[str, list[Any]], num_workers: int = 2) -> Trainer:
    config = demo_config(600, hidden_size=64, num_layers=2)
    return Trainer(config, CONFIG, MIX, tokenizer, dialogues, torch.device("cpu"), None, num_workers)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def test_resumed_run_ends_with_the_same_weights(
    tokenizer: Tokenizer, dialogues: dict[str, list[Any]], tmp_path: Path
) -> None:
    straight = new_trainer(tokenizer, dialogues)
    straight.run(lambda t: True)
    assert straight.progress.step > 6
    assert straight.progress.pool >= 1, "the run must cross a pool to mean anything"

    path = tmp_path / CHECKPOINT
    first = new_trainer(tokenizer, dialogues)
    first.run(lambda t: t.progress.step < 3)
    first.save(path)
    second = new_trainer(tokenizer, dialogues, num_workers=1)
    second.load(path)
    second.run(lambda t: True)

    assert second.progress.tokens == straight.progress.tokens
    expected, found = weights(straight), weights(second)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoint_of_another_mix_is_refused(
    tokenizer: Tokenizer, dialogues: dict[str, list[Any]], tmp_path: Path
) -> None:
    trainer = new_trainer(tokenizer, dialogues)
    trainer.save(tmp_path / CHECKPOINT)
    other = Trainer(
        demo_config(600, hidden_size=64, num_layers=2),
        CONFIG,
        MixConfig(seed=2),
        tokenizer,
        dialogues,
        torch.device("cpu"),
    )
    with pytest.raises(ValueError, match="use the same"):
        other.load(tmp_path / CHECKPOINT)


_ENDLESS_SAVES = """
import sys
from pathlib import Path
import torch
from tokenizers import Tokenizer
from workbench.versions.demo.batches import MixConfig
from workbench.versions.demo.model import demo_config
from workbench.versions.demo.train import TrainConfig, Trainer
torch.set_num_threads(1)
folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
trainer = Trainer(demo_config(600, hidden_size=64, num_layers=2), TrainConfig(), MixConfig(), tokenizer, {}, torch.device("cpu"))
while True:
    trainer.progress.step += 1
    trainer.save(folder / "checkpoint.pt")
    print(trainer.progress.step, flush=True)
"""


@pytest.mark.full
def test_kill_at_any_moment_leaves_a_checkpoint_that_loads(
    tokenizer: Tokenizer, dialogues: dict[str, list[Any]], tmp_path: Path
) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS_SAVES, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        time.sleep(0.013)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
        assert state["progress"]["step"] >= int(lines[-1])
        assert state["model"].keys() == new_trainer(tokenizer, dialogues).model.state_dict().keys()


def test_loss_falls(tokenizer: Tokenizer, dialogues: dict[str, list[Any]]) -> None:
    losses: list[float] = []
    trainer = new_trainer(tokenizer, dialogues)
    trainer.run(lambda t: losses.append(t.loss) is None)
    assert sum(losses[-3:]) / 3 < 0.93 * losses[0]


def test_loss_equals_the_models_own_on_answers_only(
    tokenizer: Tokenizer, dialogues: dict[str, list[Any]]
) -> None:
    trainer = new_trainer(tokenizer, dialogues)
    batch = next(iter(TrainingStream(tokenizer, dialogues, MIX).steps())).micro_batches[0]
    labels = batch.ids.masked_fill(~batch.is_answer, -100)
    expected = trainer.model(input_ids=batch.ids, labels=labels).loss * int(batch.is_answer[:, 1:].sum())
    torch.testing.assert_close(answer_loss(trainer.model, batch), expected, rtol=1e-5, atol=1e-4)


def test_stream_continues_from_any_position(tokenizer: Tokenizer, dialogues: dict[str, list[Any]]) -> None:
    stream = TrainingStream(tokenizer, dialogues, MIX)
    steps = stream.steps()
    for _ in range(4):
        here = next(steps)
    later, resumed = next(steps), next(stream.steps(here.next_pool, here.next_step))
    assert all(
        torch.equal(a.ids, b.ids) for a, b in zip(later.micro_batches, resumed.micro_batches, strict=True)
    )


def test_batches_keep_every_chat_and_the_budget() -> None:
    chats = [EncodedChat(list(range(1, size + 1)), [True] * size) for size in (3, 50, 7, 7, 21, 90, 4)]
    batches = cut_by_length(chats, 60, 80)
    assert sum(batch.num_tokens for batch in batches) == sum(min(80, len(chat.ids)) for chat in chats)
    assert all(batch.ids.numel() <= 60 or batch.ids.shape[0] == 1 for batch in batches)


def test_schedule_warms_up_stays_and_decays_to_zero() -> None:
    config = TrainConfig(warmup_steps=10, decay_share=0.2)
    assert lr_factor(config, 0, 0.0) == pytest.approx(0.1)
    assert lr_factor(config, 500, 0.5) == lr_factor(config, 500, 0.79) == 1.0
    assert lr_factor(config, 500, 0.9) == pytest.approx(0.5)
    assert lr_factor(config, 500, 1.0) == 0.0


def test_deadline_that_has_passed_ends_the_run(tokenizer: Tokenizer, dialogues: dict[str, list[Any]]) -> None:
    config = demo_config(600, hidden_size=64, num_layers=2)
    device, past = torch.device("cpu"), time.time() - 1
    trainer = Trainer(config, CONFIG, MIX, tokenizer, dialogues, device, past)
    trainer.progress.wall_s = 100.0
    assert trainer.done_share() == 1.0
    trainer.run(lambda t: True)
    assert trainer.progress.step == 0


def test_orthogonalized_matrices_keep_their_vectors_and_level_their_values() -> None:
    torch.manual_seed(0)
    for shape in ((2, 16, 48), (1, 48, 16), (3, 24, 24)):
        matrices = torch.randn(shape)
        values = torch.linalg.svdvals(orthogonalize(matrices))
        assert values.max() < 2.0
        assert values.median() > 0.6
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        turned = left.transpose(1, 2) @ orthogonalize(matrices) @ right.transpose(1, 2)
        torch.testing.assert_close(
            turned, torch.diag_embed(torch.diagonal(turned, dim1=1, dim2=2)), atol=1e-4, rtol=0
        )


def test_muon_refuses_vectors() -> None:
    with pytest.raises(ValueError, match="matrices only"):
        Muon([torch.nn.Parameter(torch.zeros(3))], weight_decay=0.1)


@pytest.mark.full
def test_pools_made_in_processes_are_the_same(tokenizer: Tokenizer, dialogues: dict[str, list[Any]]) -> None:
    stream = TrainingStream(tokenizer, dialogues, MIX)
    here, ahead = stream.steps(1, 1), stream.steps(1, 1, num_processes=2)
    for _ in range(8):
        want, got = next(here), next(ahead)
        assert (got.next_pool, got.next_step) == (want.next_pool, want.next_step)
        for mine, theirs in zip(want.micro_batches, got.micro_batches, strict=True):
            assert torch.equal(mine.ids, theirs.ids)
            assert torch.equal(mine.is_answer, theirs.is_answer)
            assert mine.num_tokens == theirs.num_tokens
    ahead.close()
