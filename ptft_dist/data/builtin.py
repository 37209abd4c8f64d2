"""Data that every Python has: the source text of its standard library, and what that text says of itself.

`python-stdlib` is one document a module. `python-functions` is one row a documented function or method, with columns
for every task: try a recipe without any file, and see it learn something real.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptft_dist.data.formats import Record
from ptft_dist.errors import DataError

BUILTIN = ("python-stdlib", "python-functions")

# Tests hold broken text on purpose; the rest is not part of the library.
_NOT_STDLIB = {"test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
_WORD = re.compile(r"\w+|[^\w\s]")
_SHORTEST_SUMMARY = 3  # words


def read_builtin(name: str) -> Iterator[Record]:
    return _functions() if name == "python-functions" else _modules()


@functools.cache
def stdlib_files() -> list[Path]:
    """Every module of the running interpreter's standard library, sorted by its path below the library.

    Raises:
        DataError: there are none.
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
            with tokenize.open(module) as file:  # decodes as the interpreter does, by the module's declaration
                text = file.read()
        except (SyntaxError, UnicodeDecodeError) as error:
            logging.getLogger("ptft").warning("python-stdlib: left out %s, which cannot be decoded: %s", module, error)
            continue
        yield Record({"text": text}, str(module))


def _functions() -> Iterator[Record]:
    for module in _modules():
        text = module.values["text"]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in strings
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
    """
    name, module, kind: of the function; `function` or `method`
    summary, signature: the docstring's first line; the line `def name(arguments)`
    arguments, lines: how many there are, numbers
    traits: some of: arguments, defaults, returns, raises, decorated
    question, answer: what it does, for fine-tuning on questions; messages: the same as a conversation
    tokens, tags: the words of signature and summary; IOB2 tags of function and argument names
    context, answers: for questions about spans: the signature, and where its arguments stand
    text, head, tail, relation: signature and summary; the spans of the function's name and of another word there, and
        whether that word is an `argument` or a `word`
    """
    docstring = ast.get_docstring(node)
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    summary = docstring.strip().splitlines()[0].strip() if docstring and docstring.strip() else ""
    if len(summary.split()) < _SHORTEST_SUMMARY or not summary.isprintable():
        return None
    arguments = ast.unparse(node.args)
    signature = f"def {node.name}({arguments})"
    together = f"{signature}: {summary}"
    inner = list(ast.walk(node))
    traits = {
        "arguments": bool(names),
        "defaults": bool(node.args.defaults or node.args.kw_defaults),
        "returns": any(isinstance(n, ast.Return) and n.value is not None for n in inner),
        "raises": any(isinstance(n, ast.Raise) for n in inner),
        "decorated": bool(node.decorator_list),
    }
    words = _WORD.findall(together)
    question = f"What does {node.name}({', '.join(names)}) do?"
    start = len(f"def {node.name}(")
    name_span = [4, 4 + len(node.name)]
    places = [match for match in re.finditer(r"\w{2,}", together) if match.start() >= name_span[1]]
    # A word that the row itself chooses, so that both kinds of relation are about as frequent.
    of_arguments = [match for match in places if match.group() in names]
    others = [match for match in places if match.group() not in names]
    choice = of_arguments if (len(node.name) + len(names)) % 2 and of_arguments else others or of_arguments
    if not choice:
        return None
    tail = choice[node.lineno % len(choice)]
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
        "context": together,
        "answers": {"text": [arguments] if arguments else [], "answer_start": [start] if arguments else []},
        "text": together,
        "head": name_span,
        "tail": [tail.start(), tail.end()],
        "relation": "argument" if tail.group() in names else "word",
    }
