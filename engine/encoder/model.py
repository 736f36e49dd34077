"""EncoderModel: an encoder computed by transformers' own code, its weights filled by our loader, one padded batch at a time.

Texts are padded on the right and the attention mask hides the padding, so that what shares a batch shows only in the rounding of
sums. Boundary: token ids in, vectors out. Which texts make a batch is ``engine.encoder.engine``'s.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from engine.encoder.config import EncoderConfig
from engine.errors import UnsupportedModelError
from engine.models.transformers_decoder import Unfilled, place
from engine.models.transformers_model import load_config
from engine.models.weights import Progress, load_weights
from engine.pooling import Pooling, Vector

# Names in checkpoints from before PyTorch: what they stand for.
_OLD_ENDS = {".gamma": ".weight", ".beta": ".bias"}
_TABLES = re.compile(r"(position_ids|rotary_emb\.inv_freq)$")  # that the model computes itself


class EncoderModel:
    """An encoder in memory.

    Raises:
        UnsupportedModelError: transformers has no such model, or the folder has only pickled weights.
        ModelNotFoundError, CorruptWeightsError: as ``engine.models.weights.load_weights``.
    """

    def __init__(
        self,
        config: EncoderConfig,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.device = device
        with torch.device("cpu"), Unfilled():
            self.model = _build(config, folder)
        place(self.model, dtype, device)
        self._prefix = f"{self.model.base_model_prefix}."
        self._targets = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if tensor.is_floating_point()
        }
        load_weights(self, folder, progress)
        parameters = inspect.signature(self.model.forward).parameters
        self._has_segments = config.num_segments > 1 and "token_type_ids" in parameters

    @property
    def embedding(self) -> Tensor:
        """The input embedding [V, hidden]."""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    @property
    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))

    def weight_targets(self) -> Iterator[tuple[str, Tensor]]:
        """Names in the model, each with the parameter or stored buffer that it fills; of tied ones the first name."""
        seen: set[int] = set()
        for name, tensor in self._targets.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def place_of(self, stored: str) -> str | None:
        """The target's name for a checkpoint's, with or without the body's prefix; None for what is not computed: heads that
        were trained beside it, and tables."""
        for old, new in _OLD_ENDS.items():
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        bare = stored.removeprefix(self._prefix)
        for name in (stored, bare, self._prefix + stored):
            if name in self._targets:
                return name
        has_head = not self.config.architecture.endswith("Model")
        is_left_out = not self.config.is_classifier and (
            bare.startswith("pooler.") or (has_head and bare == stored)
        )
        return None if is_left_out or _TABLES.search(stored) else stored

    def finish_loading(self) -> None:
        """Nothing is left to do."""

    def encode(self, texts: Sequence[Sequence[int]], poolings: Sequence[Pooling]) -> list[Vector]:
        """The pooled vector [hidden] of each text of a batch, float64; of a classifier its logits [labels]."""
        lengths = [len(text) for text in texts]
        shape = (len(texts), max(lengths))
        ids = np.full(shape, self.config.pad_token_id, np.int64)
        segments = np.zeros(shape, np.int64)
        for i, (text, pooling) in enumerate(zip(texts, poolings, strict=True)):
            ids[i, : len(text)] = text
            if pooling.second_segment:
                segments[i, pooling.second_segment : len(text)] = 1
        mask = torch.from_numpy(np.arange(shape[1]) < np.array(lengths)[:, None]).to(self.device)
        given = {"token_type_ids": self._on_device(segments)} if self._has_segments else {}
        with torch.inference_mode():
            found: Any = self.model(input_ids=self._on_device(ids), attention_mask=mask.long(), **given)
            if self.config.is_classifier:
                pooled = found.logits.double()
            else:
                pooled = _pool(found.last_hidden_state, lengths, poolings)
        return list(pooled.cpu().numpy())

    def _on_device(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(self.device)


def _build(config: EncoderConfig, folder: Path) -> PreTrainedModel:
    """The model without values; code that comes with a checkpoint never runs."""
    kind = AutoModelForSequenceClassification if config.is_classifier else AutoModel
    try:
        # The dtype is the process's default on purpose: transformers would set another one for all threads.
        model: PreTrainedModel = kind.from_config(
            load_config(folder, trust_remote_code=False), dtype=torch.get_default_dtype()
        )
    except (ValueError, TypeError, AttributeError, KeyError, ImportError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build {config.architecture}: {error}", value=config.architecture, param="model",
            remedy="Check config.json.",
        ) from error  # fmt: skip
    if not config.is_classifier and getattr(model, "pooler", None) is not None:
        model.pooler = None  # a layer for pretraining, which embeddings do not use and checkpoints often lack
    return model.eval().requires_grad_(False)


def _pool(hidden: Tensor, lengths: list[int], poolings: Sequence[Pooling]) -> Tensor:
    """One vector [hidden] for each text of `hidden` [n, length, hidden], float64."""
    rows = []
    for states, length, pooling in zip(hidden.double(), lengths, poolings, strict=True):
        states = states[:length]
        if pooling.kind == "mean":
            rows.append(states.mean(0))
        elif pooling.kind == "max":
            rows.append(states.amax(0))
        else:
            assert pooling.kind in ("cls", "last"), pooling
            rows.append(states[0 if pooling.kind == "cls" else length - 1])
    return torch.stack(rows)
