"""A training step compiled for TPUs that are not here, against arithmetic."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from _support import train_steps
from jax.sharding import NamedSharding, PartitionSpec

from jlora import _tree
from jlora.planning import compiled_cost, hlo_cost, roofline, tpu_topology
from jlora.training import sharding

# The compiler for TPUs takes ten CPU seconds to start.
pytestmark = pytest.mark.slow

pytest.importorskip("libtpu")

# Multiples of the TPU's tiles, so that there is no padding.
SMALL = {
    "vocab_size": 2048,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 128,
    "num_layers": 5,
}
LLAMA_70B = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 128,
    "num_layers": 80,
}
RANK = 16


class Plan(NamedTuple):
    """A step for a slice, and its compiled program."""

    size: dict[str, int]
    rows: int
    length: int
    remat: str
    topology: tpu_topology.TPUTopology
    step: train_steps.Step
    lowered: Any
    compiled: Any
    measured: compiled_cost.StepCost

    @property
    def chips(self) -> int:
        return len(self.topology.devices)


def plan(
    size: dict[str, int],
    name: str,
    sizes: dict[str, int],
    *,
    rows: int,
    length: int,
    remat: Any = "full",
    chunks: int = 8,
) -> Plan:
    found = tpu_topology.get_tpu_topology(name)
    mesh = sharding.make_mesh(sizes, found.devices)
    model = train_steps.decoder(size, scan_layers=True, remat_policy=remat, dtype=jnp.bfloat16)
    step = train_steps.step(
        model, mesh, rows=rows, length=length, rank=RANK, dtype=jnp.bfloat16, chunks=chunks
    )
    with sharding.use_mesh(mesh):
        lowered = step.run.lower(*step.arguments)
    compiled = compiled_cost.compile_step(lowered, step.groups)
    measured = compiled_cost.compute_step_cost(compiled, step.groups)
    return Plan(size, rows, length, remat, found, step, lowered, compiled, measured)


def kernels(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The matrices of one layer, (inputs, outputs)."""
    width, inner = size["hidden_size"], size["intermediate_size"]
    heads, kv_heads = (size[n] * size["head_dim"] for n in ("num_heads", "num_kv_heads"))
    return {
        "q": (width, heads),
        "k": (width, kv_heads),
        "v": (width, kv_heads),
        "o": (heads, width),
        "gate": (width, inner),
        "up": (width, inner),
        "down": (inner, width),
    }


def arithmetic(of: Plan) -> float:
    """The operations of one step over all chips, for LoRA on every kernel of the layers.

    Of N numbers in frozen kernels and T tokens: 2 N T forward, and as much backward for the
    gradient of what goes in; frozen kernels have none of their own. `remat_policy="full"` goes
    forward again, but for the last product of a layer, whose result its gradient does not need.
    """
    tokens, layers = of.rows * of.length, of.size["num_layers"]
    matrices = kernels(of.size)
    numbers = sum(math.prod(shape) for shape in matrices.values())
    passes = 2.0 * numbers
    if of.remat == "full":
        passes += numbers - math.prod(matrices["down"])
    # x A and its product with B forward and twice backward, and forward again.
    lora = 4 * RANK * sum(sum(shape) for shape in matrices.values())
    # Logits of a frozen head, and the gradient for the hidden states.
    head = 2 * of.size["hidden_size"] * of.size["vocab_size"]
    # Half of all pairs: two products forward, again those in the backward pass, and seven there.
    attention = (2 + 2 + 7) * of.length / 2 * of.size["num_heads"] * of.size["head_dim"]
    return 2.0 * tokens * (layers * (passes + lora + attention) + head)


