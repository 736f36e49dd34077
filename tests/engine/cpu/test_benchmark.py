"""``python -m engine.bench cpu --quick`` runs through: every variant gives the tokens asked for, figures are whole."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

from engine.bench import cpu
from engine.bench.parts import cpu_peers


@pytest.mark.full
def test_quick_run_reports_every_variant(library, capsys):
    parser = argparse.ArgumentParser()
    cpu.add_arguments(parser)
    figures = cpu.run(parser.parse_args(["--quick", "--no-peers"]))
    json.dumps(figures)
    assert len(figures["tokens_per_s"]) == 6
    for loads in figures["tokens_per_s"].values():
        assert loads["batched"]["median"] > 0
        assert loads["single"]["median"] > 0
    for load in ("batched", "single"):
        shares = figures["step_shares"][load]
        parts = [shares[name] for name in ("forward", "sample", "prepare", "schedule", "between")]
        assert abs(sum(parts) - 1) < 1e-3
        assert min(parts) >= 0
    assert "tokens/s" in capsys.readouterr().out


PEER = """
import json, sys
print(json.dumps({"ready": "1.0"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    print("noise", file=sys.stderr)
    if len(asked["prompts"]) > 2:
        sys.exit("too many")
    print(json.dumps({"seconds": 0.5, "lengths": [asked["output_tokens"]] * len(asked["prompts"])}), flush=True)
"""


def test_a_peer_is_asked_line_by_line_and_its_last_words_are_told(tmp_path, monkeypatch):
    program = tmp_path / "peer.py"
    program.write_text(PEER)
    monkeypatch.setattr(cpu_peers, "PROCESS", program)
    with cpu_peers.running("openvino", "model", 2) as peer:
        assert peer.version == "1.0"
        assert peer.generate([[1, 2], [3]], 7) == (0.5, [7, 7])
        with pytest.raises(RuntimeError, match="too many"):
            peer.generate([[1], [2], [3]], 7)


def test_peers_that_are_not_there_are_named(monkeypatch):
    monkeypatch.setattr(cpu_peers, "find_spec", lambda name: None)
    assert cpu_peers.missing("llama.cpp") == "llama_cpp is not installed"
    assert cpu_peers.missing("vllm") == "no --vllm-python given"
    assert cpu_peers.missing("vllm", "/usr/bin/python3") is None


@pytest.mark.parametrize("shape", sorted(cpu.SHAPES))
def test_a_gguf_file_holds_the_weights(shape, tmp_path):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed (an optional peer's need)")
    cpu.write_model(tmp_path, cpu.SHAPES[shape])
    cpu_peers.write_gguf(tmp_path, tmp_path / "m.gguf", "f16", cpu.TOKENIZER)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    weights = load_file(tmp_path / "model.safetensors")
    heads, size = cpu.SHAPES[shape]["num_attention_heads"], 64
    stored = torch.from_numpy(read["blk.0.attn_q.weight"].data.copy()).view(heads, size, -1).float()
    ours = weights["model.layers.0.self_attn.q_proj.weight"].half().view(heads, size, -1).float()
    assert torch.equal(stored[:, 0::2], ours[:, : size // 2])  # pairs side by side there, in halves here
    assert torch.equal(stored[:, 1::2], ours[:, size // 2 :])
    assert len(read) == len(weights)


def test_variants_of_our_engine_continue_prompts_alike(library, tmp_path):
    cpu.write_model(tmp_path)
    workload = cpu.make_workload(3, 12, seed=5)
    with cpu._engine(str(tmp_path), 2) as ours, cpu._unfused_engine(str(tmp_path), 2) as unfused:
        assert ours.generate(workload) == unfused.generate(workload)
        assert ours.worker.config.attention_backend == "cpu"
