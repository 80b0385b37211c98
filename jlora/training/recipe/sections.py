"""The parts of a recipe, and the whole."""

from __future__ import annotations

import datetime
import os.path
import re
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from jlora.training.recipe.families import RULES, AnyRule
from jlora.training.recipe.schemes import AnyQuantization
from jlora.training.recipe.section import (
    Count,
    NotNegative,
    Positive,
    Section,
    Share,
    Text,
    Weight,
)

Task = Literal["language", "preference", "classification"]
_TASKS: dict[str, Task] = {
    "chat": "language",
    "completion": "language",
    "text": "language",
    "preference": "preference",
    "classification": "classification",
}


class Model(Section):
    """The base that is adapted.

    Attributes:
        path: A Hugging Face folder, or owner/name on the Hub.
        revision: A branch, tag or commit on the Hub.
        dtype: Of the frozen weights; that of the files when null.
        compute_dtype: Of the computation; that of the weights when null.
        scanned: Whether a decoder's layers are one program over stacked weights, which compiles in
            the time of one layer. When null they are, but where layers differ in kind and on a
            single GPU, where a step is faster with layers apart.
        remat: What a decoder's backward pass computes again instead of keeping it: nothing, all but
            the projections, or everything in a layer.
        attention: xla, cudnn or splash; the best for the device when null.
    """

    path: Text = Field(examples=["base"])
    revision: Text | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    scanned: bool | None = None
    remat: Literal["nothing", "projections", "everything"] = "nothing"
    attention: Literal["xla", "cudnn", "splash"] | None = None


