"""Fields of PEFT, transformers, TRL and torchtune, and the corresponding recipe fields."""

from __future__ import annotations

from typing import NamedTuple


class ForeignField(NamedTuple):
    """Field of another library and the corresponding recipe field.

    Attributes:
        library: Name of the other library.
        field: Dotted recipe field, or command-line flag.
        note: Translation of the value; empty if it is the same.
    """

    library: str
    field: str
    note: str = ""


_PEFT = {
    "r": ("adapter.rank",),
    "lora_alpha": ("adapter.alpha",),
    "lora_dropout": ("adapter.dropout",),
    "peft_type": ("adapter.family",),
    "use_dora": ("adapter.family", "family: DoRA"),
    "init_lora_weights": ("adapter.init", "true is kaiming_uniform"),
    "target_modules": ("adapter.target_pattern", "the same names, such as [q_proj, v_proj]"),
    "layers_to_transform": ("adapter.target_pattern", "layer numbers are part of a weight's path"),
    "exclude_modules": ("frozen_modules", "a list of regular expressions"),
    "modules_to_save": ("adapters", "[{family: FullDelta, target_pattern: ...}]"),
    "rank_pattern": ("adapters", "[{target_pattern: ..., rank: ...}]"),
    "alpha_pattern": ("adapters", "[{target_pattern: ..., alpha: ...}]"),
    "bias": ("adapters", "[{family: BitFit, target_pattern: bias}]"),
    "trainable_token_indices": ("adapters", "[{family: TrainableTokens, token_indices: [...]}]"),
    "loraplus_lr_ratio": ("optimizer.lr_multipliers", "{b: 16.0}"),
    "init_r": ("adapter.rank", "of the family AdaLoRA"),
    "target_r": ("optimizer.budget.target_rank",),
    "tinit": ("optimizer.budget.warmup_ratio", "a share of all steps"),
    "tfinal": ("optimizer.budget.final_ratio", "a share of all steps"),
    "deltaT": ("optimizer.budget.interval",),
}

_TRANSFORMERS = {
    "output_dir": ("output",),
    "model_name_or_path": ("model.path",),
    "torch_dtype": ("model.dtype",),
    "bf16": ("model.compute_dtype", "bfloat16"),
    "fp16": ("model.compute_dtype", "float16"),
    "attn_implementation": ("model.attention_implementation",),
    "gradient_checkpointing": ("model.remat_policy", "true is full"),
    "load_in_4bit": ("quantize.scheme", "nf4"),
    "load_in_8bit": ("quantize.scheme", "int8"),
    "per_device_train_batch_size": ("batch.size", "over all devices, not per device"),
    "train_batch_size": ("batch.size",),
    "per_device_eval_batch_size": ("batch.eval_batch_size", "over all devices, not per device"),
    "num_train_epochs": ("training.epochs",),
    "max_steps": ("training.steps",),
    "lr_scheduler_type": ("optimizer.schedule",),
    "warmup_steps": ("optimizer.warmup_ratio", "a share of all steps"),
    "adam_beta1": ("optimizer.beta1",),
    "adam_beta2": ("optimizer.beta2",),
    "adam_epsilon": ("optimizer.epsilon",),
    "eval_strategy": ("training.eval_steps", "null evaluates after every epoch"),
    "evaluation_strategy": ("training.eval_steps", "null evaluates after every epoch"),
    "save_strategy": ("training.save_steps",),
    "metric_for_best_model": ("training.metric",),
    "load_best_model_at_end": ("training.metric", "the best adapter is always written"),
    "label_smoothing_factor": ("classification.label_smoothing",),
    "resume_from_checkpoint": ("--resume",),
    "report_to": ("report.tensorboard", "or report.wandb"),
    "fsdp": ("mesh.fsdp", "a number of devices"),
    "deepspeed": ("mesh.fsdp", "a number of devices"),
}

_TRL = {
    "max_length": ("data.max_seq_length",),
    "assistant_only_loss": ("data.train_on", "true is assistant"),
    "completion_only_loss": ("data.train_on", "true is assistant"),
    "dataset_text_field": ("data.train.0.columns", "{text: NAME}"),
    "dataset_name": ("data.train.0.path",),
    "chat_template_path": ("data.chat_template",),
    "model_init_kwargs": ("model",),
}

_TORCHTUNE = {
    "batch_size": ("batch.size",),
    "max_seq_len": ("data.max_seq_length",),
    "lora_rank": ("adapter.rank",),
    "lora_attn_modules": ("adapter.target_pattern",),
    "train_on_input": ("data.train_on", "true is all"),
    "clip_grad_norm": ("optimizer.max_grad_norm",),
    "enable_activation_checkpointing": ("model.remat_policy", "true is full"),
}

FOREIGN_FIELDS: dict[str, ForeignField] = {
    name: ForeignField(library, *row)
    for library, table in (
        ("torchtune", _TORCHTUNE),
        ("TRL", _TRL),
        ("transformers", _TRANSFORMERS),
        ("PEFT", _PEFT),
    )
    for name, row in table.items()
}


def format_foreign_fields_table() -> str:
    """Returns the mapping as a Markdown table, sorted by library and name."""
    header = ("library", "field there", "field in a recipe", "value")
    rows = sorted(
        (foreign.library, f"`{name}`", f"`{foreign.field}`", foreign.note)
        for name, foreign in FOREIGN_FIELDS.items()
    )
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
