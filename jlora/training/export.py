"""What a run leaves: the adapter, the head, exports, and the report."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from jlora import models, peft
from jlora._sharding import fetch_global
from jlora._tree import PyTree
from jlora.checkpoints.adapter_file import write_adapter
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.safetensors_io import serialize_safetensors
from jlora.convert import rebase_to_original
from jlora.merging.merge_to import merge_to_dtype
from jlora.optim.multi_transform import combine
from jlora.training import sharding
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, get_layer_layout_options, schemes_from_recipe
from jlora.transform import lora_transform, merge

_PEFT_READERS: tuple[Literal["peft", "vllm"], ...] = ("peft", "vllm")

ADAPTER_FILE, HEAD_FILE = "adapter.safetensors", "head.safetensors"

# What of a recipe has no part in the numbers: runs that make the same adapter make the same bytes.
_LINEAGE_EXCLUDED_FIELDS: dict[str, Any] = {
    "output": True,
    "distributed": True,
    "export": True,
    "report": True,
    "optimizer": {"offload"},
}


def combine_adapter(setup: Setup, trainable: PyTree) -> dict[str, Any]:
    """The adapter that the loop trains, with its frozen arrays."""
    return combine(trainable["adapter"], setup.frozen["adapter"])


def gather_adapter(setup: Setup, trainable: PyTree) -> dict[str, Any]:
    """The adapter for the checkpoint's own base, in host memory."""
    held = jax.tree.map(fetch_global, combine_adapter(setup, trainable))
    if setup.initial_adapter is None:
        return held
    return rebase_to_original(held, jax.tree.map(fetch_global, setup.initial_adapter))


def export_folders(recipe: Recipe) -> list[Path]:
    """The folders that the recipe asks for beside the adapter's file."""
    asked, output = recipe.export, Path(recipe.output)
    return [output / name for name in ("merged", *_PEFT_READERS) if getattr(asked, name)]


def check_exports(recipe: Recipe, setup: Setup) -> None:
    """Tries the exports on the fresh adapter: what cannot be is told before it is trained.

    Raises:
        ValueError: The adapter cannot be merged, or PEFT has no form for it.
    """
    if jax.process_count() > 1:  # No process has all of the weights.
        return
    adapter = gather_adapter(setup, setup.state.trainable)
    if recipe.export.merged:
        jax.eval_shape(functools.partial(merge, dequantize=True), setup.frozen["base"], adapter)
    with tempfile.TemporaryDirectory() as temporary:
        for reader in _PEFT_READERS:
            if getattr(recipe.export, reader):
                folder = Path(temporary) / reader
                _write_peft(recipe, setup.model, setup.frozen["base"], adapter, reader, folder)


def save_adapter_and_head(
    recipe: Recipe,
    setup: Setup,
    trainable: PyTree,
    fingerprints: Mapping[str, str],
    label_names: Sequence[str] | None,
) -> list[Path]:
    """Writes the adapter, and a new head, from the first process alone.

    Returns:
        What was written.

    Raises:
        ValueError: A number is not finite.
    """
    output = Path(recipe.output)
    adapter = gather_adapter(setup, trainable)
    head = jax.tree.map(fetch_global, trainable.get("head"))
    written = [output / ADAPTER_FILE]
    if jax.process_index() == 0:
        made_by = recipe.model_dump(mode="json", exclude=_LINEAGE_EXCLUDED_FIELDS)
        lineage = Lineage(method="jlora train", recipe=made_by)
        write_adapter(written[0], adapter, fingerprints, lineage)
        if head is not None:
            written.append(output / HEAD_FILE)
            _write_head(written[-1], recipe, setup, head, label_names)
    return written


def write_exports(
    recipe: Recipe, setup: Setup, trainable: PyTree, label_names: Sequence[str] | None
) -> list[Path]:
    """Writes the folders that the recipe asks for, from the first process alone.

    Those that an earlier end of the same run wrote are replaced, each when the new one is whole.

    Returns:
        What was written.

    Raises:
        ValueError: A number is not finite, or PEFT has no form for the adapter.
    """
    adapter = gather_adapter(setup, trainable)
    written = export_folders(recipe)
    if written and jax.process_index() == 0:
        _write_export_folders(recipe, setup, adapter, label_names)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jlora: written")
    return written


def _write_head(
    path: Path, recipe: Recipe, setup: Setup, head: PyTree, label_names: Sequence[str] | None
) -> None:
    """A new head: (width, labels) and (labels,), and what they are called."""
    assert label_names is not None
    decoder = isinstance(setup.model, models.Decoder)
    pooling = recipe.classification.pooling or ("last" if decoder else "mean")
    metadata = {"labels": json.dumps(list(label_names)), "pooling": pooling}
    partial = path.with_suffix(".partial")
    partial.write_bytes(
        serialize_safetensors({name: np.asarray(array) for name, array in head.items()}, metadata)
    )
    os.replace(partial, path)


