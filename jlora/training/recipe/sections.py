"""The sections of a recipe, their defaults and their validation."""

from __future__ import annotations

import datetime
import os.path
import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from jlora.training.recipe.base import (
    NonEmptyStr,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Ratio,
    Section,
    SourceWeight,
)
from jlora.training.recipe.config_sections import (
    ADAPTER_SECTIONS,
    AnyAdapterSection,
    AnyQuantizationSection,
    list_targets,
)

TaskName = Literal["language", "preference", "classification"]

_TASK_BY_FORMAT: dict[str, TaskName] = {
    "chat": "language",
    "completion": "language",
    "text": "language",
    "preference": "preference",
    "classification": "classification",
}


class ModelSection(Section):
    """Base model.

    Attributes:
        path: Hugging Face folder of the base, or owner/name on the Hub.
        revision: Branch, tag or commit on the Hub. null: the default branch.
        dtype: Type of the frozen weights. null: that of the files.
        compute_dtype: Type of activations and products. null: that of the weights, or float32 for
            weights in float16, in which small gradients are zero.
        scan_layers: Stacking of a decoder's layers for a scan, which compiles in the time of one
            layer. null: true, except where layers differ in kind, and on a single GPU, where a
            step is faster with separate layers.
        remat_policy: Activations that a decoder's backward pass recomputes to save memory: none;
            save_projections, all but the outputs of projections; full, all of a layer.
        attention_implementation: Kernel of the attention: xla, cudnn, tokamax or splash. auto: the
            fastest one that works on the device.
    """

    path: NonEmptyStr = Field(examples=["base"])
    revision: NonEmptyStr | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    scan_layers: bool | None = None
    remat_policy: Literal["none", "save_projections", "full"] = "none"
    attention_implementation: Literal["auto", "xla", "cudnn", "tokamax", "splash"] = "auto"


class SourceSection(Section):
    """Source of examples.

    Attributes:
        path: File (JSONL, Parquet, CSV, text), pattern or folder of such files, or owner/name on
            the Hub.
        name: Configuration of the dataset on the Hub. null: its default.
        split: Split of the dataset, or a slice such as train[:95%].
        revision: Branch, tag or commit on the Hub. null: the default branch.
        format: Format, and its columns: chat (messages), completion (prompt, completion), text
            (text), preference (prompt, chosen, rejected), classification (text, label, and
            text_pair for pairs of texts).
        columns: Names of the dataset's columns, by the names of the format, such as {messages:
            conversation}. The texts of a list of names are joined by a blank line, without empty
            ones: {prompt: [instruction, input]}; lists of messages, one after the other:
            {messages: [prompt, completion]}.
        weight: Passes through the source in an epoch; 0.1 is a tenth of it in each epoch, a
            different one every time. Training sources only.
        max_examples: Maximum number of rows, the first ones. null: all.
    """

    path: NonEmptyStr = Field(examples=["train.jsonl"])
    name: NonEmptyStr | None = None
    split: NonEmptyStr = "train"
    revision: NonEmptyStr | None = None
    format: Literal["chat", "completion", "text", "preference", "classification"] = Field(
        examples=["chat"]
    )
    columns: dict[str, str | list[str]] = {}
    weight: SourceWeight = 1.0
    max_examples: PositiveInt | None = None