class Source(Section):
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
        limit: At most so many rows, the first ones; all when null.
    """

    path: Text = Field(examples=["train.jsonl"])
    name: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    format: Literal["chat", "completion", "text", "preference", "classification"] = Field(
        examples=["chat"]
    )
    columns: dict[str, str] = {}
    weight: Weight = 1.0
    limit: Count | None = None


class Data(Section):
    """What is learned from, and what it is measured on.

    Attributes:
        train: One or more sources, mixed by their weights.
        validation: Sources that are evaluated on as the run goes; the best evaluation's adapter is
            kept.
        test: Sources that are evaluated on twice, before the first step and with the adapter that
            is kept. Nothing depends on them.
        length: The most tokens of a row.
        packing: Whether several examples share a row, none seeing another. Preferences and
            classification are never packed.
        buckets: Without packing, the lengths that rows are padded to; powers of two up to the
            longest when null.
        overlong: What happens to an example of more tokens: error, drop it, truncate its end, or
            split it (text alone). All are counted.
        loss_on: Which tokens of a chat or completion are learned: the responses, all, or a chat's
            last response.
        chat_template: A file with a template in the place of the tokenizer's own.
        date: The day that a chat template which writes the date shows, such as "2026-01-31"; that
            on which the run began when null, which a resumed run keeps.
    """

    train: Annotated[list[Source], Field(min_length=1)]
    validation: list[Source] = []
    test: list[Source] = []
    length: Count = 1024
    packing: bool = True
    buckets: list[Count] | None = None
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    loss_on: Literal["responses", "all", "last"] = "responses"
    chat_template: Text | None = None
    date: str | None = Field(default=None, json_schema_extra={"format": "date"})

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

    @pydantic.field_validator("date")
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
    def _check(self) -> Data:
        formats = self.formats
        if len({_TASKS[name] for name in formats}) > 1:
            raise ValueError(
                f"The formats {formats} are of different tasks, and a run has one. Leave some out."
            )
        if self.overlong == "split" and formats != ["text"]:
            raise ValueError(
                f"overlong=split cuts plain text alone, and the sources are of the formats "
                f"{formats}. Use truncate or drop."
            )
        for bucket in self.buckets or ():
            if bucket > self.length:
                raise ValueError(f"The bucket {bucket} exceeds length={self.length}. Leave it out.")
        return self

    @pydantic.model_validator(mode="after")
    def _check_use(self) -> Data:
        """Refuses what would do nothing."""
        if self.buckets is not None and self.packing and _TASKS[self.train[0].format] == "language":
            raise ValueError(
                f"buckets={self.buckets} are lengths of rows of one example, and packing=true "
                f"fills rows of length={self.length} with several. Use packing: false, or leave "
                f"buckets out."
            )
        for part in ("validation", "test"):
            for number, source in enumerate(getattr(self, part)):
                if source.weight != 1:
                    raise ValueError(
                        f"{part}.{number}.weight={source.weight} mixes training sources, and "
                        f"this one is gone through whole. Leave it out; limit takes less of it."
                    )
        users = {"all": ["chat", "completion"], "last": ["chat"]}.get(self.loss_on, self.formats)
        if not set(users) & set(self.formats):
            raise ValueError(
                f"loss_on={self.loss_on} is for {' and '.join(users)}, and the sources are of the "
                f"formats {self.formats}. Leave it out."
            )
        return self


class Batch(Section):
    """How much a step takes.

    Attributes:
        rows: In each forward pass, over all devices.
        accumulate: Forward and backward passes in a step. Its loss is the mean over all their
            tokens, as if they were one.
        evaluation_rows: In each pass over validation or test sources; as many as rows when null.
    """

    rows: Count = 8
    accumulate: Count = 1
    evaluation_rows: Count | None = None


class Budget(Section):
    """AdaLoRA's budget: how many directions stay.

    Attributes:
        target_rank: Of a matrix, on average.
        warmup_share: The share of all steps before the first direction goes.
        final_share: The share of all steps, at the end, in which the choice is fixed.
        interval: Steps between two choices.
    """

    target_rank: Positive
    warmup_share: Share = 0.1
    final_share: Share = 0.3
    interval: Count = 1

    @pydantic.model_validator(mode="after")
    def _check(self) -> Budget:
        if self.warmup_share + self.final_share >= 1:
            raise ValueError(
                f"warmup_share={self.warmup_share} and final_share={self.final_share} leave no "
                f"step to choose in. Make them smaller."
            )
        return self


class Optimizer(Section):
    """AdamW and its learning rate.

    Attributes:
        learning_rate: The highest.
        schedule: How it falls after the warm-up: as a cosine, in a line, or not at all.
        warmup_share: The share of all steps in which it rises from zero.
        final_share: What is left of it at the end.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of their squares.
        epsilon: Added to its root.
        weight_decay: On factors; magnitudes, gates, biases and heads have none.
        clip_norm: Gradients of a larger norm are scaled down to it; null never does.
        offload: Whether its state lies in the host's memory between steps, and not on the devices.
        ratios: Multiples of the learning rate by label: {b: 16} is LoRA+, {full: 10} is for heads.
        budget: AdaLoRA's; of that family alone, which needs one.
        orthogonality: How strongly AdaLoRA's factors are kept orthogonal.
        sparsity: How strongly SoRA's gates are pulled to zero.
        balance: How strongly the experts of a mixture are kept in equal use.
    """

    learning_rate: Positive = 2e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_share: Share = 0.03
    final_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    beta1: Share = 0.9
    beta2: Share = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    clip_norm: Positive | None = 1.0
    offload: bool = False
    ratios: dict[str, Positive] = {}
    budget: Budget | None = None
    orthogonality: NotNegative = 0.1
    sparsity: NotNegative = 0.1
    balance: NotNegative = 0.01


class Training(Section):
    """How long a run goes on, and what is kept of it.

    Attributes:
        epochs: How often the training sources are gone through; stays at 1 where steps decide.
        steps: How many steps are made, however many epochs that takes; epochs decide when null.
        evaluate_every: Steps between evaluations; at the end of every epoch when null.
        save_every: Steps between checkpoints; null leaves it to save_minutes.
        save_minutes: Minutes between checkpoints; null leaves it to save_every.
        keep_last: How many checkpoints stay, beside the best one.
        metric: What says which evaluation is best: the least loss, or the highest accuracy.
        patience: Evaluations without a better one after which the run ends; null never ends it.
        nonfinite: What happens when a loss or gradient is NaN or infinite: stop, or skip the step.
        max_skipped: So many steps in a row may be skipped; one more stops.
        save_errors: What happens when a checkpoint cannot be written: stop, or warn and go on.
    """

    epochs: Count = 1
    steps: Count | None = None
    evaluate_every: Count | None = None
    save_every: Count | None = None
    save_minutes: Positive | None = 10.0
    keep_last: Count = 2
    metric: Literal["loss", "accuracy"] = "loss"
    patience: Count | None = None
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Annotated[int, Field(ge=0)] = 3
    save_errors: Literal["stop", "warn"] = "stop"

    @pydantic.model_validator(mode="after")
    def _check(self) -> Training:
        # The default stands beside steps in every recipe that a run writes, and says nothing.
        if self.steps is not None and self.epochs != Training.model_fields["epochs"].default:
            raise ValueError(
                f"epochs={self.epochs} and steps={self.steps} each say how long the run is. Leave "
                f"one out."
            )
        return self


class Mesh(Section):
    """Over how many devices each part of the work is spread; their product is that of all devices.

    Attributes:
        data: Copies of the weights, each with its own rows; what is left when null.
        fsdp: Parts that weights are kept in, and gathered from layer by layer; each has its own
            rows.
        tensor: Parts of every product.
    """

    data: Count | None = None
    fsdp: Count = 1
    tensor: Count = 1


class Distributed(Section):
    """Several processes, each of which is started with the same recipe.

    Attributes:
        coordinator: host:port of the first process; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
            and JAX_PROCESS_ID say it when null.
        processes: How many there are.
        process: The number of this one.
        auto: Whether to ask the surroundings: Cloud TPU metadata, Slurm, or Open MPI.
    """

    coordinator: Text | None = None
    processes: Count | None = None
    process: Annotated[int, Field(ge=0)] | None = None
    auto: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> Distributed:
        given = [self.coordinator, self.processes, self.process]
        if any(v is not None for v in given) and None in given:
            raise ValueError(
                "coordinator, processes and process belong together. Give all three, or none."
            )
        if self.process is not None and self.processes and self.process >= self.processes:
            raise ValueError(
                f"process={self.process} is none of processes={self.processes}; the first is 0."
            )
        return self


class Preference(Section):
    """Direct preference optimisation, with the base as its own reference.

    Attributes:
        beta: How strongly the reference holds.
        label_smoothing: The probability that a preference is the wrong way about.
    """

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0


class Classification(Section):
    """A label for every text.

    Attributes:
        labels: Their names in order; those of the training sources, sorted, when null.
        pooling: What the new head sees of a model that comes without one: the mean of a text's
            hidden states, that of its first token, or of its last; the mean for encoders and the
            last for decoders when null.
        label_smoothing: The probability that the targets spread over all labels.
    """

    labels: list[Text] | None = None
    pooling: Literal["mean", "first", "last"] | None = None
    label_smoothing: Share = 0.0


class Export(Section):
    """What is written beside adapter.safetensors when a run ends.

    Attributes:
        merged: Whether to write the merged checkpoint, as a Hugging Face folder.
        merged_dtype: Of that; that of the base's files when null.
        merged_base: What the change is added to where the base was quantised: the dequantized
            weights, which the adapter was trained on, so that the checkpoint computes what the run
            measured; or the original ones, on which nothing was measured.
        peft: Whether to write a folder of PEFT's.
        vllm: Whether to write what vLLM serves.
    """

    merged: bool = False
    merged_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    merged_base: Literal["dequantized", "original"] = "dequantized"
    peft: bool = False
    vllm: bool = False


class Report(Section):
    """What a run tells of itself, in metrics.jsonl and report.html.

    Attributes:
        tensorboard: Whether to write TensorBoard's files too.
        prompts: Texts that a decoder continues before and after.
        max_new_tokens: How far.
        peak_tflops: Of one device, for the share of it that is used; known for common ones.
    """

    tensorboard: bool = False
    prompts: list[Text] = []
    max_new_tokens: Count = 64
    peak_tflops: Positive | None = None


class Recipe(Section):
    """A training run.

    Attributes:
        output: The folder that everything is written to.
        seed: Of every draw: factors, dropout, the order of examples.
        model: The base that is adapted.
        quantize: In how few bits it is held (QLoRA), such as {scheme: nf4}; as it is when null.
        lora: What is trained.
        more: Further rules, which come before it; each with its own targets.
        frozen: Regular expressions of weights that stay as they are, whatever the rules say.
        data: What is learned from.
        batch: How much a step takes.
        optimizer: AdamW and its learning rate.
        training: How long it goes on, and what is kept.
        mesh: How the work is spread over devices.
        distributed: How several processes find each other.
        preference: Of preference data.
        classification: Of labelled texts.
        export: What is written at the end.
        report: What the run tells of itself.
    """

    output: Text = Field(examples=["run"])
    seed: Annotated[int, Field(ge=0)] = 0
    model: Model
    quantize: AnyQuantization | None = None
    lora: AnyRule = Field(default_factory=lambda: RULES["LoRA"]())
    more: list[AnyRule] = []
    frozen: list[Text] = []
    data: Data
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    mesh: Mesh = Mesh()
    distributed: Distributed = Distributed()
    preference: Preference = Preference()
    classification: Classification = Classification()
    export: Export = Export()
    report: Report = Report()

    @property
    def task(self) -> Task:
        """What the formats of the data ask for."""
        return _TASKS[self.data.train[0].format]

    @pydantic.model_validator(mode="after")
    def _check(self) -> Recipe:
        for number, rule in enumerate(self.more):
            if rule.targets is None:
                raise ValueError(f"more.{number} has no targets. Say which weights it is for.")
        quantized = None if self.quantize is None else self.quantize.weights
        targets = (rule.targets for rule in (self.lora, *self.more))
        for pattern in (*targets, *self.frozen, quantized):
            try:
                re.compile(pattern or "")
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}.") from error
        adalora = "AdaLoRA" in {rule.family for rule in (self.lora, *self.more)}
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
    def _check_starts(self) -> Recipe:
        """Refuses what would have to be taken out of quantised weights."""
        rules = {"lora": self.lora, **{f"more.{n}": rule for n, rule in enumerate(self.more)}}
        for place, rule in rules.items() if self.quantize is not None else ():
            init = getattr(rule.config(), "init", None)
            if init is not None and init.residual:
                raise ValueError(
                    f"{place}.init={init.name} takes its start out of the weights, and quantize "
                    f"keeps them as codes, which nothing can be taken out of. Use init: uniform, "
                    f"gaussian or orthogonal, or leave quantize out."
                )
        return self

    @pydantic.model_validator(mode="after")
    def _check_use(self) -> Recipe:
        """Refuses what would do nothing."""
        if not self.data.validation:
            for name in ("patience", "evaluate_every", "metric"):
                value = getattr(self.training, name)
                if value != Training.model_fields[name].default:
                    raise ValueError(
                        f"training.{name}={value} is about evaluations as the run goes, and "
                        f"data.validation is empty. Give validation sources, or leave it out."
                    )
        if self.batch.evaluation_rows and not (self.data.validation or self.data.test):
            raise ValueError(
                f"batch.evaluation_rows={self.batch.evaluation_rows} is about evaluations, and "
                f"data.validation and data.test are empty. Give such sources, or leave it out."
            )
        merged_base = self.export.merged_base
        if merged_base != "dequantized" and not (self.quantize and self.export.merged):
            raise ValueError(
                f"export.merged_base={merged_base} is about merging on a quantised base, which "
                f"needs quantize and export.merged: true. Give both, or leave it out."
            )
        if self.report.prompts and self.task == "classification":
            raise ValueError(
                f"report.prompts={self.report.prompts} are continued by models that write, and "
                f"classification trains one that chooses labels. Leave them out."
            )
        return self
