"""docs/reference/metrics.md: the metrics of metrics.jsonl and TensorBoard.

Names of evaluations come from the tasks' settings, those of updates from UPDATE. tests/test_docs_reference.py trains a
tiny network for each task and compares the names in metrics.jsonl with both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.config.recipe import goal_of
from ptft_dist.tasks.registry import TASKS
from reference_pages.markdown import sentence, table

EVERY_UPDATE = {
    "step": ("updates", "The number of the update, from 1."),
    "loss": ("nats", "Mean loss of the update over its labels. Not in nats: `regression`, and the losses of rollouts."),
    "lr": ("", "Peak learning rate times the schedule, before layer_decay and groups."),
    "grad_norm": ("", "2-norm of the gradient before clipping."),
    "skipped": ("", "1 if the fp16 loss scaler skipped the update; `grad_norm` is missing then. Needs a GPU."),
    "tokens": ("tokens", "Tokens of all updates so far, without padding."),
    "loss_tokens": ("labels", "Labels that the loss of this update is averaged over: tokens, rows or pairs."),
    "time_s": ("s", "Wall time of the update, data and rollouts included."),
    "tokens_per_s": ("tokens/s", "Tokens of the update divided by time_s, over all processes."),
    "mfu": ("fraction", "Model FLOPs utilization, where the peak of the device is known."),
    "memory_bytes": ("bytes", "Peak memory of rank 0: of the GPU, or of the process on a CPU."),
}
OPTIONAL = {
    "penalty": ("", "`continual.ewc` and `continual.l2_sp`: the penalty, which is not part of `loss`."),
    "router_loss": ("", "Mixture of experts (clm, sft): the load balancing loss, before its weight."),
    "hard_loss": ("nats", "`distillation`: the task's own loss, without the teacher."),
    "divergence": ("nats", "`distillation`: the divergence from the teacher."),
}
WITH_VLLM = {
    "sampler_gap": ("nats", "`sampling.vllm`: mean difference of vLLM's log-probabilities from the network's."),
    "sampler_weight": ("", "`sampling.vllm`: mean weight of what a token learns."),
    "sampler_weight_limited": ("fraction", "`sampling.vllm`: tokens whose weight is `max_weight`."),
}
IN_EVALUATIONS = tuple(f"eval/{name}" for name in ("router_loss", *DistillationSettings.metric_names))
"""Those of OPTIONAL that evaluations have too."""
_POLICY = (
    "approx_kl clip_fraction entropy generation_s kl policy_loss ratio response_tokens reward reward_std score "
    "scoring_s without_eos"
)
_PREFERENCE = "logps/chosen logps/rejected rewards/chosen rewards/rejected"
UPDATE = {
    "mlm": "accuracy",
    "mlm_nsp": "mlm_accuracy mlm_loss nsp_accuracy nsp_loss",
    "plm": "accuracy",
    "span_corruption": "accuracy",
    "seq2seq": "accuracy",
    "classification": "accuracy",
    "token_classification": "accuracy",
    "question_answering": "accuracy",
    "reward": "accuracy margin reward",
    "dpo": f"accuracy margin {_PREFERENCE} nll_loss log_odds_ratio",
    "kto": f"kl {_PREFERENCE}",
    "ppo": f"{_POLICY} reward/NAME explained_variance kl_coefficient value_clip_fraction value_loss",
    "grpo": f"{_POLICY} reward/NAME groups_without_spread",
    "rloo": f"{_POLICY} reward/NAME groups_without_spread",
}
"""Task -> the metrics of an update besides those of every update and optional ones."""
_ROLLOUTS = ("ppo", "grpo", "rloo")
_AVERAGES = {"micro": "over all decisions", "macro": "mean over labels", "weighted": "mean over labels by rows"}
_SCORES = {"precision": "Precision", "recall": "Recall", "f1": "F1"}
MEANINGS = {
    "accuracy": ("fraction", "Correct predictions: tokens, rows, or pairs in the right order."),
    "accuracy_longer": ("fraction", "Accuracy of always preferring the longer text."),
    "accuracy_shorter": ("fraction", "Accuracy of always preferring the shorter text."),
    "approx_kl": ("nats", "Estimate of the KL from the policy that sampled the responses."),
    "bleu": ("0 to 100", "BLEU of the generated texts (sacrebleu)."),
    "brier": ("", "Brier score of sigmoid(chosen - rejected)."),
    "chosen_mean": ("", "Mean reward of the chosen texts."),
    "chosen_std": ("", "Standard deviation of the rewards of the chosen texts."),
    "chrf": ("0 to 100", "chrF of the generated texts (sacrebleu)."),
    "clip_fraction": ("fraction", "Tokens whose probability ratio was clipped."),
    "ece": ("fraction", "Expected calibration error of sigmoid(chosen - rejected), 10 bins."),
    "entropy": ("nats", "Entropy of the policy per token."),
    "exact_match": ("fraction", "Texts or spans equal to their reference."),
    "explained_variance": ("", "1 - variance(returns - values) / variance(returns): how well the critic predicts."),
    "f1": ("fraction", "F1 of the words of predicted and correct spans."),
    "generation_s": ("s", "Time for sampling the responses of the rollout."),
    "groups_without_spread": ("fraction", "Groups whose responses have the same score: nothing is learned from them."),
    "kl": ("nats", "Rollouts: KL from the reference per response. KTO: its estimate z."),
    "kl_coefficient": ("", "The coefficient of the KL penalty, which `kl_target` adapts."),
    "log_odds_ratio": ("", "`dpo.loss: orpo`: log of the odds ratio of chosen and rejected."),
    "logps/chosen": ("nats", "Log-probability of the chosen (desirable) answers."),
    "logps/rejected": ("nats", "Log-probability of the rejected (undesirable) answers."),
    "loss": ("nats", "The task's loss on the validation rows; for rollouts minus the mean reward."),
    "mae": ("", "Mean absolute error."),
    "margin": ("", "Mean of chosen - rejected rewards."),
    "mcc": ("", "Matthews correlation coefficient, -1 to 1."),
    "mlm_accuracy": ("fraction", "Masked tokens that were predicted correctly."),
    "mlm_loss": ("nats", "Loss of the masked tokens."),
    "mse": ("", "Mean squared error."),
    "nll_loss": ("nats", "`dpo.loss: orpo`: negative log-likelihood per token."),
    "nsp_accuracy": ("fraction", "Sentence pairs that were classified correctly."),
    "nsp_loss": ("nats", "Loss of next-sentence prediction."),
    "pearson": ("", "Pearson correlation, -1 to 1."),
    "perplexity": ("", "exp(mean negative log-likelihood per token)."),
    "policy_loss": ("", "The clipped policy loss."),
    "ratio": ("", "Mean ratio of new and old probabilities of the tokens."),
    "rejected_mean": ("", "Mean reward of the rejected texts."),
    "rejected_std": ("", "Standard deviation of the rewards of the rejected texts."),
    "response_tokens": ("tokens", "Mean length of a response."),
    "reward": ("", "Mean reward before shaping. Task `reward`: over chosen and rejected texts."),
    "reward/NAME": ("", "With several rewards: the mean of one of them, before its weight."),
    "reward_p05": ("", "5th percentile of all rewards."),
    "reward_p50": ("", "Median of all rewards."),
    "reward_p95": ("", "95th percentile of all rewards."),
    "reward_std": ("", "Standard deviation of the rewards."),
    "rewards/chosen": ("", "Implicit reward of chosen answers: beta x log-ratio with the reference."),
    "rewards/rejected": ("", "Implicit reward of rejected answers."),
    "rouge1": ("fraction", "ROUGE-1 F1."),
    "rouge2": ("fraction", "ROUGE-2 F1."),
    "rougeL": ("fraction", "ROUGE-L F1."),
    "score": ("", "Mean reward after normalization, clipping and penalties."),
    "scoring_s": ("s", "Time for the rewards of the rollout."),
    "spearman": ("", "Spearman rank correlation, -1 to 1; 0 if one side is constant."),
    "time_s": ("s", "Wall time of the update, or of the evaluation."),
    "value_clip_fraction": ("fraction", "Tokens whose value was clipped."),
    "value_loss": ("", "The clipped value loss."),
    "without_eos": ("fraction", "Responses that ended at `max_new_tokens` instead of EOS."),
} | {
    f"{score}_{average}": ("fraction", f"{word}, {how}.")
    for average, how in _AVERAGES.items()
    for score, word in _SCORES.items()
}
_HEAD = """# Metrics reference

