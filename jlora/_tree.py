"""Paths into parameter trees, and rules that say which weights a config applies to."""

from __future__ import annotations

import collections
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.core.meta
import jax
import numpy as np

from jlora._quantized_array import QuantizedArray, is_quantized

PyTree = Any


class FlatTree(NamedTuple):
    """A tree taken apart: one path, one leaf each, and what puts them together again."""

    paths: tuple[str, ...]
    leaves: list[Any]
    treedef: Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is numbers that JAX traces, or stands for them before they exist.

    Python's own numbers are not: `train=False` and `deterministic=True` must stay static.
    """
    return isinstance(
        leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct | QuantizedArray
    )


def flatten_with_paths(tree: PyTree) -> FlatTree:
    """The leaves of a tree with their `/`-joined paths, in the order of `jax.tree.leaves`.

    A packed weight is one leaf. A box around an array (`flax.linen.Partitioned`,
    `flax.nnx.Variable`) adds nothing to the path.

    Raises:
        ValueError: When two leaves have one path, because a key contains `/`.
    """
    boxed, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_flatten_leaf)
    paths: list[str] = []
    for keys, box in boxed:
        inside, _ = jax.tree_util.tree_flatten_with_path(box, is_leaf=is_quantized)
        for inner, _ in inside:
            # The key of a box that holds one array says nothing; those of a tree in a box do.
            names = (*keys, *inner) if len(inside) > 1 else keys
            paths.append("/".join(_format_tree_key(key) for key in names))
    repeated = [path for path, count in collections.Counter(paths).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Two leaves of the tree share the path {repeated[0]!r}, so a rule could not tell them "
            f"apart. Rename a key that contains '/'."
        )
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_quantized)
    return FlatTree(tuple(paths), leaves, treedef)


def _is_flatten_leaf(node: Any) -> bool:
    return is_quantized(node) or _is_flax_box(node)


def _is_flax_box(node: Any) -> bool:
    # Flax's NNX is not imported for its own sake: without it there is no Variable to find.
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
    """Refuses what is neither one config nor a mapping of patterns to configs or None.

    Raises:
        TypeError: For another type of rules, pattern or config.
        ValueError: For an empty mapping or a pattern that does not compile.
    """
    if is_config(rules):
        return
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules={rules!r} is a {type(rules).__name__}. Give one adapter config, such as "
            f"jlora.LoRA(rank=8, alpha=16), or a mapping of regular expressions to configs or None."
        )
    if not rules:
        raise ValueError(
            "rules={} adapts nothing. Map a pattern to a config, or give the config alone."
        )
    for pattern, config in rules.items():
        if not isinstance(pattern, str):
            raise TypeError(f"The rule {pattern!r} is no string; a pattern is searched in paths.")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"The rule {pattern!r} is not a regular expression: {error}. Escape special "
                f"characters with a backslash."
            ) from error
        if config is not None and not is_config(config):
            raise TypeError(
                f"The rule {pattern!r} maps to {config!r}. Map it to an adapter config, or to None "
                f"to leave its weights frozen."
            )


class PatternMatches(NamedTuple):
    """Which rule took which path, and what is wrong with rules that took none."""

    rule_by_path: dict[str, tuple[str, Any]]
    errors: tuple[str, ...]


def match_patterns(rules: Mapping[str, Any], paths: Sequence[str]) -> PatternMatches:
    """For every path that a rule matches, the first such pattern and its config.

    A pattern that matches no path, or only paths that earlier patterns took, is a problem.
    """
    assigned: dict[str, tuple[str, Any]] = {}
    problems = []
    for pattern, config in rules.items():
        matches = [path for path in paths if re.search(pattern, path)]
        new = [path for path in matches if path not in assigned]
        if not matches:
            problems.append(
                f"The rule {pattern!r} matches none of the {len(paths)} weights. The nearest paths "
                f"are {closest_matches(pattern, paths)}; lora.explain(params, ...) lists them all."
            )
        elif not new:
            problems.append(
                f"The rule {pattern!r} has no effect: every weight it matches, such as "
                f"{matches[0]!r}, was taken by the earlier rule {assigned[matches[0]][0]!r}. Put "
                f"the narrower rule first."
            )
        assigned.update(dict.fromkeys(new, (pattern, config)))
    return PatternMatches(assigned, tuple(problems))


def closest_matches(query: str, candidates: Iterable[str], count: int = 2) -> list[str]:
    """The paths that hold the stretch most like `query`, best first."""

    def likeness(path: str) -> float:
        windows = max(1, len(path) - len(query) + 1)
        matcher = difflib.SequenceMatcher(b=query, autojunk=False)
        best = 0.0
        for start in range(windows):
            matcher.set_seq1(path[start : start + len(query)])
            if matcher.real_quick_ratio() > best and matcher.quick_ratio() > best:
                best = max(best, matcher.ratio())
        return best

    return sorted(candidates, key=likeness, reverse=True)[:count]
