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

from jlora import _tree, models
from jlora._tree import PyTree
from jlora.adapters.base import AdapterConfig, get_adapter_leaves, is_adapter_node
from jlora.adapters.full import FullDelta
from jlora.adapters.sora import SoRALeaf
from jlora.checkpoints import hub
from jlora.checkpoints.adapter_file import fingerprint
from jlora.convert import residual_base
from jlora.models.hf.load import example_inputs
from jlora.optim.multi_transform import partition
from jlora.optim.offload import check_host_memory, check_offload, host_shardings
from jlora.quantization.schemes import QuantizationScheme
from jlora.training import objectives
from jlora.training.recipe.sections import Recipe
from jlora.training.sharding import (
    WeightSpecs,
    adapter_specs,
    make_named_sharding,
    make_tree_shardings,
    opt_state_specs,
    use_mesh,
    weight_specs,
)
from jlora.training.train_step import (
    ScheduledOptimizer,
    TrainState,
    init_train_state,
    make_eval_step,
    make_optimizer,
    make_train_step,
)

# Products inside layers, which are adapted, and quantised. A router chooses experts, and moving it
# moves all of them.
_DEFAULT_TARGET_PATTERN = r"/layers?(_\d+)?/.*(?<!router)/(kernel|gate_up|down)$"

_FAMILY_TARGET_PATTERNS = {
    "BitFit": r"/layers?(_\d+)?/.*bias$",
    "TrainableTokens": r"/(embed|word)/embedding$",
}

_CLASSIFIER_PATTERN = r"^params/classifier/"


class MeshJitted:
    """A jitted function whose tracing sees a mesh."""

    def __init__(self, mesh: Mesh, fn: Any) -> None:
        self._mesh, self._fn = mesh, fn

    def __call__(self, *args: Any) -> Any:
        with use_mesh(self._mesh):
            return self._fn(*args)

    def lower(self, *args: Any) -> Any:
        """As `jax.stages.Wrapped.lower`."""
        with use_mesh(self._mesh):
            return self._fn.lower(*args)


class Setup(NamedTuple):
    """What a run computes with.

    Attributes:
        folder: Of the base.
        model: Of the base.
        objective: What is adapted, and the loss.
        mesh: Of the devices.
        frozen: `{"base": ..., "adapter": ...}`, the latter with its frozen arrays.
        fingerprints: Of the adapted weights of the checkpoint, by path; none if all is abstract.
        initial_adapter: The adapter before the first step, where its base is not the checkpoint's own.
        optimizer: What makes steps of gradients.
        state: Before the first step.
        train_step: Compiled at its first call: `(state, frozen, batch, key)`, the state donated.
        eval_step: Likewise: `(trained, frozen, batch)`.
    """

    folder: Path
    model: Any
    objective: objectives.Objective
    mesh: Mesh
    frozen: PyTree
    fingerprints: dict[str, str]
    initial_adapter: PyTree | None
    optimizer: ScheduledOptimizer
    state: TrainState
    train_step: MeshJitted
    eval_step: MeshJitted


