"""The Python API. The commands of `ptft` are thin wrappers of these functions.

    import ptft_dist
    result = ptft_dist.train("recipe.yaml", {"optim.lr": 1e-4})
    result.metrics["eval/loss"], result.model

The functions raise the errors of `ptft_dist.errors`. `train` and `evaluate` restore signal handlers, library verbosity,
PyTorch's random state and Accelerate's state. They also work in threads; there, only the stop file can stop a run.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, get_args

from ptft_dist.config.load import Loaded, read_recipe
from ptft_dist.config.secrets import hide
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.networks.names import model_of
from ptft_dist.tasks.common.preference_settings import PreferenceSettings
from ptft_dist.tasks.registry import recipe_class

if TYPE_CHECKING:
    from ptft_dist.chatting import Chat
    from ptft_dist.checkpoint.listing import CheckpointInfo
    from ptft_dist.converting.convert import Converted
    from ptft_dist.data.inspection import Inspection
    from ptft_dist.data.prepare import Prepared
    from ptft_dist.data.trained_tokenizer import TokenizerReport
    from ptft_dist.hub import Fetched
    from ptft_dist.judging.evaluation import Evaluation
    from ptft_dist.judging.harness import HarnessResult
    from ptft_dist.judging.prediction import Predictions
    from ptft_dist.pages.comparison import Comparison
    from ptft_dist.run import Result

Source = str | Path | Mapping[str, Any]
"""A recipe: a file, the name of a shipped recipe, or its contents as nested dictionaries."""
Overrides = Mapping[str, Any] | Sequence[str]
"""Values that replace those of the recipe: {"optim.lr": 1e-4}, or ["optim.lr=1e-4"] as on the command line."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


def _hiding_secrets(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: mask the values of `${env:...}` references in the errors of `call`. A notebook saves tracebacks."""

    @functools.wraps(call)
    def hiding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except PtftError as error:
            error.args = (hide(str(error)),)
            if any(hide(str(cause)) != str(cause) for cause in _causes(error)):
                raise error from None
            raise

    return hiding


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


@_hiding_secrets
def load_recipe(source: Source, overrides: Overrides = (), *, training: bool = False) -> Loaded:
    """Read, override and validate a recipe. Raises RecipeError, which lists all mistakes.

    training: refuse a recipe whose task is evaluated only.
    """
    loaded = read_recipe(source if isinstance(source, Mapping) else str(source), _words(overrides), recipe_class())
    if training and not loaded.recipe.settings.trains:
        raise RecipeError(f"task: {loaded.recipe.task} is evaluated only: ptft evaluate MODEL RECIPE")
    return loaded


def _words(overrides: Overrides) -> Sequence[str]:
    """The overrides as on the command line."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return overrides


@_hiding_secrets
def prepare(source: Source, overrides: Overrides = ()) -> Prepared:
    """Prepare a recipe's data in the cache, or reuse them from there. Raises RecipeError and DataError."""
    from ptft_dist.data.prepare import prepare as run
    from ptft_dist.data.sources import check_sources
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(source, overrides)
    check_sources(loaded.recipe, loaded.base)
    return run(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))


@_hiding_secrets
def convert(
    file: str | Path, out: str | Path, overrides: Overrides = (), *, task: str | None = None, processes: int = 1
) -> tuple[Converted, str]:
    """Write a recipe that does the same as a configuration of TRL, axolotl, LLaMA-Factory or TrainingArguments.

    Args:
        task: what the file trains, if its keys do not say it.
        processes: the number of processes of that training, which is a factor of the batch size.

    Returns:
        What became of each key, and the mistakes of the recipe, such as a missing model; empty if it is valid.

    Raises:
        RecipeError: the file is of no known trainer, or `out` exists.
    """
    from ptft_dist.converting.convert import convert as converted_from
    from ptft_dist.reporting.output import write_text

    target = Path(out)
    if target.exists():
        raise RecipeError(f"{target}: already exists, nothing was written; remove the file or name another with --out")
    words = _words(overrides)
    converted = converted_from(Path(file), target, recipe_class(), task=task, processes=processes, overrides=words)
    write_text(target, converted.text)
    try:
        load_recipe(target)
    except RecipeError as error:
        return converted, str(error)
    return converted, ""


