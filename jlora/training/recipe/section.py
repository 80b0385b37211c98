"""What all parts of a recipe have in common."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import pydantic
from pydantic import Field

from jlora.documentation import attributes

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
# What the order of the data can count with, `jlora.training.data.order.exact_weights`.
Weight = Annotated[float, Field(ge=1e-4, lt=1e4, allow_inf_nan=False)]


class Section(pydantic.BaseModel):
    """A part of a recipe. What its docstring says of an attribute is shown wherever it is named."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """What each field means."""
        texts = attributes(cls)
        return {name: texts[name] for name in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = handler.resolve_ref_schema(handler(core_schema))
        schema["description"] = (inspect.getdoc(cls) or "").partition("\n")[0]
        for name, text in cls.descriptions().items():
            schema.get("properties", {}).get(name, {}).setdefault("description", text)
        return schema
