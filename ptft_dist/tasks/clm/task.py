"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

from ptft_dist.tasks.common.causal import NextTokenTask


class CausalLM(NextTokenTask):
    """Every token of a document but its first is predicted."""
