"""The sections `model.adapt` and `model.quantize`: which parameters of a pretrained network are trained, and how."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, field_validator, model_validator

from ptft_dist.config.section import BelowOne, ModelName, Positive, Section, Text, only_with


def _as_tuple(value: Any) -> Any:
    """A list as a tuple. Validation is strict, and knows that lists are tuples only outside of short forms."""
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[Text, ...], BeforeValidator(_as_tuple)]
Targets = Literal["all-linear"] | Names | Text
Rank = Annotated[int, Field(ge=1, le=65536)]


def _expression(value: Any, what: str) -> Any:
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"{what} is not a regular expression: {error}") from None
    return value


class Quantization(Section):
    """Quantize the frozen weights of linear layers with bitsandbytes. `quantize: nf4` selects the defaults."""

    type: Literal["nf4", "int8"]
    """`nf4`: 4-bit NormalFloat (QLoRA, Dettmers et al. 2023). `int8`: LLM.int8() (Dettmers et al. 2022)."""
    double: bool | None = None
    """`nf4`: quantize the quantization constants too, which saves 0.4 bits per weight. Default: true."""
    compute_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """`nf4`: the data type of the matrix products. `auto`: that of train.precision."""
    storage_dtype: Literal["uint8", "fp32", "bf16", "fp16"] = "uint8"
    """`nf4`: the data type that holds the packed weights. FSDP2 shards floating-point types only."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("nf4", "int8"):
            raise ValueError(f"there is no type {value!r}; the types are nf4 and int8")
        return {"type": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("double", "compute_dtype", "storage_dtype"), self.type == "nf4", "type: nf4")
        return self


class LoraSettings(Section):
    """LoRA (Hu et al. 2022): h = W x + scale x B A x, with trained A [r, in] and B [out, r] and a frozen W."""

    r: Rank = 16
    """The rank of the update."""
    alpha: PositiveFloat | None = None
    """The scale is alpha / r; with `rslora` alpha / sqrt(r). Default: 2 r."""
    dropout: BelowOne = 0.0
    """Dropout of the adapter's input."""
    targets: Targets = "all-linear"
    """The adapted layers: `all-linear`, every linear layer except the output head; a list of names, each the end of a
    layer's full name; or a regular expression that matches a full name."""
    exclude: Names = ()
    """Names of layers that are not adapted, although `targets` selects them."""
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)] = ()
    """Adapt only these blocks of the network, counted from 0. Default: all."""
    rank_pattern: dict[str, Rank] = Field(default_factory=dict)
    """Regular expression of layer names -> their rank, instead of `r`."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Regular expression of layer names -> their alpha."""
    rslora: bool = False
    """Rank-stabilized LoRA (Kalajdzievski 2023)."""
    dora: bool = False
    """Weight-decomposed LoRA (Liu et al. 2024)."""
    init: Text = "default"
    """Initial values: `default` (B is zero), `gaussian`, `pissa` or `pissa_niter_N` (Meng et al. 2024), `olora`
    (Buyukakyuz 2024), `orthogonal`, `eva` (Paischer et al. 2024). PiSSA and OLoRA also change the base's weights; the
    exported adapter has twice the rank and refers to the unchanged base."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Also train biases: of all layers, or of the adapted ones. The base without the adapter then differs too."""
    target_parameters: Names = ()
    """Parameters that are not in a linear layer, such as `mlp.experts.gate_up_proj` of a mixture of experts."""
    plus_ratio: Positive | None = None
    """LoRA+ (Hayou et al. 2024): the learning rate of B is this many times that of A. The paper recommends 16."""
    eva_rows: PositiveInt = 64
    """`init: eva`: the number of training rows whose activations are decomposed."""

    @field_validator("targets")
    @classmethod
    def _targets(cls, value: Any) -> Any:
        if not value and value != ():
            raise ValueError("targets is empty")
        return _expression(value, "targets")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not re.fullmatch(r"default|gaussian|pissa(_niter_[1-9]\d*)?|olora|orthogonal|eva", self.init):
            raise ValueError(
                f"init: {self.init!r} is not one of default, gaussian, pissa, pissa_niter_N, olora, orthogonal, eva"
            )
        only_with(self, ("eva_rows",), self.init == "eva", "init: eva")
        if self.init == "eva" and self.eva_rows < 2 * max((self.r, *self.rank_pattern.values())):
            raise ValueError(f"eva_rows: {self.eva_rows} is less than twice the rank, which the decomposition needs")
        if self.target_parameters and (self.dropout or self.dora or self.bias != "none"):
            raise ValueError("target_parameters work without dropout, dora and bias only; remove these keys")
        return self


