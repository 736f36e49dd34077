"""Job kind "finetune": a LoRA fine-tune with progress, then its version in the registry with lineage.

The run folder is the job's own, so that a job started again after a crash goes on from its checkpoint; cancelling keeps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.settings import bundled_model
from workbench.versions.errors import FinetuneConfigError
from workbench.versions.training_data import data_from

if TYPE_CHECKING:
    from workbench.jobs import JobContext
    from workbench.versions.finetune import LoraConfig, Progress

NUMBERS = (
    "rank", "alpha", "steps", "batch_tokens", "micro_tokens", "peak_lr", "warmup_steps", "decay_share", "max_length", "seed",
)  # fmt: skip
"""Fields of LoraConfig that a spec may set."""
_OTHERS = ("name", "base", "data", "targets", "dtype", "device", "description", "threads")


def check(spec: dict[str, Any]) -> None:
    """Refuses unknown fields, wrong types and data that cannot be, before any work.

    Raises:
        FinetuneConfigError, TrainingDataError: naming the field, its value and what is accepted.
    """
    unknown = sorted(set(spec) - {*NUMBERS, *_OTHERS})
    if unknown:
        raise FinetuneConfigError(
            f"unknown field {unknown[0]!r} of a fine-tune", value=unknown, limit=[*_OTHERS, *NUMBERS], param=unknown[0],
            remedy="Use one of the fields that exist.",
        )  # fmt: skip
    if not isinstance(spec.get("name"), str) or not spec["name"]:
        raise FinetuneConfigError(
            "a fine-tune needs a name to be registered under", value=spec.get("name"), param="name"
        )
    for field in NUMBERS:
        value = spec.get(field, 1)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise FinetuneConfigError(f"{field}={value!r} is no number", value=value, param=field)
    data = spec.get("data", {"num_examples": 1})
    if not isinstance(data, dict):
        raise FinetuneConfigError(f"data={data!r} is no object", value=data, param="data")
    data_from(data)


def run(spec: dict[str, Any], context: JobContext) -> dict[str, Any]:
    """Trains, registers, and returns the version, its digests and the training's figures."""
    import torch

    from workbench.versions.adapter import read_adapter, read_lineage
    from workbench.versions.finetune import finetune
    from workbench.versions.lineage import register_adapter

    torch.set_num_threads(int(spec.get("threads", 1)))
    config = lora_config(spec, context.folder)

    def on_progress(progress: Progress) -> bool:
        left_s = progress.wall_s / progress.step * (progress.steps - progress.step)
        text = f"step {progress.step} of {progress.steps}, loss {progress.loss:.3f}, {left_s:.0f} s left"
        context.report(0.95 * progress.fraction, text)
        if progress.step % 10 == 0:
            context.partial({"step": progress.step, "steps": progress.steps, "loss": progress.loss})
        return not context.cancelled

    context.report(0.0, "reading base and data")
    adapter = finetune(config, on_progress)
    context.check_cancelled()
    assert adapter is not None, "only a cancelled run ends early"
    context.report(0.96, "registering the version")
    ref = register_adapter(
        context.settings, spec["name"], adapter, config.base, description=str(spec.get("description", ""))
    )
    found = read_adapter(adapter)
    return {
        "version": ref.id, "digest": ref.digest, "base_digest": ref.base_digest, "adapter_digest": ref.adapter_digest,
        "adapter": str(adapter), "size_bytes": found.size_bytes, "training": read_lineage(adapter).get("training", {}),
    }  # fmt: skip


def lora_config(spec: dict[str, Any], out: Path) -> LoraConfig:
    """The fine-tune that a checked spec asks for."""
    from workbench.versions.finetune import LoraConfig

    given = {field: spec[field] for field in (*NUMBERS, "dtype", "device") if field in spec}
    if "data" in spec:
        given["data"] = data_from(spec["data"])
    if "targets" in spec:
        given["targets"] = tuple(spec["targets"])
    return LoraConfig(base=Path(spec.get("base") or bundled_model()), out=out, **given)