def build_setup(
    recipe: Recipe,
    mesh: Mesh,
    *,
    total_steps: int,
    num_labels: int | None = None,
    abstract: bool = False,
) -> Setup:
    """What a recipe describes, on a mesh.

    Args:
        recipe: The whole of it; its data is not looked at.
        mesh: Of the devices, which may not be here if all is abstract.
        total_steps: How many are made in all, for the learning rate.
        num_labels: How many, for classification.
        abstract: Whether arrays are only described, as `jax.ShapeDtypeStruct`s with shardings.

    Raises:
        FileNotFoundError: The base is not there.
        ValueError: The recipe asks for what the model or devices have not, or the mesh does not
            divide it.
        RuntimeError: The devices compute something else with the optimizer's state offloaded.
    """
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    model = model_from_recipe(recipe, folder)
    specs = weight_specs(model, *example_inputs(model))
    task = objective_from_recipe(recipe, model, num_labels)
    base = _build_base_params(recipe, folder, model, specs, mesh, abstract)
    keys = {name: _derive_prng_key(recipe, name) for name in ("adapter", "head")}
    # Devices that are not here can compute nothing, keys neither.
    with use_mesh(mesh):
        adapter = _build_initial_adapter(keys["adapter"], task, base, specs, mesh, abstract)
        prints = {} if abstract else _fingerprint_weights(base, adapter)
        fresh = adapter if _uses_residual_base(adapter) else None
        if fresh is not None:
            base = _jit_or_eval_shape(residual_base, abstract)(base, fresh)
        trained, rest = partition(adapter)
        arrays = {"adapter": trained}
        if task.init_head is not None:
            whole = NamedSharding(mesh, PartitionSpec())
            arrays["head"] = _build_new_head(task.init_head, keys["head"], whole, abstract)
        gates = any(isinstance(leaf, SoRALeaf) for leaf in _list_adapter_leaves(adapter))
        made = make_optimizer(recipe.optimizer, total_steps, has_gates=gates)
        state = _build_train_state(arrays, made, mesh, abstract)
        if made.offload_state and not abstract:
            passes = recipe.batch.gradient_accumulation_steps
            check_offload(
                made.transform, state.trainable, state.opt_state, accumulation_steps=passes
            )
    step = make_train_step(task.loss_fn, made, recipe.optimizer.max_grad_norm)
    places = jax.tree.map(lambda array: array.sharding, state)
    return Setup(
        folder=folder,
        model=model,
        objective=task,
        mesh=mesh,
        frozen={"base": base, "adapter": rest},
        fingerprints=prints,
        initial_adapter=fresh,
        optimizer=made,
        state=state,
        train_step=MeshJitted(mesh, jax.jit(step, donate_argnums=0, out_shardings=(places, None))),
        eval_step=MeshJitted(mesh, jax.jit(make_eval_step(task.loss_fn))),
    )


def model_from_recipe(recipe: Recipe, folder: Path) -> Any:
    """The model of a recipe, without weights."""
    asked = recipe.model
    model = models.model_from_config(folder)
    if isinstance(model, models.Decoder):
        scanned = model.can_scan_layers if asked.scan_layers is None else asked.scan_layers
        model = model.clone(
            scanned=scanned, remat=asked.remat_policy, implementation=asked.attention_implementation
        )
    return model if asked.compute_dtype is None else model.clone(dtype=asked.compute_dtype)


def objective_from_recipe(
    recipe: Recipe, model: Any, num_labels: int | None = None
) -> objectives.Objective:
    """What a recipe trains for."""
    rules = rules_from_recipe(recipe, model)
    if recipe.task == "language":
        return objectives.make_lm_objective(model, rules, recipe.optimizer)
    if recipe.task == "preference":
        return objectives.make_dpo_objective(model, rules, recipe.optimizer, recipe.dpo)
    assert num_labels is not None
    return objectives.make_classification_objective(
        model, rules, recipe.optimizer, recipe.classification, num_labels
    )


def rules_from_recipe(recipe: Recipe, model: Any) -> dict[str, AdapterConfig | None]:
    """The recipe's rules: what stays frozen, further rules, a head's own, and the main one."""
    rules: dict[str, AdapterConfig | None] = dict.fromkeys(recipe.frozen_modules)
    for rule in recipe.adapters:
        assert rule.target_pattern is not None
        rules[rule.target_pattern] = rule.to_config()
    if recipe.task == "classification" and getattr(model.config, "num_labels", None) is not None:
        rules.setdefault(_CLASSIFIER_PATTERN, FullDelta())
    main = recipe.adapter
    rules[
        main.target_pattern or _FAMILY_TARGET_PATTERNS.get(main.family, _DEFAULT_TARGET_PATTERN)
    ] = main.to_config()
    return rules


def schemes_from_recipe(recipe: Recipe) -> dict[str, QuantizationScheme] | None:
    """The recipe's rules for what of the base is quantised, as `models.load` takes them."""
    asked = recipe.quantize
    return (
        None
        if asked is None
        else {asked.target_pattern or _DEFAULT_TARGET_PATTERN: asked.to_scheme()}
    )


def _build_base_params(
    recipe: Recipe, folder: Path, model: Any, specs: WeightSpecs, mesh: Mesh, abstract: bool
) -> PyTree:
    """The frozen weights, each read right to where it lies."""
    dtype, schemes = recipe.model.dtype, schemes_from_recipe(recipe)
    where = lambda path, shape: make_named_sharding(mesh, path, specs[path], shape.shape)  # noqa: E731
    if abstract:
        return models.abstract_params(model, dtype or "bfloat16", sharding=where, quantize=schemes)
    options = get_layer_layout_options(model)
    return models.load(folder, dtype=dtype, sharding=where, quantize=schemes, **options).params


