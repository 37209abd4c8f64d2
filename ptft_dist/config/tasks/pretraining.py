"""Sections of the tasks that learn from plain documents."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import Fraction, only_with
from ptft_dist.config.tasks.rows import TaskSection


class DocumentRows(TaskSection):
    """How the documents of a pretraining task are laid out in rows."""

    packing: bool = True
    """True: documents are laid end to end and cut into rows of exactly max_length tokens. False: each document is a
    row (a longer one becomes several), padded only as far as its micro-batch needs."""
    attention: Literal["document", "across"] | None = None
    """With packing: may a token see the other documents of its row? `document` (when not given): no, exactly as if
    each document stood alone. `across`: yes."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        only_with(self, ("attention",), self.packing, "packing: true")
        return self

    @property
    def isolated(self) -> bool:
        """Several documents share a row and must not see each other."""
        return self.packing and self.attention != "across"

    @property
    def full_rows(self) -> bool:
        return self.packing

    @property
    def boundaries(self) -> tuple[str | None, str]:
        """The roles of the special tokens at a document's beginning and end."""
        return None, "eos"


class ClmSection(DocumentRows):
    """Settings of causal language modelling."""

    bos: bool = False
    """Begin each document with the tokenizer's BOS token. It always ends with EOS."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """`fused`: the loss is computed tile by tile and the [batch, length, vocabulary] logits are never held; `logits`:
    they are. `auto`: fused on an accelerator, logits on a CPU, where they are faster."""

    @property
    def boundaries(self) -> tuple[str | None, str]:
        return "bos" if self.bos else None, "eos"


class Masking(DocumentRows):
    """What masked language modelling hides (Devlin et al. 2019)."""

    probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """The share of tokens that are to be predicted; never special tokens."""
    mask_share: Fraction = 0.8
    """Of those, the share that the network sees as [MASK]."""
    random_share: Fraction = 0.1
    """Of those, the share that it sees as a random token; the rest it sees unchanged."""
    unit: Literal["token", "word", "span"] = "token"
    """What is chosen as one: a token; a whole word; a span of tokens (Joshi et al. 2020, SpanBERT)."""
    span_length: Annotated[float, Field(ge=1.0)] | None = None
    """`span`: the mean of the geometric distribution of lengths, which ends at 10 tokens; 5 when not given."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("span_length",), self.unit == "span", f"{self._name}.unit: span")
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        return self

    @property
    def _name(self) -> str:
        return "mlm"

    @property
    def boundaries(self) -> tuple[str | None, str]:
        return "cls", "sep"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"


class MlmSection(Masking):
    """Settings of masked language modelling. A document is [CLS] text [SEP]."""


class MlmNspSection(Masking):
    """Settings of BERT's pretraining: masked tokens, and whether the second segment follows the first.

    A row is [CLS] A [SEP] B [SEP]; half of the time B goes on where A ends, else it is from another document.
    """

    after_prepare = ("probability", "mask_share", "random_share", "unit", "span_length")
    draws = True

    packing: Literal[False] = False
    """A row holds one pair."""
    sentence: Literal["line", "punctuation"] = "punctuation"
    """What a sentence is: a line, or what ends with a full stop, question or exclamation mark or a line."""
    short_probability: Fraction = 0.1
    """The share of pairs that aim at a random shorter length, so that short inputs are known too."""
    duplicates: Annotated[int, Field(ge=1)] = 1
    """Pairs are drawn this many times from each document (BERT's dupe_factor)."""

    @property
    def _name(self) -> str:
        return "mlm_nsp"


class PlmSection(DocumentRows):
    """Settings of permuted language modelling (Yang et al. 2019, XLNet). Documents end with EOS."""

    attention: Literal["across"] | None = None
    """XLNet's networks cannot keep the documents of a packed row apart."""
    mask_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 1 / 6
    """The share of tokens that are to be predicted, in spans: the paper's 1/K."""
    longest_span: Annotated[int, Field(ge=1)] = 5
    """Span lengths are drawn evenly from 1 to this."""

    @property
    def isolated(self) -> bool:
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "cls", "sep", "mask", "pad"


class SpanCorruptionSection(DocumentRows):
    """Settings of T5's denoising (Raffel et al. 2020): spans become sentinels, and are to be written after them."""

    attention: Literal["across"] | None = None
    """The documents of a packed row see each other, as in T5's own pretraining."""
    density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """The share of tokens that are hidden."""
    mean_span: Annotated[float, Field(ge=1.0)] = 3.0
    """The mean length of a hidden span."""
    sentinels: Annotated[int, Field(ge=1, le=1000)] = 100
    """How many sentinels (<extra_id_0> and so on) a tokenizer that is learned here gets."""

    @property
    def isolated(self) -> bool:
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "pad", "unk"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return tuple(f"<extra_id_{i}>" for i in range(self.sentinels))
