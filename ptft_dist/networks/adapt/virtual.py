"""What peft's virtual tokens change for those who call a decoder: outputs at them, and the positions behind padding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from peft import PeftModel, PeftModelForCausalLM

from ptft_dist.networks.facts import read_facts


def hide_virtual_tokens(model: PeftModel) -> None:
    """Let a network with virtual tokens be called like one without.

    Its outputs have the positions of the input, and padding on the left takes no positions. Networks without virtual
    tokens, and encoder-decoders, stay as they are.
    """
    base: Any = model.get_base_model()
    if not model.active_peft_config.is_prompt_learning or base.config.is_encoder_decoder:
        return
    model.register_forward_hook(_without_virtual_tokens)
    facts = read_facts(base)
    if isinstance(model, PeftModelForCausalLM) and facts.takes("position_ids"):
        base.register_forward_pre_hook(
            partial(_positions_without_padding, offset=facts.position_offset), with_kwargs=True
        )


def _without_virtual_tokens(model: Any, _inputs: Any, output: Any) -> Any:
    """Forward hook: remove the outputs at virtual tokens, so that outputs have the positions of the input."""
    config = model.active_peft_config
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):  # keys and values only
        return output
    virtual = config.num_virtual_tokens
    for name in ("logits", "start_logits", "end_logits", "log_probs"):
        values = getattr(output, name, None)
        if values is None:
            continue
        if values.dim() == 3 or name in ("start_logits", "end_logits", "log_probs"):
            output[name] = values[:, virtual:]
    return output


def _positions_without_padding(
    _base: Any, args: tuple[Any, ...], inputs: Mapping[str, Any], offset: int
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of the base: positions that do not count padding on the left.

    This padding lies between the virtual tokens and the prompt. peft passes no position ids, and the base would count
    the padding, so a generated text would depend on the other prompts of its batch.

    offset: the position id of a row's first token.
    """
    mask, tokens = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    tokens = inputs.get("input_ids") if tokens is None else tokens
    if inputs.get("position_ids") is not None or mask is None or mask.dim() != 2 or tokens is None:
        return None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :] + offset
    return args, {**inputs, "position_ids": positions}
