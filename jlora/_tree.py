"""Paths of parameter trees, and rules that map patterns of paths to configs."""

from __future__ import annotations

import collections
import difflib
import heapq
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.core.meta
import jax
import numpy as np

from jlora._quantized_array import QuantizedArray

PyTree = Any


class FlatTree(NamedTuple):
    """A flattened tree.

    Attributes:
        paths: `/`-joined path of each leaf.
        leaves: Leaves.
        treedef: Structure of the tree.
    """

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array that JAX traces, or the abstract value of one.

    Python numbers are not: `train=False` and `deterministic=True` must stay static.
    """
    return isinstance(
        leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | QuantizedArray
    )


def is_quantized(node: Any) -> bool:
    """Whether a node of a tree is a quantized weight."""
    return isinstance(node, QuantizedArray)


def flatten_with_paths(tree: PyTree) -> FlatTree:
    """Flattens a tree to its leaves and their `/`-joined paths, in the order of `jax.tree.leaves`.

    A quantized weight is one leaf. A box around an array (`flax.linen.Partitioned`,
    `flax.nnx.Variable`) adds nothing to the path.

    Raises:
        ValueError: If two leaves have the same path, because a key contains `/`.
    """
    boxed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_flatten_leaf)
    paths: list[str] = []
    for keys, box in boxed:
        box_leaves, _ = jax.tree_util.tree_flatten_with_path(box, is_leaf=is_quantized)
        for inner, _ in box_leaves:
            # Keys inside a box are part of the path if it contains several arrays.
            path_keys = (*keys, *inner) if len(box_leaves) > 1 else keys
            paths.append("/".join(_format_tree_key(key) for key in path_keys))
    repeated = [path for path, count in collections.Counter(paths).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Two leaves of the tree share the path {repeated[0]!r}, but paths must be unique. "
            f"Rename a key that contains '/'."
        )
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_quantized)
    return FlatTree(tuple(paths), leaves, treedef)


def _is_flatten_leaf(node: Any) -> bool:
    return is_quantized(node) or _is_flax_box(node)


def _is_flax_box(node: Any) -> bool:
    # NNX is not imported here: unless it is loaded, no tree has a Variable.
    nnx = sys.modules.get("flax.nnx")
    return isinstance(node, flax.core.meta.AxisMetadata) or (
        nnx is not None and isinstance(node, nnx.Variable)
    )


def _format_tree_key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def check_rules(rules: Any, is_config: Callable[[Any], bool]) -> None:
    """Checks that rules are one config, or a mapping of patterns to configs or None.

    Args:
        rules: Rules to check.
        is_config: Function that returns whether a value is a config.

    Raises:
        TypeError: If rules, a pattern or a config has another type.
        ValueError: If the mapping is empty or a pattern does not compile.
    """
    if is_config(rules):
        return
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules={shorten(rules)} must be one adapter config, such as "
            f"jlora.LoRA(rank=8, alpha=16), or a mapping of regular expressions to configs or "
            f"None, got {type(rules).__name__}."
        )
    if not rules:
        raise ValueError(
            "rules={} adapts nothing. Map a pattern to a config, or pass a single config."
        )
    for pattern, config in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(
                f"The rule {pattern!r} must be a string, a regular expression to search in paths."
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"The rule {pattern!r} is not a regular expression: {error}. Escape special "
                f"characters with a backslash."
            ) from error
        if config is not None and not is_config(config):
            raise TypeError(
                f"The rule {pattern!r} maps to {shorten(config)}. Map it to an adapter "
                f"config, or to None to leave its weights frozen."
            )


class PatternMatches(NamedTuple):
    """Assignment of rules to paths.

    Attributes:
        rule_by_path: Pattern and config of the rule that applies to each matched path.
        errors: Messages on rules that apply to no path.
    """

    rule_by_path: dict[str, tuple[str, Any]]
    errors: tuple[str, ...]


def match_patterns(rules: Mapping[str, Any], paths: Sequence[str]) -> PatternMatches:
    """Matches paths with patterns; the first pattern that matches a path applies to it.

    A pattern that matches no path, or only paths of earlier patterns, is reported as an error.
    """
    rule_by_path: dict[str, tuple[str, Any]] = {}
    errors = []
    for pattern, config in rules.items():
        matches = [path for path in paths if re.search(pattern, path)]
        unassigned = [path for path in matches if path not in rule_by_path]
        if not matches:
            errors.append(
                f"The rule {pattern!r} matches none of the {len(paths)} weights. The nearest paths "
                f"are {closest_matches(pattern, paths)}; lora.explain(params, ...) lists them all."
            )
        elif not unassigned:
            errors.append(
                f"The rule {pattern!r} has no effect: every weight it matches, such as "
                f"{matches[0]!r}, is matched by the earlier rule "
                f"{rule_by_path[matches[0]][0]!r}. Put the narrower rule first."
            )
        rule_by_path.update(dict.fromkeys(unassigned, (pattern, config)))
    return PatternMatches(rule_by_path, tuple(errors))


# A query comes from a user or from a file, and an error message must not take longer than the work.
_MAX_QUERY_LETTERS = 200
_MAX_CANDIDATES = 20_000
_MAX_COMPARED = 50


def shorten(text: Any, max_letters: int = _MAX_QUERY_LETTERS) -> str:
    """Returns the representation of a value for an error message, with a bounded length."""
    text = repr(text)
    return text if len(text) <= max_letters else f"{text[: max_letters - 3]}..."


def closest_matches(query: str, candidates: Iterable[str], count: int = 2) -> list[str]:
    """Returns the candidates that contain the substrings most similar to `query`, best first.

    The time is bounded: the query is cut off after 200 letters, and of more than 50 candidates, up
    to 20,000, those with the most triples of letters in common are compared.
    """
    query = query[:_MAX_QUERY_LETTERS]
    names = [name[:1000] for name in itertools.islice(candidates, _MAX_CANDIDATES)]
    if len(names) > _MAX_COMPARED:
        triples = {query[start : start + 3] for start in range(len(query) - 2)}
        names = heapq.nlargest(
            _MAX_COMPARED, names, key=lambda name: sum(triple in name for triple in triples)
        )

    def similarity(path: str) -> float:
        num_windows = max(1, len(path) - len(query) + 1)
        matcher = difflib.SequenceMatcher(b=query, autojunk=False)
        best = 0.0
        for start in range(num_windows):
            matcher.set_seq1(path[start : start + len(query)])
            if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
                best = max(best, matcher.ratio())
        return best

    return sorted(names, key=similarity, reverse=True)[:count]
