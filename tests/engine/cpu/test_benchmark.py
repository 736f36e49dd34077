"""``python -m engine.bench cpu --quick`` runs through: every variant gives the tokens asked for, figures are whole."""

from __future__ import annotations

import argparse
import json

from engine.bench import cpu


def test_quick_run_reports_every_variant(library, capsys):
    parser = argparse.ArgumentParser()
    cpu.add_arguments(parser)
    figures = cpu.run(parser.parse_args(["--quick"]))
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


def test_variants_of_our_engine_continue_prompts_alike(library, tmp_path):
    cpu.write_model(tmp_path)
    workload = cpu.make_workload(3, 12, seed=5)
    with cpu._engine(str(tmp_path), 2) as ours, cpu._unfused_engine(str(tmp_path), 2) as unfused:
        assert ours.generate(workload) == unfused.generate(workload)
        assert ours.worker.config.attention_backend == "cpu"
