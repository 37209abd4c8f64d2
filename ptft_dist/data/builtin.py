"""Built-in data sets from Python's standard library, to try recipes without any file.

`python-stdlib` has one document per module. `python-functions` has one row per documented function or method, with
columns for every task.
"""

from __future__ import annotations

import ast
import functools
import logging
import os
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from zlib import crc32

from ptft_dist.data.formats import Record
from ptft_dist.errors import DataError

BUILTIN = ("python-stdlib", "python-functions")

# Tests contain invalid text on purpose; the other folders are not part of the library.
_NOT_STDLIB = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_WORD = re.compile(r"\w+|[^\w\s]")
_SHORTEST_SUMMARY = 3  # words
_READ_AHEAD = 256  # functions


def read_builtin(name: str) -> Iterator[Record]:
    """The records of a built-in data set; name: one of BUILTIN."""
    return _functions() if name == "python-functions" else _modules()


@functools.cache
def stdlib_files() -> list[Path]:
    """The modules of the running interpreter's standard library, sorted by relative path.

    Raises:
        DataError: there are no .py files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_STDLIB]
        modules += [Path(folder, name) for name in names if name.endswith(".py")]
    if not modules:
        raise DataError(f"source: python-stdlib: there are no .py files in {root}. Use another source.")
    return sorted(modules, key=lambda module: module.relative_to(root).as_posix())


def _modules() -> Iterator[Record]:
    for module in stdlib_files():
        try:
            with tokenize.open(module) as file:  # decodes by the module's encoding declaration
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            logging.getLogger("ptft").warning("python-stdlib: dropped %s: it cannot be decoded: %s", module, error)
            continue
        yield Record({"text": text}, str(module))


def _functions() -> Iterator[Record]:
    return _with_other_answers(_documented_functions())


def _with_other_answers(records: Iterable[Record]) -> Iterator[Record]:
    """Add `other_answer`: the answer about an earlier function, or one of the next few, by a hash of the signature."""
    records, seen = iter(records), set[str]()
    while block := list(islice(records, _READ_AHEAD)):
        seen.update(record.values["answer"] for record in block)
        answers = sorted(seen)
        for record in block:
            i = crc32(record.values["signature"].encode()) % len(answers)
            if answers[i] == record.values["answer"]:
                i = (i + 1) % len(answers)
            if len(answers) > 1:
                record.values["other_answer"] = answers[i]
            yield record


def _documented_functions() -> Iterator[Record]:
    for module in _modules():
        text = module.values["text"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escape sequences in strings
                tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node, kind in _definitions(tree, "function"):
            values = _columns(node, kind, Path(module.where))
            if values is not None:
                yield Record(values, f"{module.where}:{node.lineno}")


def _definitions(tree: ast.AST, kind: str) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, kind
        yield from _definitions(node, "method" if isinstance(node, ast.ClassDef) else kind)


def _columns(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str, path: Path) -> dict[str, Any] | None:
    """The columns of one function; None if it has no usable docstring.

    name, module: of the function.
    kind: `function` or `method`.
    summary: first line of the docstring.
    signature: `def name(arguments)`.
    arguments, lines: number of arguments, number of source lines.
    traits: multi-label; some of arguments, defaults, returns, raises, decorated.
    question, answer, messages: what the function does, as two texts and as a conversation.
    other_answer: what another function does; added by `_with_other_answers`.
    tokens, tags: the words of signature and summary; IOB2 tags of function and argument names.
    context, answers: extractive question answering: signature and summary; the span of the arguments.
    text, head, tail, relation: relation extraction: signature and summary; the spans of the function's name and of
        another word; whether that word is an `argument` or a `word`.
    """
    docstring = ast.get_docstring(node)
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    summary = docstring.strip().splitlines()[0].strip() if docstring and docstring.strip() else ""
    if len(summary.split()) < _SHORTEST_SUMMARY or not summary.isprintable():
        return None
    arguments = ast.unparse(node.args)
    signature = f"def {node.name}({arguments})"
    text = f"{signature}: {summary}"
    inner = list(ast.walk(node))
    traits = {
        "arguments": bool(names),
        "defaults": bool(node.args.defaults or node.args.kw_defaults),
        "returns": any(isinstance(n, ast.Return) and n.value is not None for n in inner),
        "raises": any(isinstance(n, ast.Raise) for n in inner),
        "decorated": bool(node.decorator_list),
    }
    words = _WORD.findall(text)
    question = f"What does {node.name}({', '.join(names)}) do?"
    start = len(f"def {node.name}(")
    name_span = [4, 4 + len(node.name)]
    matches = [match for match in re.finditer(r"\w{2,}", text) if match.start() >= name_span[1]]
    # A deterministic choice that makes both relations about equally frequent.
    argument_matches = [match for match in matches if match.group() in names]
    other_matches = [match for match in matches if match.group() not in names]
    use_arguments = (len(node.name) + len(names)) % 2 and argument_matches
    candidates = argument_matches if use_arguments else other_matches or argument_matches
    if not candidates:
        return None
    tail = candidates[node.lineno % len(candidates)]
    return {
        "name": node.name,
        "module": path.stem,
        "kind": kind,
        "summary": summary,
        "signature": signature,
        "arguments": len(names),
        "lines": (node.end_lineno or node.lineno) - node.lineno + 1,
        "traits": [name for name, holds in traits.items() if holds],
        "question": question,
        "answer": summary,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": summary}],
        "tokens": words,
        "tags": ["B-FUNCTION" if i == 1 else "B-ARGUMENT" if word in names else "O" for i, word in enumerate(words)],
        "context": text,
        "answers": {"text": [arguments] if arguments else [], "answer_start": [start] if arguments else []},
        "text": text,
        "head": name_span,
        "tail": [tail.start(), tail.end()],
        "relation": "argument" if tail.group() in names else "word",
    }
