"""Configurations of other trainers as recipes. Imports no torch."""
