"""Fields that hold one of several sections: which one, a field of the section itself says."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from jlora._docstrings import parse_attribute_docs

PositiveInt = Annotated[int, Field(ge=1)]

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]

NonEmptyStr = Annotated[str, Field(min_length=1)]

# What the order of the data can count with, `jlora.training.data.order.exact_weights`.
SourceWeight = Annotated[float, Field(ge=1e-4, lt=1e4, allow_inf_nan=False)]


class Section(pydantic.BaseModel):
    """A part of a recipe. What its docstring says of an attribute is shown wherever it is named."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def field_descriptions(cls) -> dict[str, str]:
        """What each field means."""
        texts = parse_attribute_docs(cls)
        return {name: texts[name] for name in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["description"] = (inspect.getdoc(cls) or "").partition("\n")[0]
        for name, text in cls.field_descriptions().items():
            schema.get("properties", {}).get(name, {}).setdefault("description", text)
        return schema


UNKNOWN_TAG = "unknown"  # The name of what stands for a kind that there is not.


class TaggedSection(Section):
    """One of several sections, each made from a config of the library.

    Attributes:
        tag_field: The field that says which section it is.
        default_tag: What that field says when it is left out.
        config_fields: The fields of the config.
    """

    tag_field: ClassVar[str]
    default_tag: ClassVar[str]
    config_fields: ClassVar[tuple[str, ...]] = ()

    def config_values(self) -> dict[str, Any]:
        """The config's own fields."""
        return {name: getattr(self, name) for name in self.config_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        if cls.model_fields[cls.tag_field].default != cls.default_tag:
            # Without its tag a section is the usual one, and no other in the schema's oneOf.
            schema["required"] = [cls.tag_field, *schema.get("required", [])]
        return schema


def tagged_union(sections: Mapping[str, type[TaggedSection]]) -> Any:
    """The type of such a field; a kind that there is not is refused with the nearest.

    Args:
        sections: The sections by what their tag says.
    """
    first = next(iter(sections.values()))
    tag, usual = first.tag_field, first.default_tag

    def said(value: Any) -> Any:
        return value.get(tag, usual) if isinstance(value, Mapping) else getattr(value, tag, None)

    def kind_of(value: Any) -> str:
        found = said(value)
        return found if isinstance(found, str) and found in sections else UNKNOWN_TAG

    class _Unknown(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")

        @pydantic.model_validator(mode="before")
        @classmethod
        def _refuse(cls, value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"That is no section. Give one, such as {{{tag}: {usual}}}")
            lower = {name.lower(): name for name in sections}
            near = difflib.get_close_matches(str(said(value)).lower(), lower, n=3, cutoff=0.3)
            hint = f"; the nearest are {[lower[name] for name in near]}" if near else ""
            raise ValueError(f"{tag}={said(value)!r} is none of {sorted(sections)}{hint}.")

    # To the schema a kind that there is not is simply wrong.
    members = (*sections.items(), (UNKNOWN_TAG, SkipJsonSchema[_Unknown]))
    tagged = tuple(Annotated[kind, pydantic.Tag(name)] for name, kind in members)
    return Annotated[typing.Union[tagged], pydantic.Discriminator(kind_of)]  # noqa: UP007