@_hiding_secrets
def inspect_data(source: Source, overrides: Overrides = (), *, samples: int = 5) -> Inspection:
    """What the prepared data of a recipe look like; prepares them if necessary.

    Args:
        source: a recipe, or the directory of prepared stores: `<cache>/stores/<fingerprint>`.
        samples: number of rows that are decoded.

    Raises:
        RecipeError: there is no such recipe or store, or a store is given overrides.
        DataError: the data cannot be prepared, or are damaged.
    """
    from ptft_dist.data.inspection import inspect_prepared, inspect_stores, is_stores
    from ptft_dist.data.prepare import records_of
    from ptft_dist.tasks.registry import encoder_class

    if isinstance(source, str | Path) and is_stores(Path(source)):
        if overrides:
            raise RecipeError(f"{next(iter(overrides))}: prepared data cannot be changed; name their recipe instead")
        return inspect_stores(Path(source), samples=samples)
    loaded = load_recipe(source, overrides)
    prepared = prepare(source, overrides)
    kind = encoder_class(loaded.recipe.task)
    return inspect_prepared(prepared, loaded.recipe, kind, records_of(loaded.recipe, loaded.base, kind), samples)


@_hiding_secrets
def verify_data(source: Source, overrides: Overrides = ()) -> list[tuple[Path, int]]:
    """Read all bytes of prepared data, and compare them with their checksums: store and size in bytes.

    Args:
        source: a recipe, whose data are prepared if necessary, or a directory of prepared stores.

    Raises:
        DataError: a file is missing, or its contents have changed.
    """
    from ptft_dist.data.inspection import is_stores, stores_of
    from ptft_dist.data.store import verify

    if isinstance(source, str | Path) and is_stores(Path(source)):
        stores = stores_of(Path(source))
    else:
        stores = stores_of(prepare(source, overrides).train.path.parent)
    return [(store, verify(store)) for store in stores]


@_hiding_secrets
def train_tokenizer(
    source: Source, overrides: Overrides = (), *, out: str | Path | None = None, compare: Sequence[str] = ()
) -> TokenizerReport:
    """Write the tokenizer that `prepare` trains or extends for a recipe, and measure it on the recipe's texts.

    A recipe that takes a tokenizer as it is gets a report only, and nothing is written.

    Args:
        out: the target. Default: RUN_DIR/tokenizer. The report lies beside it. If the directory has the tokenizer of
            the same settings and data, nothing is done.
        compare: directories and Hub names of other tokenizers, which are measured too.

    Raises:
        RecipeError: `out` has other files, or there is nothing to write there; or a tokenizer cannot be loaded.
        DataError: a source is missing or malformed.
    """
    from ptft_dist.data.trained_tokenizer import TrainedTokenizer
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(source, overrides)
    target = Path(out) if out is not None else Path(loaded.recipe.run_dir) / "tokenizer"
    tokenizer = TrainedTokenizer(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task), compare)
    if tokenizer.writes:
        return tokenizer.write(target.absolute())
    if out is not None:
        raise RecipeError(
            f"--out: has no effect here: the recipe takes the tokenizer of {loaded.recipe.tokenizer.path} as it is. "
            "Set tokenizer.train, add or extend, or remove --out"
        )
    return tokenizer.report()


@_hiding_secrets
def prefetch(source: Source, overrides: Overrides = ()) -> list[Fetched]:
    """Fetch a recipe's models, tokenizers and data sets from the Hub into the local caches, for nodes without internet.

    Returns what the recipe names, and where it lies; also local files. Raises RecipeError and DataError.
    """
    from ptft_dist.hub import prefetch as run

    return run(load_recipe(source, overrides))


@_hiding_secrets
def missing_offline(loaded: Loaded) -> list[str]:
    """What a node without internet would not find in the local caches of the Hub; imports no torch. See `prefetch`."""
    from ptft_dist.hub import missing_offline as run

    return run(loaded)


@_hiding_secrets
def input_fingerprint(loaded: Loaded) -> str:
    """A hash of the source files of a recipe's data and tokenizer, without preparing the data.

    Files that have not changed since they were last hashed are not read. Raises RecipeError and DataError.
    """
    from ptft_dist.data.prepare import input_fingerprint as run
    from ptft_dist.tasks.registry import encoder_class

    return run(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))


@_hiding_secrets
def train(
    source: Source, overrides: Overrides = (), *, resume: str = "auto", accept: Sequence[str] = (), quiet: bool = False
) -> Result:
    """Train a recipe in this process: as the only process, or as one rank of those that a launcher started.

    Args:
        resume: `auto`: resume from the newest valid checkpoint of run_dir; `never`: start from zero; or the path of a
            checkpoint.
        accept: recipe keys that are meant to differ from the checkpoint.
        quiet: show warnings only.

    Raises:
        PtftError: one of the errors in ptft_dist.errors; the message says what to do.
    """
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages
    from ptft_dist.run import run

    loaded, here = load_recipe(source, overrides, training=True), place()
    with messages(here.rank, quiet=quiet):
        return run(loaded, here, resume=resume, accept=accept)


