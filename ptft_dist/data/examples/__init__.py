"""What the rows of each task become: one module a task, one line each in ENCODERS. Nothing here imports torch."""

from __future__ import annotations

from importlib import import_module

from ptft_dist.data.examples.encoder import RowEncoder

ENCODERS = {
    "seq2seq": "ptft_dist.data.examples.seq2seq:Seq2SeqRows",
    "sft": "ptft_dist.data.examples.sft:ConversationRows",
    "classification": "ptft_dist.data.examples.classification:ClassificationRows",
    "regression": "ptft_dist.data.examples.regression:RegressionRows",
    "token_classification": "ptft_dist.data.examples.token_classification:TaggedRows",
    "question_answering": "ptft_dist.data.examples.question_answering:QuestionRows",
}


def encoder_class(task: str) -> type[RowEncoder]:
    module, attribute = ENCODERS[task].split(":")
    found: type[RowEncoder] = getattr(import_module(module), attribute)
    return found
