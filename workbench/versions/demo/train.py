"""Trains the bundled model: `python -m workbench.versions.demo.train --data DIALOGUES --out DIR [--resume]`.

One seeded, resumable loop: loss on answers only, Muon and AdamW, warm-up then constant then linear decay.
A checkpoint holds weights, optimizer, stream position and counters and is replaced atomically, so that
killing the process at any moment leaves one that loads. It does not export or judge a finished model: see
`export` and `evaluate`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from workbench.versions.demo.batches import MicroBatch, MixConfig, StreamStep, TrainingStream
from workbench.versions.demo.corpus import Conversation, load_dialogues
from workbench.versions.demo.evaluate import evaluate
from workbench.versions.demo.model import (
    MAX_LENGTH,
    answer_loss,
    compute_dtype,
    demo_config,
    hardware,
    new_model,
)
from workbench.versions.demo.muon import Muon
from workbench.versions.demo.tokenizer import save_tokenizer, train_tokenizer, training_texts

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Optimization. `total_tokens` counts real tokens, context and answers; rates are for AdamW."""

    total_tokens: int = 30_000_000
    peak_lr: float = 2e-3
    warmup_steps: int = 60
    decay_share: float = 0.4
    muon_lr: float = 2.5e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0


RECIPES = {
    "small": (TrainConfig(), MixConfig()),
    "large": (
        TrainConfig(warmup_steps=200, peak_lr=3e-3, muon_lr=4e-3),
        MixConfig(
            episodes_per_pool=2560, dialogues_per_pool=80, copy_first_pools=24, copy_first_dialogues=16,
            micro_tokens=16384, micro_per_step=2,
        ),
    ),
}  # fmt: skip
"""By `--steps`: about 2,000 and about 30,000 tokens an optimizer step. A run keeps to one of them."""


@dataclass(slots=True)
class Progress:
    """Where a run stands. `wall_s` and `answer_tokens` add up over resumed parts."""

    step: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    pool: int = 0
    pool_step: int = 0
    wall_s: float = 0.0


def lr_factor(config: TrainConfig, step: int, done_share: float) -> float:
    """Share of the peak rate: linear warm-up by steps, flat, then linear to zero over the last `decay_share`."""
    warmup = min(1.0, (step + 1) / config.warmup_steps)
    return min(warmup, max(0.0, (1.0 - done_share) / config.decay_share))


@dataclass(frozen=True, slots=True)
class Gradient:
    """Of the summed loss of one micro-batch, a tensor per parameter."""

    loss_sum: float
    tensors: tuple[torch.Tensor, ...]


