"""The commands, their parser, and how one is run."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora import cli
from jlora.cli import files, merging, ranks, text, training
from jlora.documentation import attributes

_DTYPES = ("float32", "bfloat16", "float16")


COMMANDS: dict[tuple[str, ...], tuple[type, Callable[[Any], int | None]]] = {
    ("train",): (training.Train, training.train),
    ("recipe",): (training.ShowRecipe, training.show_recipe),
    ("plan",): (training.Plan, training.plan),
    ("rank-search",): (ranks.RankSearch, ranks.rank_search),
    ("inspect",): (files.Inspect, files.inspect),
    ("merge",): (merging.Merge, merging.merge),
    ("export", "merged"): (files.ExportMerged, files.export_merged),
    ("export", "peft"): (files.ExportPeft, files.export_peft),
    ("export", "adapter"): (files.ExportAdapter, files.export_adapter),
    ("generate",): (text.Generate, text.generate),
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, made from their dataclasses."""
    top = argparse.ArgumentParser(prog="jlora", description=(cli.__doc__ or "").strip())
    groups: dict[tuple[str, ...], Any] = {(): top.add_subparsers(required=True, metavar="COMMAND")}
    for names, (options, run) in COMMANDS.items():
        for depth in range(1, len(names)):
            if names[:depth] not in groups:
                inner = groups[names[: depth - 1]].add_parser(
                    names[depth - 1], help="other formats"
                )
                groups[names[:depth]] = inner.add_subparsers(required=True, metavar="WHAT")
        first = (options.__doc__ or "").partition("\n")[0]
        one = groups[names[:-1]].add_parser(
            names[-1],
            help=first,
            description=first,
            epilog=f"example: {options.example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_fields(one, options)
        one.set_defaults(options=options, run=run)
    return top


def _add_fields(one: argparse.ArgumentParser, options: type) -> None:
    """An argument for each field: those without a default by their place."""
    texts = attributes(options)
    for field in dataclasses.fields(options):
        if field.name == "overrides":
            continue
        kind = str(field.type).removesuffix(" | None")
        several = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", kind)
        kind = several[1] if several else kind
        type_of = {"Path": Path, "int": int, "float": float}.get(kind, str)
        many: dict[str, Any] = {"nargs": "+"} if several else {}
        choices = _DTYPES if field.name == "dtype" else None
        flag = flag_of(field.name)
        if kind == "bool":
            one.add_argument(flag, action="store_true", help=texts[field.name])
        elif field.default is dataclasses.MISSING:
            one.add_argument(field.name, type=type_of, help=texts[field.name], **many)
        else:
            one.add_argument(
                flag,
                dest=field.name,
                type=type_of,
                default=field.default,
                choices=choices,
                help=texts[field.name],
                **many,
            )


# Fields of every recipe, which no flag is shortened to: --seed is not --seeds.
_OF_RECIPES = ("--seed", "--output")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def apart(options: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those that say otherwise than its recipe, in any order."""
    flags = ["--help", *(flag_of(field.name) for field in dataclasses.fields(options))]
    own: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, _ = argument.partition("=")
        # The parser takes its flags shortened too, and "--" is one of its own.
        is_own = name not in _OF_RECIPES and any(flag.startswith(name) for flag in flags)
        if not name.startswith("--") or is_own:
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals and pending and not pending[0].startswith("--"):
            overrides.append(pending.pop(0))
    return own, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    The exit status is 1 for an error that it tells of, 2 for a command that there is not, 143 or
    130 for a training run that SIGTERM or SIGINT ended, after it was saved, and 130 for anything
    else that SIGINT ended.
    """
    made = parser()
    own = list(sys.argv[1:] if arguments is None else arguments)
    overrides: list[str] = []
    command = COMMANDS.get(tuple(own[:1]), (object, None))[0]
    overridable = hasattr(command, "overrides")
    if overridable:
        own[1:], overrides = apart(command, own[1:])
    parsed, rest = made.parse_known_args(own)
    given = vars(parsed)
    options, run = given.pop("options"), given.pop("run")
    if overridable:
        given["overrides"] = (*overrides, *rest)
    elif rest:
        made.error(f"unrecognized arguments: {' '.join(rest)}")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return run(options(**given)) or 0
        except (
            OSError,
            ValueError,
            TypeError,
            ArithmeticError,
            MemoryError,
            ModuleNotFoundError,
        ) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
