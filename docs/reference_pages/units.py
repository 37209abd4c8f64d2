"""The units of the numbers in a recipe, which the schema does not have. A number without an entry is an error of the
generator, so that a new key gets its unit."""

from __future__ import annotations

NONE = "-"
"""A number without a unit, such as a rate, a weight or an exponent."""
_OF = {
    "tokens": (
        "global_tokens max_answer_length max_length max_new_tokens max_target_length max_tokens mean_span "
        "length_target micro_tokens longest_span stride tokens vocab_size"
    ),
    "rows": "eva_rows global_size micro_size max_rows rows",
    "updates": "from_step max_steps",
    "epochs": "epochs max_epochs",
    "texts": "show",
    "words": "max_words min_words ngram",
    "megabytes": "max_megabytes",
    "nats": "kl_target target_kl",
    "occurrences": "min_frequency",
    "evaluations": "patience",
    "checkpoints": "keep",
    "processes": "workers",
    "characters": "min_characters",
    "lines": "empty_lines",
    "layers": "last_layers",
    "dimensions": "hidden_size size r target_r",
    "responses": "group_size kl_horizon",
    "prompts": "prompts",
    "examples": "shots",
    "copies": "copies duplicates",
    "folds": "fold folds",
    "hashes": "hashes",
    "candidates": "n_best num_beams top_k",
    "fraction": (
        "decay density dropout hard label_smoothing mask_share min_lr_ratio min_p min_score probability random_share "
        "share short_probability threshold top_p validation memory"
    ),
    NONE: (
        "alpha beta center_rewards_coefficient clip clip_high clip_rewards desirable_weight entropy_coefficient eps "
        "gamma head_lr_scale kl lam layer_decay length_penalty lr lr_scale max_grad_norm missing_eos_penalty momentum "
        "neftune_alpha no_answer_margin orthogonality plus_ratio power seed strength temperature undesirable_weight "
        "value_clip value_coefficient weight weight_decay max_weight"
    ),
}
_SPECIAL = {
    "AdaLoraSettings.start": "fraction",
    "AdaLoraSettings.end": "fraction",
    "AdaLoraSettings.every": "updates",
    "EvalSection.every": "updates",
    "SaveSection.every": "updates",
    "LogSection.every": "updates",
    "OptimSection.warmup": "fraction, or updates from 1 on",
    "ReplaySettings.weight": "fraction",
    "Source.limit": "documents",
    "SpanCorruptionSettings.sentinels": "tokens",
    "MlmSettings.span_length": "tokens",
    "MlmNspSettings.span_length": "tokens",
    "GrpoSettings.epochs": "passes",
    "PpoSettings.epochs": "passes",
    "RlooSettings.epochs": "passes",
}
_UNITS = {name: unit for unit, names in _OF.items() for name in names.split()}


def unit_of(section: str, key: str) -> str:
    """The unit of a number. section: the name of its class. Raises KeyError for a key that has no entry above."""
    special = _SPECIAL.get(f"{section}.{key}")
    if special is not None:
        return special
    if key not in _UNITS:
        raise KeyError(f"the key {section}.{key} is a number: name its unit in docs/reference_pages/units.py")
    return _UNITS[key]
