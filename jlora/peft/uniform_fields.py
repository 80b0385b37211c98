"""Folds settings that a PEFT config has once for all modules into the modules' tensors.

Weights of jlora may differ in each setting. PEFT's config has a pattern by module for ranks and
alphas, and one value for every other setting. Where that value is part of the function, modules of
another value get tensors that compute the same update with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jlora.peft.modules_to_save import PeftModule


def unify_fields(
    peft_type: str, modules: Sequence[PeftModule], *, has_parameters: bool
) -> list[PeftModule]:
    """Returns modules with the same updates, which agree in all fields that can be folded.

    Args:
        peft_type: PEFT method of the modules.
        modules: Modules of an adapter.
        has_parameters: Whether some are adapted as parameters, which have no dropout in PEFT.
    """
    unified = list(modules)
    if has_parameters:
        unified = [_replace_fields(module, lora_dropout=0.0) for module in unified]
    for fold in _FOLDS.get(peft_type, ()):
        unified = fold(unified)
    return unified


def _distinct_values(modules: Sequence[PeftModule], name: str) -> set[Any]:
    """Returns the values of a field, without those of modules that do not depend on it."""
    return {module.fields[name] for module in modules} - {None}


def _replace_tensors(
    module: PeftModule, removed: Sequence[str], **changes: np.ndarray
) -> PeftModule:
    kept = {name: value for name, value in module.tensors.items() if name not in removed}
    return module._replace(tensors={**kept, **changes})


def _replace_fields(module: PeftModule, **changes: Any) -> PeftModule:
    return module._replace(fields={**module.fields, **changes})


def _fold_rslora(modules: list[PeftModule]) -> list[PeftModule]:
    """Gives modules with `use_rslora` the alpha that has the same scale without it."""
    if len(_distinct_values(modules, "use_rslora")) < 2:
        return modules
    return [
        _replace_fields(
            module,
            use_rslora=False,
            lora_alpha=module.fields["lora_alpha"]
            * (module.fields["r"] ** 0.5 if module.fields["use_rslora"] else 1),
        )
        for module in modules
    ]


def _pad_module_ranks(modules: list[PeftModule]) -> list[PeftModule]:
    """Pads all modules to one rank with zeros: PEFT's HiRA does not read `rank_pattern`."""
    rank = max(module.fields["r"] for module in modules)
    unified = []
    for module in modules:
        tensors = {}
        for name, tensor in module.tensors.items():
            widths = [(0, 0)] * tensor.ndim
            widths[0 if name.endswith("A") else 1] = (0, rank - module.fields["r"])
            tensors[name] = np.pad(tensor, widths)
        unified.append(_replace_fields(module._replace(tensors=tensors), r=rank))
    return unified


def _fold_adalora(modules: list[PeftModule]) -> list[PeftModule]:
    """Pads all modules to one rank with zeros, and folds their scales into the singular values."""
    if len({(module.fields["init_r"], module.fields["lora_alpha"]) for module in modules}) < 2:
        return modules
    largest = max(modules, key=lambda module: module.fields["init_r"])
    rank, alpha = largest.fields["init_r"], largest.fields["lora_alpha"]
    unified = []
    for module in modules:
        missing = rank - module.fields["init_r"]
        gain = (module.fields["lora_alpha"] / module.fields["init_r"]) / (alpha / rank)
        tensors = {
            "lora_A": np.pad(module.tensors["lora_A"], ((0, missing), (0, 0))),  # (r, in)
            "lora_B": np.pad(module.tensors["lora_B"], ((0, 0), (0, missing))),  # (out, r)
            "lora_E": np.pad(module.tensors["lora_E"], ((0, missing), (0, 0))) * np.float32(gain),
        }
        fields = {"init_r": rank, "target_r": rank, "lora_alpha": alpha}
        unified.append(_replace_fields(module._replace(tensors=tensors), **fields))
    return unified


# Names of a Tucker core, and of the factors of the outputs and of the inputs beside it.
_CORES = (
    ("hada_t1", "hada_w1_a", "hada_w1_b"),
    ("hada_t2", "hada_w2_a", "hada_w2_b"),
    ("lokr_t2", "lokr_w2_a", "lokr_w2_b"),
)


def _fold_cores(modules: list[PeftModule]) -> list[PeftModule]:
    """Contracts the Tucker cores of modules that have them, where others have none."""
    if len(_distinct_values(modules, "use_effective_conv2d")) < 2:
        return modules
    unified = []
    for module in modules:
        for core, outputs, inputs in _CORES:
            if core in module.tensors:
                # (r, r, *window) and (r, in) to (r, in, *window)
                product = np.einsum("qr...,rc->qc...", module.tensors[core], module.tensors[inputs])
                changes = {
                    outputs: module.tensors[outputs].T,  # (out, r)
                    inputs: product.reshape(product.shape[0], -1),  # (r, in * window)
                }
                module = _replace_tensors(module, (core,), **changes)
        unified.append(_replace_fields(module, use_effective_conv2d=False))
    return unified


def _fold_lokr_products(modules: list[PeftModule]) -> list[PeftModule]:
    """Multiplies the factors of `w1` of modules that have them, where others have a full one."""
    if len(_distinct_values(modules, "decompose_both")) < 2:
        return modules

    def multiply(module: PeftModule) -> PeftModule:
        names = ("lokr_w1_a", "lokr_w1_b")  # (out, r) and (r, in)
        w1 = module.tensors[names[0]] @ module.tensors[names[1]]
        return _replace_tensors(module, names, lokr_w1=w1)

    return [
        _replace_fields(
            multiply(module) if module.fields["decompose_both"] else module, decompose_both=False
        )
        for module in modules
    ]


def _fold_spectrum_scale(modules: list[PeftModule]) -> list[PeftModule]:
    """Folds the scales of modules into their spectra, where they differ."""
    if len(_distinct_values(modules, "scaling")) < 2:
        return modules
    common = modules[0].fields["scaling"]
    return [
        _replace_fields(
            module._replace(
                tensors={
                    name: tensor * np.float32(module.fields["scaling"] / common)
                    for name, tensor in module.tensors.items()
                }
            ),
            scaling=common,
        )
        for module in modules
    ]


_FOLDS: dict[str, tuple[Callable[[list[PeftModule]], list[PeftModule]], ...]] = {
    "LORA": (_fold_rslora,),
    "ADALORA": (_fold_adalora,),
    "HIRA": (_pad_module_ranks,),
    "LOHA": (_fold_cores,),
    "LOKR": (_fold_lokr_products, _fold_cores),
    "FOURIERFT": (_fold_spectrum_scale,),
}
