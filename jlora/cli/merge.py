"""`jlora merge`: a combination of several adapters of one base."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jlora.cli.export import check_adapter_bases, check_output_is_new, replaces_base_weights

if TYPE_CHECKING:
    from jlora.checkpoints.base_digest import BaseDigest


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Combine the weight updates of several adapters of one base into one adapter.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        out: New adapter file.
        adapters: Adapter files of jlora, or PEFT folders.
        weights: Weight of each adapter, in their order; 1 by default.
        method: linear, magnitude, ties, dare, dare-ties, della or della-linear.
        density: Fraction of the entries that are kept, for all methods except linear.
        epsilon: Range of the keep probabilities around the density, for della.
        rank: Maximum rank of the result; not reduced by default.
        energy: Fraction of each update's squared norm to keep, instead of a rank.
        seed: Random seed of dare and della; 0 by default.
        heat_map: New PNG file with the interference between the adapters.
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
    """Writes the combined adapter, and prints its fidelity and the adapters' interference.

    Raises:
        ValueError: If options are invalid, an adapter cannot be combined, or its run had another
            base.
        FileExistsError: If an output exists.
        OutputInUseError: If another process is writing it.
        ModuleNotFoundError: If a heat map is requested without matplotlib.
    """
    from jlora.checkpoints.output_lock import lock_output

    method = _build_merge_method(options)
    _check_merge_options(options)
    with lock_output(options.out):
        _check_merge_options(options)  # Another process may just have written the output.
        _merge_adapters(options, method)


def _merge_adapters(options: MergeOptions, method: Any) -> None:
    """Combines the adapters of the options, whose outputs no other process writes."""
    from jlora.models.hf.load import open_model

    digest = check_adapter_bases(options.base, options.adapters)
    with open_model(options.base) as (model, params):
        _merge_on_base(options, method, model, params, digest)


def _merge_on_base(
    options: MergeOptions, method: Any, model: Any, params: Any, digest: BaseDigest
) -> None:
    """Combines the adapters of the options on their base, of stored weights."""
    import jax

    from jlora import merging
    from jlora.checkpoints.adapter_file import read_quantization_schemes
    from jlora.checkpoints.lineage import Lineage, ParentAdapter, content_hash
    from jlora.training.prompt_format import read_prompt_format, save_adapter_and_format

    formats = {read_prompt_format(path, model) for path in options.adapters}
    adapters = [_load_adapter_of_any_format(path, model, params) for path in options.adapters]
    weights = [1.0] * len(adapters) if options.weights is None else list(options.weights)
    combined = merging.combine_adapters(
        adapters,
        weights,
        method=method,
        params=params,
        rank=options.rank,
        energy=options.energy,
        key=jax.random.key(options.seed or 0) if method.is_random else None,
    )
    parents = tuple(
        ParentAdapter(str(path), content_hash(adapter), weight)
        for path, adapter, weight in zip(options.adapters, adapters, weights, strict=True)
    )
    lineage = Lineage(parents=parents, method=_describe_merge(options, method))
    prompt_format = next(iter(formats)) if len(formats) == 1 else None
    save_adapter_and_format(options.out, combined.adapter, params, prompt_format, digest, lineage)
    print(combined)
    if len(adapters) > 1:
        interference = merging.measure_interference(
            _name_adapters_by_path(options.adapters, adapters), params
        )
        print(f"\n{interference}\n")
        if options.heat_map is not None:
            merging.save_heatmap(interference, options.heat_map)
            print(f"Wrote {options.heat_map}.")
    if len(formats) > 1:
        print(
            "The adapters were trained on prompts of different formats, so the new adapter has "
            "none: jlora generate uses the chat template of the base."
        )
    files = [path for path in options.adapters if not path.is_dir()]
    schemes = sorted({scheme for file in files for scheme in read_quantization_schemes(file)})
    if schemes:
        print(
            f"Some adapters were trained on weights quantized as {', '.join(schemes)}; the new "
            f"adapter is for the original weights, on which those were not evaluated."
        )
    print(f"Wrote {options.out}.")


def _build_merge_method(options: MergeOptions) -> Any:
    """Returns the merging method of the options.

    Raises:
        ValueError: If the method is unknown, requires another option, or does not use one.
    """
    from jlora import merging

    # Class, fixed arguments and options of each method.
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
        raise ValueError(f"--method {options.method} must be one of {', '.join(methods)}.")
    method, fixed, option_names = methods[options.method]
    values = {name: getattr(options, name) for name in ("density", "epsilon")}
    for name, value in values.items():
        if value is None and name in option_names:
            raise ValueError(f"--method {options.method} requires --{name}. Give it, such as 0.2.")
        if value is not None and name not in option_names:
            raise ValueError(f"--method {options.method} does not use --{name}. Leave it out.")
    if options.seed is not None and not method.is_random:
        raise ValueError(f"--method {options.method} is not random. Leave --seed out.")
    return method(**fixed, **{name: values[name] for name in option_names})


def _check_merge_options(options: MergeOptions) -> None:
    """Rejects invalid outputs and weights before the base is loaded."""
    check_output_is_new(options.out)
    if options.heat_map is not None:
        check_output_is_new(options.heat_map)
        if options.heat_map.absolute() == options.out.absolute():
            raise ValueError(
                f"--heat-map {options.heat_map} is also the file of the new adapter. Use another "
                f"name."
            )
        if len(options.adapters) < 2:
            raise ValueError("--heat-map compares adapters, but there is only one. Leave it out.")
        if importlib.util.find_spec("matplotlib") is None:
            raise ModuleNotFoundError(
                "--heat-map requires matplotlib, which is not installed. Use "
                "pip install 'jlora[train]', or leave it out."
            )
    if options.weights is not None and len(options.weights) != len(options.adapters):
        raise ValueError(
            f"--weights must have one number for each of the {len(options.adapters)} adapters, got "
            f"{len(options.weights)}."
        )


def _load_adapter_of_any_format(path: Path, model: Any, params: Any) -> Any:
    """Returns the adapter of a jlora file or a PEFT folder.

    Raises:
        ValueError: If a PEFT folder replaces weights of the base, or a file is for another base.
    """
    from jlora import peft
    from jlora.checkpoints.adapter_file import load_adapter

    if not path.is_dir():
        return load_adapter(path, params)
    loaded = peft.load(path, model, params)
    if replaces_base_weights(loaded.params, params):
        raise ValueError(
            f"{path} also replaces weights of the base, which cannot be combined with updates. "
            f"Use jlora export --format hf."
        )
    return loaded.adapter


def _name_adapters_by_path(paths: tuple[Path, ...], adapters: list[Any]) -> dict[str, Any]:
    """Returns the adapters by the shortest distinct ends of their paths."""
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).removesuffix(".safetensors") for path in paths]
        if len(set(names)) == len(names):
            return dict(zip(names, adapters, strict=True))
    return {
        f"{number}: {path}": a
        for number, (path, a) in enumerate(zip(paths, adapters, strict=True), 1)
    }


def _describe_merge(options: MergeOptions, method: Any) -> str:
    """Returns the method and options of the merge as a text."""
    values = {name: getattr(options, name) for name in ("rank", "energy")}
    if method.is_random:
        values["seed"] = options.seed or 0
    texts = [f"{name}={value}" for name, value in values.items() if value is not None]
    return ", ".join([f"jlora merge: {method}", *texts])
