"""Cleaning of records before the split: the steps of data.steps (docs/cleaning.md)."""
