"""Several adapters as one."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from jlora.cli.export import check_output_is_new, infer_layer_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Combine adapters of one base into one, by what they change.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        out: The new adapter file.
        adapters: Files of jlora.save_adapter, or folders of PEFT's.
        weights: A number for each adapter, in their order; ones when left out.
        method: linear, magnitude, ties, dare, dare-ties, della or della-linear.
        density: Share of the entries that are kept; for all methods but linear.
        epsilon: How far the probabilities of della are from the density.
        rank: Of the result; the sum of the ranks, or the whole change, when left out.
        energy: In place of a rank: the share of each change's squared norm that is kept.
        seed: Of the draws of dare and della; 0 when left out.
        heat_map: A new PNG with how much the adapters are in each other's way.
    """

    base: str
    out: Path
    adapters: tuple[Path, ...]
    weights: tuple[float, ...] | None = None
    method: str = "linear"
    density: float | None = None
    epsilon: float | None = None
    rank: int | None = None
    energy: float | None = None
    seed: int | None = None
    heat_map: Path | None = None
    example = "jlora merge base/ both.safetensors one.safetensors two/ --weights 1 -0.5 --rank 16"


def run_merge(options: MergeOptions) -> None:
    """Writes the adapter, and prints what it keeps and how the adapters meet."""
    import jax

    from jlora import merging, models
    from jlora.checkpoints.adapter_file import read_quantization_schemes, save_adapter
    from jlora.checkpoints.lineage import Lineage, ParentAdapter, content_hash

    method = _build_merge_method(options)
    _check_merge_options(options)
    model, params = models.load(options.base, **_common_layer_layout(options.adapters))
    adapters = [_load_adapter_of_any_format(path, model, params) for path in options.adapters]
    weights = [1.0] * len(adapters) if options.weights is None else list(options.weights)
    combined = merging.combine_adapters(
        adapters,
        weights,
        method=method,
        params=params,
        rank=options.rank,
        energy=options.energy,
        key=jax.random.key(options.seed or 0) if method.random else None,
    )
    parents = tuple(
        ParentAdapter(str(path), content_hash(adapter), weight)
        for path, adapter, weight in zip(options.adapters, adapters, weights, strict=True)
    )
    lineage = Lineage(parents=parents, method=_describe_merge(options, method))
    save_adapter(options.out, combined.adapter, params, lineage)
    print(combined)
    if len(adapters) > 1:
        found = merging.measure_interference(
            _name_adapters_by_path(options.adapters, adapters), params
        )
        print(f"\n{found}\n")
        if options.heat_map is not None:
            merging.save_heatmap(found, options.heat_map)
            print(f"Wrote {options.heat_map}.")
    schemes = sorted(
        {
            s
            for path in options.adapters
            if not path.is_dir()
            for s in read_quantization_schemes(path)
        }
    )
    if schemes:
        print(
            f"Some were trained on weights quantised as {', '.join(schemes)}; the new adapter is "
            f"for the original ones, which those were not measured on."
        )
    print(f"Wrote {options.out}.")


def _build_merge_method(options: MergeOptions) -> Any:
    """The method that is asked for.

    Raises:
        ValueError: There is none of that name, it lacks an option, or has no use for one.
    """
    from jlora import merging

    # Of each, its class, what is fixed in it, and the options that it takes.
    methods: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
        "linear": (merging.Linear, {}, ()),
        "magnitude": (merging.Magnitude, {}, ("density",)),
        "ties": (merging.TIES, {}, ("density",)),
        "dare": (merging.DARE, {}, ("density",)),
        "dare-ties": (merging.DARE, {"elect_signs": True}, ("density",)),
        "della": (merging.DELLA, {}, ("density", "epsilon")),
        "della-linear": (merging.DELLA, {"elect_signs": False}, ("density", "epsilon")),
    }
    if options.method not in methods:
        raise ValueError(f"--method {options.method} is none of {', '.join(methods)}.")
    made, fixed, taken = methods[options.method]
    given = {name: getattr(options, name) for name in ("density", "epsilon")}
    for name, value in given.items():
        if (value is None) == (name in taken):
            says = "needs" if value is None else "has no use for"
            mend = "Give it, such as 0.2." if value is None else "Leave it out."
            raise ValueError(f"--method {options.method} {says} --{name}. {mend}")
    if options.seed is not None and not made.random:
        raise ValueError(f"--method {options.method} draws nothing, so --seed does nothing there.")
    return made(**fixed, **{name: given[name] for name in taken})


def _check_merge_options(options: MergeOptions) -> None:
    """Refuses what cannot be, before the base is loaded."""
    check_output_is_new(options.out)
    if options.heat_map is not None:
        check_output_is_new(options.heat_map)
        if options.heat_map.absolute() == options.out.absolute():
            raise ValueError(f"--heat-map {options.heat_map} is the new adapter's own file, too.")
        if len(options.adapters) < 2:
            raise ValueError("--heat-map compares adapters, and only one is given. Leave it out.")
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "--heat-map draws with matplotlib, which is missing. Use "
                "pip install 'jlora[train]', or leave it out."
            )
    if options.weights is not None and len(options.weights) != len(options.adapters):
        raise ValueError(
            f"--weights has {len(options.weights)} numbers for {len(options.adapters)} adapters. "
            f"Give one for each, in their order."
        )


def _common_layer_layout(paths: tuple[Path, ...]) -> dict[str, Any]:
    """How the layers lie in the base that all adapters are for; PEFT's folders fit either way.

    Raises:
        ValueError: Files differ in it.
    """
    layouts = {path: infer_layer_layout(path) for path in paths if not path.is_dir()}
    first = next(iter(layouts.values()), {})
    for path, layout in layouts.items():
        if layout != first:
            stacked, apart = (path, next(iter(layouts))) if layout else (next(iter(layouts)), path)
            raise ValueError(
                f"{stacked} is for layers in one stack, and {apart} for layers apart. Export one "
                f"of them with jlora export peft, whose folder fits either."
            )
    return first


def _load_adapter_of_any_format(path: Path, model: Any, params: Any) -> Any:
    """The adapter of either format.

    Raises:
        ValueError: A folder of PEFT's replaces weights of the base, or a file is of another base.
    """
    import jax

    from jlora import peft
    from jlora.checkpoints.adapter_file import load_adapter

    if not path.is_dir():
        return load_adapter(path, params)
    loaded = peft.load(path, model, params)
    same = jax.tree.map(lambda one, two: one is two, loaded.params, params)
    if not jax.tree.all(same):
        raise ValueError(
            f"{path} also replaces weights of the base, which cannot be added up with changes. "
            f"Use jlora export hf."
        )
    return loaded.adapter


def _name_adapters_by_path(paths: tuple[Path, ...], adapters: list[Any]) -> dict[str, Any]:
    """The adapters by the shortest ends of their paths that differ."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).removesuffix(".safetensors") for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, adapters, strict=True))
    return {
        f"{number}: {path}": a
        for number, (path, a) in enumerate(zip(paths, adapters, strict=True), 1)
    }


def _describe_merge(options: MergeOptions, method: Any) -> str:
    """The method and what else made the result, as a text."""
    more = {name: getattr(options, name) for name in ("rank", "energy")}
    if method.random:
        more["seed"] = options.seed or 0
    said = [f"{name}={value}" for name, value in more.items() if value is not None]
    return ", ".join([f"jlora merge: {method}", *said])
