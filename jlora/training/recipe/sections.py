"""The parts of a recipe, and the whole."""

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
    """The base that is adapted.

    Attributes:
        path: A Hugging Face folder, or owner/name on the Hub.
        revision: A branch, tag or commit on the Hub.
        dtype: Of the frozen weights; that of the files when null.
        compute_dtype: Of the computation; that of the weights when null.
        scan_layers: Whether a decoder's layers are one program over stacked weights, which compiles in
            the time of one layer. When null they are, but where layers differ in kind and on a
            single GPU, where a step is faster with layers apart.
        remat_policy: What a decoder's backward pass computes again instead of keeping it: none, all but
            the projections (save_projections), or all of a layer (full).
        attention_implementation: xla, cudnn or splash; the best for the device when null.
    """

    path: NonEmptyStr = Field(examples=["base"])
    revision: NonEmptyStr | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    scan_layers: bool | None = None
    remat_policy: Literal["none", "save_projections", "full"] = "none"
    attention_implementation: Literal["xla", "cudnn", "splash"] | None = None


class SourceSection(Section):
    """Examples from one place.

    Attributes:
        path: A file (JSONL, Parquet, CSV, text), a pattern or a folder of such, or owner/name on
            the Hub.
        name: Of a configuration on the Hub.
        split: Which part of a dataset with several.
        revision: A branch, tag or commit on the Hub.
        format: chat has a column messages; completion has prompt and completion; text has text;
            preference has prompt, chosen and rejected; classification has text and label, and
            text_pair if there are two texts.
        columns: From those names to the dataset's own.
        weight: How often the source is gone through in an epoch; 0.1 takes a tenth of it in each,
            another one every time. Of training sources alone.
        max_examples: At most so many rows, the first ones; all when null.
    """

    path: NonEmptyStr = Field(examples=["train.jsonl"])
    name: NonEmptyStr | None = None
    split: NonEmptyStr = "train"
    revision: NonEmptyStr | None = None
    format: Literal["chat", "completion", "text", "preference", "classification"] = Field(
        examples=["chat"]
    )
    columns: dict[str, str] = {}
    weight: SourceWeight = 1.0
    max_examples: PositiveInt | None = None


