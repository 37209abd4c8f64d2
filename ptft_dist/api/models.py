"""Trained models: text, chats, scores, merging."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ptft_dist.api.calls import check_dtype, hiding_secrets, quiet_imports
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.networks.names import model_of
from ptft_dist.tasks.common.preference_settings import PreferenceSettings

if TYPE_CHECKING:
    from ptft_dist.inference.chatting import Chat


@hiding_secrets
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
    quiet_imports()
    from ptft_dist.inference.generation import Sampling
    from ptft_dist.inference.generation import generate as run

    return run(model, prompt, Sampling(max_new_tokens, temperature, top_p, seed), raw=raw, adapters=named, use=use)


@hiding_secrets
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
    quiet_imports()
    from ptft_dist.inference.chatting import Chat
    from ptft_dist.inference.generation import Sampling

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


def _editing_steps(model: Path) -> str:
    """The steps of data.steps that changed texts of the run with this model."""
    from ptft_dist.launch.result import read_json

    steps = read_json(model.parent / "data_report.json").get("steps", [])
    return ", ".join(dict.fromkeys(step["name"] for step in steps if step["changed"]))


@hiding_secrets
def score(
    model_dir: str | Path, file: str | Path, out: str | Path, *, shape: str | None = None, batch_tokens: int = 8192
) -> dict[str, float]:
    """Score the rows of a file with a reward model, and write them with their scores as JSON lines, atomically.

    Pairs (chosen, rejected) get `score_chosen` and `score_rejected`; conversations and texts get `score`. Rows are
    scored as they are: data.steps of the run does not apply.

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
        RecipeError: `shape` is unknown, `out` cannot be written, or an adapter or its base cannot be loaded.
        DataError: the file cannot be read, rows are invalid, or they have a field of this name already.
    """
    shapes = get_args(PreferenceSettings.model_fields["shape"].annotation)
    if shape is not None and shape not in shapes:
        raise RecipeError(f"shape: {shape!r} is none of {', '.join(shapes)}")
    model = model_of(model_dir)
    if not Path(file).is_file():
        raise DataError(f"{file} does not exist. Give a file with rows to score.")
    if steps := _editing_steps(model):
        from ptft_dist.reporting.messages import say

        say(f"this run was trained on texts that data.steps ({steps}) changed; here, rows are scored as they are")
    quiet_imports()
    from ptft_dist.inference.scoring import score as run

    return run(model, Path(file), Path(out), shape=shape, batch_tokens=batch_tokens)


@hiding_secrets
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
    check_dtype(dtype)
    quiet_imports()
    from ptft_dist.exporting.merging import merge_run
    from ptft_dist.reporting.messages import messages

    with messages(0):
        return merge_run(Path(run), Path(out).absolute(), dtype=dtype)
