"""The adapter families as sections of a recipe, made from their configs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import pydantic
from pydantic import Field

from jlora.adapters import inits
from jlora.adapters.catalog import CONFIGS
from jlora.adapters.protocol import AdapterConfig
from jlora.documentation import attributes
from jlora.training.recipe.choosing import Choice, one_of
from jlora.training.recipe.section import Text

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


class Rule(Choice):
    """A family of adapters, its hyperparameters, and the weights that it is for.

    Attributes:
        family: One of FAMILIES.
        targets: A regular expression, searched in the paths of weights: those are adapted. The
            products inside the model's layers when null.
    """

    tag: ClassVar[str] = "family"
    usual: ClassVar[str] = "LoRA"
    family: str = "LoRA"
    targets: Text | None = None

    def config(self) -> AdapterConfig:
        """What goes into the rules of `jlora.lora_transform`."""
        values = self.values()
        if "init" in values:
            values["init"] = _STARTS[values["init"]]
        if "dtype" in values:
            values["dtype"] = getattr(jnp, values["dtype"])
        return _FAMILIES[self.family](**values)

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

if typing.TYPE_CHECKING:
    AnyRule = Rule
else:
    AnyRule = one_of(RULES)
