"""Writes the bundled model: `python -m workbench.versions.demo.export --run DIR --data DIALOGUES`.

From a training checkpoint: bf16 weights, configs, tokenizer, prompt chips that the exported weights pass,
figures, and the model card. Every figure is measured on exactly the weights that are written. Files are
replaced one by one, atomically, the weights last but for the card.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from workbench.versions.demo.chips import choose_chips
from workbench.versions.demo.corpus import load_domain, story_tasks
from workbench.versions.demo.evaluate import evaluate
from workbench.versions.demo.model import MAX_LENGTH, demo_config, hardware, new_model
from workbench.versions.demo.model_card import write_card
from workbench.versions.demo.tokenizer import save_tokenizer
from workbench.versions.demo.train import CHECKPOINT

_LAST = ("model.safetensors", "README.md")


def load_checkpoint(run: Path) -> tuple[LlamaForCausalLM, Tokenizer, dict[str, Any]]:
    """The model of a training checkpoint with its weights rounded to bf16, held in fp32; tokenizer; counters."""
    state = torch.load(run / CHECKPOINT, map_location="cpu", weights_only=True)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    model = new_model(demo_config(tokenizer.get_vocab_size()), seed=0)
    model.load_state_dict({name: tensor.bfloat16().float() for name, tensor in state["model"].items()})
    return model.eval(), tokenizer, {**state["progress"], **state["config"], **state["made_on"]}


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json, model.safetensors (bf16) and the tokenizer's files."""
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    model.to(torch.float32)
    save_tokenizer(tokenizer, folder, MAX_LENGTH)


def publish(source: Path, target: Path) -> None:
    """Replaces the target's files by the source's, each atomically; readers never see half a file."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(
        source.iterdir(), key=lambda p: (_LAST.index(p.name) + 1 if p.name in _LAST else 0, p.name)
    ):
        path.chmod(0o644)
        os.replace(path, target / path.name)


def versions() -> dict[str, str]:
    """What the figures were measured with."""
    return {
        "hardware": hardware(torch.device("cpu")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, required=True, help="work folder of the training")
    parser.add_argument("--data", type=Path, required=True, help="folder of DOMAIN.PART.jsonl.xz dialogues")
    parser.add_argument("--out", type=Path, default=Path("data/models/chat-base"))
    parser.add_argument("--per-family", type=int, default=200, help="tasks a family, all held out")
    parser.add_argument(
        "--per-family-known", type=int, default=200, help="tasks a family, only values held out"
    )
    parser.add_argument("--num-stories", type=int, default=None, help="dev stories to judge; default all")
    parser.add_argument("--note", default="", help="how this run differed from one uninterrupted default run")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # parallel by family: parallel operators would wait for busy cores
    model, tokenizer, training = load_checkpoint(arguments.run)
    result = evaluate(
        model,
        tokenizer,
        arguments.data,
        arguments.per_family,
        per_family_known=arguments.per_family_known,
        num_stories=arguments.num_stories,
        num_workers=arguments.threads,
    )
    figures = {
        "training": training,
        "note": arguments.note,
        "parameters": sum(p.numel() for p in model.parameters()),
        "evaluation": asdict(result),
        "measured_with": versions(),
        "measured_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
    }
    stories = story_tasks(load_domain(arguments.data, "story", "dev"))[:16]
    chips = choose_chips(model, tokenizer, stories)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=".export-") as temporary:
        staging = Path(temporary)
        write_model(model, tokenizer, staging)
        (staging / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        text = json.dumps({"chips": chips}, indent=2, ensure_ascii=False)
        (staging / "prompt_chips.json").write_text(text + "\n", encoding="utf-8")
        (staging / "README.md").write_text(write_card(figures, len(chips)), encoding="utf-8")
        publish(staging, arguments.out)
    print(json.dumps({"out": str(arguments.out), **figures["evaluation"]}))


if __name__ == "__main__":
    main()