class DataSection(Section):
    """Training, validation and test data.

    Attributes:
        train: Training sources, mixed by their weights.
        validation: Sources evaluated during training; the adapter of the best evaluation is kept.
        test: Sources evaluated twice, before the first step and with the best adapter. They
            influence nothing.
        max_seq_length: Maximum number of tokens of a row.
        packing: Packing of several examples into each row, without attention between them.
            Preference and classification data is never packed.
        buckets: Lengths that rows are padded to without packing. null: powers of two up to the
            longest.
        truncation: Treatment of examples longer than max_seq_length: error; drop; truncate their
            end; split (text only). The report counts them.
        train_on: Tokens of chats and completions in the loss: assistant, those of the assistant;
            all; last, those of the last assistant turn of a chat.
        chat_template: File with a chat template. null: the tokenizer's.
        chat_template_date: Day for chat templates that contain the date, such as "2026-01-31".
            null: the day on which the run began, also after a resume.
    """

    train: Annotated[list[SourceSection], Field(min_length=1)]
    validation: list[SourceSection] = []
    test: list[SourceSection] = []
    max_seq_length: PositiveInt = 1024
    packing: bool = True
    buckets: list[PositiveInt] | None = None
    truncation: Literal["error", "drop", "truncate", "split"] = "error"
    train_on: Literal["assistant", "all", "last"] = "assistant"
    chat_template: NonEmptyStr | None = None
    chat_template_date: str | None = Field(default=None, json_schema_extra={"format": "date"})

    @property
    def formats(self) -> list[str]:
        """Formats of all sources, sorted."""
        return sorted({s.format for s in (*self.train, *self.validation, *self.test)})

    @pydantic.field_validator("chat_template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isfile(value):
            raise ValueError("There is no such file. Use an existing file, or null")
        return value

    @pydantic.field_validator("chat_template_date")
    @classmethod
    def _check_date(cls, value: str | None) -> str | None:
        try:
            # Python also parses weeks and days without dashes, which no template writes.
            valid = value is None or datetime.date.fromisoformat(value).isoformat() == value
        except ValueError:
            valid = False
        if not valid:
            raise ValueError("Expected a date such as 2026-01-31")
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataSection:
        formats = self.formats
        if len({_TASK_BY_FORMAT[name] for name in formats}) > 1:
            raise ValueError(
                f"The formats {formats} belong to different tasks, but a run has one task. Leave "
                f"some sources out."
            )
        if self.truncation == "split" and formats != ["text"]:
            raise ValueError(
                f"truncation=split applies only to the format text, but the sources have the "
                f"formats {formats}. Use truncate or drop."
            )
        for bucket in self.buckets or ():
            if bucket > self.max_seq_length:
                raise ValueError(
                    f"The bucket {bucket} exceeds max_seq_length={self.max_seq_length}. Leave it "
                    f"out."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_unused_fields(self) -> DataSection:
        """Rejects fields that would have no effect."""
        if (
            self.buckets is not None
            and self.packing
            and _TASK_BY_FORMAT[self.train[0].format] == "language"
        ):
            raise ValueError(
                f"buckets={self.buckets} apply to rows of one example, but packing=true fills rows "
                f"of max_seq_length={self.max_seq_length} with several. Use packing: false, or "
                f"leave buckets out."
            )
        for part in ("validation", "test"):
            for number, source in enumerate(getattr(self, part)):
                if source.weight != 1:
                    raise ValueError(
                        f"{part}.{number}.weight={source.weight} applies only to training sources. "
                        f"Leave it out; max_examples limits a source."
                    )
        allowed = {"all": ["chat", "completion"], "last": ["chat"]}.get(self.train_on, self.formats)
        if not set(allowed) & set(self.formats):
            raise ValueError(
                f"train_on={self.train_on} applies only to {' and '.join(allowed)}, but the "
                f"sources have the formats {self.formats}. Leave it out."
            )
        return self


class BatchSection(Section):
    """Batch sizes.

    Attributes:
        size: Rows of each forward pass, over all devices.
        gradient_accumulation_steps: Forward and backward passes of a training step, whose loss is
            the mean over all of their tokens.
        eval_batch_size: Rows of each forward pass on validation and test sources. null: size.
    """

    size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    eval_batch_size: PositiveInt | None = None


class RankBudgetSection(Section):
    """Rank budget of AdaLoRA.

    Attributes:
        target_rank: Average rank of an adapted weight after pruning.
        warmup_ratio: Fraction of all steps before the first pruning.
        final_ratio: Fraction of all steps at the end, with fixed ranks.
        interval: Steps between two prunings.
    """

    target_rank: PositiveFloat
    warmup_ratio: Ratio = 0.1
    final_ratio: Ratio = 0.3
    interval: PositiveInt = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> RankBudgetSection:
        if self.warmup_ratio + self.final_ratio >= 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and final_ratio={self.final_ratio} must be less "
                f"than 1 together, to leave steps for pruning."
            )
        return self


class OptimizerSection(Section):
    """AdamW and its learning rate schedule.

    Attributes:
        learning_rate: Peak learning rate, reached after warm-up.
        schedule: Decay after warm-up: cosine, linear, or constant for none.
        warmup_ratio: Fraction of all steps in which the learning rate rises from zero.
        min_lr_ratio: Final learning rate, as a fraction of the peak.
        beta1: Decay rate of the mean of gradients.
        beta2: Decay rate of the mean of squared gradients.
        epsilon: Constant added to the root of the mean of squared gradients.
        weight_decay: Weight decay of the factors; magnitudes, gates, biases and heads have none.
        max_grad_norm: Maximum norm of the gradients; larger ones are scaled down to it. null: no
            clipping.
        offload: Offloading of the optimizer state to host memory between steps.
        lr_multipliers: Multipliers of the learning rate by parameter label: {b: 16} is LoRA+,
            {full: 10} is for heads.
        budget: Rank budget; required with AdaLoRA, not allowed with other families. null: none.
        orth_reg_weight: Weight of the orthogonality loss of AdaLoRA.
        l1_gate: Weight of the L1 penalty on SoRA's gates.
        aux_loss_coef: Weight of the load-balancing loss of LoRA-MoE.
    """

    learning_rate: PositiveFloat = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Ratio = 0.03
    min_lr_ratio: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    beta1: Ratio = 0.9
    beta2: Ratio = 0.999
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    offload: bool = False
    lr_multipliers: dict[str, PositiveFloat] = {}
    budget: RankBudgetSection | None = None
    orth_reg_weight: NonNegativeFloat = 0.1
    l1_gate: NonNegativeFloat = 0.1
    aux_loss_coef: NonNegativeFloat = 0.01


class TrainingSection(Section):
    """Length of the run, evaluation and checkpoints.

    Attributes:
        epochs: Passes through the training sources; to be left at 1 if steps is set.
        steps: Training steps, over as many epochs as they take. null: epochs sets the length.
        eval_steps: Steps between evaluations. null: one evaluation at the end of every epoch.
        save_steps: Steps between checkpoints. null: only save_interval_minutes applies.
        save_interval_minutes: Minutes between checkpoints. null: only save_steps applies.
        save_total_limit: Number of checkpoints kept, besides the best one.
        metric: Criterion of the best evaluation: lowest loss, or highest accuracy.
        early_stopping_patience: Evaluations without improvement after which the run ends. null: no
            early stopping.
        on_nonfinite_loss: Reaction to a NaN or infinite loss, gradient or update: raise an error,
            or skip the step.
        max_consecutive_skips: Maximum number of steps skipped in a row; one more ends the run.
        on_save_error: Reaction to a checkpoint that cannot be written: raise an error, or warn and
            continue.
    """

    epochs: PositiveInt = 1
    steps: PositiveInt | None = None
    eval_steps: PositiveInt | None = None
    save_steps: PositiveInt | None = None
    save_interval_minutes: PositiveFloat | None = 10.0
    save_total_limit: PositiveInt = 2
    metric: Literal["loss", "accuracy"] = "loss"
    early_stopping_patience: PositiveInt | None = None
    on_nonfinite_loss: Literal["raise", "skip"] = "raise"
    max_consecutive_skips: Annotated[int, Field(ge=0)] = 3
    on_save_error: Literal["raise", "warn"] = "raise"

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainingSection:
        # Recipes written by a run contain the default of epochs besides steps.
        if self.steps is not None and self.epochs != TrainingSection.model_fields["epochs"].default:
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps} both set the length of the run. "
                f"Leave one out."
            )
        return self


