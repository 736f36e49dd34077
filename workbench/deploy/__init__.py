"""Deployment beyond one process: Quire's engine as replicas of a Ray Serve application."""
