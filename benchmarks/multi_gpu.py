"""The training step of a recipe over several GPUs of one host, beside the same step on one.

On a CPU, in seconds, with XLA_FLAGS=--xla_force_host_platform_device_count=2:
`python -m benchmarks.multi_gpu --tiny --mesh fsdp=2`. On GPUs:
`python -m benchmarks.multi_gpu --shape 8b --mesh fsdp=2 --output 8b_fsdp2.json`, one process for
each row, so that the peak of its memory is its own.

Everything but the weights' numbers is what `jlora train` has: model, sharding, task, optimizer and
step come of a recipe. With `--restored-from data=1` the state is first written as a checkpoint on
that mesh and read on this one. `python -m benchmarks.multi_gpu_table` makes the tables of
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.h100 import common
from benchmarks.h100.step import LIBRARIES, SCHEMES, drawn_matrices
from jlora import _quantized_array, _tree
from jlora.optim.multi_transform import partition
from jlora.planning import hlo_cost
from jlora.training import recipe as recipes
from jlora.training import sharding
from jlora.training.checkpointing import CheckpointManager
from jlora.training.data.batch_stream import LMBatch
from jlora.training.setup import Setup, build_setup
from jlora.training.train_step import TrainState, init_train_state

# Dense products of bfloat16 at the boost clock, by the device's name. NVIDIA H100 and H200 Tensor
# Core GPU datasheets, SXM; the sheets' own numbers are with sparsity, twice these.
PEAK_FLOPS = {"NVIDIA H100 80GB HBM3": 989.4e12, "NVIDIA H200": 989.4e12}


def config_of(shape: common.Shape) -> dict[str, Any]:
    """The config.json of a Llama of that shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