class MeshSection(Section):
    """Device mesh; the product of its axes is the number of devices.

    Attributes:
        data: Replicas of the weights, each with its own part of the batch. null: all remaining
            devices.
        fsdp: Shards of the weights, gathered layer by layer, each with its own part of the batch.
        tensor: Shards of every matrix product (tensor parallelism).
    """

    data: PositiveInt | None = None
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1


class DistributedSection(Section):
    """Training with several processes, each started with the same recipe.

    Attributes:
        coordinator_address: host:port of the first process. null: the environment variables
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, if set.
        num_processes: Number of processes. null: as for coordinator_address.
        process_id: Number of this process, from 0. null: as for coordinator_address.
        auto: Detection of the processes from Cloud TPU metadata, Slurm or Open MPI.
    """

    coordinator_address: NonEmptyStr | None = None
    num_processes: PositiveInt | None = None
    process_id: Annotated[int, Field(ge=0)] | None = None
    auto: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> DistributedSection:
        values = [self.coordinator_address, self.num_processes, self.process_id]
        if any(value is not None for value in values) and None in values:
            raise ValueError(
                "coordinator_address, num_processes and process_id must be given together. Give "
                "all three, or none."
            )
        if (
            self.process_id is not None
            and self.num_processes
            and self.process_id >= self.num_processes
        ):
            raise ValueError(
                f"process_id={self.process_id} must be below num_processes={self.num_processes}; "
                f"the first is 0."
            )
        return self