def weights_per_chip(of: Plan, width: int = 2) -> int:
    """Bytes: matrices split over all chips of fsdp and tensor, norms replicated."""
    flat = _tree.flatten_with_paths(of.step.weights)
    split = of.compiled.input_shardings[0][0]
    parts = math.prod(jax.tree.leaves(split)[0].mesh.shape[a] for a in ("fsdp", "tensor"))
    matrices = sum(
        math.prod(leaf.shape)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if not path.endswith("scale")
    )
    norms = of.size["hidden_size"] * (2 * of.size["num_layers"] + 1)
    assert matrices % parts == 0
    return width * (matrices // parts + norms)


@functools.cache
def small() -> Plan:
    return plan(SMALL, "v5e:2x2", {"fsdp": 2, "tensor": 2}, rows=8, length=256, chunks=2)


def check(of: Plan, tolerance: float) -> None:
    held = of.measured.memory
    assert held.arguments["weights"] == weights_per_chip(of)
    # AdamW's two moments, and its count of steps.
    assert held.arguments["optimizer"] == 2 * held.arguments["adapter"] + 4
    assert held.peak < of.topology.chip.hbm_bytes
    assert held.outputs < 1e5  # The adapter and the optimizer's state take their own places.
    assert of.measured.unknown_loops == 0
    assert of.measured.flops * of.chips == pytest.approx(arithmetic(of), rel=tolerance)


def test_step_cost_agrees_with_arithmetic() -> None:
    # 3%: the compiler chooses the order of LoRA's own products.
    check(small(), 0.03)


@pytest.mark.slow
def test_step_cost_of_replicas() -> None:
    """Each of two replicas of the weights has half of the rows."""
    check(plan(SMALL, "v5e:2x2", {"fsdp": 2}, rows=8, length=256, chunks=2), 0.03)


def test_lowered_step_has_the_tpu_kernel() -> None:
    assert jax.default_backend() == "cpu"
    assert "tpu_custom_call" in small().lowered.as_text()
    names = {
        run.instruction.name
        for run in hlo_cost.iter_executed_instructions(
            hlo_cost.parse_hlo(small().compiled.as_text())
        )
    }
    assert any(name.startswith("splash_mha_fwd") for name in names)


def test_count_flops_agrees_with_xla() -> None:
    of = small()
    runs = hlo_cost.iter_executed_instructions(
        hlo_cost.parse_hlo(of.compiled.as_text()), count_trips=False
    )
    products = sum(
        run.executions * hlo_cost.count_flops(run) for run in runs if "custom" not in run[0].opcode
    )
    xla = of.compiled.cost_analysis()["flops"]  # It also counts other operations.
    assert 0.95 * xla < products < xla


def test_ici_bytes_cover_gathered_weights() -> None:
    of = small()
    split = of.measured.memory.arguments["weights"]
    # Each chip gathers half of the weights, forward and backward.
    assert of.measured.ici_bytes > 2 * split * 0.9
    assert {"all-gather", "all-reduce"} <= {c.kind for c in of.measured.collectives}


def test_estimate_step_time_bounds() -> None:
    of = small()
    found = roofline.estimate_step_time(
        of.measured, of.topology.chip, tokens=of.rows * of.length, chips=of.chips
    )
    assert 0 < found.fastest_s <= found.slowest_s
    assert found.compute_s == of.measured.flops / 197e12


def test_step_memory_separates_its_parts() -> None:
    mesh = sharding.make_mesh({"fsdp": 4}, tpu_topology.get_tpu_topology("v5e:2x2").devices)
    n = 2**14
    spec = NamedSharding(mesh, PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((4 * n, n), jnp.bfloat16, sharding=spec)
    w = jax.ShapeDtypeStruct((n, n), jnp.bfloat16)

    def fn(x: jax.Array, w: jax.Array) -> jax.Array:
        a, b = jnp.sin(x) @ w, jnp.cos(x) @ w
        return jnp.sort(a @ w, axis=1)[:, :8] + jnp.sort(b, axis=1)[:, -8:]

    compiled = jax.jit(fn).lower(x, w).compile()
    held = compiled_cost.compute_step_cost(compiled, {"batch": x, "weights": w}).memory
    one = 2 * n * n
    assert held.arguments == {"batch": one, "weights": one}
    assert (held.padding, held.outputs) == (0, 2 * 8 * n)
    assert held.peak - held.program == compiled.memory_analysis().peak_memory_in_bytes
    # Less than the compiler reserves, in which arrays that are not held at once lie apart.
    assert held.temporaries < 0.9 * compiled.memory_analysis().temp_size_in_bytes


def test_compile_step_too_large_raises() -> None:
    mesh = sharding.make_mesh({"fsdp": 4}, tpu_topology.get_tpu_topology("v5e:2x2").devices)
    place = lambda *names: NamedSharding(mesh, PartitionSpec(*names))
    n = 2**17
    groups = {
        "batch": jax.ShapeDtypeStruct((4 * n, n), jnp.bfloat16, sharding=place("fsdp")),
        "weights": jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=place()),
    }
    lowered = jax.jit(lambda x, w: jnp.sort(jnp.sin(x) @ w, axis=1)[:, :8]).lower(*groups.values())
    with pytest.raises(
        compiled_cost.DoesNotFitError, match="but 15.75 GiB are available: batch 32.00 GiB"
    ) as found:
        compiled_cost.compile_step(lowered, groups)
    assert found.value.available_bytes == 15.75 * 2**30
    assert found.value.memory.arguments == {"batch": 2 * n * n, "weights": 2 * n * n}
    assert found.value.memory.temporaries > 2**34


# --- the shapes that users train -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "name", "sizes", "options"),
    [
        (LLAMA_70B, "v5p:8x8x8", {"fsdp": 128, "tensor": 4}, {"rows": 128}),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_step_cost_of_large_models(size: Any, name: str, sizes: Any, options: Any) -> None:
    check(plan(size, name, sizes, length=4096, **options), 0.03)
