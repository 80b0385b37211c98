"""Training step that `jlora train` runs for a recipe, on one GPU or several of one host.

On a CPU, in seconds: `python -m benchmarks.speed.train --tiny`, and on two devices, with
XLA_FLAGS=--xla_force_host_platform_device_count=2, also `--mesh fsdp=2`. On GPUs:
`python -m benchmarks.speed.train --shape 8b --mesh fsdp=2 --output 8b_fsdp2.json`, with one process
for each row, so that the memory peak belongs to that row.

Model, sharding, task, optimizer, rows and step are those of `jlora train` with a recipe; only the
weights are random. The rows are packed from texts of Python's standard library, about eight in
each, by jlora's own planner. `--one-text` fills each row with one text, `--without-segments` also
hides from the attention that there are texts, and `--method floor` trains the first norm alone, so
that the gradient reaches every activation and no product has an adapter. `--loop-steps 60` also
runs `jlora train` for that many steps, on a base that is written to a temporary folder.

With `--restored-from data=1`, the state is first written as a checkpoint on that mesh and restored
on this one. `python -m benchmarks.speed._tables` prints the tables of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import datasets
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from benchmarks.speed import _common, input_pipeline
from benchmarks.speed.train_step import (
    LIBRARIES,
    SCHEMES,
    flatten_with_paths,
    random_matrices,
)
from jlora import models, planning, training
from jlora.models import Decoder
from jlora.training import (
    Callback,
    CheckpointManager,
    Setup,
    TrainState,
    build_setup,
    describe_attention,
    init_train_state,
)
from jlora.training import recipe as recipes
from jlora.training.data import (
    BatchConfig,
    BatchStream,
    LMBatch,
    TokenizeConfig,
    Tokenizer,
    tokenize_texts,
)

# FLOP/s of dense bfloat16 products at the boost clock, by device name. NVIDIA H100 and H200 Tensor
# Core GPU datasheets, SXM; their figures with sparsity are twice these.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


TEXTS_FILE = "texts.jsonl"
ADAPTER = {"rank": _common.RANK, "alpha": float(_common.ALPHA)}
FLOOR = {"family": "FullDelta", "target_pattern": r"layers(_0)?/attention_norm/scale"}

TEXTS_PER_ROW = 8
CHARACTERS_PER_TOKEN = 4  # Of the tokenizer that is trained on the texts.
TEXT_FILES = 60
# Steps of a run that are not measured: the first one compiles, and the next fill the queues.
LOOP_WARM_UP = 5


def make_recipe(
    folder: pathlib.Path, sizes: dict[str, int], rows: int, options: Any, steps: int = 10_000
) -> Any:
    """Returns the recipe of the step, whose base is a folder with texts and without weights."""
    shape = _common.SHAPES[options.shape]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_common.llama_config(shape)))
    texts = make_texts(options.length or shape.length)
    (folder / TEXTS_FILE).write_text("".join(json.dumps(row) + "\n" for row in texts))
    input_pipeline.write_tokenizer(texts, min(shape.vocabulary, 4000), folder)
    quantize = {} if options.quantize == "none" else {"quantize": {"scheme": options.quantize}}
    return recipes.validate(
        {
            "output": str(folder / "run"),
            "model": {
                "path": str(folder),
                "dtype": "bfloat16",
                "compute_dtype": "float32" if options.float32 else "bfloat16",
                "scan_layers": options.stacked,
                "attention_implementation": options.attention,
                "remat_policy": options.remat_policy,
            },
            "adapter": FLOOR if options.method == "floor" else ADAPTER,
            "data": {
                "train": [{"path": str(folder / TEXTS_FILE), "format": "text"}],
                "max_seq_length": options.length or shape.length,
            },
            "batch": {"size": rows},
            "optimizer": {
                "learning_rate": _common.LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "training": {"steps": steps},
            "mesh": sizes,
            **quantize,
        }
    )


# --- arrays with the shardings of the recipe -----------------------------------------------------


def random_base(abstract: Any, scheme: Any) -> Any:
    """Returns random weights for abstract ones, each created with its sharding.

    The values of a weight do not depend on its sharding.
    """
    paths, leaves, treedef = flatten_with_paths(abstract)
    keys = jax.random.split(jax.random.key(1), len(paths))
    weights = zip(keys, paths, leaves, strict=True)
    return jax.tree.unflatten(
        treedef, [_random_weight(key, path, leaf, scheme) for key, path, leaf in weights]
    )


def _random_weight(key: jax.Array, path: str, like: Any, scheme: Any) -> Any:
    arrays, treedef = jax.tree.flatten(like)
    shardings = tuple(array.sharding for array in arrays)
    if path.endswith("scale"):
        return jnp.ones(like.shape, like.dtype, device=shardings[0])
    scheme = scheme if isinstance(like, jlora.QArray) else None
    return _compiled_random_matrices(like.shape, scheme, treedef, shardings)(key)


@functools.cache  # A decoder has few shapes.
def _compiled_random_matrices(
    shape: tuple[int, ...], scheme: Any, treedef: Any, shardings: Any
) -> Any:
    out_shardings = jax.tree.unflatten(treedef, shardings)
    return jax.jit(lambda key: random_matrices(key, shape, scheme), out_shardings=out_shardings)


def init_state(setup: Setup, base: Any) -> tuple[TrainState, Any]:
    """Returns the initial state, with the recipe's shardings, and the adapter's frozen part."""
    shardings = jax.tree.map(lambda array: array.sharding, (setup.state, setup.frozen["adapter"]))
    with training.use_mesh(setup.mesh):
        adapter = setup.objective.lora.init(
            jax.random.key(2), base, *setup.objective.example_inputs
        )
        trained, frozen = jlora.partition(adapter)
        state = jax.jit(init_train_state, static_argnums=1)({"adapter": trained}, setup.optimizer)
        return jax.device_put((state, frozen), shardings)


def make_texts(length: int) -> input_pipeline.Rows:
    """Returns texts of the standard library, of which about eight fill a row of `length` tokens."""
    size = length * CHARACTERS_PER_TOKEN // TEXTS_PER_ROW
    return [
        {"text": row["text"][start : start + size]}
        for row in input_pipeline.texts(files=TEXT_FILES)
        for start in range(0, len(row["text"]), size)
        if len(row["text"]) - start >= size // 4
    ]


def packed_batch(mesh: Mesh, recipe: training.Recipe) -> LMBatch:
    """Returns the recipe's first packed rows, the same on every mesh."""
    length = recipe.data.max_seq_length
    source = recipe.data.train[0].path
    texts = [json.loads(line) for line in pathlib.Path(source).read_text().splitlines()]
    tokenizer = Tokenizer.from_folder(recipe.model.path)
    reading = TokenizeConfig(max_seq_length=length)
    dataset = tokenize_texts(datasets.Dataset.from_list(texts), tokenizer, reading)
    stream = BatchStream([dataset], BatchConfig(batch_size=recipe.batch.size, seq_length=length))
    batch = next(iter(stream.batches(epochs=1)))[1].arrays
    assert isinstance(batch, LMBatch)
    return put_batch(mesh, batch)


