"""The command line: training, what a file holds, checkpoints in other formats, and text."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jlora.documentation import attributes

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspect:
    """What a checkpoint's folder, a folder of PEFT's or an adapter file holds.

    Attributes:
        path: The folder or file.
    """

    path: Path
    example = "jlora inspect my-adapter/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportMerged:
    """Merge an adapter into its base and write a Hugging Face folder.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: File of jlora.save_adapter, or folder of PEFT's.
        out: The new folder.
        dtype: Of the weights; those of the base when left out.
        shard_gb: Size of a file, in 10^9 bytes.
    """

    base: str
    adapter: Path
    out: Path
    dtype: str | None = None
    shard_gb: float = 5.0
    example = "jlora export merged base/ adapter.safetensors merged/ --dtype bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPeft:
    """Write an adapter as a folder that PEFT, or vLLM, reads.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: File of jlora.save_adapter.
        out: The new folder.
        vllm: Write what vLLM takes, or say why it cannot be.
        task: One of PEFT's task types.
        base_name: The base's name for the folder's readers; its path when left out.
    """

    base: str
    adapter: Path
    out: Path
    vllm: bool = False
    task: str | None = None
    base_name: str | None = None
    example = "jlora export peft base/ adapter.safetensors peft-adapter/ --task CAUSAL_LM"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportAdapter:
    """Write a folder of PEFT's as one adapter file of jlora's.

    Attributes:
        base: Folder of the base model, or its name on the Hub.
        adapter: Folder of PEFT's.
        out: The new file.
    """

    base: str
    adapter: Path
    out: Path
    example = "jlora export adapter base/ peft-adapter/ adapter.safetensors"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate:
    """Write what follows a prompt.

    Attributes:
        model: Folder of a decoder with its tokenizer.json, or its name on the Hub.
        prompt: The text that is continued.
        adapter: File of jlora.save_adapter, or folder of PEFT's.
        max_new_tokens: How many tokens are written at most.
        temperature: 0 takes the likeliest token every time.
        top_k: How many of the likeliest tokens are drawn from.
        top_p: The least share of probability that is drawn from.
        seed: Of the draws.
        dtype: Of the weights; that of the files when left out.
    """

    model: str
    prompt: str
    adapter: Path | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    dtype: str | None = None
    example = 'jlora generate base/ "Once upon a time" --adapter adapter.safetensors'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train what a recipe describes. `--section.field value` says otherwise than the recipe.

    Attributes:
        recipe: The YAML file; `jlora recipe` writes one to change.
        resume: Go on from the last checkpoint.
        allow_changes: Go on though data, base or hyperparameters are others than they were.
        overrides: What is said otherwise.
    """

    recipe: Path
    resume: bool = False
    allow_changes: bool = False
    overrides: tuple[str, ...] = ()
    example = "jlora train recipe.yaml --lora.rank 32 --output run-32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Compile a recipe's step for a TPU that is not here, and tell what it needs on each chip.

    Attributes:
        recipe: The YAML file.
        topology: A chip and the sides of a slice: v5e:4x4, v5p:4x4x4, v6e:8x8.
        overrides: What is said otherwise than the recipe, as `--section.field value`.
    """

    recipe: Path
    topology: str = "v5e:4x4"
    overrides: tuple[str, ...] = ()
    example = "jlora plan recipe.yaml --topology v5e:16x16 --mesh.fsdp 256"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowRecipe:
    """Print a recipe with every field, its default and what it means.

    Attributes:
        schema: Print the JSON schema for editors instead.
    """

    schema: bool = False
    example = "jlora recipe > recipe.yaml"


def train(options: Train) -> int:
    """Trains; the exit status says whether a signal ended it."""
    from jlora.training import recipe
    from jlora.training.interruption import Interrupted
    from jlora.training.run import train

    read = recipe.load(options.recipe, options.overrides)
    try:
        train(read, resume=options.resume, allow_changes=options.allow_changes)
    except Interrupted as ended:
        print(ended, file=sys.stderr)
        return ended.status
    return 0


def plan(options: Plan) -> int:
    """Prints the plan; the exit status is 1 where it does not fit."""
    from jlora.planning.plan import plan
    from jlora.training import recipe

    made = plan(recipe.load(options.recipe, options.overrides), options.topology)
    print(made)
    return 0 if made.fits else 1


def show_recipe(options: ShowRecipe) -> None:
    """Prints it."""
    import json

    from jlora.training import recipe

    print(json.dumps(recipe.json_schema(), indent=2) if options.schema else recipe.commented())


def inspect(options: Inspect) -> None:
    """Prints what is there."""
    from jlora.inspection import inspect

    print(inspect(options.path))


def export_merged(options: ExportMerged) -> None:
    """Writes the merged checkpoint and prints what rounding leaves of each change."""
    from jlora import models
    from jlora.checkpoints.adapter_file import schemes_of
    from jlora.merging.export import merge_to

    _new(options.out)
    _, params, adapter = _with_adapter(options.base, options.adapter)
    merged = merge_to(params, adapter, options.dtype)
    models.save(
        options.out,
        merged.params,
        options.base,
        dtype=options.dtype,
        shard_bytes=int(options.shard_gb * 1e9),
        **_layout(options.adapter),
    )
    print(merged)
    schemes = [] if options.adapter.is_dir() else schemes_of(options.adapter)
    if schemes:
        print(
            f"The adapter was trained on weights quantised as {', '.join(schemes)}, and is merged "
            f"into the original ones, which it was not measured on. The export of its recipe "
            f"merges into the dequantized ones: --export.merged true --resume."
        )
    print(f"Wrote {options.out}.")


def export_peft(options: ExportPeft) -> None:
    """Writes the folder."""
    from jlora import peft

    _new(options.out)
    model, params, adapter = _with_adapter(options.base, options.adapter)
    peft.save(
        options.out,
        adapter,
        model,
        params,
        base_model=options.base_name or options.base,
        task=options.task,
        reader="vllm" if options.vllm else "peft",
    )
    print(f"Wrote {options.out}.")


def export_adapter(options: ExportAdapter) -> None:
    """Writes the file."""
    import jax

    from jlora import models, peft
    from jlora.checkpoints.adapter_file import save_adapter

    _new(options.out)
    model, params = models.load(options.base)
    loaded = peft.load(options.adapter, model, params)
    same = jax.tree.map(lambda one, two: one is two, loaded.params, params)
    if not jax.tree.all(same):
        raise ValueError(
            f"{options.adapter} also replaces weights of the base, which an adapter file has no "
            f"room for. Use jlora export merged."
        )
    save_adapter(options.out, loaded.adapter, params)
    print(f"Wrote {options.out}.")


def generate(options: Generate) -> None:
    """Prints the text."""
    import jax
    import numpy as np
    from tokenizers import Tokenizer

    from jlora import models
    from jlora.checkpoints.hub import folder_of
    from jlora.transform import lora_transform

    folder = folder_of(options.model)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: jlora generate needs the tokenizer.")
    tokenizer = Tokenizer.from_file(str(file))
    given: Any = None
    apply: Callable[..., Any] | None = None
    if options.adapter is None:
        model, given = models.load(folder, dtype=options.dtype)
    else:
        model, *given = _with_adapter(folder, options.adapter, dtype=options.dtype)
    if not isinstance(model, models.Decoder):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which writes no text.")
    if options.adapter is not None:
        lora = lora_transform(model.apply)
        apply = lambda both, *args: lora.apply(both[0], both[1], *args)  # noqa: E731
    sampling = models.Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_tokens=models.stop_tokens(folder),
    )
    ids = tokenizer.encode(options.prompt).ids
    written = models.generate(
        model,
        given,
        np.array([ids]),
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
        apply=apply,
    )
    print(tokenizer.decode([*ids, *np.asarray(written.tokens[0, : int(written.lengths[0])])]))


def _with_adapter(base: str | Path, path: Path, **options: Any) -> tuple[Any, Any, Any]:
    """The model, its weights, and the adapter of either format."""
    from jlora import models, peft
    from jlora.checkpoints.adapter_file import load_adapter

    model, params = models.load(base, **_layout(path), **options)
    if path.is_dir():
        loaded = peft.load(path, model, params)
        return model, loaded.params, loaded.adapter
    return model, params, load_adapter(path, params)


def _layout(path: Path) -> dict[str, Any]:
    """How the layers lie in the base that an adapter is for: in one stack, or each apart."""
    from jlora.checkpoints.adapter_file import weight_paths

    if path.is_dir():
        return {}
    stacked = any("/layers/" in weight for weight in weight_paths(path))
    return {"scanned": True} if stacked else {}


def _new(out: Path) -> None:
    """Refuses to write where something is, before the work begins."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is left as it was. Choose another name.")


