"""An adapter as a folder that PEFT reads."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from jlora import tree
from jlora.adapters.full import FullLeaf
from jlora.adapters.lokr import factorization
from jlora.adapters.protocol import AdapterLeaf, Weight, check_adapter
from jlora.adapters.token_rows import TokenRowsLeaf
from jlora.checkpoints.pieces import Weight as Stored
from jlora.checkpoints.tensors import listed, new_folder
from jlora.packed import dense
from jlora.peft.config import CONFIG
from jlora.peft.formats import FORMATS, Format
from jlora.peft.layouts import Facts, to_file
from jlora.peft.reading import PREFIX, TENSORS, TOKEN_ROWS, WITH_HEAD
from jlora.peft.sites import Site, sites_of

PyTree = Any
TASKS = (
    "CAUSAL_LM",
    "SEQ_2_SEQ_LM",
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
    "FEATURE_EXTRACTION",
)
# Under the tasks WITH_HEAD PEFT itself trains whole every module of such a name.
_HEADS = ("classifier", "score")


class Module(NamedTuple):
    """One module's part of an adapter, as PEFT has it.

    Attributes:
        site: The module.
        fields: Its own rank, alpha and so on.
        tensors: By suffix.
    """

    site: Site
    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Whole(NamedTuple):
    """Everything that a folder of PEFT's holds.

    Attributes:
        kind: Its `peft_type`.
        modules: The method's own parts.
        extra: Other tensors, by their names in the file without the common prefix.
        fields: Of the config, beside those of the modules.
    """

    kind: str
    modules: list[Module]
    extra: dict[str, np.ndarray]
    fields: dict[str, Any]


class _Base(NamedTuple):
    """The weights that an adapter belongs on, by path.

    Attributes:
        arrays: Their numbers.
        used: How the model uses them.
        stored: Which tensors of a checkpoint they are.
        sites: Which modules' parameters they are.
    """

    arrays: Mapping[str, Any]
    used: Mapping[str, Weight]
    stored: Mapping[str, Stored]
    sites: Mapping[str, list[Site]]


def taken_apart(
    adapter: Mapping[str, Any],
    params: PyTree,
    used: Mapping[str, Weight],
    stored: Mapping[str, Stored],
    *,
    embeddings: bool,
    task: str | None = None,
) -> Whole:
    """An adapter as PEFT's modules and tensors.

    Args:
        adapter: What is written.
        params: The base that it belongs on.
        used: Every weight of the base, with how the model uses it.
        stored: Which tensors of a checkpoint they are.
        embeddings: Whether to write the base's own table beside the factors of an embedding.
        task: PEFT's task type. With those of classification the head is written whole, trained or
            not.

    Raises:
        ValueError: PEFT has no form for a part of it.
    """
    leaves = check_adapter(adapter)
    flat = tree.flatten(params)
    base = _Base(dict(zip(flat.paths, flat.leaves, strict=True)), used, stored, _by_path(stored))
    strange = [path for path in leaves if path not in base.sites]
    if strange:
        raise ValueError(
            f"The adapter has {listed(strange)}, which no tensor of a checkpoint is. Give the "
            f"model that it was made for."
        )
    wholes = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, FullLeaf)}
    rows = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, TokenRowsLeaf)}
    own = {path: leaf for path, leaf in leaves.items() if path not in {*wholes, *rows}}
    kind = _kind(own)
    form = FORMATS[kind]
    modules = [
        module
        for path, leaf in own.items()
        for module in _modules(form, leaf, used[path], base.sites[path])
    ]
    if not modules:
        raise ValueError(
            "The adapter has no part of a method of PEFT's: what is trained whole goes into a "
            "merged checkpoint. Use jlora.merge and jlora.models.save."
        )
    _check_gains(modules, base)
    targets = {module.site.module for module in modules}
    # A module is saved with its bias; what is left are biases alone.
    trained = {s.module for p in wholes if used[p].kind != "bias" for s in base.sites[p]}
    heads = _heads(task, targets, base)
    saved = trained | heads
    biases = {p: wholes[p] for p in wholes if not {s.module for s in base.sites[p]} <= saved}
    if biases and not form.biases:
        raise ValueError(
            f"PEFT's {kind} has no mode for biases, and this adapter has {listed(sorted(biases))}. "
            f"Merge it, or leave the biases as they are."
        )
    fields: dict[str, Any] = {}
    if saved:
        names = _saved_names(trained - heads, modules_of(stored))
        fields["modules_to_save"] = [*names, *(_HEADS if heads else ())]
    if biases:
        fields["bias"] = _bias_mode(biases, targets, saved, base)
    if rows:
        fields["trainable_token_indices"] = {
            base.sites[path][0].module.rpartition(".")[2]: list(leaf.tokens)
            for path, leaf in rows.items()
        }
    extra = {
        **_shared(form, adapter, own),
        **_saved_tensors(saved, wholes, base),
        **_bias_tensors(biases, targets, base),
        **_row_tensors(rows, base),
        **(_embeddings(modules, base) if embeddings else {}),
    }
    return Whole(kind, modules, extra, fields)


def write(
    folder: str | os.PathLike[str],
    whole: Whole,
    modules: Sequence[str],
    *,
    base_model: str | None,
    task: str | None,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors into a new folder."""
    form = FORMATS[whole.kind]
    tensors = {_name(whole.modules, m, s): t for m in whole.modules for s, t in m.tensors.items()}
    tensors |= whole.extra
    named = {
        key if key.startswith("base_model.") else PREFIX + key: np.ascontiguousarray(value)
        for key, value in tensors.items()
    }
    for key, value in named.items():
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(
                f"{key} holds NaN or Inf; nothing was written. Save an earlier adapter."
            )
    config = {
        "peft_type": whole.kind,
        "base_model_name_or_path": base_model,
        "task_type": task,
        "inference_mode": True,
        **({"bias": "none"} if form.biases else {}),
        "modules_to_save": None,
        **_fields(form, whole, modules),
        **whole.fields,
    }
    with new_folder(folder) as partial:
        text = json.dumps(config, indent=2, sort_keys=True)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
        safetensors.numpy.save_file(named, partial / TENSORS, metadata={"format": "pt"})


