"""Formats: (plan, matrices) -> a checkpoint that software loads."""
