"""Setup of a run from its recipe: model, adapter, optimizer, and the jitted training step.

`build_setup` creates it with arrays, to train, or with abstract arrays, to compile for devices that
are not attached.
"""

from __future__ import annotations

import functools
import re
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
from jlora.checkpoints.adapter_file import fingerprint_weights
from jlora.checkpoints.base_digest import BaseDigest
from jlora.checkpoints.safetensors_io import open_checkpoint
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

# Weights of products inside layers, which are adapted and quantized by default. A router is left
# out, because a change of it changes the choice of all experts.
_FAMILY_TARGET_PATTERNS = {
    "BitFit": r"/layers?(_\d+)?/.*bias$",
    "TrainableTokens": r"/(embed|word)/embedding$",
}

_CLASSIFIER_PATTERN = r"^params/classifier/"


class MeshJitted:
    """A jitted function that is traced in the context of a mesh."""

    def __init__(self, mesh: Mesh, fn: Any) -> None:
        self._mesh, self._fn = mesh, fn

    def __call__(self, *args: Any) -> Any:
        with use_mesh(self._mesh):
            return self._fn(*args)

    def lower(self, *args: Any) -> Any:
        """Lowers the function, like `jax.stages.Wrapped.lower`."""
        with use_mesh(self._mesh):
            return self._fn.lower(*args)


class Setup(NamedTuple):
    """Arrays and jitted functions of a run.

    Attributes:
        folder: Folder of the base.
        model: Flax module of the base.
        objective: Adapted function and loss.
        mesh: Mesh of the devices.
        frozen: Frozen arrays: "base"; "adapter" with those of the adapter; and "reference", the
            adapter with which "base" computes what the checkpoint computes. It is empty, except
            where initial updates were subtracted from the checkpoint's weights (PiSSA, OLoRA).
        fingerprints: Fingerprints of the checkpoint's adapted weights by path; empty if abstract.
        base_digest: Digest of the checkpoint's files; None if abstract.
        optimizer: Optimizer and its learning rate schedule.
        state: Initial training state.
        train_step: Function `(state, frozen, batch, key)` to the next state and `StepMetrics`. The
            state is donated. The first call compiles it.
        eval_step: Function `(trainable, frozen, batch)` to `LossSums`.

    Example:
        >>> from jlora.training import Setup
        >>> Setup._fields[-2:]
        ('train_step', 'eval_step')
    """

    folder: Path
    model: Any
    objective: objectives.Objective
    mesh: Mesh
    frozen: PyTree
    fingerprints: dict[str, str]
    base_digest: BaseDigest | None
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
    """Returns the setup of a recipe on a mesh.

    Args:
        recipe: Recipe of the run; its data is not read.
        mesh: Mesh of the devices, which need not be attached if `abstract` is true.
        total_steps: Steps of the run, for the learning rate schedule.
        num_labels: Number of labels for classification; None for other tasks.
        abstract: Whether to create `jax.ShapeDtypeStruct`s with shardings instead of arrays.

    Raises:
        FileNotFoundError: The base does not exist.
        ValueError: The recipe does not fit the model, or the mesh does not divide the weights.
        RuntimeError: The devices compute wrong steps with an offloaded optimizer state.

    Example:
        >>> from jlora.training import Recipe, build_setup, make_mesh
        >>> recipe = Recipe.model_validate(  # doctest: +SKIP
        ...     {
        ...         "output": "run",
        ...         "model": {"path": "base"},
        ...         "data": {"train": [{"path": "train.jsonl", "format": "chat"}]},
        ...     }
        ... )
        >>> setup = build_setup(recipe, make_mesh({}), total_steps=100)  # doctest: +SKIP
    """
    folder = hub.resolve_checkpoint_folder(recipe.model.path, recipe.model.revision)
    model = model_from_recipe(recipe, folder)
    specs = weight_specs(model, *example_inputs(model))
    objective = objective_from_recipe(recipe, model, num_labels)
    # Before the weights are read: files that are replaced in between are then noticed.
    digest = None if abstract else BaseDigest.from_folder(folder)
    base = _build_base_params(recipe, folder, model, specs, mesh, abstract)
    keys = {name: _derive_prng_key(recipe, name) for name in ("adapter", "head")}
    with use_mesh(mesh):
        adapter = _build_initial_adapter(keys["adapter"], objective, base, specs, mesh, abstract)
        fingerprints = {} if abstract else _fingerprint_weights(base, adapter)
        reference = _residual_leaves(adapter)
        if reference:
            base = _jit_or_eval_shape(residual_base, abstract)(base, reference)
        trainable_part, frozen_part = partition(adapter)
        trainable = {"adapter": trainable_part}
        if objective.init_head is not None:
            replicated = NamedSharding(mesh, PartitionSpec())
            trainable["head"] = _build_new_head(
                objective.init_head, keys["head"], replicated, abstract
            )
        has_gates = any(isinstance(leaf, SoRALeaf) for leaf in _list_adapter_leaves(adapter))
        optimizer = make_optimizer(recipe.optimizer, total_steps, has_gates=has_gates)
        state = _build_train_state(trainable, optimizer, mesh, abstract)
        if optimizer.offload_state and not abstract:
            check_offload(
                optimizer.transform,
                state.trainable,
                state.opt_state,
                accumulation_steps=recipe.batch.gradient_accumulation_steps,
            )
    step = make_train_step(objective.loss_fn, optimizer, recipe.optimizer.max_grad_norm)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    jitted_step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    return Setup(
        folder=folder,
        model=model,
        objective=objective,
        mesh=mesh,
        frozen={"base": base, "adapter": frozen_part, "reference": reference},
        fingerprints=fingerprints,
        base_digest=digest,
        optimizer=optimizer,
        state=state,
        train_step=MeshJitted(mesh, jitted_step),
        eval_step=MeshJitted(mesh, jax.jit(make_eval_step(objective.loss_fn))),
    )