# --- the method's own parts ----------------------------------------------------------------------


def modules_of(stored: Mapping[str, Stored]) -> list[str]:
    """The modules that these tensors belong to."""
    return list(dict.fromkeys(site.module for site in sites_of(stored)))


def _by_path(stored: Mapping[str, Stored]) -> dict[str, list[Site]]:
    found: dict[str, list[Site]] = {}
    for site in sites_of(stored):
        found.setdefault(site.path, []).append(site)
    return found


def _kind(own: Mapping[str, AdapterLeaf]) -> str:
    """The one `peft_type` of all leaves."""
    families = {leaf.family for leaf in own.values()}
    kinds = {kind for kind, form in FORMATS.items() if families & set(form.families)}
    unknown = families - {f for form in FORMATS.values() for f in form.families}
    if unknown:
        raise ValueError(
            f"PEFT has nothing like {sorted(unknown)}. Convert the adapter with jlora.to_lora, or "
            f"merge it."
        )
    if len(kinds) > 1 or (len(families) > 1 and "dora" in families):
        raise ValueError(
            f"One folder of PEFT's holds one method, and this adapter has {sorted(families)}. Save "
            f"each part of it apart."
        )
    rest = [path for path, leaf in own.items() if getattr(leaf, "residual", False)]
    if rest:
        raise ValueError(
            f"The adapter on {rest[0]!r} belongs on a base of jlora.residual_base or jlora.loftq, "
            f"which no reader of these files has. Convert it with jlora.on_original_base first."
        )
    return kinds.pop() if kinds else "LORA"


def _modules(form: Format, leaf: Any, weight: Weight, sites: list[Site]) -> list[Module]:
    """A leaf as its modules."""
    found = []
    shapes = leaf.shapes()
    layouts = form.tensors(leaf, weight)
    for site in sites:
        inside = leaf.axes.batch[len(site.entry) :]
        facts = Facts(leaf.shape, leaf.axes, weight.window, inside)
        values = {
            name: np.asarray(jax.device_get(getattr(leaf, name)[site.entry])) for name in shapes
        }
        fields = form.fields(leaf)
        if site.entry and "a" in values and "b" in values and hasattr(leaf, "scale"):
            values, rank = _without_padding(leaf, values, len(inside))
            if not rank:
                continue  # A layer that was not adapted.
            root = getattr(leaf, "rank_stabilized", False)
            if rank != leaf.rank and form.rank and form.alpha:
                fields[form.rank] = rank
                fields[form.alpha] = leaf.scale * (rank**0.5 if root else rank)
        tensors = {
            suffix: to_file(values[name], layout, facts)
            for name, (suffix, layout) in layouts.items()
        }
        found.append(Module(site, fields, tensors))
    return found


def _check_gains(modules: Sequence[Module], base: _Base) -> None:
    """Refuses gains on the outputs of modules with a bias, which PEFT would scale too."""
    every = [site for some in base.sites.values() for site in some]
    biases = {site.module: site.path for site in every if site.parameter == "bias"}
    for module in modules:
        gains = module.tensors.get("ia3_l")
        path = biases.get(module.site.module)
        outputs = gains is not None and gains.shape[0] != 1
        if outputs and path and np.asarray(jax.device_get(dense(base.arrays[path]))).any():
            raise ValueError(
                f"PEFT's IA3 scales the bias of {module.site.module} with its outputs, and jlora's "
                f"scales the weight alone, so PEFT would compute something else. Merge the adapter."
            )


