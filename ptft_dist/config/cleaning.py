"""The steps of data.steps: cleaning, filtering and deduplication of the records before the split.

Each item of data.steps is the name of a step, or the name with its settings: `unicode`, or `{unicode: {form: NFKC}}`.
docs/cleaning.md names the paper behind each default.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import Fraction, Section, Text, exactly_one, only_with

QualityRules = Literal["gopher", "c4", "fineweb"]
PersonalData = Literal["email", "ip", "phone", "chinese_id", "chinese_mobile"]
LanguageCode = Annotated[str, Field(pattern=r"^[a-z]{2,3}$")]


class HtmlStep(Section):
    """Replace an HTML page by its main text, without navigation and advertisements. Text without HTML is kept as it is;
    a page without main text is dropped."""

    comments: bool = False
    """Also keep the comments of readers."""
    tables: bool = True
    """Also keep the text of tables."""


class UnicodeStep(Section):
    """Repair text that was decoded with the wrong encoding (mojibake), and normalize Unicode."""

    form: Literal["NFC", "NFKC"] = "NFC"
    """The normalization form. NFKC also replaces full-width and other compatibility characters."""


class WhitespaceStep(Section):
    """Remove spaces at the ends of lines and of the text, and reduce runs of spaces and of empty lines."""

    empty_lines: Annotated[int, Field(ge=0)] = 1
    """At most this many empty lines in a row are kept."""


class ControlStep(Section):
    """Remove control characters, invisible characters and terminal escapes. Tabs and line ends are kept."""


class LanguageStep(Section):
    """Identify the language of each record, and keep or drop languages."""

    keep: Annotated[list[LanguageCode], Field(min_length=1)] | None = None
    """Keep these languages only (ISO 639 codes), such as [en, zh]. `und` is text without letters."""
    drop: Annotated[list[LanguageCode], Field(min_length=1)] | None = None
    """Drop these languages."""
    min_score: Fraction = 0.65
    """Also drop records whose language has a lower probability than this (FineWeb, CCNet)."""

    @model_validator(mode="after")
    def _check(self) -> LanguageStep:
        exactly_one(self, "keep", "drop")
        return self


class QualityStep(Section):
    """Drop records by the rules of Gopher, C4 and FineWeb; each drop names its rule."""

    rules: list[QualityRules] = Field(default_factory=lambda: list(get_args(QualityRules)), min_length=1)
    """The sets of rules to use."""
    min_words: PositiveInt = 50
    """Gopher: records with fewer words are dropped. In languages without spaces, each character is a word."""
    max_words: PositiveInt = 100_000
    """Gopher: records with more words are dropped."""

    @model_validator(mode="after")
    def _check(self) -> QualityStep:
        only_with(self, ("min_words", "max_words"), "gopher" in self.rules, "gopher in rules")
        if self.min_words > self.max_words:
            raise ValueError(f"min_words: {self.min_words:,} is more than max_words ({self.max_words:,})")
        return self


class PiiStep(Section):
    """Mask personal data: each match is replaced by its kind, such as <EMAIL>."""

    kinds: list[PersonalData] = Field(default_factory=lambda: list(get_args(PersonalData)), min_length=1)
    """What is masked."""


class RepetitionStep(Section):
    """Drop records with many repeated lines, paragraphs or n-grams (Rae et al. 2021, Gopher, table A1)."""


class ExactDedupStep(Section):
    """Keep the first of equal documents, paragraphs or lines."""

    unit: Literal["document", "paragraph", "line"] = "document"
    """What is compared: all texts of a record together, or the paragraphs or lines of its texts. Paragraphs and lines
    are compared without the spaces around them; short ones (below `min_characters`) are kept."""
    min_characters: Annotated[int, Field(ge=1)] | None = None
    """`paragraph` and `line`: shorter ones are always kept. Default: 20."""

    @model_validator(mode="after")
    def _check(self) -> ExactDedupStep:
        if self.unit == "document" and self.min_characters is not None:
            raise ValueError("min_characters has no effect here: it needs unit: paragraph or line")
        return self


class NearDedupStep(Section):
    """Keep the first of similar records: MinHash with locality-sensitive hashing (Broder 1997; Lee et al. 2022)."""

    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.8
    """Records whose sets of n-grams have at least this Jaccard similarity (estimated) are similar."""
    ngram: PositiveInt = 5
    """Length of the n-grams in words. In languages without spaces, each character is a word."""
    hashes: Annotated[int, Field(ge=16, le=1024)] = 128
    """Number of hash functions: more estimate the similarity better and take longer."""


class DecontaminateStep(Section):
    """Drop training records that share an n-gram with evaluation files (Brown et al. 2020, GPT-3, appendix C)."""

    files: Annotated[list[Text], Field(min_length=1)]
    """Files or globs with evaluation data, in the formats of data sources. All their texts are used. A relative path
    starts at the recipe's directory."""
    ngram: PositiveInt = 13
    """Length of the n-grams in words, after removing punctuation and case. Shorter evaluation texts are compared as a
    whole, from 8 words on."""


class CustomStep(Section):
    """Your own function: it gets a text and returns a new text, or None to drop the record."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*\.[A-Za-z_]\w*$")]
    """Its dotted path, such as my_package.cleaning.without_links. The recipe's directory is searched too."""


class StepSection(Section):
    """One step: exactly one of these keys."""

    html: HtmlStep | None = None
    """The main text of HTML pages."""
    unicode: UnicodeStep | None = None
    """Mojibake repaired, Unicode normalized."""
    whitespace: WhitespaceStep | None = None
    """Spaces and empty lines reduced."""
    control: ControlStep | None = None
    """Control and invisible characters removed."""
    language: LanguageStep | None = None
    """Languages kept or dropped."""
    quality: QualityStep | None = None
    """Records dropped by the rules of Gopher, C4 and FineWeb."""
    pii: PiiStep | None = None
    """Personal data masked."""
    repetition: RepetitionStep | None = None
    """Records dropped that repeat lines, paragraphs or n-grams."""
    exact_dedup: ExactDedupStep | None = None
    """Equal documents, paragraphs or lines dropped."""
    near_dedup: NearDedupStep | None = None
    """Similar records dropped."""
    decontaminate: DecontaminateStep | None = None
    """Records dropped that share an n-gram with evaluation data."""
    custom: CustomStep | None = None
    """Your own function."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`unicode` and `{unicode: null}` mean the step with its default settings."""
        if isinstance(value, str):
            if value not in cls.model_fields:
                near = get_close_matches(value, cls.model_fields, n=1)
                hint = f"did you mean {near[0]}?" if near else f"the steps are {', '.join(cls.model_fields)}"
                raise ValueError(f"there is no step {value!r}; {hint}")
            value = {value: None}
        if isinstance(value, dict) and len(value) == 1:
            return {name: {} if settings is None else settings for name, settings in value.items()}
        return value

    @model_validator(mode="after")
    def _check(self) -> StepSection:
        exactly_one(self, *type(self).model_fields)
        return self

    @property
    def name(self) -> str:
        """The name of the step."""
        return next(name for name in type(self).model_fields if getattr(self, name) is not None)

    @property
    def edits(self) -> bool:
        """Whether the step may change texts, besides dropping records."""
        units = self.exact_dedup is not None and self.exact_dedup.unit != "document"
        return units or self.name in ("html", "unicode", "whitespace", "control", "pii", "custom")

    @property
    def settings(self) -> Section:
        """The settings of the step."""
        section: Section = getattr(self, self.name)
        return section
