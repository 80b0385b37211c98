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

from jlora.models.layers import ACTIVATIONS

# Says nothing about what a forward pass computes, in any model.
IGNORED_FIELDS = (
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
REQUIRED_VALUES: dict[str, Any] = {
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}


@contextlib.contextmanager
def convert_to_value_error(location: str) -> Iterator[None]:
    """Turns what comes of fields of other types, such as a text for a list, into a ValueError."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        raise ValueError(
            f"{location}: a field is of another type than it should be ({error}). Copy the file anew "
            f"from its source."
        ) from error


class ConfigReader:
    """A config.json's fields, of which it is kept in mind which were asked for.

    Args:
        config_dict: The fields.
        location: What errors call the config.json.
        ignored_fields: Names that need not be asked for, besides `IGNORED_FIELDS`.
    """

    def __init__(
        self, config_dict: Mapping[str, Any], location: str, ignored_fields: Iterable[str] = ()
    ) -> None:
        self.config_dict, self.location = config_dict, location
        self.fields_read: set[str] = {*IGNORED_FIELDS, *ignored_fields}

    def get(self, name: str, default: Any) -> Any:
        """A field, or the default where it is missing or null."""
        self.fields_read.add(name)
        value = self.config_dict.get(name)
        return default if value is None else value

    def get_positive_int(self, name: str, default: int | None = None) -> int:
        """A field that is a positive whole number."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{self.location}: {name}={value!r} is no size. Copy a positive whole number from the "
                f"config.json that the checkpoint came with."
            )
        return value

    def get_float(self, name: str, default: float) -> float:
        """A field that is a number of 0 or more."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(
                f"{self.location}: {name}={value!r} is no number of 0 or more. Copy one from the "
                f"config.json that the checkpoint came with."
            )
        return float(value)

    def get_bool(self, name: str, default: bool) -> bool:
        """A field that is true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise ValueError(
                f"{self.location}: {name}={value!r} is neither true nor false. Copy it from the "
                f"config.json that the checkpoint came with."
            )
        return value

    def get_optional_int(self, name: str, default: int | None) -> int | None:
        """A field that is a size, or null for none."""
        self.fields_read.add(name)
        return (
            None
            if self.config_dict.get(name, default) is None
            else self.get_positive_int(name, default)
        )

    def require_value(self, name: str, value: Any) -> None:
        """Refuses another value than the one that is implemented."""
        found = self.get(name, value)
        if found != value:
            raise ValueError(
                f"{self.location}: {name}={found!r} is not implemented, only {value!r}. The model "
                f"would compute something else than its checkpoint was trained for."
            )

    def get_activation(self, name: str, default: str) -> str:
        """A field that names one of `ACTIVATIONS`."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(
                f"{self.location}: the activation {name}={value!r} is not implemented; "
                f"{sorted(ACTIVATIONS)} are."
            )
        return value

    def reject_unread_fields(self) -> None:
        """Refuses fields that nobody asked for and that say something."""
        empty = (None, False, 0, "", [], {})
        unknown = {
            n: v
            for n, v in self.config_dict.items()
            if n not in self.fields_read and v not in empty
        }
        if unknown:
            raise ValueError(
                f"{self.location}: {unknown} is not known here, so that it may change what the model "
                f"computes. If it does not, take it out of the config.json; else this checkpoint "
                f"needs another model."
            )
