"""The adapter families as sections of a recipe, made from their configs."""

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

# Where a family leaves a number to its user, a recipe has one that is often good.
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
    """A family of adapters, its hyperparameters, and the weights that it is for.

    Attributes:
        family: One of FAMILIES.
        target_pattern: A regular expression, searched in the paths of weights: those are adapted. The
            products inside the model's layers when null.
    """

    tag_field: ClassVar[str] = "family"
    default_tag: ClassVar[str] = "LoRA"
    family: str = "LoRA"
    target_pattern: NonEmptyStr | None = None

    def to_config(self) -> AdapterConfig:
        """What goes into the rules of `jlora.lora_transform`."""
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


_ADAPTER_CONFIGS: dict[str, type[AdapterConfig]] = {
    config.__name__: config for config in ADAPTER_CONFIGS
}


def _make_adapter_section(config: type[AdapterConfig]) -> type[AdapterSection]:
    """The section of one family: its config's fields."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    of_config: Any = config  # Each is a dataclass.
    for field in dataclasses.fields(of_config):
        kind = _ADAPTER_FIELD_TYPES.get(field.name, hints[field.name])
        default: Any = field.default
        if field.name == "init":
            default = "kaiming_uniform"
        elif field.name == "dtype":
            default = "float32"
        elif default is dataclasses.MISSING:
            default = _ADAPTER_DEFAULTS.get(field.name, ...)
        if field.name == "token_indices":  # YAML has lists and no tuples.
            default = Field(default=..., strict=False, examples=[[0]])
        if field.name != "share":
            fields[field.name] = (kind, default)
    made = pydantic.create_model(
        config.__name__,
        __base__=AdapterSection,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        family=(Literal[config.__name__], config.__name__),  # type: ignore[valid-type]
        **fields,
    )
    made.config_fields = tuple(fields)
    texts = {**parse_attribute_docs(AdapterSection), **parse_attribute_docs(config)}
    texts["init"] = f"How the factors start: {', '.join(_ADAPTER_INITS)}."
    texts["family"] = texts["family"].replace("FAMILIES", ", ".join(_ADAPTER_CONFIGS))
    kept = {name: texts[name] for name in ("family", *fields, "target_pattern")}
    made.field_descriptions = classmethod(lambda cls: kept)  # type: ignore[method-assign]
    return made


ADAPTER_SECTIONS = {
    name: _make_adapter_section(config) for name, config in _ADAPTER_CONFIGS.items()
}

if typing.TYPE_CHECKING:
    AnyAdapterSection = AdapterSection
else:
    AnyAdapterSection = tagged_union(ADAPTER_SECTIONS)


class QuantizationSection(TaggedSection):
    """How weights of the base are held in fewer bits, and which.

    Attributes:
        scheme: One of SCHEMES.
        target_pattern: A regular expression, searched in the paths of weights: those are quantised. The
            matrices of the model's layers when null.
    """

    tag_field: ClassVar[str] = "scheme"
    default_tag: ClassVar[str] = "nf4"
    scheme: str = "nf4"
    target_pattern: NonEmptyStr | None = None

    def to_scheme(self) -> QuantizationScheme:
        """What goes into the rules of `jlora.quantize`."""
        return SCHEMES[self.scheme](**self.config_values())

    @pydantic.model_validator(mode="after")
    def _check(self) -> QuantizationSection:
        self.to_scheme()
        return self


def _make_quantization_section(config: type[QuantizationScheme]) -> type[QuantizationSection]:
    """The section of one scheme: its config's fields."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclasses.fields(config)
    }
    made = pydantic.create_model(
        config.__name__,
        __base__=QuantizationSection,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        scheme=(Literal[config.name], config.name),  # type: ignore[valid-type]
        **fields,
    )
    made.config_fields = tuple(fields)
    texts = {**parse_attribute_docs(QuantizationSection), **parse_attribute_docs(config)}
    texts["scheme"] = texts["scheme"].replace("SCHEMES", ", ".join(SCHEMES))
    kept = {name: texts[name] for name in ("scheme", *fields, "target_pattern")}
    made.field_descriptions = classmethod(lambda cls: kept)  # type: ignore[method-assign]
    return made


QUANTIZATION_SECTIONS = {
    name: _make_quantization_section(scheme) for name, scheme in SCHEMES.items()
}

if typing.TYPE_CHECKING:
    AnyQuantizationSection = QuantizationSection
else:
    AnyQuantizationSection = tagged_union(QUANTIZATION_SECTIONS)
