"""Everything that a run computes with, from its recipe: model, adapter, optimizer, and the step.

The same function makes it of arrays, to train, and of shapes alone, to compile for devices that are
not here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jlora import models, tree
from jlora.adapters.full import Full
from jlora.adapters.protocol import AdapterConfig, is_leaf, leaves_of
from jlora.adapters.sora import SoRALeaf
from jlora.checkpoints import hub
from jlora.checkpoints.adapter_file import fingerprint
from jlora.conversion import residual_base
from jlora.models.folders import example_inputs
from jlora.optim.labels import partition
from jlora.optim.offloading import check_host_memory, check_offload, host_shardings
from jlora.quantization.schemes import Scheme
from jlora.training import mesh as meshes
from jlora.training import tasks
from jlora.training.optimizer import Optimizing, optimizing
from jlora.training.recipe.sections import Recipe
from jlora.training.step import State, evaluation_of, initial, step_of

PyTree = Any

# Products inside layers, which are adapted, and quantised. A router chooses experts, and moving it
# moves all of them.
_IN_LAYERS = r"/layers?(_\d+)?/.*(?<!router)/(kernel|gate_up|down)$"
_TARGETS = {"BitFit": r"/layers?(_\d+)?/.*bias$", "TokenRows": r"/(embed|word)/embedding$"}
_HEAD = r"^params/classifier/"


class OnMesh:
    """A jitted function whose tracing sees a mesh."""

    def __init__(self, mesh: Mesh, fn: Any) -> None:
        self._mesh, self._fn = mesh, fn

    def __call__(self, *args: Any) -> Any:
        with meshes.active(self._mesh):
            return self._fn(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.stages.Wrapped.lower`."""
        with meshes.active(self._mesh):
            return self._fn.lower(*args)


class Setup(NamedTuple):
    """What a run computes with.

    Attributes:
        folder: Of the base.
        model: Of the base.
        task: What is adapted, and the loss.
        mesh: Of the devices.
        frozen: `{"base": ..., "adapter": ...}`, the latter with its frozen arrays.
        fingerprints: Of the adapted weights of the checkpoint, by path; none if all is abstract.
        fresh: The adapter before the first step, where its base is not the checkpoint's own.
        optimizing: What makes steps of gradients.
        state: Before the first step.
        step: Compiled at its first call: `(state, frozen, batch, key)`, the state donated.
        evaluate: Likewise: `(trained, frozen, batch)`.
    """

    folder: Path
    model: Any
    task: tasks.Task
    mesh: Mesh
    frozen: PyTree
    fingerprints: dict[str, str]
    fresh: PyTree | None
    optimizing: Optimizing
    state: State
    step: OnMesh
    evaluate: OnMesh


def set_up(
    recipe: Recipe, mesh: Mesh, *, steps: int, labels: int | None = None, abstract: bool = False
) -> Setup:
    """What a recipe describes, on a mesh.

    Args:
        recipe: The whole of it; its data is not looked at.
        mesh: Of the devices, which may not be here if all is abstract.
        steps: How many are made in all, for the learning rate.
        labels: How many, for classification.
        abstract: Whether arrays are only described, as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: The recipe asks for what the model or devices have not, or the mesh does not
            divide it.
        RuntimeError: The devices compute something else with the optimizer's state offloaded.
    """
    folder = hub.folder_of(recipe.model.path, recipe.model.revision)
    model = model_of(recipe, folder)
    specs = meshes.weight_specs(model, *example_inputs(model))
    task = task_of(recipe, model, labels)
    base = _base(recipe, folder, model, specs, mesh, abstract)
    keys = {name: _key(recipe, name) for name in ("adapter", "head")}
    # Devices that are not here can compute nothing, keys neither.
    with meshes.active(mesh):
        adapter = _adapter(keys["adapter"], task, base, specs, mesh, abstract)
        prints = {} if abstract else _fingerprints(base, adapter)
        fresh = adapter if _taken_out(adapter) else None
        if fresh is not None:
            base = _jitted(residual_base, abstract)(base, fresh)
        trained, rest = partition(adapter)
        arrays = {"adapter": trained}
        if task.head is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            arrays["head"] = _made(task.head, keys["head"], whole, abstract)
        gates = any(isinstance(leaf, SoRALeaf) for leaf in _leaves(adapter))
        made = optimizing(recipe.optimizer, steps, gates=gates)
        state = _state(arrays, made, mesh, abstract)
        if made.offloaded and not abstract:
            passes = recipe.batch.accumulate
            check_offload(made.transform, state.trained, state.optimizer, passes=passes)
    step = step_of(task.loss, made, recipe.optimizer.clip_norm)
    places = jax.tree.map(lambda array: array.sharding, state)
    return Setup(
        folder=folder,
        model=model,
        task=task,
        mesh=mesh,
        frozen={"base": base, "adapter": rest},
        fingerprints=prints,
        fresh=fresh,
        optimizing=made,
        state=state,
        step=OnMesh(mesh, jax.jit(step, donate_argnums=0, out_shardings=(places, None))),
        evaluate=OnMesh(mesh, jax.jit(evaluation_of(task.loss))),
    )


def model_of(recipe: Recipe, folder: Path) -> Any:
    """The model of a recipe, without weights."""
    asked = recipe.model
    model = models.model_of(folder)
    if isinstance(model, models.Decoder):
        scanned = model.stackable if asked.scanned is None else asked.scanned
        model = model.clone(scanned=scanned, remat=asked.remat, implementation=asked.attention)
    return model if asked.compute_dtype is None else model.clone(dtype=asked.compute_dtype)


