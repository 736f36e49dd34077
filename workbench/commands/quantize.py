"""`quire quantize MODEL`: what int8, int4 or fp8 weights and caches cost in quality, and a checkpoint of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from workbench.errors import SettingsError

METHODS = ("int8", "int4", "fp8")
_ROW = "{:<22}{:>12}{:>12}{:>10}{:>12}{:>12}{:>10}"


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Add `quire quantize`."""
    parser = commands.add_parser(
        "quantize", help="what quantizing a model costs in quality; write a quantized copy"
    )
    parser.add_argument("model", help="a folder or hub id, in floats")
    parser.add_argument(
        "--method", action="append", choices=METHODS, help="of the weights; may be given more than once"
    )
    parser.add_argument(
        "--kv-cache",
        action="append",
        choices=("fp8", "int8"),
        help="of the KV cache, alone and with each method",
    )
    parser.add_argument(
        "--report", action="store_true", help="perplexity and KL divergence against the original over --texts"
    )
    parser.add_argument(
        "--texts", type=Path, help="a text file (a blank line ends a text) or JSONL of {text} or {messages}"
    )
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text (default 2048)")
    parser.add_argument("--limit", type=int, default=64, help="texts (default 64)")
    parser.add_argument(
        "--output", type=Path, help="write a compressed-tensors checkpoint into this new folder"
    )
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write and measure; the record of a report is one JSON object."""
    methods = list(dict.fromkeys(arguments.method or ()))
    _check(arguments, methods)
    from engine.model_folder import find_model

    folder = find_model(arguments.model)
    # Texts are read first: a mistake there must not cost a checkpoint.
    texts = _read_texts(folder, arguments) if arguments.report else []
    if arguments.output is not None:
        from engine.quantization.compress import write_compressed

        write_compressed(folder, arguments.output, methods[0])
        print(f"wrote {arguments.output}", file=sys.stderr)
    record: dict[str, Any] = {"output": None if arguments.output is None else str(arguments.output)}
    if arguments.report:
        record |= _report(arguments, folder, methods, texts)
    if arguments.json:
        print(json.dumps(record))
    return 0


def _check(arguments: argparse.Namespace, methods: list[str]) -> None:
    """Refuse options that do not go together.

    Raises:
        SettingsError: naming the option and what is missing.
    """
    if not arguments.report and arguments.output is None:
        raise _wrong("nothing to do", "report", "Give --report --texts FILE, --output FOLDER, or both.")
    if arguments.report and arguments.texts is None:
        raise _wrong("--report needs texts to score", "texts", "Give --texts FILE.")
    if not methods and not (arguments.report and arguments.kv_cache):
        raise _wrong(
            "no method", "method", f"Give --method {'|'.join(METHODS)}, or --kv-cache with --report."
        )
    if arguments.output is not None and len(methods) != 1:
        raise _wrong("a checkpoint has one method", "method", "Give --method once with --output.")
    if arguments.max_tokens < 2 or arguments.limit < 1:
        raise _wrong(
            "too few tokens or texts", "max_tokens", "Give --max-tokens 2 or more and --limit 1 or more."
        )


def _wrong(message: str, param: str, remedy: str) -> SettingsError:
    return SettingsError(message, param=param, remedy=remedy)


def _read_texts(folder: Path, arguments: argparse.Namespace) -> list[list[int]]:
    """The texts as token ids, those of at least two tokens, cut to --max-tokens."""
    from engine.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(folder)
    try:
        content = arguments.texts.read_text(encoding="utf-8")
        if arguments.texts.suffix == ".jsonl":
            rows = [json.loads(line) for line in content.splitlines() if line.strip()]
            found = [
                tokenizer.apply_chat_template(row["messages"])
                if "messages" in row
                else tokenizer.encode(row["text"])
                for row in rows[: arguments.limit]
            ]
        else:
            parts = [part for part in content.split("\n\n") if part.strip()]
            found = [tokenizer.encode(part) for part in parts[: arguments.limit]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"{arguments.texts} cannot be read as texts ({error})", value=str(arguments.texts), param="texts",
            remedy="Give a UTF-8 text file, or JSONL with text or messages in each row.",
        ) from error  # fmt: skip
    texts = [ids[: arguments.max_tokens] for ids in found if len(ids) > 1]
    if not texts:
        raise _wrong(
            f"{arguments.texts} holds no text of two tokens", "texts", "Give a file with longer texts."
        )
    return texts


def _report(
    arguments: argparse.Namespace, folder: Path, methods: list[str], texts: list[list[int]]
) -> dict[str, Any]:
    """Measure, print the table, return the record."""
    import torch

    from engine.bench.parts.quality import Variant, measure_variants
    from engine.bench.record import make_record
    from engine.config import EngineConfig
    from engine.memory import held_weight_bytes
    from engine.models.config import ModelConfig

    caches = ["auto", *dict.fromkeys(arguments.kv_cache or ())]
    variants = [Variant(method, cache) for method in (None, *methods) for cache in caches][1:]
    if arguments.output is not None:
        variants.append(Variant(model=str(arguments.output)))
    config = EngineConfig(model=str(folder), dtype=arguments.dtype, device=arguments.device)
    found = measure_variants(config, texts, variants)
    model, gpu = ModelConfig.from_folder(folder), torch.device("cuda")
    rows = []
    for quality in found:
        variant = quality.variant
        weighed = ModelConfig.from_folder(Path(variant.model)) if variant.model else model
        rows.append({
            "weights": "written checkpoint" if variant.model else variant.quantization or "original",
            "kv_cache": variant.kv_cache_dtype,
            "weights_bytes_on_gpu": held_weight_bytes(weighed, torch.bfloat16, gpu, variant.quantization),
            "perplexity": quality.perplexity, "perplexity_change": quality.perplexity / found[0].perplexity - 1,
            "mean_kl": quality.mean_kl, "max_kl": quality.max_kl, "same_top": quality.same_top,
        })  # fmt: skip
    _print_table(rows, found[0].num_tokens, sys.stderr if arguments.json else sys.stdout)
    figures = {"model": str(arguments.model), "texts": str(arguments.texts), "num_texts": len(texts),
               "num_tokens": found[0].num_tokens, "rows": rows}  # fmt: skip
    return make_record("quantize", figures)


def _print_table(rows: list[dict[str, Any]], num_tokens: int, to: Any) -> None:
    from workbench.memory_budget import in_units

    print(
        _ROW.format(
            "weights / KV cache", "on a GPU", "perplexity", "change", "mean KL", "max KL", "same top"
        ),
        file=to,
    )
    for row in rows:
        cache = "" if row["kv_cache"] == "auto" else f" / {row['kv_cache']}"
        print(
            _ROW.format(
                row["weights"] + cache, in_units(row["weights_bytes_on_gpu"]), f"{row['perplexity']:.4g}",
                f"{row['perplexity_change']:+.2%}", f"{row['mean_kl']:.2g}", f"{row['max_kl']:.2g}", f"{row['same_top']:.1%}",
            ),
            file=to,
        )  # fmt: skip
    print(
        f"{num_tokens} tokens scored; KL in nats a token, of the original from each; same top: the likeliest token is the same.",
        file=to,
    )