class AdaLoraSettings(Section):
    """AdaLoRA (Zhang et al. 2023): LoRA whose ranks are reduced during training where they matter least."""

    r: Rank = 12
    """The rank of every layer at the beginning."""
    target_r: Rank = 8
    """The average rank at the end."""
    alpha: PositiveFloat | None = None
    """The scale is alpha / r. Default: 2 r."""
    dropout: BelowOne = 0.0
    """Dropout of the adapter's input."""
    targets: Targets = "all-linear"
    """The adapted layers, as in `lora`."""
    start: BelowOne = 0.1
    """The ranks do not change in this first fraction of all updates."""
    end: BelowOne = 0.3
    """The ranks do not change in this last fraction of all updates."""
    every: PositiveInt = 1
    """Ranks change every this many updates."""
    orthogonality: Annotated[float, Field(ge=0.0)] = 0.5
    """The weight of the penalty that keeps the singular vectors orthogonal."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target_r >= self.r:
            raise ValueError(f"target_r: {self.target_r} is not below r ({self.r}), so no rank would ever be reduced")
        if self.start + self.end >= 1.0:
            raise ValueError("start and end leave no update in which ranks change: their sum must be below 1")
        return self


class Ia3Settings(Section):
    """IA3 (Liu et al. 2022): trained vectors that scale keys, values and inner activations of feed-forward layers."""

    targets: Names = ()
    """The scaled layers. Default: those that peft lists for this type of network."""
    feedforward: Names = ()
    """Those of `targets` whose input is scaled instead of the output."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if set(self.feedforward) - set(self.targets):
            raise ValueError("feedforward: it may only name layers that targets names too")
        return self


class PromptTuningSettings(Section):
    """Prompt tuning (Lester et al. 2021): trained embeddings before the input."""

    tokens: PositiveInt = 20
    """Number of virtual tokens."""
    init_text: Text | None = None
    """Begin with the embeddings of this text instead of random ones."""


class PTuningSettings(Section):
    """P-tuning (Liu et al. 2021): as prompt tuning, with embeddings that a small network computes."""

    tokens: PositiveInt = 20
    """Number of virtual tokens."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """The small network."""
    hidden_size: PositiveInt | None = None
    """Its hidden size. Default: that of the network."""


class PrefixTuningSettings(Section):
    """Prefix tuning (Li and Liang 2021): trained keys and values before those of the input, in every layer."""

    tokens: PositiveInt = 20
    """Number of virtual tokens."""
    projection: bool = False
    """Compute them with a small network."""
    hidden_size: PositiveInt | None = None
    """`projection`: its hidden size. Default: that of the network."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("hidden_size",), self.projection, "projection: true")
        return self


class BottleneckSettings(Section):
    """Bottleneck adapters: h + up(f(down(h))) after layers of every block, with trained down and up."""

    size: PositiveInt = 64
    """The width of the bottleneck."""
    placement: Literal["houlsby", "pfeiffer"] = "pfeiffer"
    """`houlsby`: after attention and feed-forward layer (Houlsby et al. 2019); `pfeiffer`: after the feed-forward layer
    only (Pfeiffer et al. 2021)."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """The nonlinearity f."""
    targets: Names = ()
    """The layers after which adapters are inserted, instead of `placement`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("placement",), not self.targets, "no targets")
        return self


METHODS = (
    *("last_layers", "match", "bitfit", "lora", "adalora", "ia3"),
    *("prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck", "peft", "adapter"),
)
PARTIAL = ("full", "last_layers", "match", "bitfit")
"""The methods that train parameters of the network itself. All others add a peft adapter to it."""
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
_DEFAULTS = ("lora", "adalora", "ia3", "prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck")