def recipe_of(folder: pathlib.Path, sizes: dict[str, int], rows: int, options: Any) -> Any:
    """The recipe of the step, whose base is a folder with a config.json alone."""
    shape = common.SHAPES[options.shape]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(shape)))
    quantize = {} if options.quantize == "none" else {"quantize": {"scheme": options.quantize}}
    return recipes.validate(
        {
            "output": str(folder / "run"),
            "model": {
                "path": str(folder),
                "dtype": "bfloat16",
                "compute_dtype": "float32" if options.float32 else "bfloat16",
                "scan_layers": options.stacked,
                "remat_policy": options.remat,
            },
            "adapter": {"rank": common.RANK, "alpha": float(common.ALPHA)},
            "data": {
                "train": [{"path": "none.txt", "format": "text"}],
                "max_seq_length": options.length or shape.length,
            },
            "batch": {"size": rows},
            "optimizer": {
                "learning_rate": common.LEARNING_RATE,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "training": {"steps": 10_000},
            "mesh": sizes,
            **quantize,
        }
    )


# --- arrays where the recipe has them ------------------------------------------------------------


def base_like(described: Any, scheme: Any) -> Any:
    """Random weights for the described ones, each drawn where it lies.

    The numbers of a weight do not depend on how it is split.
    """
    flat = _tree.flatten_with_paths(described)
    keys = jax.random.split(jax.random.key(1), len(flat.paths))
    leaves = [_weight(*of, scheme) for of in zip(keys, flat.paths, flat.leaves, strict=True)]
    return jax.tree.unflatten(flat.treedef, leaves)


def _weight(key: jax.Array, path: str, like: Any, scheme: Any) -> Any:
    arrays, treedef = jax.tree.flatten(like)
    places = tuple(array.sharding for array in arrays)
    if path.endswith("scale"):
        return jnp.ones(like.shape, like.dtype, device=places[0])
    scheme = scheme if _quantized_array.is_quantized(like) else None
    return _drawing(like.shape, scheme, treedef, places)(key)


@functools.cache  # Of which a decoder has few.
def _drawing(shape: tuple[int, ...], scheme: Any, treedef: Any, places: Any) -> Any:
    where = jax.tree.unflatten(treedef, places)
    return jax.jit(lambda key: drawn_matrices(key, shape, scheme), out_shardings=where)


def state_like(setup: Setup, base: Any) -> tuple[TrainState, Any]:
    """The state before the first step, where the recipe has it, and the adapter's frozen part."""

    def fresh(key: jax.Array, base: Any) -> Any:
        trained, frozen = partition(
            setup.objective.lora.init(key, base, *setup.objective.example_inputs)
        )
        return init_train_state({"adapter": trained}, setup.optimizer), frozen

    described = (setup.state, setup.frozen["adapter"])
    where = jax.tree.map(lambda array: array.sharding, described)
    with sharding.use_mesh(setup.mesh):
        return jax.jit(fresh, out_shardings=where)(jax.random.key(2), base)


def batch_of(mesh: Mesh, rows: int, length: int, vocabulary: int) -> LMBatch:
    """Full rows of random tokens, the same on every mesh."""
    text = np.random.default_rng(3).integers(0, vocabulary, (1, rows, length + 1), np.int32)
    ones = np.ones((1, rows, length), np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ones.shape)
    whole = LMBatch(text[..., :-1], text[..., 1:], ones.astype(np.float32), ones, positions)
    place = NamedSharding(mesh, PartitionSpec(None, sharding.BATCH_AXES))
    return jax.tree.map(lambda array: jax.device_put(array, place), whole)


class OnCards:
    """A recipe's step with all of its arguments on a mesh."""

    def __init__(self, sizes: dict[str, int], rows: int, options: Any, folder: pathlib.Path):
        devices = jax.devices()[: math.prod(sizes.values())]
        recipe = recipe_of(folder, sizes, rows, options)
        self.mesh = sharding.make_mesh(sizes, devices)
        sharding.check_batch_size(self.mesh, rows)
        self.setup = build_setup(
            recipe, self.mesh, total_steps=recipe.training.steps or 0, abstract=True
        )
        base = base_like(self.setup.frozen["base"], SCHEMES[options.quantize])
        self.state, adapter = state_like(self.setup, base)
        self.frozen = {"base": base, "adapter": adapter}
        vocabulary = common.SHAPES[options.shape].vocabulary
        self.batch = batch_of(self.mesh, rows, recipe.data.max_seq_length, vocabulary)

    def compiled(self) -> Any:
        """`(state, frozen, batch, key)` to the next state and what was measured."""
        given = (self.state, self.frozen, self.batch, jax.random.key(4))
        return self.setup.train_step.lower(*given).compile()

    def advance(self, compiled: Any) -> jax.Array:
        """Goes one step; its loss, which need not be there yet."""
        self.state, measured = compiled(self.state, self.frozen, self.batch, jax.random.key(4))
        return measured.loss

    def advanced(self, compiled: Any, steps: int) -> list[float]:
        """Goes that many steps; their losses."""
        losses = []
        for _ in range(steps):
            losses.append(self.advance(compiled))
        return [float(loss) for loss in losses]


# --- the row -------------------------------------------------------------------------------------


def useful_flops(shape: common.Shape, rows: int, length: int) -> float:
    """Of a step: what the losses and the factors' gradients cannot be had without.

    Every product with a frozen matrix is made forward, and once backward for what it was given (not
    for itself); those with factors also for themselves; attention under its causal mask, whose two
    products have four backward. What is computed again to save memory does not count.
    """
    tokens = rows * length
    matrices = shape.layers * sum(math.prod(sides) for sides in shape.projections.values())
    matrices += shape.width * shape.vocabulary
    # For each token half of all others, and two operations for each number of a pair.
    attention = shape.layers * shape.heads * shape.head_dim * length
    return float(tokens * (4 * matrices + 6 * shape.lora_size() + 6 * attention))


def exchanged(compiled: Any) -> list[dict[str, Any]]:
    """What the cards exchange in a step, by the compiled program."""
    found = hlo_cost.collect_collective_stats(hlo_cost.parse_hlo(compiled.as_text()))
    return [{"kind": one.kind, "times": one.executions, "bytes": one.sent_bytes} for one in found]


def peak_of(device: str) -> float | None:
    """The most operations of a card per second, or None for one that is not in the table."""
    return PEAK_FLOPS.get(device)


def measure(options: Any) -> common.Row:
    """The row of one mesh."""
    shape = common.SHAPES[options.shape]
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
        "remat_policy": options.remat,
    }
    with tempfile.TemporaryDirectory() as folder:
        running = OnCards(sizes, rows, options, pathlib.Path(folder))
        if options.restored_from:
            details["restored"] = restored(running, rows, options, pathlib.Path(folder))
    compiled = running.compiled()
    losses = running.advanced(compiled, options.losses)

    timing = common.timed(
        lambda: running.advance(compiled),
        lambda: jax.block_until_ready(running.state),
        steps=options.steps,
        repeats=options.repeats,
    )._replace(loss_before=losses[0])
    peaks = [common.peak_gib(device) for device in running.mesh.devices.flat]
    row = common.row(
        method_of(options),
        options,
        timing,
        script="benchmarks.multi_gpu",
        libraries=LIBRARIES,
        # The other mesh of --restored-from has taken its own part of the memory.
        peak_gib=None if options.restored_from or None in peaks else max(peaks),  # type: ignore
        planned_gib=common.planned_gib(compiled),
        trained=sum(leaf.size for leaf in jax.tree.leaves(running.state.trainable)),
        batch=rows,
        length=length,
        details=details,
    )
    flops = useful_flops(shape, rows, length)
    most = peak_of(row.device)
    details["collectives"] = exchanged(compiled)
    details["losses"] = losses
    # Products in float32 have another peak.
    if options.float32:
        most = None
    details["share_of_peak"] = most and 1e3 * flops / row.step_ms / (cards * most)
    return row