class DataSection(Section):
    """What is learned from, and what it is measured on.

    Attributes:
        train: One or more sources, mixed by their weights.
        validation: Sources that are evaluated on as the run goes; the best evaluation's adapter is
            kept.
        test: Sources that are evaluated on twice, before the first step and with the adapter that
            is kept. Nothing depends on them.
        max_seq_length: The most tokens of a row.
        packing: Whether several examples share a row, none seeing another. Preferences and
            classification are never packed.
        buckets: Without packing, the lengths that rows are padded to; powers of two up to the
            longest when null.
        truncation: What happens to an example of more tokens: error, drop it, truncate its end, or
            split it (text alone). All are counted.
        train_on: Which tokens of a chat or completion are learned: the assistant's, all, or a chat's
            last response.
        chat_template: A file with a template in the place of the tokenizer's own.
        chat_template_date: The day that a chat template which writes the date shows, such as "2026-01-31"; that
            on which the run began when null, which a resumed run keeps.
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
        """Those of all sources, sorted."""
        return sorted({s.format for s in (*self.train, *self.validation, *self.test)})

    @pydantic.field_validator("chat_template")
    @classmethod
    def _check_template(cls, value: str | None) -> str | None:
        if value is not None and not os.path.isfile(value):
            raise ValueError("There is no such file. Give one that is there, or null")
        return value

    @pydantic.field_validator("chat_template_date")
    @classmethod
    def _check_date(cls, value: str | None) -> str | None:
        try:
            # Python also reads weeks and days without dashes, which no template writes.
            good = value is None or datetime.date.fromisoformat(value).isoformat() == value
        except ValueError:
            good = False
        if not good:
            raise ValueError("That is no day. Write year, month and day, such as 2026-01-31")
        return value

    @pydantic.model_validator(mode="after")
    def _check(self) -> DataSection:
        formats = self.formats
        if len({_TASK_BY_FORMAT[name] for name in formats}) > 1:
            raise ValueError(
                f"The formats {formats} are of different tasks, and a run has one. Leave some out."
            )
        if self.truncation == "split" and formats != ["text"]:
            raise ValueError(
                f"truncation=split cuts plain text alone, and the sources are of the formats "
                f"{formats}. Use truncate or drop."
            )
        for bucket in self.buckets or ():
            if bucket > self.max_seq_length:
                raise ValueError(
                    f"The bucket {bucket} exceeds max_seq_length={self.max_seq_length}. Leave it out."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_unused_fields(self) -> DataSection:
        """Refuses what would do nothing."""
        if (
            self.buckets is not None
            and self.packing
            and _TASK_BY_FORMAT[self.train[0].format] == "language"
        ):
            raise ValueError(
                f"buckets={self.buckets} are lengths of rows of one example, and packing=true "
                f"fills rows of max_seq_length={self.max_seq_length} with several. Use packing: false, or leave "
                f"buckets out."
            )
        for part in ("validation", "test"):
            for number, source in enumerate(getattr(self, part)):
                if source.weight != 1:
                    raise ValueError(
                        f"{part}.{number}.weight={source.weight} mixes training sources, and "
                        f"this one is gone through whole. Leave it out; max_examples takes less of it."
                    )
        users = {"all": ["chat", "completion"], "last": ["chat"]}.get(self.train_on, self.formats)
        if not set(users) & set(self.formats):
            raise ValueError(
                f"train_on={self.train_on} is for {' and '.join(users)}, and the sources are of the "
                f"formats {self.formats}. Leave it out."
            )
        return self


class BatchSection(Section):
    """How much a step takes.

    Attributes:
        size: In each forward pass, over all devices.
        gradient_accumulation_steps: Forward and backward passes in a step. Its loss is the mean over all their
            tokens, as if they were one.
        eval_batch_size: In each pass over validation or test sources; as many as rows when null.
    """

    size: PositiveInt = 8
    gradient_accumulation_steps: PositiveInt = 1
    eval_batch_size: PositiveInt | None = None


class RankBudgetSection(Section):
    """AdaLoRA's budget: how many directions stay.

    Attributes:
        target_rank: Of a matrix, on average.
        warmup_ratio: The share of all steps before the first direction goes.
        final_ratio: The share of all steps, at the end, in which the choice is fixed.
        interval: Steps between two choices.
    """

    target_rank: PositiveFloat
    warmup_ratio: Ratio = 0.1
    final_ratio: Ratio = 0.3
    interval: PositiveInt = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> RankBudgetSection:
        if self.warmup_ratio + self.final_ratio >= 1:
            raise ValueError(
                f"warmup_ratio={self.warmup_ratio} and final_ratio={self.final_ratio} leave no "
                f"step to choose in. Make them smaller."
            )
        return self


class OptimizerSection(Section):
    """AdamW and its learning rate.

    Attributes:
        learning_rate: The highest.
        schedule: How it falls after the warm-up: as a cosine, in a line, or not at all.
        warmup_ratio: The share of all steps in which it rises from zero.
        min_lr_ratio: What is left of it at the end.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to its root.
        weight_decay: On factors; magnitudes, gates, biases and heads have none.
        max_grad_norm: Gradients of a larger norm are scaled down to it; null never does.
        offload: Whether its state lies in the host's memory between steps, and not on the devices.
        lr_multipliers: Multiples of the learning rate by label: {b: 16} is LoRA+, {full: 10} is for heads.
        budget: AdaLoRA's; of that family alone, which needs one.
        orth_reg_weight: How strongly AdaLoRA's factors are kept orthogonal.
        l1_gate: How strongly SoRA's gates are pulled to zero.
        aux_loss_coef: How strongly the experts of a mixture are kept in equal use.
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
    """How long a run goes on, and what is kept of it.

    Attributes:
        epochs: How often the training sources are gone through; stays at 1 where steps decide.
        steps: How many steps are made, however many epochs that takes; epochs decide when null.
        eval_steps: Steps between evaluations; at the end of every epoch when null.
        save_steps: Steps between checkpoints; null leaves it to save_interval_minutes.
        save_interval_minutes: Minutes between checkpoints; null leaves it to save_steps.
        save_total_limit: How many checkpoints stay, beside the best one.
        metric: What says which evaluation is best: the least loss, or the highest accuracy.
        early_stopping_patience: Evaluations without a better one after which the run ends; null never ends it.
        on_nonfinite_loss: What happens when a loss or gradient is NaN or infinite: raise an error, or skip the step.
        max_consecutive_skips: So many steps in a row may be skipped; one more stops.
        on_save_error: What happens when a checkpoint cannot be written: raise an error, or warn and go on.
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
        # The default stands beside steps in every recipe that a run writes, and says nothing.
        if self.steps is not None and self.epochs != TrainingSection.model_fields["epochs"].default:
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps} each say how long the run is. Leave "
                f"one out."
            )
        return self


class MeshSection(Section):
    """Over how many devices each part of the work is spread; their product is that of all devices.

    Attributes:
        data: Copies of the weights, each with its own rows; what is left when null.
        fsdp: Parts that weights are kept in, and gathered from layer by layer; each has its own
            rows.
        tensor: Parts of every product.
    """

    data: PositiveInt | None = None
    fsdp: PositiveInt = 1
    tensor: PositiveInt = 1


class DistributedSection(Section):
    """Several processes, each of which is started with the same recipe.

    Attributes:
        coordinator_address: host:port of the first process; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
            and JAX_PROCESS_ID say it when null.
        num_processes: How many there are.
        process_id: The number of this one.
        auto: Whether to ask the surroundings: Cloud TPU metadata, Slurm, or Open MPI.
    """

    coordinator_address: NonEmptyStr | None = None
    num_processes: PositiveInt | None = None
    process_id: Annotated[int, Field(ge=0)] | None = None
    auto: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> DistributedSection:
        given = [self.coordinator_address, self.num_processes, self.process_id]
        if any(v is not None for v in given) and None in given:
            raise ValueError(
                "coordinator_address, num_processes and process_id belong together. Give all three, or none."
            )
        if (
            self.process_id is not None
            and self.num_processes
            and self.process_id >= self.num_processes
        ):
            raise ValueError(
                f"process_id={self.process_id} is none of num_processes={self.num_processes}; the first is 0."
            )
        return self


class DPOSection(Section):
    """Direct preference optimisation, with the base as its own reference.

    Attributes:
        beta: How strongly the reference holds.
        label_smoothing: The probability that a preference is the wrong way about.
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class ClassificationSection(Section):
    """A label for every text.

    Attributes:
        labels: Their names in order; those of the training sources, sorted, when null.
        pooling: What the new head sees of a model that comes without one: the mean of a text's
            hidden states, that of its first token, or of its last; the mean for encoders and the
            last for decoders when null.
        label_smoothing: The probability that the targets spread over all labels.
    """

    labels: list[NonEmptyStr] | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    label_smoothing: Ratio = 0.0


