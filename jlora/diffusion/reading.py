"""A file of diffusers or kohya as an adapter."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jlora.adapters.protocol import Weight
from jlora.checkpoints.pieces import Weight as Stored
from jlora.checkpoints.tensors import DTYPES, listed, open_file, read_finite
from jlora.diffusion.names import Names, Role
from jlora.peft import config as configs
from jlora.peft.formats import FORMATS
from jlora.peft.leaves import Part, Problem, leaf_of
from jlora.peft.sites import Site, sites_of

METADATA = "lora_adapter_metadata"  # diffusers' name for the fields of PEFT's config.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Where the alpha was a whole number in torch, some converters write it as one.
_ALPHA_DTYPES = (*DTYPES, "F64", "I64", "I32")


def read(
    path: str | os.PathLike[str],
    used: Mapping[str, Weight],
    stored: Mapping[str, Stored],
    prefix: str,
) -> dict[str, Any]:
    """See `jlora.diffusion.load`."""
    path = Path(path)

    def problem(what: str) -> ValueError:
        return ValueError(
            f"{path}: {what} Use a file that was made for this model, as it was written."
        )

    sites = adaptable(used, stored)
    names = Names(prefix, sites, problem)
    found, fields = _modules(path, names, prefix, problem)
    parts: dict[str, list[Part]] = {}
    for module, tensors in found.items():
        site = sites[module]
        reason = unfit(used[site.path], site)
        if reason:
            raise problem(f"{module} cannot be adapted: {reason}.")
        part = _part(site, used[site.path], tensors, fields, problem)
        parts.setdefault(site.path, []).append(part)
    if fields:
        configs.check_patterns(fields, found)
    form = FORMATS["LORA"]
    return {path: leaf_of(form, used[path], some, problem) for path, some in parts.items()}


def adaptable(used: Mapping[str, Weight], stored: Mapping[str, Stored]) -> dict[str, Site]:
    """The modules with a weight of their own, by name.

    Raises:
        ValueError: `stored` has a path that params has not.
    """
    strange = [path for path in stored if path not in used]
    if strange:
        raise ValueError(f"stored has {listed(strange)}, which params has not. Leave them out.")
    found = [site for site in sites_of(stored) if site.parameter == "weight" and site.piece]
    return {site.module: site for site in found}


def unfit(weight: Weight, site: Site) -> str | None:
    """Why these files have no LoRA for a weight; None when they have."""
    if weight.kind not in ("linear", "convolution"):
        return f"it is of the kind {weight.kind}, and these files know linear and convolution"
    if len(weight.axes.batch) > len(site.entry):
        return f"its tensor is a batch of weights along the axes {weight.axes.batch}"
    return None


def _modules(
    path: Path, names: Names, prefix: str, problem: Problem
) -> tuple[dict[str, dict[Role, np.ndarray]], dict[str, Any] | None]:
    """The tensors of each module, and what the metadata says of all."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path} is not opened, since files that end in {path.suffix} can run code. Load it in "
            f"the program that wrote it and save it as safetensors."
        )
    found: dict[str, dict[Role, np.ndarray]] = {}
    with open_file(path) as file:
        keys = list(file.keys())
        own = [key for key in keys if names.has(key)]
        if not own:
            others = sorted({key.partition(".")[0] for key in keys})
            raise problem(
                f"it has no tensor for prefix={prefix!r}; its keys begin with "
                f"{listed(others) or 'nothing'}."
            )
        for key in own:
            module, role = names.entry(key)
            tensors = found.setdefault(module, {})
            if role in tensors:
                raise problem(f"{key} is not the only tensor that is {role} of {module}.")
            dtypes = _ALPHA_DTYPES if role == "alpha" else tuple(DTYPES)
            tensors[role] = read_finite(file, key, path, dtypes)
        metadata = dict(file.metadata() or {})
    fields = _fields(path, metadata.get(METADATA), prefix, problem)
    if fields and any("alpha" in tensors for tensors in found.values()):
        raise problem("it says alpha in its metadata and in tensors too.")
    return found, fields


def _fields(path: Path, text: str | None, prefix: str, problem: Problem) -> dict[str, Any] | None:
    """The fields of PEFT's config that the metadata has for this model."""
    if text is None:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise problem(f"its metadata {METADATA} is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise problem(f"its metadata {METADATA} holds no JSON object.")
    start = f"{prefix}."
    own = {k.removeprefix(start): value for k, value in content.items() if k.startswith(start)}
    if not own:
        return None
    fields, form = configs.checked(path, {"peft_type": "LORA", **own})
    if form is not FORMATS["LORA"] or fields["use_dora"]:
        raise problem(
            f"its metadata speak of {'DoRA' if fields.get('use_dora') else own['peft_type']}, and "
            f"LoRA alone is read from these files."
        )
    return fields


def _part(
    site: Site,
    weight: Weight,
    tensors: Mapping[Role, np.ndarray],
    fields: Mapping[str, Any] | None,
    problem: Problem,
) -> Part:
    """One module's factors with its rank and alpha, after checking them against the weight."""
    missing = [role for role in ("down", "up") if role not in tensors]
    if missing:
        raise problem(f"{site.module} lacks {' and '.join(missing)}.")
    down, up = tensors["down"], tensors["up"]
    form = FORMATS["LORA"]
    inputs, window, outputs = _sizes(weight)
    _check_shape(f"down of {site.module}", down.shape, (None, inputs, *window), problem)
    _check_shape(f"up of {site.module}", up.shape, (outputs, None, *[1] * len(window)), problem)
    rank = down.shape[0]
    if rank < 1 or up.shape[1] != rank:
        raise problem(f"{site.module} has ranks {rank} in down and {up.shape[1]} in up.")
    if fields is None:
        own = {
            **form.defaults,
            "lora_alpha": _alpha(site.module, tensors.get("alpha"), rank, problem),
        }
    else:
        own = configs.own_fields(fields, form, site.module)
        if own["r"] != rank:
            raise problem(f"{site.module} has rank {rank}, and by the metadata r={own['r']}.")
    own["r"] = rank
    return Part(site, own, {"lora_A.weight": down, "lora_B.weight": up})


def _sizes(weight: Weight) -> tuple[int, list[int], int]:
    """The inputs, the window and the outputs of the weight's tensor in torch."""
    window = [weight.shape[axis] for axis in weight.window]
    return math.prod(weight.shape[axis] for axis in weight.channels), window, weight.fan_out


def _check_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int | None, ...], problem: Problem
) -> None:
    """Refuses a shape that is not the expected one, in which None is the rank."""

    def fits(sizes: tuple[int, ...]) -> bool:
        pairs = zip(sizes, expected, strict=False)
        return len(sizes) == len(expected) and all(b in (a, None) for a, b in pairs)

    if not fits(shape):
        wanted = tuple("rank" if size is None else size for size in expected)
        hint = " It looks transposed." if fits(shape[::-1]) else ""
        raise problem(f"{name} has shape {shape} instead of {wanted}.{hint}")


def _alpha(module: str, tensor: np.ndarray | None, rank: int, problem: Problem) -> float:
    """A module's alpha, which is the rank where the file has none."""
    if tensor is None:
        return float(rank)
    if tensor.size != 1:
        raise problem(f"alpha of {module} has shape {tensor.shape}, and is one number.")
    alpha = float(tensor.reshape(()))
    if alpha <= 0:
        raise problem(f"alpha of {module} is {alpha}, which is not positive.")
    return alpha
