"""Causal language modelling: predict each token from the previous tokens."""

from __future__ import annotations

from ptft_dist.tasks.common.causal import NextTokenTask


class CausalLM(NextTokenTask):
    """Predicts all tokens of a document except its first."""
