"""Scores that are no averages over examples, from predictions and references. From kept libraries."""
