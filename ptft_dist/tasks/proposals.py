"""Which tasks fit the columns of a file, for `ptft init --data`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ptft_dist.data.columns import ANSWERS, LABELS, QUESTIONS, TEXTS
from ptft_dist.data.survey import Column, Survey
from ptft_dist.tasks.common.preference_pairs import is_transcript
from ptft_dist.tasks.token_classification.encode import misplaced

NEEDS = {
    "classification": "text and label (a few different values), with text_pair for pairs, or head, tail for relations",
    "regression": "text and label (a number), with text_pair for pairs",
    "token_classification": "tokens and tags: two lists of the same length, as .conll files have",
    "question_answering": "question, context, and answers: {text: [...], answer_start: [...]}",
    "sft": "messages; or conversations; or instruction, output; or prompt, completion; or text",
    "dpo, reward": "chosen and rejected, with prompt or conversations unless both repeat it",
    "kto": "messages, or prompt and completion; and label: true or false",
    "grpo, rloo, ppo": "prompt, or messages that end with the user's",
    "seq2seq": "source and target: two texts",
    "clm, mlm, mlm_nsp, plm, span_corruption": "text",
}
"""Tasks -> the columns that they need."""

_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("text_a", "text_b"),
    ("query", "passage"),
    ("question", "sentence"),
)
_SIDES = (
    ("source", "target"),
    ("src", "tgt"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("document", "summary"),
    ("article", "summary"),
    ("input", "target"),
)
_TURNS = ("system", "tools")
_OPTIONAL = {"sft": _TURNS, "dpo": _TURNS, "kto": _TURNS, "reward": (*_TURNS, "margin")}
_FEW = 60  # different labels of a classification
_MOST_COLUMNS = 3  # of a file whose two longest texts are taken for source and target
_SCALAR = ("text", "number", "boolean")


@dataclass(frozen=True)
class Fit:
    """How the columns of a file fit a task."""

    fields: dict[str, str]
    """Role -> column."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the task's section."""
    texts: Sequence[str] = ()
    """The columns whose texts are in one row of tokens."""
    label: str | None = None
    """The column with the labels."""
    optional: Sequence[str] = ()
    """Further columns that the task reads if a file has them, such as `tools`."""

    @property
    def renamed(self) -> dict[str, str]:
        """The fields whose column does not have the name of its role."""
        return {role: column for role, column in self.fields.items() if role != column}


def fitting_tasks(survey: Survey) -> dict[str, Fit]:
    """The tasks that fit the columns, the most likely one first."""
    found: dict[str, Fit] = {}
    for tasks, fit_of in _FAMILIES:
        fit = fit_of(survey.columns)
        if fit is not None:
            found |= {task: _with_own(task, fit, survey.columns) for task in tasks if task not in found}
    return found


Columns = dict[str, Column]


def _first(columns: Columns, names: Iterable[str], kinds: Sequence[str] = ("text",)) -> str | None:
    """The first of these columns with one of these kinds."""
    return next((name for name in names if name in columns and columns[name].kind in kinds), None)


def _pair(columns: Columns, pairs: Iterable[tuple[str, str]]) -> tuple[str, str] | None:
    return next((pair for pair in pairs if all(_first(columns, [name]) for name in pair)), None)


def _longest(columns: Columns, without: Iterable[str | None] = ()) -> str | None:
    """The column with the longest texts."""
    texts = [each for name, each in columns.items() if each.kind == "text" and not each.numeric and name not in without]
    return max(texts, key=lambda each: sum(each.tokens) / each.rows).name if texts else None


def _tagged(columns: Columns) -> Fit | None:
    tokens = _first(columns, ("tokens", "words"), ("texts",))
    tags = _first(columns, ("tags", "ner_tags", "pos_tags", "labels", "ner"), ("texts",))
    if tokens is None or tags is None:
        return None
    rows = columns[tags].first
    schemes = ("iob2", "bioes", "iob1", "bilou", "bmes")
    scheme = next((each for each in schemes if not any(misplaced(each, row) for row in rows)), "plain")
    return Fit({"tokens": tokens, "tags": tags}, {"scheme": scheme}, (tokens,), tags)