def model_from_recipe(recipe: Recipe, folder: Path) -> Any:
    """Returns the Flax module of a recipe.

    Args:
        recipe: Recipe of the run.
        folder: Folder of the base, which has config.json.
    """
    options = recipe.model
    implementation = options.attention_implementation
    model = models.model_from_config(folder)
    if isinstance(model, models.Decoder):
        scan_layers = options.scan_layers
        model = model.clone(
            scan_layers=model.can_scan_layers if scan_layers is None else scan_layers,
            remat_policy=options.remat_policy,
            attention_implementation=None if implementation == "auto" else implementation,
        )
    if not isinstance(model, models.ViT):
        model = model.clone(text_layout="packed" if recipe.packs_rows else "padded")
    dtype = options.compute_dtype
    if dtype is None and _has_float16_weights(recipe, folder):
        dtype = "float32"  # Gradients below 6e-8 are zero in float16.
    return model if dtype is None else model.clone(dtype=dtype)


def _has_float16_weights(recipe: Recipe, folder: Path) -> bool:
    """Whether most weights of the base are in float16; False for a base without files."""
    if recipe.model.dtype is not None or not any(folder.glob("*.safetensors")):
        return recipe.model.dtype == "float16"
    with open_checkpoint(folder) as reader:
        stored = [header.dtype for header in reader.headers.values()]
    return 2 * stored.count("F16") > len(stored)


def objective_from_recipe(
    recipe: Recipe, model: Any, num_labels: int | None = None
) -> objectives.Objective:
    """Returns the objective of a recipe.

    Args:
        recipe: Recipe of the run.
        model: Flax module of the base.
        num_labels: Number of labels for classification; None for other tasks.
    """
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
    """Returns the adapter rules of a recipe, by pattern; the first that matches a weight wins.

    The order is: frozen modules, additional adapters, the model's own head, the main adapter.
    """
    rules: dict[str, AdapterConfig | None] = dict.fromkeys(frozen_patterns(recipe, model))
    for rule in recipe.adapters:
        assert rule.target_pattern is not None
        rules[models.find_target_pattern(model, rule.target_pattern)] = rule.to_config()
    if recipe.task == "classification" and getattr(model.config, "num_labels", None) is not None:
        rules.setdefault(_CLASSIFIER_PATTERN, FullDelta())
    main = recipe.adapter
    targets = default_targets(main.family) if main.target_pattern is None else main.target_pattern
    rules[models.find_target_pattern(model, targets)] = main.to_config()
    return rules


def frozen_patterns(recipe: Recipe, model: Any) -> list[str]:
    """Returns the patterns of the frozen modules, of which names of the checkpoint are resolved."""
    paths = models.checkpoint_mapping(model)[0]
    return [
        pattern
        if any(re.search(pattern, path) for path in paths)
        else models.find_target_pattern(model, pattern)
        for pattern in recipe.frozen_modules
    ]


def default_targets(family: str) -> str:
    """Returns the targets that a family of adapters changes by default."""
    return _FAMILY_TARGET_PATTERNS.get(family, "all-linear")


def schemes_from_recipe(recipe: Recipe, model: Any) -> dict[str, QuantizationScheme] | None:
    """Returns the quantization schemes of a recipe by pattern; None without quantization."""
    options = recipe.quantize
    if options is None:
        return None
    targets = "all-linear" if options.target_pattern is None else options.target_pattern
    try:
        pattern = models.find_target_pattern(model, targets)
    except ValueError as error:
        raise ValueError(f"quantize.target_pattern: {error}") from None
    return {pattern: options.to_scheme()}


