"""Sections of the tasks that learn to write text from examples: conversations, and pairs of source and target."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import BelowOne, Positive, Section, Text, only_with
from ptft_dist.config.tasks.rows import TaskSection

CHATML = ("<|im_start|>", "<|im_end|>")


class GenerationSection(Section):
    """Let the network write, at every evaluation, and compare with the reference."""

    max_new_tokens: PositiveInt = 64
    """Write at most this many tokens."""
    num_beams: PositiveInt = 1
    """1: the likeliest token each time; more: beam search."""
    metrics: tuple[Literal["exact_match", "bleu", "chrf", "rouge"], ...] = ("exact_match", "bleu", "chrf", "rouge")
    """`bleu`, `chrf`: sacrebleu's, 0 to 100. `rouge`: F1 of ROUGE-1, -2, -L, 0 to 1. `exact_match`: a share."""
    bleu_tokenize: Literal["13a", "zh", "char", "intl", "none"] | None = None
    """sacrebleu's tokenizer; 13a when not given. Use zh for Chinese."""
    show: Annotated[int, Field(ge=0)] = 5
    """Write this many of the texts to run_dir/samples.jsonl at each evaluation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("bleu_tokenize",), "bleu" in self.metrics, "bleu among the metrics")
        if not self.metrics and not self.show:
            raise ValueError("generation has no effect here: no metrics, and nothing to show")
        return self


class Seq2SeqSection(TaskSection):
    """Settings of text-to-text learning with an encoder and a decoder."""

    after_prepare = ("label_smoothing", "generation")
    text_settings = ("prefix",)

    prefix: str = ""
    """Stands before every source text, such as "translate English to German: "."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a target at most, EOS included; data.max_length is the source's. What is longer is cut and counted."""
    label_smoothing: BelowOne = 0.0
    """This share of the target probability is spread evenly over the vocabulary (Szegedy et al. 2016)."""
    generation: GenerationSection | None = None
    """Write and score translations or summaries at evaluations."""

    @property
    def roles(self) -> tuple[str, ...]:
        return "source", "target"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "pad"


class SftSection(TaskSection):
    """Settings of supervised fine-tuning on conversations."""

    after_prepare = ("neftune_alpha", "head", "generation")
    text_settings = ("shape", "system")

    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How rows look. `messages`: role and content; `sharegpt`: conversations of from and value; `alpaca`: instruction,
    input, output; `prompt_completion`: two texts, or two lists of messages; `text`: nothing but text. `auto`: by the
    columns of each file's first row, which all its rows must share."""
    template: Text | None = None
    """The chat template: a name that TRL knows (chatml, llama3, qwen3, ...), or a Jinja file. When not given: the
    tokenizer's own, and `chatml` for a tokenizer that is learned here."""
    system: Text | None = None
    """A system message for conversations that have none."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """What is learned: the assistant's turns, the last of them only, or everything. The end of a turn belongs to it."""
    too_long: Literal["cut", "drop"] = "cut"
    """A conversation longer than data.max_length loses its end, or is left out; both are counted. One whose answers
    would be cut away entirely is always left out."""
    packing: bool = False
    """Put several conversations into a row, as many as fit, so that little is padded. They do not see each other. A
    row counts as one in batch.global_size."""
    neftune_alpha: Positive | None = None
    """Noise on the embeddings in training (Jain et al. 2023, NEFTune); 5 is usual."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """As clm.head."""
    generation: GenerationSection | None = None
    """At evaluations, write the last answer of each conversation and compare."""

    @property
    def isolated(self) -> bool:
        return self.packing

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation is not None and self.packing:
            raise ValueError("generation needs rows of one conversation each: packing: false")
        if self.generation is not None and self.shape == "text":
            raise ValueError("generation has no effect here: it needs rows with answers, and shape: text has none")
        only_with(self, ("system", "template"), self.shape != "text", "a shape with turns")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return (
            "messages",
            "conversations",
            "instruction",
            "input",
            "output",
            "prompt",
            "completion",
            "text",
            "system",
            "tools",
        )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return f"eos={CHATML[1]}", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return CHATML[:1]
