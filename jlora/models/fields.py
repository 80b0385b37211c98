"""Reading a checkpoint's config.json without overlooking anything in it.

A field that would change the numbers and is not implemented is refused by name; so is a field that
nothing here knows, unless it says nothing (null, false, empty).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jlora.models.parts import ACTIVATIONS

# Says nothing about what a forward pass computes, in any model.
HARMLESS = (
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cache_implementation",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "length_penalty",
    "max_length",
    "model_type",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pad_token_id",
    "problem_type",
    "repetition_penalty",
    "return_dict",
    "task_specific_params",
    "temperature",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torch_dtype",
    "transformers_version",
    "typical_p",
    "unk_token_id",
    "use_cache",
)

# Forms of transformer that none of the models here has.
NEVER: dict[str, Any] = {
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}


@contextlib.contextmanager
def as_value_errors(where: str) -> Iterator[None]:
    """Turns what comes of fields of other types, such as a text for a list, into a ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        raise ValueError(
            f"{where}: a field is of another type than it should be ({error}). Copy the file anew "
            f"from its source."
        ) from error


class Fields:
    """A config.json's fields, of which it is kept in mind which were asked for.

    Args:
        raw: The fields.
        where: What errors call the config.json.
        harmless: Names that need not be asked for, besides `HARMLESS`.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, harmless: Iterable[str] = ()) -> None:
        self.raw, self.where = raw, where
        self.read: set[str] = {*HARMLESS, *harmless}

    def get(self, name: str, default: Any) -> Any:
        """A field, or the default where it is missing or null."""
        self.read.add(name)
        value = self.raw.get(name)
        return default if value is None else value

    def size(self, name: str, default: int | None = None) -> int:
        """A field that is a positive whole number."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{self.where}: {name}={value!r} is no size. Copy a positive whole number from the "
                f"config.json that the checkpoint came with."
            )
        return value

    def number(self, name: str, default: float) -> float:
        """A field that is a number of 0 or more."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(
                f"{self.where}: {name}={value!r} is no number of 0 or more. Copy one from the "
                f"config.json that the checkpoint came with."
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise ValueError(
                f"{self.where}: {name}={value!r} is neither true nor false. Copy it from the "
                f"config.json that the checkpoint came with."
            )
        return value

    def window(self, name: str, default: int | None) -> int | None:
        """A field that is a size, or null for none."""
        self.read.add(name)
        return None if self.raw.get(name, default) is None else self.size(name, default)

    def only(self, name: str, value: Any) -> None:
        """Refuses another value than the one that is implemented."""
        found = self.get(name, value)
        if found != value:
            raise ValueError(
                f"{self.where}: {name}={found!r} is not implemented, only {value!r}. The model "
                f"would compute something else than its checkpoint was trained for."
            )

    def activation(self, name: str, default: str) -> str:
        """A field that names one of `ACTIVATIONS`."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(
                f"{self.where}: the activation {name}={value!r} is not implemented; "
                f"{sorted(ACTIVATIONS)} are."
            )
        return value

    def rest(self) -> None:
        """Refuses fields that nobody asked for and that say something."""
        empty = (None, False, 0, "", [], {})
        unknown = {n: v for n, v in self.raw.items() if n not in self.read and v not in empty}
        if unknown:
            raise ValueError(
                f"{self.where}: {unknown} is not known here, so that it may change what the model "
                f"computes. If it does not, take it out of the config.json; else this checkpoint "
                f"needs another model."
            )
