"""Reader of a checkpoint's config.json.

Which fields matter is decided by the class that transformers has for the model type. A field that
it reads is parsed, has no effect on the forward pass (`IGNORED_FIELDS`), or must have the only
value that is implemented (`REQUIRED_VALUES`); any other value is an error with the field's name. A
field that it does not read changes nothing in transformers either, and is ignored.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jlora._validation import is_nonnegative_float32, is_positive_float32
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
    "is_encoder_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "model_type",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
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


# The release of transformers whose config classes the parsers follow.
_TRANSFORMERS_VERSION = (5, 23)

MAX_LAYERS = 10_000  # A larger number in a config.json is an error of its writer.

_MAX_INT = 2**31 - 1

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

    def get_same(self, *names: str) -> Any:
        """Returns the value of a setting that has several names; None where it has none.

        Raises:
            ValueError: Two of the fields differ.
        """
        self.fields_read |= {*names}
        values = {n: self.config_dict[n] for n in names if self.config_dict.get(n) is not None}
        self.require_equal(values)
        return next(iter(values.values()), None)

    def require_equal(self, values: Mapping[str, Any]) -> None:
        """Raises an error unless all sources of one setting, by name, have one value."""
        for first, name in itertools.pairwise(values):
            if values[first] != values[name]:
                raise ValueError(
                    f"{self.location}: {first}={values[first]!r} and {name}={values[name]!r} are "
                    f"two values of one setting. Keep the one that the model was trained with."
                )

    def get_positive_int(
        self, name: str, default: int | None = None, *, maximum: int = _MAX_INT
    ) -> int:
        """Returns a field that must be a positive integer."""
        value = self.get(name, default)
        if type(value) is not int or value < 1:
            raise ValueError(
                f"{self.location}: {name}={value!r} must be a positive integer. {_COPY_FIELD}"
            )
        if value > maximum:
            raise ValueError(
                f"{self.location}: {name}={value} must be at most {maximum}. {_COPY_FIELD}"
            )
        return value

    def get_float(self, name: str, default: float) -> float:
        """Returns a field that must be 0 or a positive number in the range of float32."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not is_nonnegative_float32(value):
            raise ValueError(
                f"{self.location}: {name}={value!r} must be a finite number of at least 0, in the "
                f"range of float32. {_COPY_FIELD}"
            )
        return float(value)

    def get_positive_float(
        self, name: str, default: float, *, maximum: float = float("inf")
    ) -> float:
        """Returns a field that must be a positive number in the range of float32."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not is_positive_float32(value):
            raise ValueError(
                f"{self.location}: {name}={value!r} must be a finite number above 0, in the range "
                f"of float32. {_COPY_FIELD}"
            )
        if value > maximum:
            raise ValueError(
                f"{self.location}: {name}={value} must be at most {maximum:g}. {_COPY_FIELD}"
            )
        return float(value)

    def get_rate(self, name: str, default: float) -> float:
        """Returns a field that must be a dropout rate: at least 0 and below 1."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise ValueError(
                f"{self.location}: {name}={value!r} must be at least 0 and below 1. {_COPY_FIELD}"
            )
        return float(value)

    def get_dict(self, name: str) -> dict[str, Any]:
        """Returns a field that must be an object; empty where it is missing or null."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise ValueError(f"{self.location}: {name}={value!r} must be an object. {_COPY_FIELD}")
        return dict(value)

    def get_list(self, name: str, default: list[Any] | None = None) -> list[Any] | None:
        """Returns a field that must be a list, or the default where it is missing or null."""
        value = self.get(name, default)
        if value is not None and not isinstance(value, list):
            raise ValueError(f"{self.location}: {name}={value!r} must be a list. {_COPY_FIELD}")
        return value

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

    def warn_unread_fields(self) -> None:
        """Warns of fields that were not read, if a newer transformers may know them."""
        empty = (None, False, 0, "", [], {})
        unread = [
            name
            for name, value in self.config_dict.items()
            if name not in self.fields_read and value not in empty
        ]
        version = str(self.config_dict.get("transformers_version", ""))
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
        if unread and numbers > _TRANSFORMERS_VERSION:
            warnings.warn(
                f"{self.location}: {unread} are ignored: transformers "
                f"{'.'.join(map(str, _TRANSFORMERS_VERSION))} does not read them, but the file is "
                f"of transformers {version}. Compare the outputs with it once.",
                stacklevel=2,
            )