@_hiding_secrets
def evaluate(source: Source, overrides: Overrides = (), *, model: str | Path | None = None) -> dict[str, float]:
    """Evaluate a model on the validation rows of a recipe, each once: metrics by name. Writes no files.

    Args:
        model: a model directory or Hub name. Default: the exported model in the recipe's run_dir.

    Raises:
        PtftError: one of the errors in ptft_dist.errors; the message says what to do.
    """
    from ptft_dist.judging.evaluation import evaluate as run
    from ptft_dist.judging.target import Target, run_of
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    loaded, here = load_recipe(source, overrides), place()
    name = str(model or Path(loaded.recipe.run_dir) / "model")
    with messages(here.rank):
        return run(Target(name, loaded, run_of(Path(name)), own=False), here).metrics


@_hiding_secrets
def evaluate_model(
    model: str | Path,
    source: Source | None = None,
    overrides: Overrides = (),
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Evaluate the model of a run, or another one, on the validation rows of a recipe, each once.

    An interrupted evaluation with a file for its result goes on where it was.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        source: the recipe. Default: that of the run; for a model without a run, with `data`: one that follows from its
            architecture.
        data: a file with validation rows, which replaces data.validation. It is read with the column mapping of the
            recipe's sources.
        out: a JSON file for the result, written atomically by rank 0; FILE.rows.jsonl beside it has a line for each
            example. Default: evaluation.json in the run directory, for a run with its own recipe and rows.
        stride: for task clm, also measure the perplexity of whole documents with a window of data.max_length tokens
            that moves on by this many tokens.

    Raises:
        RecipeError: there is no recipe, or the model does not fit it.
        CheckpointError: there is no model.
        DataError: the data cannot be read.
    """
    _quiet_imports()
    from ptft_dist.judging.evaluation import evaluate_model as run
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    here = place()
    with messages(here.rank):
        return run(
            model,
            source,
            _words(overrides),
            here,
            data=None if data is None else Path(data),
            out=None if out is None else Path(out),
            stride=stride,
        )


@_hiding_secrets
def evaluate_on_benchmarks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    out: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> HarnessResult:
    """Evaluate a causal or sequence-to-sequence model on tasks of lm-eval, which must be installed.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        tasks: names of tasks, groups or tags, such as mmlu or hellaswag, or patterns.
        include: a directory with further task files. Python files that they name are imported.
        out: a JSON file for the result; FILE.rows.jsonl beside it has a line for each row.
        shots: examples before each row. Default: what the task says.
        limit: only this many rows of each task.
        allow_code: allow tasks that run code of the model, such as humaneval. Their scoring runs in processes with
            limits of time and memory, which is no sandbox.

    Raises:
        RecipeError: lm-eval is not installed, a task is unknown, or it runs code and this is not allowed.
        CheckpointError: there is no model that generates text.
        DataError: a task cannot be loaded.
    """
    _quiet_imports()
    from ptft_dist.judging.harness import run_harness
    from ptft_dist.reporting.messages import messages

    with messages(0):
        return run_harness(
            model,
            tasks,
            include=None if include is None else Path(include),
            out=None if out is None else Path(out),
            shots=shots,
            limit=limit,
            allow_code=allow_code,
        )


@_hiding_secrets
def predict(
    model: str | Path,
    file: str | Path,
    out: str | Path,
    *,
    source: Source | None = None,
    overrides: Overrides = (),
) -> Predictions:
    """Answer each row of a file with a trained model, and write rows and answers in the same order.

    A row gets the field `prediction`: label and probabilities, a tag for each word, a number, a span of the context, or
    a text. An interrupted prediction goes on where it was. On several processes each answers a share of the rows.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        file: in any format that recipes read, with the columns of the training rows; answers are not needed.
        out: JSON lines (.jsonl) or a table (.csv, .tsv), written atomically by rank 0.
        source: the recipe. Default: that of the run, else one that follows from the architecture.

    Raises:
        RecipeError: the model does not fit the recipe, its task gives no answers, or `out` has another ending.
        CheckpointError: there is no model.
        DataError: the file cannot be read, or rows are invalid.
    """
    from ptft_dist.reporting.output import check_answers_file

    check_answers_file(Path(out))
    _quiet_imports()
    from ptft_dist.judging.prediction import predict as run
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    here = place()
    with messages(here.rank):
        return run(model, source, _words(overrides), here, file=Path(file), out=Path(out))


@_hiding_secrets
def checkpoints(run_dir: str | Path) -> list[CheckpointInfo]:
    """The checkpoints of a run, sorted by step. Every byte is verified. Raises CheckpointError if there is none."""
    from ptft_dist.checkpoint.listing import list_checkpoints

    return list_checkpoints(Path(run_dir))


@_hiding_secrets
def report(run_dir: str | Path, html: str | Path | None = None) -> Path:
    """Write one HTML page about a run, finished or not, and return its path. Imports no torch.

    Args:
        html: the page. Default: run_dir/report.html.

    Raises:
        RecipeError: this is no run directory.
        DataError: the run has no metrics yet, or a file is damaged.
        PtftError: the page cannot be written.
    """
    from ptft_dist.pages.page import write_report

    return write_report(Path(run_dir), None if html is None else Path(html))


@_hiding_secrets
def compare(
    run_dirs: Sequence[str | Path], *, html: str | Path | None = None, json_file: str | Path | None = None
) -> Comparison:
    """Compare runs, finished or not: metrics, recipes, environments, and evaluations. Imports no torch.

    Args:
        run_dirs: two run directories or more; the first one is the baseline of differences.
        html: one page with tables and the curves of all runs.
        json_file: a file for `Comparison.values()`.

    Raises:
        RecipeError: fewer than two runs, one run twice, or a directory that is no run.
        DataError: a run has no metrics yet, or a file is damaged.
        PtftError: a file cannot be written.
    """
    from ptft_dist.pages.comparison import Comparison
    from ptft_dist.pages.page import write_comparison
    from ptft_dist.pages.read import read_runs
    from ptft_dist.reporting.output import write_text

    comparison = Comparison(read_runs([Path(each) for each in run_dirs]))
    if json_file is not None:
        write_text(Path(json_file), json.dumps(comparison.values(), indent=1) + "\n")
    if html is not None:
        write_comparison(comparison, Path(html))
    return comparison


@_hiding_secrets
def generate(
    model_dir: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    raw: bool | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    use: str | None = None,
) -> str:
    """Generate text with a trained model: continue a text, answer a message, or rewrite a source.

    Args:
        model_dir: the directory of a finished run, a model directory, or an adapter directory.
        temperature: 0 decodes greedily.
        top_p: nucleus sampling (Holtzman et al. 2020).
        seed: the same seed gives the same text.
        raw: continue the prompt itself, without the chat template or the prefix of a seq2seq model. None: as the run
            was trained, with the template if the tokenizer has one, unless all rows were joined without it.
        adapters: name -> adapter directory, or run with one. All have the same base: that of the adapter in model_dir,
            which is called `default`, or model_dir itself.
        use: the name of the adapter that is active. Default: the last one.

    Raises:
        CheckpointError: there is no model, or it cannot generate text.
        RecipeError: the prompt has no token, or an adapter or its base cannot be loaded.
    """
    model, named = _models_of(model_dir, adapters, use)
    if raw is None and (raw := _joined_without_template(model)):
        from ptft_dist.reporting.messages import say

        say("this run was trained on texts without the chat template, so the prompt is continued as it is")
    _quiet_imports()
    from ptft_dist.generation import Sampling
    from ptft_dist.generation import generate as run

    return run(model, prompt, Sampling(max_new_tokens, temperature, top_p, seed), raw=raw, adapters=named, use=use)


@_hiding_secrets
def chat(
    model_dir: str | Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    adapters: Mapping[str, str | Path] | None = None,
    use: str | None = None,
) -> Chat:
    """Start a chat with a trained model: `chat("runs/sft").answer("Hello")`.

    Args:
        system: the system message.

    The other arguments are those of `generate`.

    Raises:
        CheckpointError: there is no model, or it cannot generate text.
        RecipeError: the model has no chat template or was trained without it, or an adapter cannot be loaded.
    """
    model, named = _models_of(model_dir, adapters, use)
    if _joined_without_template(model):
        raise RecipeError(
            f"{model_dir}: trained on texts without the chat template, so it cannot chat. Use ptft generate"
        )
    _quiet_imports()
    from ptft_dist.chatting import Chat
    from ptft_dist.generation import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    return Chat(model, sampling, system=system, adapters=named, use=use)


def _models_of(
    model_dir: str | Path, adapters: Mapping[str, str | Path] | None, use: str | None
) -> tuple[Path, dict[str, Path]]:
    """The directories of a model and of adapters. Raises CheckpointError; RecipeError for `use` without adapters."""
    if use is not None and not adapters:
        raise RecipeError("use: chooses among several adapters. Name them with `adapters`")
    return model_of(model_dir), {name: model_of(path) for name, path in (adapters or {}).items()}


def _joined_without_template(model: Path) -> bool:
    """Whether all rows of the run with this model were prompts and completions without the chat template."""
    from ptft_dist.launch.result import read_json
    from ptft_dist.tasks.common.chat import UNTEMPLATED

    report = read_json(model.parent / "data_report.json")
    count, *_ = report.get("notes", {}).get(UNTEMPLATED, (0,))
    sides = (report.get("train"), report.get("validation"))
    return bool(count) and count >= sum(side["examples"] for side in sides if side)


@_hiding_secrets
def score(
    model_dir: str | Path, file: str | Path, out: str | Path, *, shape: str | None = None, batch_tokens: int = 8192
) -> dict[str, float]:
    """Score the rows of a file with a reward model, and write them with their scores as JSON lines, atomically.

    Pairs (chosen, rejected) get `score_chosen` and `score_rejected`; conversations and texts get `score`.

    Args:
        model_dir: the directory of a finished run, a model directory, or an adapter directory.
        file: in any format that recipes read.
        shape: how rows become texts, as in the settings of preference pairs. Default: as in training.
        batch_tokens: maximum number of tokens of a batch, padding included.

    Returns:
        A summary: number of rows, mean and standard deviation of the scores; for pairs also the metrics of an
        evaluation, such as accuracy.

    Raises:
        CheckpointError: there is no model, or it has no scalar head.
        RecipeError: `shape` is unknown, or an adapter or its base cannot be loaded.
        DataError: the file cannot be read, or rows are invalid.
    """
    shapes = get_args(PreferenceSettings.model_fields["shape"].annotation)
    if shape is not None and shape not in shapes:
        raise RecipeError(f"shape: {shape!r} is none of {', '.join(shapes)}")
    model = model_of(model_dir)
    if not Path(file).is_file():
        raise DataError(f"{file} does not exist. Give a file with rows to score.")
    _quiet_imports()
    from ptft_dist.scoring import score as run

    return run(model, Path(file), Path(out), shape=shape, batch_tokens=batch_tokens)


@_hiding_secrets
def merge(run: str | Path, out: str | Path, *, dtype: str | None = None) -> Path:
    """Fold an adapter into its base, and write a plain model directory with the tokenizer.

    The logits of the merged model are compared with those of base and adapter on a few token rows.

    Args:
        run: the directory of a finished run, or an adapter directory. If the run has quantized its base, the quantized
            base is dequantized and merged. An adapter directory does not say this, so the base itself is merged.
        out: the target; must not exist, or be empty.
        dtype: fp32, bf16 or fp16. Default: bf16 if the run has quantized its base, otherwise that of the base.

    Raises:
        RecipeError: the adapter cannot be merged, its base is missing, the logits differ, or `out` is not empty.
        CheckpointError: there is no adapter, or the base has changed since the training.
    """
    _check_dtype(dtype)
    _quiet_imports()
    from ptft_dist.merging import merge_run
    from ptft_dist.reporting.messages import messages

    with messages(0):
        return merge_run(Path(run), Path(out).absolute(), dtype=dtype)


def _quiet_imports() -> None:
    """Hide warnings about kernels that are missing on a CPU, which bitsandbytes logs when it is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _check_dtype(dtype: str | None) -> None:
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise RecipeError(f"dtype: expected fp32, bf16 or fp16, got {dtype!r}")


@_hiding_secrets
def export(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    license_id: str | None = None,
    push: str | None = None,
    private: bool = False,
) -> Path:
    """Export the weights of a checkpoint as a model directory, or as an adapter directory if the run trains an adapter.

    The directory also has the tokenizer and a model card (README.md). Needs the run directory, and the base of a
    pretrained network, but no data.

    Args:
        run: a run directory.
        out: the target; must not exist, or be empty.
        step: the update of the checkpoint. Default: the newest one.
        license_id: an identifier of the Hub for the model card, such as apache-2.0.
        push: upload the directory to this repository of the Hub, with the token in HF_TOKEN or of `hf auth login`.
        private: the repository is private, if it is created.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the base has changed.
        RecipeError: the base is missing, or `out` is not empty.
        PtftError: the upload failed.
    """
    if private and push is None:
        raise RecipeError("private: applies to a repository of the Hub. Name it with `push`")
    _quiet_imports()
    from ptft_dist.exporting import export_run
    from ptft_dist.exporting import push as upload
    from ptft_dist.reporting.messages import messages

    with messages(0):
        folder = export_run(Path(run), Path(out).absolute(), step=step, license_id=license_id)
        if push is not None:
            upload(folder, push, private=private)
    return folder