def task_of(recipe: Recipe, model: Any, labels: int | None = None) -> tasks.Task:
    """What a recipe trains for."""
    rules = rules_of(recipe, model)
    if recipe.task == "language":
        return tasks.language(model, rules, recipe.optimizer)
    if recipe.task == "preference":
        return tasks.preference(model, rules, recipe.optimizer, recipe.preference)
    assert labels is not None
    return tasks.classification(model, rules, recipe.optimizer, recipe.classification, labels)


def rules_of(recipe: Recipe, model: Any) -> dict[str, AdapterConfig | None]:
    """The recipe's rules: what stays frozen, further rules, a head's own, and the main one."""
    rules: dict[str, AdapterConfig | None] = dict.fromkeys(recipe.frozen)
    for rule in recipe.more:
        assert rule.targets is not None
        rules[rule.targets] = rule.config()
    if recipe.task == "classification" and getattr(model.config, "labels", None) is not None:
        rules.setdefault(_HEAD, Full())
    main = recipe.lora
    rules[main.targets or _TARGETS.get(main.family, _IN_LAYERS)] = main.config()
    return rules


def schemes_of(recipe: Recipe) -> dict[str, Scheme] | None:
    """The recipe's rules for what of the base is quantised, as `models.load` takes them."""
    asked = recipe.quantize
    return None if asked is None else {asked.weights or _IN_LAYERS: asked.config()}


# --- arrays, or what stands for them --------------------------------------------------------------


def _base(
    recipe: Recipe, folder: Path, model: Any, specs: meshes.Specs, mesh: Mesh, abstract: bool
) -> PyTree:
    """The frozen weights, each read right to where it lies."""
    dtype, schemes = recipe.model.dtype, schemes_of(recipe)
    where = lambda path, shape: meshes.place(mesh, path, specs[path], shape.shape)  # noqa: E731
    if abstract:
        return models.shapes(model, dtype or "bfloat16", sharding=where, quantize=schemes)
    options = layout_of(model)
    return models.load(folder, dtype=dtype, sharding=where, quantize=schemes, **options).params


def layout_of(model: Any) -> dict[str, Any]:
    """The options of `models.load` that say how a model's layers lie."""
    return {"scanned": model.scanned} if isinstance(model, models.Decoder) else {}


def _adapter(
    key: jax.Array,
    task: tasks.Task,
    base: PyTree,
    specs: meshes.Specs,
    mesh: Mesh,
    abstract: bool,
) -> PyTree:
    """A fresh adapter, sharded like the weights that it adapts."""

    def init(key: jax.Array, base: PyTree) -> PyTree:
        return task.lora.init(key, base, *task.inputs)

    shapes = jax.eval_shape(init, key, base)
    places = meshes.shardings(mesh, shapes, meshes.adapter_specs(shapes, specs))
    if abstract:
        return _described(shapes, places)
    return jax.jit(init, out_shardings=places)(key, base)


def _state(trained: PyTree, made: Optimizing, mesh: Mesh, abstract: bool) -> State:
    """The state before the first step, moments sharded like what they belong to."""
    begin = functools.partial(initial, optimizing=made)
    shapes = jax.eval_shape(begin, trained)
    splits = jax.tree.map(lambda array: array.sharding.spec, trained)
    optimizer = meshes.optimizer_specs(shapes.optimizer, trained, splits)
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    places = places._replace(
        trained=jax.tree.map(lambda array: array.sharding, trained),
        optimizer=meshes.shardings(mesh, shapes.optimizer, optimizer),
    )
    if made.offloaded:
        check_host_memory(mesh.devices.flat)
        places = places._replace(optimizer=host_shardings(places.optimizer))
    if abstract:
        return _described(shapes, places)
    return jax.jit(begin, out_shardings=places)(trained)


def _made(
    make: Callable[[jax.Array], PyTree], key: jax.Array, where: NamedSharding, abstract: bool
) -> PyTree:
    shapes = jax.eval_shape(make, key)
    places = jax.tree.map(lambda _: where, shapes)
    return _described(shapes, places) if abstract else jax.jit(make, out_shardings=places)(key)


def _jitted(fn: Callable[..., PyTree], abstract: bool) -> Callable[..., PyTree]:
    """A function of arrays whose first argument's result takes its place."""

    def described(first: PyTree, *rest: PyTree) -> PyTree:
        shapes = jax.eval_shape(fn, first, *rest)
        return _described(shapes, jax.tree.map(lambda array: array.sharding, first))

    def run(first: PyTree, *rest: PyTree) -> PyTree:
        places = jax.tree.map(lambda array: array.sharding, first)
        return jax.jit(fn, donate_argnums=0, out_shardings=places)(first, *rest)

    return described if abstract else run


def _described(shapes: PyTree, places: PyTree) -> PyTree:
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        places,
    )


def _key(recipe: Recipe, what: str) -> jax.Array:
    """A key of its own for each use of the recipe's seed."""
    number = {"adapter": 0, "head": 1, "dropout": 2}[what]
    return jax.random.fold_in(jax.random.key(recipe.seed), number)


def dropout_key(recipe: Recipe) -> jax.Array:
    """What the keys of all steps are made from."""
    return _key(recipe, "dropout")


def _fingerprints(base: PyTree, adapter: PyTree) -> dict[str, str]:
    flat = tree.flatten(base)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    return {path: fingerprint(arrays[path]) for path in leaves_of(adapter)}


def _leaves(adapter: PyTree) -> list[Any]:
    return [node for node in jax.tree.leaves(adapter, is_leaf=is_leaf) if is_leaf(node)]


def _taken_out(adapter: PyTree) -> bool:
    """Whether some of the adapter was taken out of the weights, which then need another base."""
    return any(getattr(leaf, "residual", False) for leaf in _leaves(adapter))