def _asked(columns: Columns) -> Fit | None:
    if not {"question", "context", "answers"} <= columns.keys() or columns["answers"].kind != "answers":
        return None
    return Fit({name: name for name in ("question", "context", "answers")}, texts=("question", "context"))


def _judged(columns: Columns) -> Fit | None:
    label = _first(columns, ("label", "desirable", "kto_tag"), ("boolean",))
    if label is None:
        return None
    if talk := _first(columns, ("messages",), ("messages",)):
        return Fit({"messages": talk, "label": label}, {"shape": "messages"}, (talk,), label)
    prompt, answer = _first(columns, ("prompt",), ("text", "messages")), _first(columns, ANSWERS, ("text", "messages"))
    if prompt is None or answer is None:
        return None
    fields = {"prompt": prompt, "completion": answer, "label": label}
    return Fit(fields, {"shape": "unpaired"}, (prompt, answer), label)


def _preferred(columns: Columns) -> Fit | None:
    kinds = ("text", "messages", "message", "turn")
    chosen, rejected = _first(columns, ("chosen",), kinds), _first(columns, ("rejected",), kinds)
    if chosen is None or rejected is None:
        return None
    fields = {"chosen": chosen, "rejected": rejected}
    if talk := _first(columns, ("conversations",), ("turns",)):
        return Fit({"conversations": talk, **fields}, {"shape": "sharegpt"}, (talk, chosen))
    prompt = _first(columns, ("prompt", "instruction", "question"), ("text", "messages"))
    if prompt is None:
        transcripts = all(is_transcript(value) for value in columns[chosen].first + columns[rejected].first)
        return Fit(fields, {"shape": "hh" if transcripts else "preference"}, (chosen,))
    shape = "single_turn" if columns[chosen].kind == columns[prompt].kind == "text" else "preference"
    return Fit({"prompt": prompt, **fields}, {"shape": shape}, (prompt, chosen))


def _conversation(columns: Columns) -> Fit | None:
    if talk := _first(columns, ("messages", "conversations", "conversation"), ("messages",)):
        return Fit({"messages": talk}, {"shape": "messages"}, (talk,))
    if talk := _first(columns, ("conversations", "conversation", "messages"), ("turns",)):
        return Fit({"conversations": talk}, {"shape": "sharegpt"}, (talk,))
    if _first(columns, ("prompt",), ("messages",)) and _first(columns, ("completion",), ("messages",)):
        fields = {"prompt": "prompt", "completion": "completion"}
        return Fit(fields, {"shape": "prompt_completion"}, ("prompt", "completion"))
    question, answer = _first(columns, QUESTIONS), _first(columns, ANSWERS)
    if question is None or answer is None:
        return None
    more = _first(columns, ("input", "context"))
    if more is None and question != "instruction":
        return Fit({"prompt": question, "completion": answer}, {"shape": "single_turn"}, (question, answer))
    fields = {"instruction": question, **({"input": more} if more else {}), "output": answer}
    return Fit(fields, {"shape": "alpaca"}, tuple(fields.values()))


def _prompts(columns: Columns) -> Fit | None:
    prompt = _first(columns, ("prompt", "prompts"), ("text", "messages"))
    if prompt is None:
        return None
    shape = {"shape": "single_turn"} if columns[prompt].kind == "text" else {}
    return Fit({"prompt": prompt}, shape, (prompt,))


def _label(columns: Columns) -> str | None:
    """The column with a label: by its name, or the one of two columns with a few different values."""
    named = _first(columns, LABELS, (*_SCALAR, "texts"))
    if named is not None or len(columns) != 2:
        return named
    few = [name for name, each in columns.items() if each.kind in _SCALAR and _few_values(each)]
    return few[0] if len(few) == 1 else None