def one_text_batch(mesh: Mesh, rows: int, length: int, vocabulary: int) -> LMBatch:
    """Returns full rows of random tokens, the same on every mesh."""
    text = np.random.default_rng(3).integers(0, vocabulary, (1, rows, length + 1), np.int32)
    ones = np.ones((1, rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    return put_batch(
        mesh, LMBatch(text[..., :-1], text[..., 1:], ones.astype(np.float32), ones, positions)
    )


def put_batch(mesh: Mesh, batch: LMBatch) -> LMBatch:
    """Returns a batch with its rows split over the mesh."""
    batch_sharding = NamedSharding(mesh, PartitionSpec(None, training.BATCH_AXES))
    return jax.tree.map(lambda array: jax.device_put(array, batch_sharding), batch)


class MeshRun:
    """A recipe's step with all of its arguments on a mesh."""

    def __init__(self, sizes: dict[str, int], rows: int, options: Any, folder: pathlib.Path):
        devices = jax.devices()[: math.prod(sizes.values())]
        recipe = make_recipe(folder, sizes, rows, options)
        self.mesh = training.make_mesh(sizes, devices)
        training.check_batch_size(self.mesh, rows)
        self.setup = build_setup(
            recipe, self.mesh, total_steps=recipe.training.steps or 0, abstract=True
        )
        base = random_base(self.setup.frozen["base"], SCHEMES[options.quantize])
        self.state, adapter = init_state(self.setup, base)
        self.frozen = {"base": base, "adapter": adapter}
        if options.one_text:
            vocabulary = _common.SHAPES[options.shape].vocabulary
            self.batch = one_text_batch(self.mesh, rows, recipe.data.max_seq_length, vocabulary)
        else:
            self.batch = packed_batch(self.mesh, recipe)
        self.attention = describe_attention(recipe, self.setup)

    def compile(self) -> Any:
        """Returns the compiled `(state, frozen, batch, key)` to the next state and metrics."""
        return self.lower().compile()

    def lower(self) -> Any:
        """Returns the lowered step."""
        arguments = (self.state, self.frozen, self.batch, jax.random.key(4))
        return self.setup.train_step.lower(*arguments)

    def advance(self, compiled: Any) -> jax.Array:
        """Runs one step and returns its loss, possibly still in computation."""
        self.state, metrics = compiled(self.state, self.frozen, self.batch, jax.random.key(4))
        return metrics.loss

    def advance_steps(self, compiled: Any, steps: int) -> list[float]:
        """Runs several steps and returns their losses."""
        losses = [self.advance(compiled) for _ in range(steps)]
        return [float(loss) for loss in losses]


# --- the loop ------------------------------------------------------------------------------------


class StepClock(Callback):
    """Records when the steps of a run end.

    Attributes:
        end_times: Seconds of a clock at the end of each step.
        num_texts: Texts in the rows of each step.
    """

    def __init__(self) -> None:
        self.end_times: list[float] = []
        self.num_texts: list[int] = []

    def on_step_end(self, loop: Any, step: int, metrics: Mapping[str, float]) -> None:
        """Records a step."""
        self.end_times.append(time.perf_counter())
        self.num_texts.append(sum(len(row) for row in loop.finished_step.batch.example_ids))


def write_weights(folder: pathlib.Path) -> None:
    """Writes random weights in bfloat16 for the config of a folder."""
    weights = models.checkpoint_mapping(models.model_from_config(folder))[0].values()
    pool = np.random.default_rng(0).normal(0, 0.02, 2**20 + 1).astype(ml_dtypes.bfloat16)
    tensors = {
        part.key: np.ones(part.tensor_shape, ml_dtypes.bfloat16)
        if "norm" in part.key
        else np.resize(pool, part.tensor_shape)
        for weight in weights
        for part in weight.slices
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def measure_loop(
    folder: pathlib.Path, sizes: dict[str, int], rows: int, options: Any
) -> dict[str, Any]:
    """Runs `jlora train` and returns the mean time of its steps after the warm-up."""
    recipe = make_recipe(folder, sizes, rows, options, steps=options.loop_steps)
    write_weights(folder)
    clock = StepClock()
    start = time.perf_counter()
    devices = jax.devices()[: math.prod(sizes.values())]
    training.train(recipe, callbacks=[clock], devices=devices, quiet=True)
    times = clock.end_times
    steps = len(times) - LOOP_WARM_UP
    seconds = (times[-1] - times[LOOP_WARM_UP - 1]) / steps
    result = json.loads((pathlib.Path(recipe.output) / training.RESULT_FILE).read_text())
    return {
        "steps": len(times),
        "step_ms": round(1e3 * seconds, 3),
        "tokens_per_s": round(rows * recipe.data.max_seq_length / seconds),
        "first_step_s": round(times[0] - start, 1),
        "data_wait_s": result["data_wait_s"],
        "texts_per_row": sum(clock.num_texts) / (len(times) * rows),
    }


# --- the row -------------------------------------------------------------------------------------


def useful_flops(shape: _common.Shape, rows: int, length: int) -> float:
    """Returns the FLOPs of a step that losses and factor gradients require.

    A product with a frozen matrix counts forward, and once backward for its input (the matrix has
    no gradient); one with factors also for their gradients; attention counts with its causal mask,
    its two products having four in the backward pass. Rematerialization does not count.
    """
    tokens = rows * length
    matrices = shape.layers * sum(math.prod(sides) for sides in shape.projections.values())
    matrices += shape.width * shape.vocabulary
    # Half of all other tokens for each token, and two operations for each element of a pair.
    attention = shape.layers * shape.heads * shape.head_dim * length
    return float(tokens * (4 * matrices + 6 * shape.lora_size() + 6 * attention))


def list_collectives(compiled: Any) -> list[dict[str, Any]]:
    """Returns the collectives of a step in the compiled program."""
    stats = planning.compute_step_cost(compiled, {}).collectives
    return [{"kind": one.kind, "times": one.executions, "bytes": one.sent_bytes} for one in stats]


def peak_flops(device: str) -> float | None:
    """Returns the peak FLOP/s of a card, or None for one that is not in the table."""
    return PEAK_FLOPS.get(device)


def measure(options: Any) -> _common.Row:
    """Returns the row of one mesh."""
    shape = _common.SHAPES[options.shape]
    sizes = options.mesh
    cards = math.prod(sizes.values())
    rows = options.rows or cards * (options.batch or shape.batch)
    length = options.length or shape.length
    details: dict[str, Any] = {
        "mesh": sizes,
        "cards": cards,
        "quantize": options.quantize,
        "compute_dtype": "float32" if options.float32 else "bfloat16",
        "stacked": options.stacked,
        "remat_policy": options.remat_policy,
    }
    with tempfile.TemporaryDirectory() as folder:
        run = MeshRun(sizes, rows, options, pathlib.Path(folder))
        if options.restored_from:
            details["restored"] = restore_from_mesh(run, rows, options, pathlib.Path(folder))
    # Without segments, the attention is not that of the recipe.
    details["attention"] = "of one text a row" if options.without_segments else run.attention
    details["texts_per_row"] = float(np.asarray(run.batch.segment_ids).max(axis=-1).mean())
    details["share_of_tokens"] = float(np.mean(np.asarray(run.batch.segment_ids) > 0))
    start = time.perf_counter()
    lowered = run.lower()
    details["lower_s"] = round(time.perf_counter() - start, 1)
    start = time.perf_counter()
    compiled = lowered.compile()
    details["compile_s"] = round(time.perf_counter() - start, 1)
    losses = run.advance_steps(compiled, options.losses)

    timing = _common.time_steps(
        lambda: run.advance(compiled),
        lambda: jax.block_until_ready(run.state),
        steps=options.steps,
        repeats=options.repeats,
    )._replace(loss_before=losses[0])
    peaks = [_common.peak_gib(device) for device in run.mesh.devices.flat]
    row = _common.make_row(
        format_method(options),
        options,
        timing,
        script="benchmarks.speed.train",
        libraries=LIBRARIES,
        # The other mesh of --restored-from has used memory of its own.
        peak_gib=None if options.restored_from or None in peaks else max(peaks),  # type: ignore
        planned_gib=_common.planned_gib(compiled),
        trained=sum(leaf.size for leaf in jax.tree.leaves(run.state.trainable)),
        batch=rows,
        length=length,
        details=details,
    )
    flops = useful_flops(shape, rows, length)
    # Products in float32 have another peak.
    peak = None if options.float32 else peak_flops(row.device)
    details["collectives"] = list_collectives(compiled)
    details["losses"] = losses
    details["share_of_peak"] = peak and 1e3 * flops / row.step_ms / (cards * peak)
    if options.loop_steps:
        del run, compiled  # The run has arrays of its own.
        with tempfile.TemporaryDirectory() as folder:
            loop = measure_loop(pathlib.Path(folder), sizes, rows, options)
        details["loop"] = {**loop, "share_of_step": row.step_ms / loop["step_ms"]}
    return row


def restore_from_mesh(
    run: MeshRun, rows: int, options: Any, folder: pathlib.Path
) -> dict[str, Any]:
    """Saves a state on another mesh after some steps, restores it on this one, and compares.

    Raises:
        RuntimeError: If an array differs.
    """
    other = MeshRun(options.restored_from, rows, options, folder)
    losses = other.advance_steps(other.compile(), 3)
    manager = CheckpointManager(folder / "checkpoints", save_total_limit=1)
    manager.save(3, other.state, {})
    manager.wait_until_finished()
    restored = manager.restore(run.state, 3).state
    manager.close()
    pairs = zip(jax.tree.leaves(other.state), jax.tree.leaves(restored), strict=True)
    different = [n for n, (one, two) in enumerate(pairs) if not np.array_equal(one, two)]
    if different:
        raise RuntimeError(f"{len(different)} restored arrays differ from the saved ones.")
    run.state = restored
    return {"from": options.restored_from, "losses_before": losses, "equal": True}


def attend_rows(attend: Any, *arrays: jax.Array, **options: Any) -> jax.Array:
    """Attention over whole rows, as if each were one text."""
    return attend(*arrays, **{**options, "query_segment_ids": None})


# --- the command line ----------------------------------------------------------------------------


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the sizes of a mesh's axes from text such as "data=2,fsdp=4".

    Raises:
        argparse.ArgumentTypeError: If the text is invalid, or there are not enough devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in training.MESH_AXES or axis in sizes or not size.isdigit() or size == "0":
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a mesh. Use axes of {list(training.MESH_AXES)} with sizes, such "
                f"as fsdp=2 or data=2,tensor=4."
            )
        sizes[axis] = int(size)
    cards = math.prod(sizes.values())
    if cards > jax.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} requires {cards} devices, but there are {jax.device_count()}."
        )
    return {"data": 1, **sizes}


