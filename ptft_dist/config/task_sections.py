"""The sections of a recipe that belong to one task each."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import Fraction, Section, only_with


class DocumentRows(Section):
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
    def boundaries(self) -> tuple[str | None, str]:
        """The roles of the special tokens at a document's beginning and end."""
        return None, "eos"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The roles for which a tokenizer that is learned for this task gets a token."""
        return "eos", "bos", "pad"


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


class MlmSection(DocumentRows):
    """Settings of masked language modelling (Devlin et al. 2019). A document is [CLS] text [SEP]."""

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
        only_with(self, ("span_length",), self.unit == "span", "mlm.unit: span")
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        return self

    @property
    def boundaries(self) -> tuple[str | None, str]:
        return "cls", "sep"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"
