"""Evaluation: datasets, scorers, one version's scores, the paired comparison of two versions, and the gate."""
