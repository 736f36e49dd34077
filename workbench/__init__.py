"""The ops workbench: versions, prompts, evaluations, runs and people around the engine."""
