"""Rules for models, adapters and data."""

from __future__ import annotations

from typing import Any

from ptft_dist.config.other_trainers import foreign_names
from ptft_dist.converting.datasets import common_shape, located, sources
from ptft_dist.converting.draft import Draft
from ptft_dist.converting.rules import Entry, Outcome, is_true, rule


@rule
def unneeded(entry: Entry) -> Outcome:
    return entry.setting.note or "it is not needed"


@rule
def truth(entry: Entry) -> Outcome:
    return {entry.key: True} if is_true(entry.value) else {}


@rule
def opposite(entry: Entry) -> Outcome:
    return {} if is_true(entry.value) else {entry.key: True}


@rule
def positive(entry: Entry) -> Outcome:
    """0 and less turn it off."""
    if entry.value > 0:
        return {entry.key: entry.value}
    return {entry.key: None} if entry.key == "optim.max_grad_norm" else {}


@rule
def below_one(entry: Entry) -> Outcome:
    return {entry.key: entry.value} if 0 < entry.value < 1 else {}


@rule
def words(entry: Entry) -> Outcome:
    return {entry.key: _words(entry.value)}


def _words(value: Any) -> list[str]:
    """A list, or a text with commas, as a list."""
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value)


@rule
def added_tokens(entry: Entry) -> Outcome:
    more = entry.value.get("additional_special_tokens") if isinstance(entry.value, dict) else _words(entry.value)
    return {entry.key: more} if more else foreign_names()["eos_token"].note


@rule
def adapter_dropout(entry: Entry) -> Outcome:
    if entry.value and entry.draft.without_dropout:
        return f"task {entry.draft.task} turns dropout off"
    return {entry.key: entry.value}


@rule
def task(entry: Entry) -> Outcome:
    known = entry.setting.values
    if entry.value not in known:
        return entry.setting.note or f"there is no {entry.value} here; the task is {entry.draft.task}"
    loss = {f"{entry.draft.task}.loss": entry.value} if entry.name == "rl" and entry.value != entry.draft.task else {}
    return {"task": entry.draft.task, **loss}


# --- model and adapters -----------------------------------------------------------------------------------------------

_ATTENTION = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}
_SWITCHES = {"sdp_attention": "sdpa", "eager_attention": "eager", "xformers_attention": "sdpa"}


@rule
def attention(entry: Entry) -> Outcome:
    if entry.value in (False, "auto"):
        return {}
    short = _SWITCHES.get(entry.name, "fa2") if entry.value is True else entry.value
    return {entry.key: _ATTENTION.get(short, short)}


@rule
def dtype(entry: Entry) -> Outcome:
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(
        str(entry.value).removeprefix("torch."), str(entry.value)
    )
    if entry.name == "bnb_4bit_quant_storage":
        return {entry.key: short} if entry.draft.bits == 4 else "the weights are not quantized to 4 bits"
    if short in ("fp16", "bf16") and entry.draft.adapts and not entry.draft.bits and entry.draft.precision == short:
        return {entry.key: short}
    return "trained weights are fp32; frozen ones have the data type of their files"


@rule
def adapter(entry: Entry) -> Outcome:
    if entry.value == "freeze":
        return {"model.adapt.last_layers": entry.draft.own("freeze_trainable_layers") or 2}
    if not entry.draft.adapts:
        return {} if entry.value in ("full", False) else f"there is no {entry.value} here; see docs/adapting.md"
    if entry.draft.trainer == "trl" and entry.draft.value("lora_target_modules") is None:
        entry.draft.remarks.append(
            "lora_target_modules: without it, peft adapts a few layers; here it is all linear layers. Name them with "
            "model.adapt.lora.targets"
        )
    return {"model.adapt.lora": {}, **({"model.quantize.type": "nf4"} if entry.value == "qlora" else {})}


@rule
def targets(entry: Entry) -> Outcome:
    if entry.name == "lora_target_linear":
        return {entry.key: "all-linear"} if entry.value else {}
    if entry.value in ("all", "all-linear"):
        return {entry.key: "all-linear"}
    return {entry.key: _words(entry.value)}


@rule
def trained_modules(entry: Entry) -> Outcome:
    modules = set(_words(entry.value))
    if modules <= {"embed_tokens", "lm_head"} and entry.draft.adapts:
        return {entry.key: "all"}
    return entry.setting.note


@rule
def initial(entry: Entry) -> Outcome:
    if entry.name == "pissa_init":
        return {entry.key: "pissa"} if entry.value else {}
    return {} if entry.value is True else {entry.key: entry.value}


@rule
def adapter_directory(entry: Entry) -> Outcome:
    return {entry.key: entry.value}