_COMMANDS: dict[tuple[str, ...], tuple[type, Callable[[Any], int | None]]] = {
    ("train",): (Train, train),
    ("recipe",): (ShowRecipe, show_recipe),
    ("plan",): (Plan, plan),
    ("inspect",): (Inspect, inspect),
    ("export", "merged"): (ExportMerged, export_merged),
    ("export", "peft"): (ExportPeft, export_peft),
    ("export", "adapter"): (ExportAdapter, export_adapter),
    ("generate",): (Generate, generate),
}


def parser() -> argparse.ArgumentParser:
    """The parser of all commands, made from their dataclasses."""
    top = argparse.ArgumentParser(prog="jlora", description=(__doc__ or "").strip())
    groups: dict[tuple[str, ...], Any] = {(): top.add_subparsers(required=True, metavar="COMMAND")}
    for names, (options, run) in _COMMANDS.items():
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
        type_of = {"Path": Path, "int": int, "float": float}.get(kind, str)
        choices = _DTYPES if field.name == "dtype" else None
        flag = _flag(field.name)
        if kind == "bool":
            one.add_argument(flag, action="store_true", help=texts[field.name])
        elif field.default is dataclasses.MISSING:
            one.add_argument(field.name, type=type_of, help=texts[field.name])
        else:
            one.add_argument(
                flag,
                dest=field.name,
                type=type_of,
                default=field.default,
                choices=choices,
                help=texts[field.name],
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _apart(options: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those that say otherwise than its recipe, in any order."""
    flags = ["--help", *(_flag(field.name) for field in dataclasses.fields(options))]
    own: list[str] = []
    overrides: list[str] = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        name, equals, _ = argument.partition("=")
        # The parser takes its flags shortened too, and "--" is one of its own.
        if not name.startswith("--") or any(flag.startswith(name) for flag in flags):
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
    command = _COMMANDS.get(tuple(own[:1]), (object, None))[0]
    overridable = hasattr(command, "overrides")
    if overridable:
        own[1:], overrides = _apart(command, own[1:])
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
        except (OSError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            return 130
