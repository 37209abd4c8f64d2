"""Penalties on trained parameters. They do not depend on rows and are added once per update."""

from __future__ import annotations

from typing import Protocol

import torch


class Regularizer(Protocol):
    """A sum of terms, one for each of some parameters."""

    def term(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        """The penalty on one parameter, a differentiable scalar in the unit of the mean loss; None: there is none.

        parameter: complete, in fp32, on the device. All ranks call this with the same values.
        """


def penalty_and_gradient(
    regularizers: list[Regularizer], name: str, parameter: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sum of the terms of one parameter (fp32) and its gradient; None without a term."""
    with torch.enable_grad():
        leaf = parameter.detach().float().requires_grad_(True)
        terms = [term for each in regularizers if (term := each.term(name, leaf)) is not None]
        if not terms:
            return None
        total = torch.stack(terms).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return total.detach(), gradient
