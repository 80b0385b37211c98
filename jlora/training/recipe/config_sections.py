"""Recipe sections of adapters and quantization, built from the configs of their families."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import pydantic
from pydantic import Field

from jlora import initializers
from jlora._docstrings import parse_attribute_docs
from jlora.adapters.base import AdapterConfig
from jlora.adapters.registry import ADAPTER_CONFIGS
from jlora.quantization.schemes import SCHEMES, QuantizationScheme
from jlora.training.recipe.base import NonEmptyStr, TaggedSection, tagged_union

_ADAPTER_INITS: dict[str, initializers.FactorInit] = {
    "kaiming_uniform": initializers.kaiming_uniform,
    "gaussian": initializers.gaussian(),
    "orthogonal": initializers.orthogonal(),
    "pissa": initializers.pissa(),
    "milora": initializers.milora(),
    "olora": initializers.olora(),
}

# Defaults of a recipe for fields without a default in the configs.
_ADAPTER_DEFAULTS: dict[str, Any] = {
    "rank": 16,
    "alpha": 32.0,
    "num_frequencies": 1000,
    "num_experts": 4,
}

_ADAPTER_FIELD_TYPES: dict[str, Any] = {
    "init": Literal["kaiming_uniform", "gaussian", "orthogonal", "pissa", "milora", "olora"],
    "dtype": Literal["float32", "bfloat16"],
}


class AdapterSection(TaggedSection):
    """Adapter family, its hyperparameters and its target modules.

    Attributes:
        family: Adapter family: FAMILIES.
        target_pattern: Weights to adapt: a module's name as in the checkpoint (q_proj), a regular
            expression to search in the weights' paths, or a list of these. null or all-linear: the
            projections inside the model's layers.
    """

    tag_field: ClassVar[str] = "family"
    default_tag: ClassVar[str] = "LoRA"
    family: str = "LoRA"
    target_pattern: NonEmptyStr | list[NonEmptyStr] | None = None

    def to_config(self) -> AdapterConfig:
        """Returns the adapter config for the rules of `jlora.lora_transform`."""
        values = self.config_values()
        if "init" in values:
            values["init"] = _ADAPTER_INITS[values["init"]]
        if "dtype" in values:
            values["dtype"] = getattr(jnp, values["dtype"])
        return _ADAPTER_CONFIGS[self.family](**values)

    @pydantic.model_validator(mode="after")
    def _check(self) -> AdapterSection:
        try:
            self.to_config()
        except TypeError as error:
            raise ValueError(str(error)) from error
        return self


def list_targets(target_pattern: str | list[str] | None) -> list[str]:
    """Returns the targets of a section as a list, which is empty for null."""
    return [target_pattern] if isinstance(target_pattern, str) else list(target_pattern or ())


_ADAPTER_CONFIGS: dict[str, type[AdapterConfig]] = {
    config.__name__: config for config in ADAPTER_CONFIGS
}


def _make_adapter_section(config: type[AdapterConfig]) -> type[AdapterSection]:
    """Returns the section class of one family, with the fields of its config."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    dataclass: Any = config
    for field in dataclasses.fields(dataclass):
        field_type = _ADAPTER_FIELD_TYPES.get(field.name, hints[field.name])
        default: Any = field.default
        if field.name == "init":
            default = "kaiming_uniform"
        elif field.name == "dtype":
            default = "float32"
        elif default is dataclasses.MISSING:
            default = _ADAPTER_DEFAULTS.get(field.name, ...)
        if field.name == "token_indices":  # YAML has lists, not tuples.
            default = Field(default=..., strict=False, examples=[[0]])
        if field.name != "share":
            fields[field.name] = (field_type, default)
    section = pydantic.create_model(
        config.__name__,
        __base__=AdapterSection,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        family=(Literal[config.__name__], config.__name__),  # type: ignore[valid-type]
        **fields,
    )
    section.config_fields = tuple(fields)
    texts = {**parse_attribute_docs(AdapterSection), **parse_attribute_docs(config)}
    texts["init"] = f"Initialization of the factors: {', '.join(_ADAPTER_INITS)}."
    texts["family"] = texts["family"].replace("FAMILIES", ", ".join(_ADAPTER_CONFIGS))
    descriptions = {name: texts[name] for name in ("family", *fields, "target_pattern")}
    section.field_descriptions = classmethod(lambda cls: descriptions)  # type: ignore[method-assign]
    return section


ADAPTER_SECTIONS = {
    name: _make_adapter_section(config) for name, config in _ADAPTER_CONFIGS.items()
}

if typing.TYPE_CHECKING:
    AnyAdapterSection = AdapterSection
else:
    AnyAdapterSection = tagged_union(ADAPTER_SECTIONS)


class QuantizationSection(TaggedSection):
    """Quantization of the frozen base (QLoRA).

    Attributes:
        scheme: Quantization scheme: SCHEMES.
        target_pattern: Weights to quantize, as for an adapter. null or all-linear: the matrices of
            the model's layers.
    """

    tag_field: ClassVar[str] = "scheme"
    default_tag: ClassVar[str] = "nf4"
    scheme: str = "nf4"
    target_pattern: NonEmptyStr | list[NonEmptyStr] | None = None

    def to_scheme(self) -> QuantizationScheme:
        """Returns the scheme for the rules of `jlora.quantize`."""
        return SCHEMES[self.scheme](**self.config_values())

    @pydantic.model_validator(mode="after")
    def _check(self) -> QuantizationSection:
        self.to_scheme()
        return self


def _make_quantization_section(config: type[QuantizationScheme]) -> type[QuantizationSection]:
    """Returns the section class of one scheme, with the fields of its config."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclasses.fields(config)
    }
    section = pydantic.create_model(
        config.__name__,
        __base__=QuantizationSection,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        scheme=(Literal[config.name], config.name),  # type: ignore[valid-type]
        **fields,
    )
    section.config_fields = tuple(fields)
    texts = {**parse_attribute_docs(QuantizationSection), **parse_attribute_docs(config)}
    texts["scheme"] = texts["scheme"].replace("SCHEMES", ", ".join(SCHEMES))
    descriptions = {name: texts[name] for name in ("scheme", *fields, "target_pattern")}
    section.field_descriptions = classmethod(lambda cls: descriptions)  # type: ignore[method-assign]
    return section


QUANTIZATION_SECTIONS = {
    name: _make_quantization_section(scheme) for name, scheme in SCHEMES.items()
}

if typing.TYPE_CHECKING:
    AnyQuantizationSection = QuantizationSection
else:
    AnyQuantizationSection = tagged_union(QUANTIZATION_SECTIONS)
