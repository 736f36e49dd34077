"""LoRA fine-tuning in plain torch: a config in, an adapter folder out; loss on answers only, resumable, on GPU or CPU.

One seeded loop over batches cut by length; a checkpoint (adapter, optimizer, position) is replaced atomically, so that a
killed run goes on to the same weights. The finished adapter appears under its name in one rename. It judges nothing and
registers nothing: see `tickets.evaluate` and `registry`. Importing this module imports torch and transformers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from workbench.versions.adapter import LINEAGE_NAME, adapter_digest, is_adapter, read_adapter, read_lineage
from workbench.versions.demo.batches import MicroBatch, cut_by_length
from workbench.versions.demo.chat_format import EncodedChat
from workbench.versions.demo.model import answer_loss, compute_dtype, hardware
from workbench.versions.digest import folder_digest
from workbench.versions.errors import (
    CheckpointMismatchError,
    FinetuneConfigError,
    TrainingDataError,
    WriteError,
)
from workbench.versions.lora import ALL_LINEAR, LoraLinear, inject, load_layers, save_adapter
from workbench.versions.merge import check_base
from workbench.versions.tickets.generator import TicketData
from workbench.versions.training_data import TrainingData, data_facts, encode_all

CHECKPOINT = "checkpoint.pt"
ADAPTER = "adapter"
"""The finished adapter's folder inside a run's folder."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """One fine-tune. `batch_tokens` counts padding; rates are AdamW's; `device` "auto" takes a GPU where there is one."""

    base: Path
    out: Path
    data: TrainingData = field(default_factory=lambda: TicketData(6000))
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR
    steps: int = 400
    batch_tokens: int = 8192
    micro_tokens: int = 16384
    peak_lr: float = 2e-3
    warmup_steps: int = 20
    decay_share: float = 0.6
    clip_norm: float = 1.0
    max_length: int = 1024
    seed: int = 0
    start: Path | None = None  # an adapter of the same base, rank and layers to continue from
    dtype: str = "bfloat16"
    device: str = "auto"
    checkpoint_every_s: float = 30.0
    num_processes: int = 0

    def check(self) -> None:
        """Raises FinetuneConfigError for values that cannot train, before any work."""
        positive = (
            "rank",
            "alpha",
            "steps",
            "batch_tokens",
            "micro_tokens",
            "peak_lr",
            "max_length",
            "clip_norm",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise FinetuneConfigError(
                    f"{name}={getattr(self, name)} must be above 0",
                    value=getattr(self, name),
                    limit="above 0",
                    param=name,
                )
        if self.dtype not in ("bfloat16", "float32", "float16"):
            raise FinetuneConfigError(
                f"dtype {self.dtype!r} is none of bfloat16, float32, float16", value=self.dtype, param="dtype"
            )
        if not (self.base / "config.json").is_file():
            raise FinetuneConfigError(
                f"{self.base} is no model folder", value=str(self.base), limit="a folder with config.json", param="base",
                remedy="Name the base model's folder.",
            )  # fmt: skip

    def recipe(self, base_digest: str) -> dict[str, Any]:
        """What decides the weights: equal recipes on equal software make equal adapters."""
        facts = asdict(self)
        for name in ("base", "out", "start", "device", "checkpoint_every_s", "num_processes"):
            del facts[name]
        if self.start is not None:
            facts["start"] = adapter_digest(self.start)
        return {
            **facts,
            "targets": list(self.targets),
            "data": data_facts(self.data),
            "base_digest": base_digest,
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands after a step. `loss` is the mean over that step's answer tokens, in nats."""

    step: int
    steps: int
    loss: float
    tokens: int
    answer_tokens: int
    wall_s: float

    @property
    def fraction(self) -> float:
        return self.step / self.steps


OnProgress = Callable[[Progress], object]
"""Called after every step; returning False ends the run there, with a checkpoint to continue from."""


def run_folder(config: LoraConfig, home_dir: Path) -> LoraConfig:
    """The config with `out` under HOME_DIR, named by its recipe: the same recipe again goes on, or is done already."""
    recipe = json.dumps(config.recipe(folder_digest(config.base)), sort_keys=True)
    name = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    return replace(config, out=home_dir / "finetune" / name)


def finetune(config: LoraConfig, on_progress: OnProgress | None = None) -> Path | None:
    """Trains, or continues, and returns the adapter's folder; None when `on_progress` ended it early.

    A finished adapter of the same recipe is returned as it is.

    Raises:
        FinetuneConfigError: a value that cannot train, or a checkpoint of another recipe.
        TrainingDataError: the data cannot be read, or no example fits.
        WriteError: checkpoint or adapter cannot be written; the last checkpoint is kept.
    """
    config.check()
    recipe = config.recipe(folder_digest(config.base))
    folder = config.out / ADAPTER
    if is_adapter(folder):
        if read_lineage(folder).get("recipe") != json.loads(json.dumps(recipe)):
            raise CheckpointMismatchError(
                f"{folder} holds an adapter of another recipe", value=str(folder), param="out",
                remedy="Name another folder, or remove this one.",
            )  # fmt: skip
        return folder
    trainer = LoraTrainer(config, recipe)
    trainer.resume()
    if not trainer.run(on_progress or (lambda progress: True)):
        return None
    with _writing(config.out):
        trainer.export(folder)
        (config.out / CHECKPOINT).unlink(missing_ok=True)
    return folder


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Makes the folder, and one typed error of whatever fails while writing there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:  # torch turns a failing write into the second
        raise WriteError(
            f"{folder} cannot be written: {error}", value=str(folder), param="out",
            remedy="Free some space, or name another folder; the run goes on from its last checkpoint.",
        ) from error  # fmt: skip


class LoraTrainer:
    """Owns model, optimizer and position of one run."""

    def __init__(self, config: LoraConfig, recipe: dict[str, Any]) -> None:
        self.config = config
        self.progress = Progress(0, config.steps, float("nan"), 0, 0, 0.0)
        self._recipe = recipe
        self._losses: list[float] = []
        name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        chats = encode_all(config.data, config.base / "tokenizer.json", config.num_processes)
        self._chats = [chat for chat in chats if len(chat.ids) <= config.max_length and any(chat.is_answer)]
        if not self._chats:
            raise TrainingDataError(
                f"none of {len(chats)} examples fits {config.max_length} tokens", value=len(chats),
                limit=config.max_length, param="max_length", remedy="Raise max_length or give shorter examples.",
            )  # fmt: skip
        self.model = LlamaForCausalLM.from_pretrained(config.base, dtype=torch.float32).to(self.device)
        self.layers: dict[str, LoraLinear] = inject(
            self.model, rank=config.rank, alpha=config.alpha, targets=config.targets, seed=config.seed
        )
        if config.start is not None:
            check_base(read_adapter(config.start), recipe["base_digest"])
            load_layers(self.layers, config.start)
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=config.peak_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.device.type == "cuda",
        )
        self._dtype = compute_dtype(self.device)
        self._epoch, self._epoch_step = 0, 0

    def run(self, on_progress: OnProgress) -> bool:
        """Trains to the last step; False when `on_progress` ended it before (a checkpoint is left)."""
        next_checkpoint_s = time.monotonic() + self.config.checkpoint_every_s
        self.model.train()
        while self.progress.step < self.config.steps:
            epoch = self._steps_of_epoch(self._epoch)
            while self._epoch_step < len(epoch) and self.progress.step < self.config.steps:
                self._step(epoch[self._epoch_step])
                self._epoch_step += 1
                stop = on_progress(self.progress) is False
                if stop or time.monotonic() >= next_checkpoint_s:
                    self.save()
                    next_checkpoint_s = time.monotonic() + self.config.checkpoint_every_s
                if stop:
                    return False
            if self._epoch_step >= len(epoch):
                self._epoch, self._epoch_step = self._epoch + 1, 0
        return True

    def _steps_of_epoch(self, epoch: int) -> list[list[EncodedChat]]:
        """All examples once, in an order of this epoch's own: neighbours in length share a step, steps are shuffled."""
        rng = random.Random(f"{self.config.seed}/epoch/{epoch}")
        order = sorted(self._chats, key=lambda chat: len(chat.ids) + 24 * rng.random())
        steps: list[list[EncodedChat]] = []
        size = longest = 0
        for chat in order:
            longest = max(longest, len(chat.ids))
            if not steps or longest * (size + 1) > self.config.batch_tokens:
                steps.append([])
                size, longest = 0, len(chat.ids)
            steps[-1].append(chat)
            size += 1
        rng.shuffle(steps)
        return steps

    def _lr_factor(self) -> float:
        """Linear warm-up, flat, then linear to zero over the last `decay_share` of the steps."""
        done = self.progress.step / self.config.steps
        warm = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup_steps))
        return min(warm, (1.0 - done) / self.config.decay_share if self.config.decay_share > 0 else 1.0)

    def _step(self, chats: list[EncodedChat]) -> None:
        begin = time.perf_counter()
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.peak_lr * self._lr_factor()
        batches = cut_by_length(chats, self.config.micro_tokens, self.config.max_length)
        num_answers = sum(int(batch.is_answer[:, 1:].sum()) for batch in batches)
        loss = sum(self._backward(batch, num_answers) for batch in batches)
        torch.nn.utils.clip_grad_norm_(self._parameters, self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._losses.append(float(loss))
        done = self.progress
        self.progress = replace(
            done,
            step=done.step + 1,
            loss=float(loss),
            tokens=done.tokens + sum(batch.num_tokens for batch in batches),
            answer_tokens=done.answer_tokens + num_answers,
            wall_s=done.wall_s + time.perf_counter() - begin,
        )

    def _backward(self, batch: MicroBatch, num_answers: int) -> torch.Tensor:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not torch.float32):
            loss = answer_loss(self.model, batch) / num_answers
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def save(self) -> None:
        """Replaces the checkpoint atomically."""
        state = {
            "adapter": {
                name: {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}
                for name, layer in self.layers.items()
            },
            "optimizer": self._optimizer.state_dict(),
            "progress": asdict(self.progress),
            "position": [self._epoch, self._epoch_step],
            "losses": self._losses,
            "recipe": json.dumps(self._recipe, sort_keys=True),
        }
        path = self.config.out / CHECKPOINT
        temporary = path.with_suffix(".partial")
        with _writing(self.config.out):
            with temporary.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)

    def resume(self) -> None:
        """Continues from the run folder's checkpoint, if there is one.

        Raises:
            CheckpointMismatchError: it was made by another recipe or on another base.
        """
        path = self.config.out / CHECKPOINT
        if not path.is_file():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["recipe"] != json.dumps(self._recipe, sort_keys=True):
            raise CheckpointMismatchError(
                f"checkpoint {path} was made by another recipe", value=json.loads(state["recipe"]), limit=self._recipe,
                param="out", remedy="Name another folder, or remove the checkpoint.",
            )  # fmt: skip
        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.lora_A.copy_(state["adapter"][name]["lora_A"])
                layer.lora_B.copy_(state["adapter"][name]["lora_B"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        self._epoch, self._epoch_step = state["position"]
        self._losses = list(state["losses"])

    def export(self, folder: Path) -> None:
        """Writes adapter, recipe and training figures beside their place and renames them into it."""
        config = self.config
        staging = Path(tempfile.mkdtemp(dir=config.out, prefix=".adapter-"))
        try:
            save_adapter(
                self.layers, staging, rank=config.rank, alpha=config.alpha, targets=config.targets,
                base_name=config.base.resolve().name, base_digest=self._recipe["base_digest"],
                dtype=getattr(torch, config.dtype),
            )  # fmt: skip
            lineage = {
                "base": {"name": config.base.resolve().name, "digest": self._recipe["base_digest"]},
                "recipe": self._recipe,
                "training": self._figures(),
            }
            text = json.dumps(lineage, indent=2, ensure_ascii=False) + "\n"
            (staging / LINEAGE_NAME).write_text(text, encoding="utf-8")
            for file in staging.iterdir():
                file.chmod(0o644)
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
            staging.chmod(0o755)
            os.rename(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _figures(self) -> dict[str, Any]:
        """What the run took and where it ended; `losses` are means over up to 100 equal stretches of steps."""
        size = max(1, len(self._losses) // 100)
        stretches = [self._losses[i : i + size] for i in range(0, len(self._losses), size)]
        done = self.progress
        return {
            "num_examples": len(self._chats), "epochs": round(done.answer_tokens / self._answer_tokens(), 2),
            "steps": done.step, "tokens": done.tokens, "answer_tokens": done.answer_tokens,
            "wall_s": round(done.wall_s, 1), "final_loss": round(sum(stretches[-1]) / len(stretches[-1]), 4),
            "losses": [round(sum(part) / len(part), 4) for part in stretches],
            "trained_parameters": sum(p.numel() for p in self._parameters),
            "hardware": hardware(self.device), "dtype": str(self._dtype).removeprefix("torch."),
            "torch": torch.__version__,
        }  # fmt: skip

    def _answer_tokens(self) -> int:
        return sum(sum(chat.is_answer[1:]) for chat in self._chats)