class DPOSection(Section):
    """Direct preference optimization, with the base as the reference model.

    Attributes:
        beta: Strength of the pull towards the reference model.
        label_smoothing: Assumed probability that a preference is reversed.
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class ClassificationSection(Section):
    """Classification of texts.

    Attributes:
        labels: Label names, in the order of the model's outputs. null: those of the training
            sources, sorted.
        pooling: Hidden state for the new head of a model without one: mean over a text's tokens,
            first token, or last token. null: mean for encoders, last for decoders.
        label_smoothing: Probability of the targets that is spread over all labels.
    """

    labels: list[NonEmptyStr] | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    label_smoothing: Ratio = 0.0


class ExportSection(Section):
    """Exports at the end of the run, besides adapter.safetensors.

    Attributes:
        merged: Export of the merged checkpoint as a Hugging Face folder.
        merged_dtype: Type of the merged checkpoint. null: that of the base's files.
        merge_into: Weights that the update is added to if the base was quantized: dequantized,
            which the adapter was trained and evaluated on; or original, on which nothing was
            evaluated.
        peft: Export as a PEFT folder.
        vllm: Export as a folder for vLLM.
    """

    merged: bool = False
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    merge_into: Literal["dequantized", "original"] = "dequantized"
    peft: bool = False
    vllm: bool = False


class WandbSection(Section):
    """Run of Weights & Biases.

    Attributes:
        project: Project of the W&B run.
        entity: User or team of the project. null: the default one of the account.
        name: Name of the W&B run. null: a random one.
        mode: Upload of the data, or offline for files in the output folder. null: the environment
            variable WANDB_MODE, or online.
    """

    project: NonEmptyStr = "jlora"
    entity: NonEmptyStr | None = None
    name: NonEmptyStr | None = None
    mode: Literal["online", "offline"] | None = None


class ReportSection(Section):
    """Contents of metrics.jsonl and report.html.

    Attributes:
        tensorboard: TensorBoard files, besides metrics.jsonl.
        wandb: Weights & Biases run, besides metrics.jsonl, such as {project: NAME}. null: none.
        sample_prompts: Texts that a decoder continues before and after training.
        max_new_tokens: Maximum number of tokens of each continuation.
        peak_tflops: Peak TFLOP/s of one device, for the utilization. null: the known value of a
            common device.
    """

    tensorboard: bool = False
    wandb: WandbSection | None = None
    sample_prompts: list[NonEmptyStr] = []
    max_new_tokens: PositiveInt = 64
    peak_tflops: PositiveFloat | None = None


class Recipe(Section):
    """Configuration of a training run.

    Attributes:
        output: Folder of all outputs.
        seed: Random seed of adapter initialization, dropout and data order.
        model: Base model.
        quantize: Quantization of the frozen base (QLoRA), such as {scheme: nf4}. null: no
            quantization.
        adapter: Adapter to train.
        adapters: Further adapters, each with its own target_pattern; they take precedence over
            adapter.
        frozen_modules: Regular expressions of weights that no adapter adapts.
        data: Training, validation and test data.
        batch: Batch sizes.
        optimizer: AdamW and its learning rate schedule.
        training: Length of the run, evaluation and checkpoints.
        mesh: Device mesh.
        distributed: Training with several processes.
        dpo: Direct preference optimization, for preference data.
        classification: Classification, for labeled texts.
        export: Exports at the end of the run.
        report: Contents of metrics.jsonl and report.html.

    Example:
        >>> from jlora.training import recipe
        >>> source = {"path": "pairs.jsonl", "format": "preference"}
        >>> raw = {"output": "run", "model": {"path": "base"}, "data": {"train": [source]}}
        >>> recipe.Recipe.model_validate(raw).task
        'preference'
    """

    output: NonEmptyStr = Field(examples=["run"])
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSection
    quantize: AnyQuantizationSection | None = None
    adapter: AnyAdapterSection = Field(default_factory=lambda: ADAPTER_SECTIONS["LoRA"]())
    adapters: list[AnyAdapterSection] = []
    frozen_modules: list[NonEmptyStr] = []
    data: DataSection
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainingSection = TrainingSection()
    mesh: MeshSection = MeshSection()
    distributed: DistributedSection = DistributedSection()
    dpo: DPOSection = DPOSection()
    classification: ClassificationSection = ClassificationSection()
    export: ExportSection = ExportSection()
    report: ReportSection = ReportSection()

    @property
    def task(self) -> TaskName:
        """Task of the data's formats."""
        return _TASK_BY_FORMAT[self.data.train[0].format]

    @property
    def packs_rows(self) -> bool:
        """Whether a row may hold several texts, which only language modeling knows apart."""
        return self.data.packing and self.task == "language"

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        for number, rule in enumerate(self.adapters):
            if rule.target_pattern is None:
                raise ValueError(
                    f"adapters.{number} has no target_pattern. Give the pattern of its weights."
                )
        patterns = {
            "adapter.target_pattern": self.adapter.target_pattern,
            **{
                f"adapters.{n}.target_pattern": r.target_pattern
                for n, r in enumerate(self.adapters)
            },
            **{f"frozen_modules.{n}": pattern for n, pattern in enumerate(self.frozen_modules)},
            "quantize.target_pattern": self.quantize and self.quantize.target_pattern,
        }
        named = ((field, one) for field, target in patterns.items() for one in list_targets(target))
        for field, pattern in named:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"{field}={pattern!r} is not a valid regular expression: {error}."
                ) from error
        adalora = "AdaLoRA" in {rule.family for rule in (self.adapter, *self.adapters)}
        if adalora != (self.optimizer.budget is not None):
            raise ValueError(
                "optimizer.budget and the family AdaLoRA require each other. Give both, such as "
                "budget: {target_rank: 8} with a rank of 12, or neither."
            )
        if self.training.metric == "accuracy" and self.task == "language":
            raise ValueError(
                "training.metric=accuracy is not available for language modeling. Use metric: loss."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_quantized_init(self) -> Recipe:
        """Rejects initializations that change the base, if the base is quantized."""
        rules = {
            "adapter": self.adapter,
            **{f"adapters.{n}": rule for n, rule in enumerate(self.adapters)},
        }
        for path, rule in rules.items() if self.quantize is not None else ():
            init = getattr(rule.to_config(), "init", None)
            if init is not None and init.residual:
                raise ValueError(
                    f"{path}.init={init.name} subtracts the initial update from the weights, which "
                    f"is impossible for quantized weights. Use init: kaiming_uniform, gaussian or "
                    f"orthogonal, or leave quantize out."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_unused_fields(self) -> Recipe:
        """Rejects fields that would have no effect."""
        if not self.data.validation:
            for name in ("early_stopping_patience", "eval_steps", "metric"):
                value = getattr(self.training, name)
                if value != TrainingSection.model_fields[name].default:
                    raise ValueError(
                        f"training.{name}={value} applies to evaluations during training, but "
                        f"data.validation is empty. Give validation sources, or leave it out."
                    )
        if self.batch.eval_batch_size and not (self.data.validation or self.data.test):
            raise ValueError(
                f"batch.eval_batch_size={self.batch.eval_batch_size} applies to evaluations, but "
                f"data.validation and data.test are empty. Give such sources, or leave it out."
            )
        merge_into = self.export.merge_into
        if merge_into != "dequantized" and not (self.quantize and self.export.merged):
            raise ValueError(
                f"export.merge_into={merge_into} applies to merging into a quantized base, which "
                f"requires quantize and export.merged: true. Give both, or leave it out."
            )
        if self.report.sample_prompts and self.task == "classification":
            raise ValueError(
                f"report.sample_prompts={self.report.sample_prompts} require a model that "
                f"generates text, but classification trains a classifier. Leave them out."
            )
        return self
