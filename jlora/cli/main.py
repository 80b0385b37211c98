"""The commands, their parser, and how one is run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora import cli
from jlora._docstrings import parse_attribute_docs
from jlora.cli import export, generate, inspect, merge, rank_search, train

_CHOICES = {"dtype": ("float32", "bfloat16", "float16"), "format": export.FORMATS}

COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "train": (train.TrainOptions, train.run_train),
    "init": (train.InitOptions, train.run_init),
    "plan": (train.PlanOptions, train.run_plan),
    "rank-search": (rank_search.RankSearchOptions, rank_search.run_rank_search),
    "inspect": (inspect.InspectOptions, inspect.run_inspect),
    "merge": (merge.MergeOptions, merge.run_merge),
    "export": (export.ExportOptions, export.run_export),
    "generate": (generate.GenerateOptions, generate.run_generate),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands, made from their dataclasses."""
    top = argparse.ArgumentParser(prog="jlora", description=(cli.__doc__ or "").strip())
    version = f"jlora {importlib.metadata.version('jlora')}"
    top.add_argument("--version", action="version", version=version)
    subparsers = top.add_subparsers(required=True, metavar="COMMAND")
    for name, (options, run) in COMMANDS.items():
        first = (options.__doc__ or "").partition("\n")[0]
        one = subparsers.add_parser(
            name,
            help=first,
            description=first,
            epilog=f"example: {options.example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        _add_option_arguments(one, options)
        one.set_defaults(options=options, run=run)
    return top


def _add_option_arguments(subparser: argparse.ArgumentParser, options: type) -> None:
    """An argument for each field: those without a default by their place."""
    texts = parse_attribute_docs(options)
    for field in dataclasses.fields(options):
        if field.name == "overrides":
            continue
        kind = str(field.type).removesuffix(" | None")
        several = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", kind)
        kind = several[1] if several else kind
        type_of = {"Path": Path, "int": int, "float": float}.get(kind, str)
        many: dict[str, Any] = {"nargs": "+"} if several else {}
        choices = _CHOICES.get(field.name)
        flag = flag_from_name(field.name)
        if kind == "bool":
            subparser.add_argument(flag, action="store_true", help=texts[field.name])
        elif field.default is dataclasses.MISSING:
            subparser.add_argument(field.name, type=type_of, help=texts[field.name], **many)
        else:
            subparser.add_argument(
                flag,
                dest=field.name,
                type=type_of,
                default=field.default,
                choices=choices,
                help=texts[field.name],
                **many,
            )


# Fields of every recipe, which no flag is shortened to: --seed is not --seeds.
_RECIPE_FLAGS = ("--seed", "--output")


def flag_from_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def split_overrides(options: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those that say otherwise than its recipe, in any order."""
    flags = ["--help", *(flag_from_name(field.name) for field in dataclasses.fields(options))]
    own: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, _ = argument.partition("=")
        # The parser takes its flags shortened too, and "--" is one of its own.
        is_own = name not in _RECIPE_FLAGS and any(flag.startswith(name) for flag in flags)
        if not name.startswith("--") or is_own:
            own.append(argument)
            continue
        overrides.append(argument)
        if not equals and pending and not pending[0].startswith("--"):
            overrides.append(pending.pop(0))
    return own, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    The exit status is 1 for an error that it tells of, 2 for a command that there is not, 143 or
    130 for a training run that SIGTERM or SIGINT ended, after it was saved, and 130 for anything
    else that SIGINT ended.
    """
    made = build_parser()
    own = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    command = COMMANDS.get(own[0] if own else "", (object, None))[0]
    overridable = hasattr(command, "overrides")
    if overridable:
        own[1:], overrides = split_overrides(command, own[1:])
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
