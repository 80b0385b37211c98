"""Entry point of the command line: the commands, their parser, and how one is run."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jlora
from jlora import cli
from jlora._docstrings import parse_attribute_docs
from jlora.cli import export, generate, inspect, merge, rank_search, train
from jlora.cli.terminal import escape_control_characters

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
    """Returns the parser of all commands, built from their option dataclasses."""
    parser = argparse.ArgumentParser(prog="jlora", description=(cli.__doc__ or "").strip())
    parser.add_argument("--version", action="version", version=f"jlora {jlora.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (options, run) in COMMANDS.items():
        description = (options.__doc__ or "").partition("\n")[0]
        subparser = subparsers.add_parser(
            name,
            help=description,
            description=description,
            epilog=f"example: {options.example}",
            formatter_class=_DefaultsHelpFormatter,
        )
        _add_option_arguments(subparser, options)
        subparser.set_defaults(options=options, run=run)
    return parser


class _DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults to help texts, except None and False, which the texts describe."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False):
            return action.help
        return super()._get_help_string(action)


def _add_option_arguments(subparser: argparse.ArgumentParser, options: type) -> None:
    """Adds an argument for each field; fields without a default are positional."""
    texts = parse_attribute_docs(options)
    for field in dataclasses.fields(options):
        if field.name == "overrides":
            continue
        type_name = str(field.type).removesuffix(" | None")
        sequence = re.fullmatch(r"tuple\[(\w+), \.\.\.\]", type_name)
        type_name = sequence[1] if sequence else type_name
        field_type = {"Path": _parse_path, "int": int, "float": float}.get(type_name, str)
        nargs: dict[str, Any] = {"nargs": "+"} if sequence else {}
        flag = flag_from_name(field.name)
        if type_name == "bool":
            subparser.add_argument(flag, action="store_true", help=texts[field.name])
        elif field.default is dataclasses.MISSING:
            subparser.add_argument(field.name, type=field_type, help=texts[field.name], **nargs)
        else:
            subparser.add_argument(
                flag,
                dest=field.name,
                type=field_type,
                default=field.default,
                choices=_CHOICES.get(field.name),
                help=texts[field.name],
                **nargs,
            )


def _parse_path(text: str) -> Path:
    """Returns a path; an empty text would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty text is no path; leave the option out")
    return Path(text)


def flag_from_name(name: str) -> str:
    """Returns the flag of a field, such as --top-k for top_k."""
    return "--" + name.replace("_", "-")


# Top-level recipe fields, which are not abbreviations of flags: --seed is not --seeds.
_RECIPE_FLAGS = ("--seed", "--output")


def split_overrides(options: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates a command's arguments from overrides of its recipe, in any order."""
    flags = ["--help", *(flag_from_name(field.name) for field in dataclasses.fields(options))]
    command_arguments: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, _ = argument.partition("=")
        # argparse also accepts abbreviated flags, and "--".
        is_flag = name not in _RECIPE_FLAGS and any(flag.startswith(name) for flag in flags)
        if not name.startswith("--") or is_flag:
            command_arguments.append(argument)
            continue
        overrides.append(argument)
        if not equals and pending and not pending[0].startswith("--"):
            overrides.append(pending.pop(0))
    return command_arguments, overrides


# Errors whose messages are complete; those of other types begin with the type.
_DESCRIBED_ERRORS = (OSError, ValueError, TypeError, ArithmeticError, ModuleNotFoundError)


def _print_warning(message: Warning | str, *_: Any) -> None:

    print(escape_control_characters(f"warning: {message}"), file=sys.stderr)


def _format_error(error: Exception) -> str:
    is_described = isinstance(error, _DESCRIBED_ERRORS) and str(error)
    return f"error: {error}" if is_described else f"error: {type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Command and its arguments; None: those of the process.

    Returns:
        Exit status: 0 for success; 1 for an error, whose message is printed; 143 or 130 for a
        training run that SIGTERM or SIGINT ended after it was saved; 130 for other commands that
        SIGINT ended.

    Raises:
        SystemExit: With status 2 for an unknown command or argument, 0 for --help and --version.

    Example:
        >>> main(["inspect", "missing/"])
        1
    """
    parser = build_parser()
    arguments = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    command = COMMANDS.get(arguments[0] if arguments else "", (object, None))[0]
    has_overrides = hasattr(command, "overrides")
    if has_overrides:
        arguments[1:], overrides = split_overrides(command, arguments[1:])
    namespace, unknown = parser.parse_known_args(arguments)
    values = vars(namespace)
    options, run = values.pop("options"), values.pop("run")
    if has_overrides:
        values["overrides"] = (*overrides, *unknown)
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = _print_warning
        try:
            return run(options(**values)) or 0
        except Exception as error:
            print(escape_control_characters(_format_error(error)), file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