def get_layer_layout_options(model: Any) -> dict[str, Any]:
    """The options of `models.load` that say how a model's layers lie."""
    return {"scan_layers": model.scan_layers} if isinstance(model, models.Decoder) else {}


def _build_initial_adapter(
    key: jax.Array,
    objective: objectives.Objective,
    base: PyTree,
    specs: WeightSpecs,
    mesh: Mesh,
    abstract: bool,
) -> PyTree:
    """A fresh adapter, sharded like the weights that it adapts."""

    def init(key: jax.Array, base: PyTree) -> PyTree:
        return objective.lora.init(key, base, *objective.example_inputs)

    shapes = jax.eval_shape(init, key, base)
    places = make_tree_shardings(mesh, shapes, adapter_specs(shapes, specs))
    if abstract:
        return _make_abstract_arrays(shapes, places)
    return jax.jit(init, out_shardings=places)(key, base)


def _build_train_state(
    trainable: PyTree, scheduled_optimizer: ScheduledOptimizer, mesh: Mesh, abstract: bool
) -> TrainState:
    """The state before the first step, moments sharded like what they belong to."""
    begin = functools.partial(init_train_state, scheduled_optimizer=scheduled_optimizer)
    shapes = jax.eval_shape(begin, trainable)
    splits = jax.tree.map(lambda array: array.sharding.spec, trainable)
    optimizer = opt_state_specs(shapes.opt_state, trainable, splits)
    places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    places = places._replace(
        trainable=jax.tree.map(lambda array: array.sharding, trainable),
        opt_state=make_tree_shardings(mesh, shapes.opt_state, optimizer),
    )
    if scheduled_optimizer.offload_state:
        check_host_memory(mesh.devices.flat)
        places = places._replace(opt_state=host_shardings(places.opt_state))
    if abstract:
        return _make_abstract_arrays(shapes, places)
    return jax.jit(begin, out_shardings=places)(trainable)


def _build_new_head(
    init_head: Callable[[jax.Array], PyTree],
    key: jax.Array,
    sharding: NamedSharding,
    abstract: bool,
) -> PyTree:
    shapes = jax.eval_shape(init_head, key)
    places = jax.tree.map(lambda _: sharding, shapes)
    return (
        _make_abstract_arrays(shapes, places)
        if abstract
        else jax.jit(init_head, out_shardings=places)(key)
    )


def _jit_or_eval_shape(fn: Callable[..., PyTree], abstract: bool) -> Callable[..., PyTree]:
    """A function of arrays whose first argument's result takes its place."""

    def described(first: PyTree, *rest: PyTree) -> PyTree:
        shapes = jax.eval_shape(fn, first, *rest)
        return _make_abstract_arrays(shapes, jax.tree.map(lambda array: array.sharding, first))

    def run(first: PyTree, *rest: PyTree) -> PyTree:
        places = jax.tree.map(lambda array: array.sharding, first)
        return jax.jit(fn, donate_argnums=0, out_shardings=places)(first, *rest)

    return described if abstract else run


def _make_abstract_arrays(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
        shapes,
        shardings,
    )


def _derive_prng_key(recipe: Recipe, purpose: str) -> jax.Array:
    """A key of its own for each use of the recipe's seed."""
    number = {"adapter": 0, "head": 1, "dropout": 2}[purpose]
    return jax.random.fold_in(jax.random.key(recipe.seed), number)


def make_dropout_key(recipe: Recipe) -> jax.Array:
    """What the keys of all steps are made from."""
    return _derive_prng_key(recipe, "dropout")


def _fingerprint_weights(base: PyTree, adapter: PyTree) -> dict[str, str]:
    flat = _tree.flatten_with_paths(base)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    return {path: fingerprint(arrays[path]) for path in get_adapter_leaves(adapter)}


def _list_adapter_leaves(adapter: PyTree) -> list[Any]:
    return [
        node for node in jax.tree.leaves(adapter, is_leaf=is_adapter_node) if is_adapter_node(node)
    ]


def _uses_residual_base(adapter: PyTree) -> bool:
    """Whether some of the adapter was taken out of the weights, which then need another base."""
    return any(getattr(leaf, "residual", False) for leaf in _list_adapter_leaves(adapter))