class Trainer:
    """Owns the model, the optimizer and the stream of one run.

    On a CPU each worker thread computes whole micro-batches with one thread of its own. Parallel operators would wait
    at every operator for whichever core other work has taken.
    """

    def __init__(
        self,
        model_config: LlamaConfig,
        config: TrainConfig,
        mix: MixConfig,
        tokenizer: Tokenizer,
        dialogues: dict[str, list[Conversation]],
        device: torch.device,
        deadline_unix_s: float | None = None,
        num_workers: int = 1,
        num_processes: int = 0,
    ) -> None:
        self.config = config
        self.mix = mix
        self.progress = Progress()
        self.device = device
        self.model: LlamaForCausalLM = new_model(model_config, config.seed).to(device)
        self.muon, self.optimizer = _optimizers(self.model, config)
        self._parameters = list(self.model.parameters())
        self._workers = ThreadPoolExecutor(num_workers, initializer=torch.set_num_threads, initargs=(1,))
        self.loss = float("nan")
        self.lr_factor = 0.0
        self._stream = TrainingStream(tokenizer, dialogues, mix)
        self._num_processes = num_processes
        self._deadline_unix_s = deadline_unix_s
        self._dtype = compute_dtype(device)

    def done_share(self) -> float:
        """Share of the run that is behind: of the tokens, or of the time until the deadline, whichever is more."""
        share = self.progress.tokens / self.config.total_tokens
        if self._deadline_unix_s is not None:
            left_s = self._deadline_unix_s - time.time()
            if left_s <= 0.0:
                return 1.0
            share = max(share, self.progress.wall_s / (self.progress.wall_s + left_s))
        return share

    def run(self, on_step: Callable[[Trainer], bool]) -> None:
        """Trains until the budget is spent or `on_step` returns False."""
        start = self.progress.pool, self.progress.pool_step
        self.model.train()
        for step in self._stream.steps(*start, self._num_processes):
            if self.done_share() >= 1.0:
                return
            self._step(step)
            if not on_step(self):
                return

    def _step(self, step: StreamStep) -> None:
        begin = time.perf_counter()
        self.lr_factor = lr_factor(self.config, self.progress.step, self.done_share())
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.peak_lr * self.lr_factor
        num_answers = sum(int(batch.is_answer[:, 1:].sum()) for batch in step.micro_batches)
        parts = list(self._workers.map(self._gradient, step.micro_batches))
        self._apply(parts, num_answers)
        self.loss = sum(part.loss_sum for part in parts) / num_answers
        self.progress.step += 1
        self.progress.tokens += sum(batch.num_tokens for batch in step.micro_batches)
        self.progress.answer_tokens += num_answers
        self.progress.pool, self.progress.pool_step = step.next_pool, step.next_step
        self.progress.wall_s += time.perf_counter() - begin

    def _gradient(self, batch: MicroBatch) -> Gradient:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            loss = answer_loss(self.model, batch)
        return Gradient(float(loss.detach()), torch.autograd.grad(loss, self._parameters))

    def _apply(self, parts: list[Gradient], num_answers: int) -> None:
        """One optimizer step on the mean over answer tokens; sums in stream order, whichever worker was first."""
        for index, parameter in enumerate(self._parameters):
            total = parts[0].tensors[index]
            for part in parts[1:]:
                total = total + part.tensors[index]
            parameter.grad = total / num_answers
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self.optimizer.step()
        self.muon.step(self.config.muon_lr * self.lr_factor, self._workers.map)

    def save(self, path: Path) -> None:
        """Replaces the checkpoint at `path` atomically."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "muon": self.muon.state_dict(),
            "progress": asdict(self.progress),
            "config": asdict(self.config),
            "mix": asdict(self.mix),
            "made_on": {"hardware": hardware(self.device), "dtype": str(self._dtype).removeprefix("torch.")},
            "torch_rng": torch.get_rng_state(),
        }
        temporary = path.with_suffix(".partial")
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Continues from a checkpoint. Raises ValueError where it was made with another seed or mix."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["mix"] != asdict(self.mix) or state["config"]["seed"] != self.config.seed:
            raise ValueError(
                f"checkpoint {path} was made with mix {state['mix']}, not {asdict(self.mix)}: use the same"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.muon.load_state_dict(state["muon"])
        self.progress = Progress(**state["progress"])
        torch.set_rng_state(state["torch_rng"].cpu())


def _optimizers(model: LlamaForCausalLM, config: TrainConfig) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices, AdamW for the (tied) embedding and the norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    taken = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=config.peak_lr, betas=(0.9, 0.95), fused=True)
    return Muon(inner, weight_decay=config.weight_decay), adamw


class Watch:
    """Per-step side work: log lines, timed checkpoints and evaluations, a clean stop on SIGTERM or Ctrl-C."""

    def __init__(
        self,
        out: Path,
        checkpoint_every_s: float,
        evaluate_every_s: float,
        judge: Callable[[Trainer], dict[str, Any]],
    ) -> None:
        self._out = out
        self._checkpoint_every_s = checkpoint_every_s
        self._evaluate_every_s = evaluate_every_s
        self._judge = judge
        self._stop = False
        now = time.monotonic()
        self._next_checkpoint_s, self._next_evaluation_s = now + checkpoint_every_s, now + evaluate_every_s
        self._losses: list[float] = []

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """A signal handler: ends the run after this step."""
        self._stop = True

    def __call__(self, trainer: Trainer) -> bool:
        self._losses.append(trainer.loss)
        if trainer.progress.step % 20 == 0:
            self._log(trainer, {})
        now = time.monotonic()
        if now >= self._next_checkpoint_s:
            trainer.save(self._out / CHECKPOINT)
            self._next_checkpoint_s = now + self._checkpoint_every_s
        if now >= self._next_evaluation_s:
            trainer.model.eval()
            self._log(trainer, self._judge(trainer))
            trainer.model.train()
            self._next_evaluation_s = time.monotonic() + self._evaluate_every_s
        return not self._stop

    def _log(self, trainer: Trainer, scores: dict[str, Any]) -> None:
        p = trainer.progress
        line = {
            "step": p.step, "tokens": p.tokens, "answer_tokens": p.answer_tokens, "wall_s": round(p.wall_s, 1),
            "tokens_per_s": round(p.tokens / max(p.wall_s, 1e-9)), "done": round(trainer.done_share(), 4),
            "lr": trainer.optimizer.param_groups[0]["lr"],
            "loss": round(sum(self._losses) / max(1, len(self._losses)), 4), **scores,
        }  # fmt: skip
        self._losses.clear()
        text = json.dumps(line)
        print(text, flush=True)
        with (self._out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(text + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of DOMAIN.PART.jsonl.xz dialogues")
    home = Path(os.environ.get("HOME_DIR", ".quire"))
    parser.add_argument("--out", type=Path, default=home / "train" / "chat-base", help="work folder")
    parser.add_argument("--tokens", type=float, default=30e6, help="training tokens")
    parser.add_argument(
        "--minutes", type=float, help="end after so long at the latest, decaying in time for it"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=0, help="make the data ahead in so many processes")
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device)
    parser.add_argument(
        "--steps", choices=RECIPES, default="large" if default_device == "cuda" else "small",
        help="sizes and rates: small steps for a CPU, large ones keep a GPU busy",
    )  # fmt: skip
    parser.add_argument("--checkpoint-s", type=float, default=120.0)
    parser.add_argument("--evaluate-s", type=float, default=600.0)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    out: Path = arguments.out
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not arguments.resume:
        raise SystemExit(f"{checkpoint} exists: pass --resume to continue it, or another --out")
    torch.set_num_threads(arguments.threads)
    out.mkdir(parents=True, exist_ok=True)
    dialogues = load_dialogues(arguments.data, "train")
    tokenizer = _tokenizer(out, dialogues, arguments.seed)
    config, mix = RECIPES[arguments.steps]
    trainer = Trainer(
        demo_config(tokenizer.get_vocab_size()),
        replace(config, total_tokens=int(arguments.tokens), seed=arguments.seed),
        replace(mix, seed=arguments.seed),
        tokenizer,
        dialogues,
        torch.device(arguments.device),
        time.time() + 60 * arguments.minutes if arguments.minutes else None,
        arguments.threads if arguments.device == "cpu" else 1,
        arguments.processes,
    )
    if checkpoint.exists():
        trainer.load(checkpoint)

    def judge(current: Trainer) -> dict[str, Any]:
        result = evaluate(
            current.model, tokenizer, arguments.data, per_family=24, dialogues_per_domain=24, num_stories=8
        )
        rates = {family: f"{score.passed}/{score.total}" for family, score in result.scores.items()}
        return {"perplexity": {d: round(p, 2) for d, p in result.perplexity.items()}, "passed": rates}

    watch = Watch(out, arguments.checkpoint_s, arguments.evaluate_s, judge)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, watch.stop)
    trainer.run(watch)
    trainer.save(checkpoint)
    print(json.dumps({"end": asdict(trainer.progress), "done": round(trainer.done_share(), 4)}), flush=True)


def _tokenizer(out: Path, dialogues: dict[str, list[Conversation]], seed: int) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        save_tokenizer(train_tokenizer(training_texts(dialogues, seed)), out, MAX_LENGTH)
    return Tokenizer.from_file(str(path))


if __name__ == "__main__":
    main()