class AdaptSection(Section):
    """Which parameters are trained, by one method. `adapt: lora` selects a method with its defaults; `adapt: full`, the
    default, trains all parameters."""

    last_layers: PositiveInt | None = None
    """Train the last blocks of the network, this many, and everything after them."""
    match: Text | None = None
    """Train the parameters whose name this regular expression matches (searched)."""
    bitfit: bool = False
    """Train all biases, and layers with random weights, such as a new head (Ben Zaken et al. 2022)."""
    lora: LoraSettings | None = None
    """Low-rank adapters."""
    adalora: AdaLoraSettings | None = None
    """Low-rank adapters with adaptive ranks."""
    ia3: Ia3Settings | None = None
    """Scaled activations."""
    prompt_tuning: PromptTuningSettings | None = None
    """Trained embeddings before the input."""
    p_tuning: PTuningSettings | None = None
    """Trained embeddings before the input, computed by a small network."""
    prefix_tuning: PrefixTuningSettings | None = None
    """Trained keys and values in every layer."""
    bottleneck: BottleneckSettings | None = None
    """Bottleneck adapters (Houlsby, Pfeiffer)."""
    peft: dict[str, Any] | None = None
    """Any other method of peft: its `type`, such as vera, oft or loha, and the keyword arguments of its config."""
    adapter: ModelName | None = None
    """Continue to train this adapter: a directory or a Hub name. Its method and settings are its own."""
    name: Text = "default"
    """The name of the adapter in the network, for code that loads several."""
    embeddings: Literal["new", "all"] | None = None
    """Which token embeddings an adapter trains and saves. `new`: those of added tokens; `all`: the whole table with the
    output head. Default: `new` if there are added tokens, else none."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in (*_DEFAULTS, "full", "bitfit"):
            near = get_close_matches(value, METHODS, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; the methods are full, {', '.join(METHODS)}"
            needs = " needs a value: " + value + ": ..." if value in METHODS else f": there is no such method{hint}"
            raise ValueError(f"{value!r}{needs}")
        given = {value: True} if isinstance(value, str) else value
        if not isinstance(given, dict):
            return value
        others = {key: each for key, each in given.items() if (key, each) != ("full", True)}
        return {key: {} if key in _DEFAULTS and each is True else each for key, each in others.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(given := self._given()) > 1:
            raise ValueError(f"only one of {', '.join(METHODS)} can be set; given: {', '.join(given)}")
        only_with(self, ("name", "embeddings"), self.adds_adapter, "an adapter, such as lora")
        if self.embeddings and self.method in PROMPTS:
            raise ValueError(f"embeddings: {self.method} cannot train token embeddings; use lora")
        if self.embeddings and self.adapter is not None:
            raise ValueError(
                "embeddings: a saved adapter trains the embeddings that it contains, no others. Remove this key, or "
                "use ptft merge and train a new adapter on the merged model"
            )
        if "." in self.name:
            raise ValueError(f"name: {self.name!r} contains a dot, which names of parts of a network may not")
        _expression(self.match, "match")
        if self.peft is not None and not isinstance(self.peft.get("type"), str):
            raise ValueError("peft needs a type, such as vera, oft or loha")
        return self

    @property
    def method(self) -> str:
        """The name of the method."""
        return next(iter(self._given()), "full")

    @property
    def full(self) -> bool:
        """All parameters are trained."""
        return self.method == "full"

    def _given(self) -> list[str]:
        return [name for name in METHODS if getattr(self, name) not in (None, False)]

    @property
    def settings(self) -> Any:
        """The settings of the method."""
        return getattr(self, self.method)

    @property
    def init_key(self) -> str:
        """The key of the initial values of LoRA."""
        return "lora.init" if self.lora is not None else "peft.init_lora_weights"

    @property
    def adds_adapter(self) -> bool:
        """The method adds a peft adapter, and the network itself is frozen."""
        return self.method not in PARTIAL