def _build_base_params(
    recipe: Recipe, folder: Path, model: Any, specs: WeightSpecs, mesh: Mesh, abstract: bool
) -> PyTree:
    """Returns the base weights, each loaded with its sharding."""
    dtype, schemes = recipe.model.dtype, schemes_from_recipe(recipe, model)

    def shard(path: str, weight: Any) -> NamedSharding:
        return make_named_sharding(mesh, path, specs[path], weight.shape)

    if abstract:
        return models.abstract_params(model, dtype or "bfloat16", sharding=shard, quantize=schemes)
    options = get_layer_layout_options(model)
    return models.load(folder, dtype=dtype, sharding=shard, quantize=schemes, **options).params


def get_layer_layout_options(model: Any) -> dict[str, Any]:
    """Returns the options of `models.load` for the layout of a model's layers."""
    return {"scan_layers": model.scan_layers} if isinstance(model, models.Decoder) else {}


def _build_initial_adapter(
    key: jax.Array,
    objective: objectives.Objective,
    base: PyTree,
    specs: WeightSpecs,
    mesh: Mesh,
    abstract: bool,
) -> PyTree:
    """Returns the initial adapter, sharded like the adapted weights."""

    def init(key: jax.Array, base: PyTree) -> PyTree:
        return objective.lora.init(key, base, *objective.example_inputs)

    shapes = jax.eval_shape(init, key, base)
    shardings = make_tree_shardings(mesh, shapes, adapter_specs(shapes, specs))
    if abstract:
        return _make_abstract_arrays(shapes, shardings)
    if jax.process_count() > 1:
        return jax.jit(init, out_shardings=shardings)(key, base)
    # One program of random numbers for every weight would compile for a minute on a GPU. Without
    # jit, weights of one shape share their programs.
    return jax.device_put(init(key, base), shardings)


def _build_train_state(
    trainable: PyTree, scheduled_optimizer: ScheduledOptimizer, mesh: Mesh, abstract: bool
) -> TrainState:
    """Returns the initial training state; moments are sharded like their parameters."""
    init = functools.partial(init_train_state, scheduled_optimizer=scheduled_optimizer)
    shapes = jax.eval_shape(init, trainable)
    trainable_specs = jax.tree.map(lambda array: array.sharding.spec, trainable)
    opt_specs = opt_state_specs(shapes.opt_state, trainable, trainable_specs)
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    shardings = shardings._replace(
        trainable=jax.tree.map(lambda array: array.sharding, trainable),
        opt_state=make_tree_shardings(mesh, shapes.opt_state, opt_specs),
    )
    if scheduled_optimizer.offload_state:
        check_host_memory(mesh.devices.flat)
        shardings = shardings._replace(opt_state=host_shardings(shardings.opt_state))
    if abstract:
        return _make_abstract_arrays(shapes, shardings)
    return jax.jit(init, out_shardings=shardings)(trainable)


def _build_new_head(
    init_head: Callable[[jax.Array], PyTree],
    key: jax.Array,
    sharding: NamedSharding,
    abstract: bool,
) -> PyTree:
    shapes = jax.eval_shape(init_head, key)
    shardings = jax.tree.map(lambda _: sharding, shapes)
    if abstract:
        return _make_abstract_arrays(shapes, shardings)
    return jax.jit(init_head, out_shardings=shardings)(key)


def _jit_or_eval_shape(fn: Callable[..., PyTree], abstract: bool) -> Callable[..., PyTree]:
    """Returns a function that replaces its first argument by a result with the same shardings."""

    def run(first: PyTree, *rest: PyTree) -> PyTree:
        shardings = jax.tree.map(lambda array: array.sharding, first)
        if abstract:
            return _make_abstract_arrays(jax.eval_shape(fn, first, *rest), shardings)
        return jax.jit(fn, donate_argnums=0, out_shardings=shardings)(first, *rest)

    return run


def _make_abstract_arrays(shapes: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _derive_prng_key(recipe: Recipe, purpose: str) -> jax.Array:
    """Returns a separate key for each purpose from the recipe's seed."""
    number = {"adapter": 0, "head": 1, "dropout": 2}[purpose]
    return jax.random.fold_in(jax.random.key(recipe.seed), number)


def make_dropout_key(recipe: Recipe) -> jax.Array:
    """Returns the key from which the dropout keys of all steps are derived."""
    return _derive_prng_key(recipe, "dropout")


def _fingerprint_weights(base: PyTree, adapter: PyTree) -> dict[str, str]:
    """Returns the fingerprints of the adapted weights."""
    flat = _tree.flatten_with_paths(base)
    arrays = dict(zip(flat.paths, flat.leaves, strict=True))
    return fingerprint_weights(arrays, adapter)


def _list_adapter_leaves(adapter: PyTree) -> list[Any]:
    return [
        node for node in jax.tree.leaves(adapter, is_leaf=is_adapter_node) if is_adapter_node(node)
    ]


def _residual_leaves(adapter: PyTree) -> dict[str, Any]:
    """Returns the leaves of an initial adapter that are subtracted from the base weights."""
    leaves = get_adapter_leaves(adapter)
    return {path: leaf for path, leaf in leaves.items() if getattr(leaf, "residual", False)}
