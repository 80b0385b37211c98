"""The schemes of quantisation as sections of a recipe, made from their configs."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, ClassVar, Literal

import pydantic

from jlora.documentation import attributes
from jlora.quantization.schemes import SCHEMES, Scheme
from jlora.training.recipe.choosing import Choice, one_of
from jlora.training.recipe.section import Text


class Quantization(Choice):
    """How weights of the base are held in fewer bits, and which.

    Attributes:
        scheme: One of SCHEMES.
        weights: A regular expression, searched in the paths of weights: those are quantised. The
            matrices of the model's layers when null.
    """

    tag: ClassVar[str] = "scheme"
    usual: ClassVar[str] = "nf4"
    scheme: str = "nf4"
    weights: Text | None = None

    def config(self) -> Scheme:
        """What goes into the rules of `jlora.quantize`."""
        return SCHEMES[self.scheme](**self.values())

    @pydantic.model_validator(mode="after")
    def _check(self) -> Quantization:
        self.config()
        return self


def _section(config: type[Scheme]) -> type[Quantization]:
    """The section of one scheme: its config's fields."""
    hints = typing.get_type_hints(config)
    fields: dict[str, Any] = {
        field.name: (hints[field.name], field.default) for field in dataclasses.fields(config)
    }
    made = pydantic.create_model(
        config.__name__,
        __base__=Quantization,
        __doc__=(inspect.getdoc(config) or "").partition("\n")[0],
        scheme=(Literal[config.name], config.name),  # type: ignore[valid-type]
        **fields,
    )
    made.own = tuple(fields)
    texts = {**attributes(Quantization), **attributes(config)}
    texts["scheme"] = texts["scheme"].replace("SCHEMES", ", ".join(SCHEMES))
    kept = {name: texts[name] for name in ("scheme", *fields, "weights")}
    made.descriptions = classmethod(lambda cls: kept)  # type: ignore[method-assign]
    return made


QUANTIZATIONS = {name: _section(scheme) for name, scheme in SCHEMES.items()}

if typing.TYPE_CHECKING:
    AnyQuantization = Quantization
else:
    AnyQuantization = one_of(QUANTIZATIONS)