class ExportSection(Section):
    """What is written beside adapter.safetensors when a run ends.

    Attributes:
        merged: Whether to write the merged checkpoint, as a Hugging Face folder.
        merged_dtype: Of that; that of the base's files when null.
        merge_into: What the change is added to where the base was quantised: the dequantized
            weights, which the adapter was trained on, so that the checkpoint computes what the run
            measured; or the original ones, on which nothing was measured.
        peft: Whether to write a folder of PEFT's.
        vllm: Whether to write what vLLM serves.
    """

    merged: bool = False
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    merge_into: Literal["dequantized", "original"] = "dequantized"
    peft: bool = False
    vllm: bool = False


class ReportSection(Section):
    """What a run tells of itself, in metrics.jsonl and report.html.

    Attributes:
        tensorboard: Whether to write TensorBoard's files too.
        sample_prompts: Texts that a decoder continues before and after.
        max_new_tokens: How far.
        peak_tflops: Of one device, for the share of it that is used; known for common ones.
    """

    tensorboard: bool = False
    sample_prompts: list[NonEmptyStr] = []
    max_new_tokens: PositiveInt = 64
    peak_tflops: PositiveFloat | None = None


class Recipe(Section):
    """A training run.

    Attributes:
        output: The folder that everything is written to.
        seed: Of every draw: factors, dropout, the order of examples.
        model: The base that is adapted.
        quantize: In how few bits it is held (QLoRA), such as {scheme: nf4}; as it is when null.
        adapter: What is trained.
        adapters: Further rules, which come before it; each with its own targets.
        frozen_modules: Regular expressions of weights that stay as they are, whatever the rules say.
        data: What is learned from.
        batch: How much a step takes.
        optimizer: AdamW and its learning rate.
        training: How long it goes on, and what is kept.
        mesh: How the work is spread over devices.
        distributed: How several processes find each other.
        dpo: Of preference data.
        classification: Of labelled texts.
        export: What is written at the end.
        report: What the run tells of itself.
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
        """What the formats of the data ask for."""
        return _TASK_BY_FORMAT[self.data.train[0].format]

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        for number, rule in enumerate(self.adapters):
            if rule.target_pattern is None:
                raise ValueError(
                    f"adapters.{number} has no target_pattern. Say which weights it is for."
                )
        quantized = None if self.quantize is None else self.quantize.target_pattern
        targets = (rule.target_pattern for rule in (self.adapter, *self.adapters))
        for pattern in (*targets, *self.frozen_modules, quantized):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
        adalora = "AdaLoRA" in {rule.family for rule in (self.adapter, *self.adapters)}
        if adalora != (self.optimizer.budget is not None):
            raise ValueError(
                "optimizer.budget and the family AdaLoRA need each other. Give both, such as "
                "budget: {target_rank: 8} for a rank of 12, or neither."
            )
        if self.training.metric == "accuracy" and self.task == "language":
            raise ValueError(
                "training.metric=accuracy, and text is measured by its loss. Use metric: loss."
            )
        return self

    @pydantic.model_validator(mode="after")
    def _check_quantized_init(self) -> Recipe:
        """Refuses what would have to be taken out of quantised weights."""
        rules = {
            "adapter": self.adapter,
            **{f"adapters.{n}": rule for n, rule in enumerate(self.adapters)},
        }
        for place, rule in rules.items() if self.quantize is not None else ():
            init = getattr(rule.to_config(), "init", None)
            if init is not None and init.residual:
                raise ValueError(
                    f"{place}.init={init.name} takes its start out of the weights, and quantize "
                    f"keeps them as codes, which nothing can be taken out of. Use init: kaiming_uniform, "
                    f"gaussian or orthogonal, or leave quantize out."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_unused_fields(self) -> Recipe:
        """Refuses what would do nothing."""
        if not self.data.validation:
            for name in ("early_stopping_patience", "eval_steps", "metric"):
                value = getattr(self.training, name)
                if value != TrainingSection.model_fields[name].default:
                    raise ValueError(
                        f"training.{name}={value} is about evaluations as the run goes, and "
                        f"data.validation is empty. Give validation sources, or leave it out."
                    )
        if self.batch.eval_batch_size and not (self.data.validation or self.data.test):
            raise ValueError(
                f"batch.eval_batch_size={self.batch.eval_batch_size} is about evaluations, and "
                f"data.validation and data.test are empty. Give such sources, or leave it out."
            )
        merge_into = self.export.merge_into
        if merge_into != "dequantized" and not (self.quantize and self.export.merged):
            raise ValueError(
                f"export.merge_into={merge_into} is about merging on a quantised base, which "
                f"needs quantize and export.merged: true. Give both, or leave it out."
            )
        if self.report.sample_prompts and self.task == "classification":
            raise ValueError(
                f"report.sample_prompts={self.report.sample_prompts} are continued by models that write, and "
                f"classification trains one that chooses labels. Leave them out."
            )
        return self