def restored(running: OnCards, rows: int, options: Any, folder: pathlib.Path) -> dict[str, Any]:
    """Writes a state on another mesh after some steps, reads it on this one, and compares.

    Raises:
        RuntimeError: Some number is not what was written.
    """
    other = OnCards(options.restored_from, rows, options, folder)
    before = other.advanced(other.compiled(), 3)
    saver = CheckpointManager(folder / "checkpoints", save_total_limit=1)
    saver.save(3, other.state, {})
    saver.wait_until_finished()
    read = saver.restore(running.state, 3).state
    saver.close()
    pairs = zip(jax.tree.leaves(other.state), jax.tree.leaves(read), strict=True)
    wrong = [n for n, (one, two) in enumerate(pairs) if not np.array_equal(one, two)]
    if wrong:
        raise RuntimeError(f"{len(wrong)} arrays of the checkpoint are not what was written.")
    running.state = read
    return {"from": options.restored_from, "losses_before": before, "equal": True}


# --- the command line ----------------------------------------------------------------------------


def mesh_of(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes from text such as "data=2,fsdp=4".

    Raises:
        argparse.ArgumentTypeError: It is none, or there are not as many devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in sharding.MESH_AXES or axis in sizes or not size.isdigit() or size == "0":
            raise argparse.ArgumentTypeError(
                f"{text!r} is no mesh. Give axes of {list(sharding.MESH_AXES)} with their sizes, such as "
                f"fsdp=2 or data=2,tensor=4."
            )
        sizes[axis] = int(size)
    cards = math.prod(sizes.values())
    if cards > jax.device_count():
        raise argparse.ArgumentTypeError(
            f"{text!r} takes {cards} devices, and there are {jax.device_count()}."
        )
    return {"data": 1, **sizes}


def text_of(sizes: Mapping[str, int]) -> str:
    """Those that are not one: "fsdp=2"; "one card" if there is none."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one card"


def method_of(options: Any) -> str:
    """What the row is called."""
    extras = [text_of(options.mesh)]
    extras += [options.quantize] * (options.quantize != "none")
    extras += ["layers in a stack"] * options.stacked
    extras += [f"remat={options.remat}"] * (options.remat != "nothing")
    extras += ["float32"] * options.float32
    return ", ".join(extras)


def main() -> None:
    """Measures and writes."""
    parser = common.parser(__doc__)
    parser.add_argument("--mesh", type=mesh_of, default="data=1", help="such as fsdp=2")
    parser.add_argument("--quantize", choices=["nf4", "none"], default="none")
    parser.add_argument("--batch", type=int, help="sequences for each card; else the shape's")
    parser.add_argument("--rows", type=int, help="sequences in all, instead of --batch")
    parser.add_argument("--length", type=int, help="tokens a sequence")
    parser.add_argument("--stacked", action="store_true", help="layers as one scan")
    parser.add_argument("--remat", choices=["nothing", "save_projections", "full"])
    parser.set_defaults(remat="nothing")
    parser.add_argument("--float32", action="store_true", help="to compare losses, not speed")
    parser.add_argument("--losses", type=int, default=20, help="first steps whose losses are kept")
    parser.add_argument("--restored-from", type=mesh_of, help="mesh that a checkpoint comes from")
    options = parser.parse_args()
    if options.losses < 1:
        parser.error(f"--losses {options.losses} leaves no first loss to tell. Give 1 or more.")
    precision = "highest" if options.float32 else None
    with jax.default_matmul_precision(precision):
        common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()