def format_mesh(sizes: Mapping[str, int]) -> str:
    """Returns the axes above one, such as "fsdp=2", or "one card"."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one card"


def format_method(options: Any) -> str:
    """Returns the method's name in the row."""
    extras = ["floor"] * (options.method == "floor")
    extras += [format_mesh(options.mesh)]
    extras += [f"attention {options.attention}"] * (options.attention != "auto")
    extras += ["one text a row"] * options.one_text
    extras += ["no segments"] * options.without_segments
    extras += [options.quantize] * (options.quantize != "none")
    extras += ["layers in a stack"] * options.stacked
    extras += [f"remat_policy={options.remat_policy}"] * (options.remat_policy != "none")
    extras += ["float32"] * options.float32
    return ", ".join(extras)


def main() -> None:
    """Measures and writes."""
    parser = _common.build_parser(__doc__)
    parser.add_argument("--method", choices=["lora", "floor"], default="lora")
    attentions = ("auto", "xla", "cudnn", "tokamax")
    parser.add_argument("--attention", choices=attentions, default="auto")
    parser.add_argument("--one-text", action="store_true", help="one text in each row")
    parser.add_argument("--without-segments", action="store_true", help="attention over rows")
    parser.add_argument("--mesh", type=parse_mesh, default="data=1", help="such as fsdp=2")
    parser.add_argument("--quantize", choices=["nf4", "none"], default="none")
    parser.add_argument("--batch", type=int, help="sequences per card; default: the shape's")
    parser.add_argument("--rows", type=int, help="sequences of all cards, instead of --batch")
    parser.add_argument("--length", type=int, help="tokens per sequence; default: the shape's")
    parser.add_argument("--stacked", action="store_true", help="layers as one scan")
    policies = ("none", "save_projections", "full")
    parser.add_argument("--remat-policy", choices=policies, default="none")
    parser.add_argument("--float32", action="store_true", help="to compare losses, not speed")
    parser.add_argument("--losses", type=int, default=20, help="first steps with recorded losses")
    parser.add_argument("--loop-steps", type=int, default=0, help="steps of `jlora train`")
    parser.add_argument("--restored-from", type=parse_mesh, help="mesh that saves the checkpoint")
    options = parser.parse_args()
    if options.losses < 1:
        parser.error(f"--losses {options.losses} must be at least 1, to record the first loss.")
    if options.loop_steps and options.loop_steps <= LOOP_WARM_UP:
        parser.error(f"--loop-steps {options.loop_steps} must be above {LOOP_WARM_UP}.")
    if options.without_segments:
        # There is no such option for those who train: each row would be taken for one text.
        decoder: Any = sys.modules[Decoder.__module__]
        decoder.attend = functools.partial(attend_rows, decoder.attend)
    precision = "highest" if options.float32 else None
    with jax.default_matmul_precision(precision):
        _common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()
