"""Judging a trained model: its metrics on validation rows, and its answers to new rows."""