`metrics.jsonl` has one JSON object per line: after each logged update the metrics of the update, after each evaluation
those of the evaluation, whose names begin with `eval/`. TensorBoard has the same numbers: `train/NAME` for an update (a
name with a slash stays as it is), `eval/NAME` for an evaluation, and `evaluate/NAME` for a later `ptft evaluate RUN`.

`eval.metric` and `ptft sweep` take the name of an evaluation's metric without `eval/`. The last table has the default
of `eval.goal` for names that `eval.metric` accepts; set it where this default makes no sense, such as for `kl`.

`time_s`, `tokens_per_s`, `mfu`, `memory_bytes`, `generation_s` and `scoring_s` depend on the machine. All others are
equal in a repeated run.
"""


@dataclass(frozen=True)
class Names:
    """The metrics of a task."""

    update: tuple[str, ...]
    evaluation: tuple[str, ...]
    """Without `eval/`."""


def documented(task: str) -> Names:
    """All metrics that the page lists for a task, with all its settings, but without those of every update."""
    names: dict[str, None] = {}
    for settings in _variants(task):
        names |= dict.fromkeys(settings.metric_names)
    more = ["reward_std", "reward/NAME"] if task in _ROLLOUTS else []
    return Names(tuple(sorted(UPDATE.get(task, "").split())), tuple(sorted({*names, *more, "time_s"})))


def _variants(task: str) -> Iterator[Any]:
    """Settings of a task that together have all its metrics. They are not validated."""
    kind = TASKS[task].settings
    fields = kind.model_fields
    changes: list[Mapping[str, Any]] = [{}]
    if task in _ROLLOUTS:
        changes.append({"kl": 0.1})
    if task == "dpo":
        changes.append({"loss": "orpo"})
    if "multi_label" in fields:
        changes.append({"multi_label": True})
    if "labels" in fields and task == "prompting":
        changes.append({"labels": {"a": "a", "b": "b"}})
    if "generation" in fields:
        from ptft_dist.tasks.common.generation_settings import GenerationSettings

        changes.append({"generation": GenerationSettings()})
    for change in changes:
        yield kind.model_construct(**change)


def metrics_page() -> str:
    """The page."""
    return "\n".join(
        [
            _HEAD,
            "## Every update\n",
            _table(EVERY_UPDATE),
            "Some recipes add:\n",
            _table(OPTIONAL | WITH_VLLM),
            f"Evaluations have {_list(IN_EVALUATIONS)} too.\n",
            "## By task\n",
            table(["task", "in an update, besides those above", "in an evaluation (`eval/`)"], list(_by_task())),
            "## Names\n",
            table(["name", "unit", "`eval.goal`", "meaning"], list(_all_names())),
        ]
    )


def _table(names: Mapping[str, tuple[str, str]]) -> str:
    return table(["name", "unit", "meaning"], [[f"`{name}`", *words] for name, words in names.items()])


def _by_task() -> Iterator[list[str]]:
    for task, spec in TASKS.items():
        names = documented(task)
        update = _list(names.update) if spec.settings.trains else "is not trained"
        yield [f"`{task}`", update, _list(names.evaluation)]


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "-"


def _all_names() -> Iterator[list[str]]:
    valid = {name for task in TASKS for settings in _variants(task) for name in settings.metric_names} | {"reward/NAME"}
    used = {name for task in TASKS for name in (*documented(task).update, *documented(task).evaluation)}
    unused, missing = MEANINGS.keys() - used, used - MEANINGS.keys()
    if unused or missing:
        raise KeyError(f"{__file__}: MEANINGS lacks {missing}, and does not need {unused}")
    for name in sorted(used):
        unit, meaning = MEANINGS[name]
        yield [f"`{name}`", unit, goal_of(name) if name in valid else "", sentence(meaning)]
