"""Fields that hold one of several sections: which one, a field of the section itself says."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic
from pydantic.json_schema import SkipJsonSchema

from jlora.training.recipe.section import Section

UNKNOWN = "unknown"  # The name of what stands for a kind that there is not.


class Choice(Section):
    """One of several sections, each made from a config of the library.

    Attributes:
        tag: The field that says which section it is.
        usual: What that field says when it is left out.
        own: The fields of the config.
    """

    tag: ClassVar[str]
    usual: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()

    def values(self) -> dict[str, Any]:
        """The config's own fields."""
        return {name: getattr(self, name) for name in self.own}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        if cls.model_fields[cls.tag].default != cls.usual:
            # Without its tag a section is the usual one, and no other in the schema's oneOf.
            schema["required"] = [cls.tag, *schema.get("required", [])]
        return schema


def one_of(kinds: Mapping[str, type[Choice]]) -> Any:
    """The type of such a field; a kind that there is not is refused with the nearest.

    Args:
        kinds: The sections by what their tag says.
    """
    first = next(iter(kinds.values()))
    tag, usual = first.tag, first.usual

    def said(value: Any) -> Any:
        return value.get(tag, usual) if isinstance(value, Mapping) else getattr(value, tag, None)

    def kind_of(value: Any) -> str:
        found = said(value)
        return found if isinstance(found, str) and found in kinds else UNKNOWN

    class _Unknown(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="allow")

        @pydantic.model_validator(mode="before")
        @classmethod
        def _refuse(cls, value: Any) -> Any:
            if not isinstance(value, Mapping):
                raise ValueError(f"That is no section. Give one, such as {{{tag}: {usual}}}")
            lower = {name.lower(): name for name in kinds}
            near = difflib.get_close_matches(str(said(value)).lower(), lower, n=3, cutoff=0.3)
            hint = f"; the nearest are {[lower[name] for name in near]}" if near else ""
            raise ValueError(f"{tag}={said(value)!r} is none of {sorted(kinds)}{hint}.")

    # To the schema a kind that there is not is simply wrong.
    members = (*kinds.items(), (UNKNOWN, SkipJsonSchema[_Unknown]))
    tagged = tuple(Annotated[kind, pydantic.Tag(name)] for name, kind in members)
    return Annotated[typing.Union[tagged], pydantic.Discriminator(kind_of)]  # noqa: UP007
