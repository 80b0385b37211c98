"""The adapter families as sections of a recipe, made from their configs."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax.numpy as jnp
import pydantic
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from jlora.adapters import inits
from jlora.adapters.catalog import CONFIGS
from jlora.adapters.protocol import AdapterConfig
from jlora.documentation import attributes
from jlora.training.recipe.section import Section, Text

_STARTS: dict[str, inits.Initialization] = {
    "uniform": inits.uniform,
    "gaussian": inits.gaussian(),
    "orthogonal": inits.orthogonal(),
    "pissa": inits.pissa(),
    "milora": inits.milora(),
    "olora": inits.olora(),
}
# Where a family leaves a number to its user, a recipe has one that is often good.
_DEFAULTS: dict[str, Any] = {"rank": 16, "alpha": 32.0, "frequencies": 1000, "experts": 4}
_TYPES: dict[str, Any] = {
    "init": Literal["uniform", "gaussian", "orthogonal", "pissa", "milora", "olora"],
    "dtype": Literal["float32", "bfloat16"],
}


class Rule(Section):
    """A family of adapters, its hyperparameters, and the weights that it is for.

    Attributes:
        family: One of FAMILIES.
        targets: A regular expression, searched in the paths of weights: those are adapted. The
            products inside the model's layers when null.
    """

    own: ClassVar[tuple[str, ...]] = ()
    family: str = "LoRA"
    targets: Text | None = None

    def config(self) -> AdapterConfig:
        """What goes into the rules of `jlora.lora_transform`."""
        values = {name: getattr(self, name) for name in self.own}
        if "init" in values:
            values["init"] = _STARTS[values["init"]]
        if "dtype" in values:
            values["dtype"] = getattr(jnp, values["dtype"])
        return _FAMILIES[self.family](**values)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        if cls.model_fields["family"].default != Rule.model_fields["family"].default:
            # A rule without a family is the default one's, and of no other in the schema's oneOf.
            schema["required"] = ["family", *schema.get("required", [])]
        return schema

    @pydantic.model_validator(mode="after")
    def _check(self) -> Rule:
        try:
            self.config()
        except TypeError as error:
            raise ValueError(str(error)) from error
        return self


_FAMILIES: dict[str, type[AdapterConfig]] = {config.__name__: config for config in CONFIGS}


def _rule(config: type[AdapterConfig]) -> type[Rule]:
    """The section of one family: its config's fields."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {}
    of_config: Any = config  # Each is a dataclass.
    for field in dataclasses.fields(of_config):
        kind = _TYPES.get(field.name, hints[field.name])
        default: Any = field.default
        if field.name == "init":
            default = "uniform"
        elif field.name == "dtype":
            default = "float32"
        elif default is dataclasses.MISSING:
            default = _DEFAULTS.get(field.name, ...)
        if field.name == "tokens":  # YAML has lists and no tuples.
            default = Field(default=..., strict=False, examples=[[0]])
        if field.name != "share":
            fields[field.name] = (kind, default)
    made = pydantic.create_model(
        config.__name__,
        __base__=Rule,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        family=(Literal[config.__name__], config.__name__),  # type: ignore[valid-type]
        **fields,
    )
    made.own = tuple(fields)
    texts = {**attributes(Rule), **attributes(config)}
    texts["init"] = f"How the factors start: {', '.join(_STARTS)}."
    texts["family"] = texts["family"].replace("FAMILIES", ", ".join(_FAMILIES))
    kept = {name: texts[name] for name in ("family", *fields, "targets")}
    made.descriptions = classmethod(lambda cls: kept)  # type: ignore[method-assign]
    return made


RULES = {name: _rule(config) for name, config in _FAMILIES.items()}


def _family_of(value: Any) -> str:
    found = value.get("family", "LoRA") if isinstance(value, Mapping) else value.family
    return found if found in RULES else "unknown"


class _Unknown(Rule):
    """What stands for a family that there is not."""

    model_config = pydantic.ConfigDict(extra="allow")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        lower = {name.lower(): name for name in _FAMILIES}
        near = difflib.get_close_matches(str(value.get("family")).lower(), lower, n=3, cutoff=0.3)
        hint = f"; the nearest are {[lower[name] for name in near]}" if near else ""
        raise ValueError(f"family={value.get('family')!r} is none of {sorted(_FAMILIES)}{hint}.")


if typing.TYPE_CHECKING:
    AnyRule = Rule
else:
    AnyRule = Annotated[
        typing.Union[  # noqa: UP007  Of a tuple that is made.
            tuple(
                Annotated[rule, pydantic.Tag(name)]
                # To the schema a family that there is not is simply wrong.
                for name, rule in (*RULES.items(), ("unknown", SkipJsonSchema[_Unknown]))
            )
        ],
        pydantic.Discriminator(_family_of),
    ]