def _write_export_folders(
    recipe: Recipe, setup: Setup, adapter: PyTree, label_names: Sequence[str] | None
) -> None:
    asked, output = recipe.export, Path(recipe.output)
    options = get_layer_layout_options(setup.model)
    rules = None if asked.merge_into == "original" else schemes_from_recipe(recipe)
    # The codes that were trained on are those of the weights in the run's type.
    of_run = {} if rules is None else {"dtype": recipe.model.dtype, "quantize": rules}
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # Read again, on the host: the devices hold parts of it, or another base.
        model, params = models.load(setup.folder, sharding=lambda *_: host, **of_run, **options)
        if asked.merged:
            dtype = asked.merged_dtype
            merged = merge_to_dtype(params, adapter, dtype, dequantize=True)
            with _replace_folder(output / "merged") as folder:
                models.save(folder, merged.params, setup.folder, dtype=dtype, **options)
                if (
                    label_names is not None
                    and getattr(model.config, "num_labels", None) is not None
                ):
                    _write_label_names(folder / "config.json", label_names)
        for reader in _PEFT_READERS:
            if getattr(asked, reader):
                with _replace_folder(output / reader) as folder:
                    _write_peft(recipe, model, params, adapter, reader, folder)


def _write_peft(
    recipe: Recipe,
    model: Any,
    params: PyTree,
    adapter: PyTree,
    reader: Literal["peft", "vllm"],
    folder: Path,
) -> None:
    base, task = recipe.model.path, _peft_task_type(recipe, model)
    peft.save(
        folder,
        adapter,
        model,
        params,
        base_model_name_or_path=base,
        task_type=task,
        file_format=reader,
    )


def _write_label_names(path: Path, label_names: Sequence[str]) -> None:
    """Writes what a head's labels are called into its config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(number): name for number, name in enumerate(label_names)}
    config["label2id"] = {name: number for number, name in enumerate(label_names)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _peft_task_type(recipe: Recipe, model: Any) -> str:
    """What PEFT calls the task; a head that is none of the model's is a file of its own."""
    if recipe.task != "classification":
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if getattr(model.config, "num_labels", None) is None else "SEQ_CLS"


@contextlib.contextmanager
def _replace_folder(folder: Path) -> Iterator[Path]:
    """A name to write a folder to, which then takes the place of what is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def tokenize_prompts(recipe: Recipe, setup: Setup, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of the recipe's prompts, as the model is used to them; none unless it writes.

    Raises:
        ValueError: One is too long for the model.
    """
    prompts = recipe.report.sample_prompts if recipe.task != "classification" else []
    if recipe.data.train[0].format != "chat" or tokenizer.chat_template is None:
        found = [[*tokenizer.prefix_ids, *ids] for ids in tokenizer.encode(prompts)]
    else:
        chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
        render = functools.partial(tokenizer.chat_template.render, add_generation_prompt=True)
        found = tokenizer.encode([render(chat) for chat in chats])
    room = setup.model.config.max_seq_length - recipe.report.max_new_tokens
    for prompt, tokens in zip(prompts, found, strict=True):
        if len(tokens) > room:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, and the model has room for "
                f"{room} before report.max_new_tokens={recipe.report.max_new_tokens}. Shorten it."
            )
    return found


def generate_texts(
    setup: Setup,
    adapter: PyTree | None,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[str]:
    """What the model writes after each prompt, with an adapter or without.

    Args:
        setup: Of the run.
        adapter: Of its base, as the loop has it.
        tokenizer: Of the base.
        prompts: Their tokens.
        max_new_tokens: How many are written at most.
    """
    if not prompts:
        return []
    length = max(map(len, prompts))
    rows = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros_like(rows)
    for row, found in enumerate(prompts):
        rows[row, length - len(found) :] = found
        mask[row, length - len(found) :] = 1
    lora = lora_transform(setup.model.apply)
    given = {"base": setup.frozen["base"], "adapter": adapter or {}}
    apply = lambda both, *inputs: lora.apply(both["base"], both["adapter"], *inputs)  # noqa: E731
    with sharding.use_mesh(setup.mesh):
        made = models.generate(
            setup.model,
            given,
            rows,
            mask,
            max_new_tokens=max_new_tokens,
            sampling=models.SamplingParams(eos_token_ids=models.eos_token_ids(setup.folder)),
            apply=apply,
        )
    return [
        tokenizer.with_special_tokens.decode(row[:end].tolist(), skip_special_tokens=True)
        for row, end in zip(fetch_global(made.tokens), fetch_global(made.lengths), strict=True)
    ]
