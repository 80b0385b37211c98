"""Strict reader of a checkpoint's config.json.

A field that would change the outputs and is not implemented raises an error with its name. So does
an unknown field, unless it is empty (null, false, 0, "", [], {}).
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jlora.models.layers import ACTIVATIONS

# Fields that do not affect the forward pass of any model.
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

# Variants that no model of jlora implements, with the only value that is accepted.
REQUIRED_VALUES: dict[str, Any] = {
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "quantization_config": None,
    "tie_encoder_decoder": False,
}


_COPY_FIELD = "Copy it from the checkpoint's original config.json."


@contextlib.contextmanager
def convert_to_value_error(location: str) -> Iterator[None]:
    """Converts errors from fields of a wrong type, such as a string for a list, to ValueError.

    Args:
        location: Name of the config.json in error messages.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, re.error) as error:
        raise ValueError(
            f"{location}: a field has the wrong type ({error}). Copy the file again from its "
            f"source."
        ) from error


class ConfigReader:
    """Fields of a config.json, with a record of those that were read.

    Args:
        config_dict: Fields of the config.json.
        location: Name of the config.json in error messages.
        ignored_fields: Fields that may stay unread, in addition to `IGNORED_FIELDS`.
    """

    def __init__(
        self, config_dict: Mapping[str, Any], location: str, ignored_fields: Iterable[str] = ()
    ) -> None:
        self.config_dict, self.location = config_dict, location
        self.fields_read: set[str] = {*IGNORED_FIELDS, *ignored_fields}

    def get(self, name: str, default: Any) -> Any:
        """Returns a field, or the default where it is missing or null."""
        self.fields_read.add(name)
        value = self.config_dict.get(name)
        return default if value is None else value

    def get_positive_int(self, name: str, default: int | None = None) -> int:
        """Returns a field that must be a positive integer."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{self.location}: {name}={value!r} must be a positive integer. {_COPY_FIELD}"
            )
        return value

    def get_float(self, name: str, default: float) -> float:
        """Returns a field that must be a finite number of at least 0."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(
                f"{self.location}: {name}={value!r} must be a finite number of at least 0. "
                f"{_COPY_FIELD}"
            )
        return float(value)

    def get_bool(self, name: str, default: bool) -> bool:
        """Returns a field that must be true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise ValueError(
                f"{self.location}: {name}={value!r} must be true or false. {_COPY_FIELD}"
            )
        return value

    def get_optional_int(self, name: str, default: int | None) -> int | None:
        """Returns a field that must be a positive integer or null."""
        self.fields_read.add(name)
        if self.config_dict.get(name, default) is None:
            return None
        return self.get_positive_int(name, default)

    def require_value(self, name: str, value: Any) -> None:
        """Raises an error unless a field has the only value that is implemented."""
        actual = self.get(name, value)
        if actual != value:
            raise ValueError(
                f"{self.location}: {name}={actual!r} is not implemented, only {value!r}. Without "
                f"it, the model's outputs would differ from those in training."
            )

    def get_activation(self, name: str, default: str) -> str:
        """Returns a field that must be a key of `ACTIVATIONS`."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ValueError(
                f"{self.location}: the activation {name}={value!r} is not implemented, must be one "
                f"of {sorted(ACTIVATIONS)}."
            )
        return value

    def reject_unread_fields(self) -> None:
        """Raises an error for fields that were not read and are not empty."""
        empty = (None, False, 0, "", [], {})
        unknown = {
            name: value
            for name, value in self.config_dict.items()
            if name not in self.fields_read and value not in empty
        }
        if unknown:
            raise ValueError(
                f"{self.location}: {unknown} is unknown to jlora and might change the model's "
                f"outputs. If it does not, remove it from the config.json; otherwise jlora does "
                f"not support this checkpoint."
            )