def _without_padding(
    leaf: Any, values: dict[str, np.ndarray], inside: int
) -> tuple[dict[str, np.ndarray], int]:
    """One module's factors without the ranks that are zero on both sides, and how many are left."""
    a, b = values["a"], values["b"]
    over_a = tuple(range(a.ndim - 1))
    over_b = tuple(axis for axis in range(b.ndim) if axis != inside)
    kept = (a != 0).any(axis=over_a) | (b != 0).any(axis=over_b)
    if kept.all() or leaf.family not in ("lora", "dora"):
        return values, leaf.rank
    return {**values, "a": a[..., kept], "b": b.compress(kept, axis=inside)}, int(kept.sum())


def _name(modules: Sequence[Module], module: Module, suffix: str) -> str:
    """A tensor's name: of a module whose two parameters are adapted, the first one is inside."""
    site = module.site
    both = {m.site.parameter for m in modules if m.site.module == site.module}
    inner = len(both) == 2 and site.parameter == "gate_up_proj"
    return f"{site.module}{'.base_layer' if inner else ''}.{suffix}"


def _shared(form: Format, adapter: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the modules share."""
    if not form.shared:
        return {}
    names = {leaf.share for leaf in own.values()}
    if len(names) > 1:
        raise ValueError(
            f"The adapter shares arrays under {sorted(names)}, and one folder of PEFT's has room "
            f"for one set. Save each part of it apart."
        )
    shared = adapter[names.pop()]
    nothing = Facts(
        (), next(iter(own.values())).axes._replace(batch=(), inputs=(), outputs=()), (), ()
    )
    return {
        key: to_file(np.asarray(jax.device_get(getattr(shared, name))), layout, nothing)
        for name, (key, layout) in form.shared.items()
    }


# --- the config -----------------------------------------------------------------------------------


def _fields(form: Format, whole: Whole, modules: Sequence[str]) -> dict[str, Any]:
    """The fields that the modules agree on, and patterns for the rank and alpha of the others."""
    names = [m.site.module for m in whole.modules if m.site.parameter == "weight"]
    joined = {f"{m.site.module}.{m.site.parameter}" for m in whole.modules} - {
        f"{name}.weight" for name in names
    }
    fields: dict[str, Any] = {"target_modules": sorted(_endings(names, modules))}
    if joined:
        fields["target_parameters"] = sorted(_endings(sorted(joined), sorted(joined), parts=3))
    patterns = {form.rank: "rank_pattern", form.alpha: "alpha_pattern"}
    for name in whole.modules[0].fields:
        if name == "decompose_factor":
            fields[name] = _lokr_factor(whole.modules)
            continue
        values = collections.Counter(_key(m.fields[name]) for m in whole.modules)
        common = max(values, key=lambda value: values[value])
        by_module = {_pattern_name(m): m.fields[name] for m in whole.modules}
        fields[name] = next(v for v in by_module.values() if _key(v) == common)
        others = {m: v for m, v in by_module.items() if _key(v) != common}
        if not others:
            continue
        if name in patterns:
            fields[patterns[name]] = others
        elif all(isinstance(value, bool) for value in by_module.values()):
            fields[name] = True  # What is only said of some kinds of module.
        else:
            raise ValueError(
                f"PEFT has one {name} for all modules, and this adapter has {sorted(values)}. Save "
                f"the parts that agree apart."
            )
    if whole.kind == "IA3":
        sides = {m.site.module for m in whole.modules if m.tensors["ia3_l"].shape[0] == 1}
        fields["feedforward_modules"] = sorted(_endings(sorted(sides), names))
    return fields


def _key(value: Any) -> Any:
    return value if not isinstance(value, float) or value != int(value) else int(value)


def _pattern_name(module: Module) -> str:
    site = module.site
    return site.module if site.parameter == "weight" else f"{site.module}.{site.parameter}"


def _endings(chosen: Sequence[str], modules: Sequence[str], parts: int = 1) -> set[str]:
    """The shortest list of endings that names just the modules chosen."""
    endings = set()
    for name in chosen:
        ending = ".".join(name.split(".")[-parts:])
        like = {m for m in modules if m == ending or m.endswith(f".{ending}")}
        endings.add(ending if like <= set(chosen) else name)
    return endings


def _is_head(module: str) -> bool:
    """Whether PEFT takes a module, or one that it is part of, for the head: by the name's end."""
    return any(part.endswith(_HEADS) for part in module.split("."))


def _saved_names(saved: Collection[str], modules: Sequence[str]) -> list[str]:
    """The shortest names for `modules_to_save`, of which PEFT compares the ends without a dot.

    It would take "norm" for every layer norm.
    """
    names = set()
    for module in saved:
        parts = module.split(".")
        endings = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        fits = lambda e: {m for m in modules if m.endswith(e)} <= set(saved)  # noqa: E731
        names.add(next((ending for ending in endings if fits(ending)), module))
    return sorted(names)


def _lokr_factor(modules: Sequence[Module]) -> int:
    """The `decompose_factor` that splits all weights as the modules have them."""
    splits = {split for module in modules for split in module.fields["decompose_factor"]}
    for factor in (-1, *range(2, 1025)):
        if all(factorization(size, factor) == first for size, first in splits):
            return factor
    raise ValueError(
        "PEFT splits all weights of a LoKr by one factor, and no factor makes the splits that this "
        "adapter has. Convert it with jlora.to_lora."
    )


# --- what is trained whole ------------------------------------------------------------------------


def _heads(task: str | None, targets: set[str], base: _Base) -> set[str]:
    """The modules that PEFT trains whole for the task's sake."""
    if task not in WITH_HEAD:
        return set()
    heads = {module for module in modules_of(base.stored) if _is_head(module)}
    if targets & heads:
        raise ValueError(
            f"task={task!r}: PEFT trains the head whole under it, and this adapter has a method's "
            f"part on {listed(sorted(targets & heads))}. Leave out the task, or train the head "
            f"with jlora.Full."
        )
    return heads


def _value(path: str, leaf: Any, base: _Base) -> np.ndarray:
    """A weight with its difference added, in float32 and rounded to the weight's type."""
    value = np.asarray(jax.device_get(dense(base.arrays[path])))
    delta = np.asarray(jax.device_get(leaf.delta), np.float32)
    return value if not delta.any() else (value.astype(np.float32) + delta).astype(value.dtype)


def _tensor(site: Site, value: np.ndarray) -> np.ndarray:
    if site.piece is None:
        raise ValueError(
            f"{site.path} is trained whole, and as experts it has no tensor of its own in PEFT's "
            f"files. Merge the adapter instead."
        )
    ends = zip(site.piece.starts, site.piece.box, strict=True)
    return site.piece.to_tensor(value[tuple(slice(start, start + n) for start, n in ends)])


def _saved_tensors(
    saved: Collection[str], wholes: Mapping[str, Any], base: _Base
) -> dict[str, np.ndarray]:
    """All parameters of these modules, trained or not: a module is saved as one."""
    tensors = {}
    for path in base.stored:
        for site in base.sites[path]:
            if site.module in saved:
                value = np.asarray(jax.device_get(dense(base.arrays[path])))
                value = _value(path, wholes[path], base) if path in wholes else value
                tensors[f"{site.module}.{site.parameter}"] = _tensor(site, value)
    return tensors


def _bias_mode(
    biases: Collection[str], targets: set[str], saved: Collection[str], base: _Base
) -> str:
    """Which of the two sets of biases that PEFT can train these are."""
    trained = {site.module for path in biases for site in base.sites[path]}
    every = {s.module for some in base.sites.values() for s in some if s.parameter == "bias"}
    every = every.difference(saved)
    if trained == every & targets:
        return "lora_only"
    if trained == every:
        return "all"
    raise ValueError(
        f"PEFT trains all biases, or those of adapted modules; this adapter has those of "
        f"{listed(sorted(trained))}. Train one of these sets, or merge it."
    )


def _bias_tensors(
    biases: Mapping[str, Any], targets: set[str], base: _Base
) -> dict[str, np.ndarray]:
    tensors = {}
    for path, leaf in biases.items():
        value = _value(path, leaf, base)
        for site in base.sites[path]:
            inner = ".base_layer" if site.module in targets else ""
            tensors[f"{site.module}{inner}.bias"] = _tensor(site, value)
    return tensors


def _row_tensors(rows: Mapping[str, TokenRowsLeaf], base: _Base) -> dict[str, np.ndarray]:
    """The trained rows of embeddings, as they are."""
    tensors = {}
    for path, leaf in rows.items():
        table = np.asarray(jax.device_get(dense(base.arrays[path])))[list(leaf.tokens)]
        delta = np.asarray(jax.device_get(leaf.delta), np.float32)
        value = (table.astype(np.float32) + delta).astype(table.dtype)
        tensors[f"{base.sites[path][0].module}.{TOKEN_ROWS}"] = value
    return tensors


def _embeddings(modules: Sequence[Module], base: _Base) -> dict[str, np.ndarray]:
    """The tables that PEFT writes beside their factors: of decoders' embeddings and heads."""
    tensors = {}
    for module in modules:
        site = module.site
        if site.module.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            value = np.asarray(jax.device_get(dense(base.arrays[site.path])))
            tensors[f"{site.module}.base_layer.{site.parameter}"] = _tensor(site, value)
    return tensors