@rule
def last_layers(entry: Entry) -> Outcome:
    if entry.value > 0 and not entry.draft.adapts:
        return {entry.key: entry.value}
    return "the first layers cannot be chosen; use model.adapt: {match: ...}" if entry.value < 0 else "LoRA is trained"


@rule
def quantize(entry: Entry) -> Outcome:
    bits = entry.draft.bits
    if not entry.value:
        return {}
    if bits and not entry.draft.adapts:
        return "quantized weights cannot be trained; it needs an adapter"
    if bits not in (0, 4, 8) or (entry.name.endswith("type") and entry.value not in ("nf4", "bitsandbytes", "bnb")):
        return f"there is no {entry.value} here; the types are nf4 and int8"
    return {"model.quantize.type": {4: "nf4", 8: "int8"}[bits]} if bits else {}


@rule
def double(entry: Entry) -> Outcome:
    return {entry.key: bool(entry.value)} if entry.draft.bits == 4 else "the weights are not quantized to 4 bits"


@rule
def template(entry: Entry) -> Outcome:
    if entry.value in ("tokenizer_default", "default", "empty"):
        return {}
    if entry.value == "chatml" or str(entry.value).endswith(".jinja"):
        return {entry.key: entry.value}
    return f"the tokenizer's own template is used; for {entry.value} set {entry.key}, see docs/tasks.md"


# --- data -------------------------------------------------------------------------------------------------------------


@rule
def datasets(entry: Entry) -> Outcome:
    sourced = sources(entry.draft, entry.value)
    listed = [_limited(entry.draft, source) for source, _ in sourced]
    shape = common_shape(sourced)
    return {entry.key: listed, **({f"{entry.draft.task}.shape": shape} if shape and entry.draft.roles else {})}


def _limited(draft: Draft, source: dict[str, Any]) -> dict[str, Any]:
    more = {"limit": draft.own("max_samples"), "streaming": draft.own("streaming") if "hub" in source else None}
    return source | {key: value for key, value in more.items() if value}


@rule
def dataset_name(entry: Entry) -> Outcome:
    source = located(entry.draft, entry.value)
    if "hub" in source:
        renamed = {"dataset_config": "config", "dataset_train_split": "split", "dataset_streaming": "streaming"}
        source |= {ours: entry.draft.own(theirs) for theirs, ours in renamed.items() if entry.draft.own(theirs)}
    column = entry.draft.own("dataset_text_field")
    if column and column != "text":
        source |= {"fields": {"text": column}} if entry.draft.roles else {"field": column}
    evaluated = entry.draft.own("eval_strategy") in ("steps", "epoch") and "hub" in source
    held_out = (
        {"data.validation": [source | {"split": entry.draft.own("dataset_test_split") or "test"}]} if evaluated else {}
    )
    return {entry.key: [source], **held_out}


@rule
def paths(entry: Entry) -> Outcome:
    return {
        entry.key: [
            located(entry.draft, each) for each in (entry.value if isinstance(entry.value, list) else [entry.value])
        ]
    }


@rule
def part_of_datasets(entry: Entry) -> Outcome:
    if any(entry.draft.own(each) for each in ("dataset", "dataset_name", "datasets")):
        return {}  # taken with the data set
    return "it belongs to a data set, which is not named"


@rule
def mixing(entry: Entry) -> Outcome:
    return {} if entry.value == "concat" else entry.setting.note


@rule
def fraction(entry: Entry) -> Outcome:
    if entry.value == 0:
        return {}
    if 0 < entry.value < 1:
        return {entry.key: entry.value}
    return f"{entry.value} is a number of rows; data.validation is a fraction of them, or separate files"


@rule
def packing(entry: Entry) -> Outcome:
    return (
        {entry.key: True}
        if entry.value and entry.draft.roles
        else {}
        if entry.value
        else {entry.key: False}
        if not entry.draft.roles
        else {}
    )


@rule
def learned(entry: Entry) -> Outcome:
    if entry.name in ("train_on_inputs", "train_on_prompt"):
        return {entry.key: "all"} if entry.value else {}
    if entry.name == "mask_history":
        return {entry.key: "last"} if entry.value else {}
    if entry.name == "train_on_eos" and entry.value != "turn":
        return "the end of each turn that is learned is learned too, as with turn"
    if entry.name == "roles_to_train":
        roles = set(_words(entry.value))
        if roles & {"user", "human"}:
            return {entry.key: "all"}
        return {} if roles and roles <= {"assistant", "gpt"} else "turns of the assistant only are learned"
    masks = (entry.draft.given.get(f"{each}_only_loss") for each in ("assistant", "completion"))
    return {} if entry.value == "turn" or True in masks else {entry.key: "all"}
