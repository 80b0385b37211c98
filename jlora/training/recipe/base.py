"""Base classes of recipe sections, and unions of sections that a tag field discriminates."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from jlora._docstrings import parse_attribute_docs

PositiveInt = Annotated[int, Field(ge=1)]

_FLOAT32_MIN, _FLOAT32_MAX = (float(n) for n in (np.finfo("f4").tiny, np.finfo("f4").max))


def _check_float32(value: float) -> float:
    """Rejects values that are zero or infinite in float32, the type of a step's numbers."""
    if value and not _FLOAT32_MIN <= abs(value) <= _FLOAT32_MAX:
        raise ValueError(
            f"{value} is {'zero' if abs(value) < 1 else 'infinite'} in float32. Use a value "
            f"between {_FLOAT32_MIN:.2g} and {_FLOAT32_MAX:.2g}"
        )
    return value


_FITS_FLOAT32 = pydantic.AfterValidator(_check_float32)

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False), _FITS_FLOAT32]

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False), _FITS_FLOAT32]

Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

NonEmptyStr = Annotated[str, Field(min_length=1)]

# The range of `jlora.training.data.packing.weights_as_fractions`.
SourceWeight = Annotated[float, Field(ge=1e-4, lt=1e4, allow_inf_nan=False)]


class Section(pydantic.BaseModel):
    """A part of a recipe.

    The texts under "Attributes:" of its docstring describe the fields in errors, in the JSON schema
    and in the recipe of `jlora init`.
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def field_descriptions(cls) -> dict[str, str]:
        """Returns the description of each field."""
        texts = parse_attribute_docs(cls)
        return {name: texts[name] for name in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["description"] = (inspect.getdoc(cls) or "").partition("\n")[0]
        for name, text in cls.field_descriptions().items():
            schema.get("properties", {}).get(name, {}).setdefault("description", text)
        return schema


# Tag of the stand-in for unknown tags.
UNKNOWN_TAG = "unknown"


class TaggedSection(Section):
    """One of several sections of a union, each built from a config class of the library.

    Attributes:
        tag_field: Name of the field that selects the section.
        default_tag: Value of that field when it is omitted.
        config_fields: Names of the config's fields.
    """

    tag_field: ClassVar[str]
    default_tag: ClassVar[str]
    config_fields: ClassVar[tuple[str, ...]] = ()

    def config_values(self) -> dict[str, Any]:
        """Returns the values of the config's fields."""
        return {name: getattr(self, name) for name in self.config_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        if cls.model_fields[cls.tag_field].default != cls.default_tag:
            # A section without a tag is the default one and matches no other in the schema's oneOf.
            schema["required"] = [cls.tag_field, *schema.get("required", [])]
        return schema


def tagged_union(sections: Mapping[str, type[TaggedSection]]) -> Any:
    """Returns the type of a field that holds one of several sections.

    An unknown tag is rejected with the nearest known ones.

    Args:
        sections: Section classes by their tag.
    """
    first = next(iter(sections.values()))
    tag_field, default = first.tag_field, first.default_tag

    def get_tag(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get(tag_field, default)
        return getattr(value, tag_field, None)

    def discriminate(value: Any) -> str:
        tag = get_tag(value)
        return tag if isinstance(tag, str) and tag in sections else UNKNOWN_TAG

    class _Unknown(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")

        @pydantic.model_validator(mode="before")
        @classmethod
        def _reject(cls, value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"Expected a mapping such as {{{tag_field}: {default}}}, got "
                    f"{type(value).__name__}"
                )
            by_lower = {name.lower(): name for name in sections}
            tag = get_tag(value)
            near = difflib.get_close_matches(str(tag).lower(), by_lower, n=3, cutoff=0.3)
            names = " or ".join(repr(by_lower[name]) for name in near)
            hint = f" Did you mean {names}?" if near else ""
            raise ValueError(
                f"{tag_field}={tag!r} must be one of {', '.join(sorted(sections))}.{hint}"
            )

    # The JSON schema has no entry for unknown tags.
    members = (*sections.items(), (UNKNOWN_TAG, SkipJsonSchema[_Unknown]))
    tagged = tuple(Annotated[section, pydantic.Tag(tag)] for tag, section in members)
    return Annotated[typing.Union[tagged], pydantic.Discriminator(discriminate)]  # noqa: UP007
