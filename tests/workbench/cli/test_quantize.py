"""`quire quantize`: a report on quality against the original, and a checkpoint that others load too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.bench.parts.quality import Variant, measure_variants
from engine.config import EngineConfig
from engine.errors import ConfigError, UnsupportedModelError
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.weights import load_weights
from engine.quantization.compress import write_compressed
from engine.tokenizer import Tokenizer
from workbench import exit_codes
from workbench.cli import main

TEXTS = ("The cat sat on the mat and looked at the dog.", "Twelve boats sailed home before the storm came.")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("\n\n".join(TEXTS))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["quantize", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_report_is_the_measurement(
    capsys: pytest.CaptureFixture[str], tiny_model: Path, texts: Path
) -> None:
    options = ["--method", "int8", "--method", "int4", "--kv-cache", "fp8", "--report", "--texts", str(texts)]
    code, out, err = run(capsys, str(tiny_model), *options, "--dtype", "float32", "--json")
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    rows = record["figures"]["rows"]
    assert [(row["weights"], row["kv_cache"]) for row in rows] == [
        ("original", "auto"), ("original", "fp8"), ("int8", "auto"), ("int8", "fp8"), ("int4", "auto"), ("int4", "fp8"),
    ]  # fmt: skip
    tokenizer = Tokenizer.from_pretrained(tiny_model)
    ids = [tokenizer.encode(text) for text in TEXTS]
    config = EngineConfig(model=str(tiny_model), dtype="float32")
    want = measure_variants(config, ids, [Variant("int4")])
    assert record["figures"]["num_tokens"] == sum(map(len, ids)) - len(ids)
    assert rows[0]["perplexity"] == pytest.approx(want[0].perplexity, rel=1e-6)
    assert rows[4]["mean_kl"] == pytest.approx(want[1].mean_kl, rel=1e-6)
    assert rows[0]["mean_kl"] == 0 < rows[2]["mean_kl"] < rows[4]["mean_kl"]
    assert rows[4]["weights_bytes_on_gpu"] < rows[2]["weights_bytes_on_gpu"] < rows[0]["weights_bytes_on_gpu"]
    assert record["versions"]["torch"]
    table = err.splitlines()
    assert any(line.startswith("int4 / fp8") for line in table)
    assert "tokens scored" in table[-1]


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_a_written_checkpoint_is_as_good_and_others_read_it_alike(
    method: str, capsys: pytest.CaptureFixture[str], tiny_model: Path, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "quantized"
    options = [
        "--method",
        method,
        "--output",
        str(output),
        "--report",
        "--texts",
        str(texts),
        "--dtype",
        "float32",
    ]
    code, out, _ = run(capsys, str(tiny_model), *options, "--json")
    assert code == 0
    own, written = json.loads(out.splitlines()[-1])["figures"]["rows"][1:]
    assert written["weights"] == "written checkpoint"
    # Not the same scales: its own are of 32 to 128 inputs in int4, and one 255th of the range in int8. fp8 of ours rounds inputs.
    assert 0 < written["mean_kl"] < 3 * own["mean_kl"]
    assert (output / "tokenizer.json").is_file()
    model = ModelConfig.from_folder(output)
    decoder = Decoder(model, dtype=torch.float32, device=torch.device("cpu"), max_positions=8)
    load_weights(decoder, output)
    peer = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    with torch.no_grad():
        peer(torch.tensor([[1]]))  # the library unpacks the weights at the first call
    state = peer.state_dict()
    for name, value in decoder.weight_targets():
        assert torch.equal(value, state[name].float()), name


def test_what_cannot_be_written_is_refused_before_anything_is(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="new folder"):
        write_compressed(tiny_model, tmp_path, "int8")
    source = tmp_path / "awq"
    source.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    quantization = {"quant_method": "awq", "bits": 4, "group_size": 32}
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    with pytest.raises(UnsupportedModelError, match="quantized already"):
        write_compressed(source, tmp_path / "new", "int8")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ([], "--report --texts FILE"),
        (["--report", "--method", "int8"], "--texts FILE"),
        (["--output", "x", "--report", "--texts", "TEXTS", "--kv-cache", "fp8"], "--method once"),
        (["--report", "--texts", "TEXTS"], "--method int8"),
        (["--report", "--texts", "/no/such/file", "--method", "int8"], "/no/such/file"),
        (["--report", "--texts", "TEXTS", "--method", "int8", "--max-tokens", "1"], "--max-tokens 2"),
    ],
)
def test_options_that_do_not_go_together_are_bad_input(
    options: list[str], named: str, capsys: pytest.CaptureFixture[str], tiny_model: Path, texts: Path
) -> None:
    given: list[Any] = [str(texts) if option == "TEXTS" else option for option in options]
    code, _, err = run(capsys, str(tiny_model), *given)
    assert code == exit_codes.BAD_INPUT
    assert named in err
