"""Runs an adapted network as its base, without changing what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.errors import RecipeError


@contextlib.contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The layers of an adapted network compute what the base's compute.

    peft's own `disable_adapter` also sets requires_grad of the adapter, and of others when it ends.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [part._disable_adapters for part in layers]
    for part in layers:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part, value in zip(layers, before, strict=True):
            part._disable_adapters = value


def check_start_is_base(adapt: AdaptSection, key: str) -> None:
    """Check that the network without its adapter is the one that training starts from.

    key: the recipe's key that needs it, for messages.

    Raises:
        RecipeError: the start is another network: it begins with an adapter, or the initialization changes the base.
    """
    if adapt.adapter is not None:
        raise RecipeError(
            f"{key}: the reference is the network that training starts from, and with model.adapt.adapter that is not "
            "the base. Merge the adapter into its base first (ptft merge), or set it to 0"
        )
    if adapt.lora is not None and adapt.lora.init not in ("default", "gaussian", "orthogonal", "eva"):
        raise RecipeError(
            f"{key}: model.adapt.lora.init: {adapt.lora.init} changes the weights of the base, so the network without "
            "its adapter is not the one that training starts from. Use init: default, or set it to 0"
        )
    if any(each is not None for each in (adapt.prompt_tuning, adapt.p_tuning, adapt.prefix_tuning)):
        raise RecipeError(
            f"{key}: model.adapt: {adapt.method} changes the input of the network, and the reference needs the base "
            "without it. Use lora, or set it to 0"
        )