def _few_values(column: Column) -> bool:
    """Whether the values are few and return."""
    return 2 <= len(column.values) <= _FEW and sum(column.values.values()) >= 2 * len(column.values)


def _labelled(columns: Columns) -> tuple[str, dict[str, str], dict[str, Any]] | None:
    """The label column, and the fields and settings of its text or texts."""
    label = _label(columns)
    if label is None:
        return None
    if pair := _pair(columns, _PAIRS):
        return label, {"text": pair[0], "text_pair": pair[1], "label": label}, {"pair": True}
    others = {name: each for name, each in columns.items() if name != label}
    text = _first(others, TEXTS) or _longest(others)
    return None if text is None else (label, {"text": text, "label": label}, {})


def _classified(columns: Columns) -> Fit | None:
    found = _labelled(columns)
    if found is None:
        return None
    label, fields, settings = found
    column = columns[label]
    if column.kind != "texts" and (not _few_values(column) or (column.numeric and not column.whole)):
        return None
    if column.kind == "texts":
        settings |= {"multi_label": True}
    if all(_first(columns, [role], ("numbers",)) for role in ("head", "tail")) and "pair" not in settings:
        fields |= {"head": "head", "tail": "tail"}
        settings |= {"entities": True}
    return Fit(fields, settings, [fields[role] for role in ("text", "text_pair") if role in fields], label)


def _rated(columns: Columns) -> Fit | None:
    found = _labelled(columns)
    if found is None or not columns[found[0]].numeric or len(columns[found[0]].values) < 3:
        return None
    label, fields, settings = found
    return Fit(fields, settings, [fields[role] for role in ("text", "text_pair") if role in fields], label)


def _rewritten(columns: Columns) -> Fit | None:
    """Two texts: of known names, or the two columns with the longest texts of a file without a column `text`."""
    sides = _pair(columns, _SIDES)
    if sides is None and "text" not in columns and len(columns) <= _MOST_COLUMNS:
        first = _longest(columns)
        second = _longest(columns, [first])
        if first and second and not _few_values(columns[second]):
            sides = tuple(name for name in columns if name in (first, second))  # type: ignore[assignment]
    return Fit({"source": sides[0], "target": sides[1]}, texts=(sides[0],)) if sides else None


def _documents(columns: Columns) -> Fit | None:
    text = _first(columns, ("text", "content", "body", "document", "article_text")) or _longest(columns)
    return Fit({"text": text}, texts=(text,)) if text else None


_FAMILIES: tuple[tuple[tuple[str, ...], Callable[[Columns], Fit | None]], ...] = (
    (("token_classification",), _tagged),
    (("question_answering",), _asked),
    (("kto",), _judged),
    (("dpo", "reward"), _preferred),
    (("sft",), _conversation),
    (("grpo", "rloo", "ppo"), _prompts),
    (("classification",), _classified),
    (("regression",), _rated),
    (("seq2seq",), _rewritten),
    (("clm", "mlm", "mlm_nsp", "plm", "span_corruption"), _documents),
    (("sft",), lambda columns: _documents(columns) if "text" in columns else None),
    (("kto",), _preferred),
)
"""The tasks that fit the same columns, most specific first."""


def _with_own(task: str, fit: Fit, columns: Columns) -> Fit:
    """The fit with what only this task needs."""
    if task == "sft" and list(fit.fields) == ["text"]:
        return Fit(fit.fields, {"shape": "text"}, fit.texts)
    if optional := [name for name in _OPTIONAL.get(task, ()) if name in columns]:
        return replace(fit, optional=optional)
    if task == "seq2seq":
        longest = max(8, columns[fit.fields["target"]].at_quantile(0.99))
        return Fit(fit.fields, {"max_target_length": 8 * -(-longest // 8)}, fit.texts)
    return fit
