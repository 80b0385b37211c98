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
from jlora.checkpoints.adapter_file import write_adapter
from jlora.checkpoints.hosts import whole
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.tensors import file_bytes
from jlora.conversion import on_original_base
from jlora.merging.export import merge_to
from jlora.optim.labels import combine
from jlora.training import mesh as meshes
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, layout_of, schemes_of
from jlora.transform import lora_transform, merge

PyTree = Any
_READERS: tuple[Literal["peft", "vllm"], ...] = ("peft", "vllm")
ADAPTER, HEAD = "adapter.safetensors", "head.safetensors"
# What of a recipe has no part in the numbers: runs that make the same adapter make the same bytes.
_ELSEWHERE: dict[str, Any] = {
    "output": True,
    "distributed": True,
    "export": True,
    "report": True,
    "optimizer": {"offload"},
}


def whole_adapter(setup: Setup, trained: PyTree) -> dict[str, Any]:
    """The adapter that the loop trains, with its frozen arrays."""
    return combine(trained["adapter"], setup.frozen["adapter"])


def adapter_of(setup: Setup, trained: PyTree) -> dict[str, Any]:
    """The adapter for the checkpoint's own base, in host memory."""
    held = jax.tree.map(whole, whole_adapter(setup, trained))
    if setup.fresh is None:
        return held
    return on_original_base(held, jax.tree.map(whole, setup.fresh))


def export_folders(recipe: Recipe) -> list[Path]:
    """The folders that the recipe asks for beside the adapter's file."""
    asked, output = recipe.export, Path(recipe.output)
    return [output / name for name in ("merged", *_READERS) if getattr(asked, name)]


def check(recipe: Recipe, setup: Setup) -> None:
    """Tries the exports on the fresh adapter: what cannot be is told before it is trained.

    Raises:
        ValueError: The adapter cannot be merged, or PEFT has no form for it.
    """
    if jax.process_count() > 1:  # No process has all of the weights.
        return
    adapter = adapter_of(setup, setup.state.trained)
    if recipe.export.merged:
        jax.eval_shape(functools.partial(merge, dequantize=True), setup.frozen["base"], adapter)
    with tempfile.TemporaryDirectory() as temporary:
        for reader in _READERS:
            if getattr(recipe.export, reader):
                folder = Path(temporary) / reader
                _write_peft(recipe, setup.model, setup.frozen["base"], adapter, reader, folder)


def write(
    recipe: Recipe,
    setup: Setup,
    trained: PyTree,
    fingerprints: Mapping[str, str],
    labels: Sequence[str] | None,
) -> list[Path]:
    """Writes the adapter, and a new head, from the first process alone.

    Returns:
        What was written.

    Raises:
        ValueError: A number is not finite.
    """
    output = Path(recipe.output)
    adapter = adapter_of(setup, trained)
    head = jax.tree.map(whole, trained.get("head"))
    written = [output / ADAPTER]
    if jax.process_index() == 0:
        made_by = recipe.model_dump(mode="json", exclude=_ELSEWHERE)
        lineage = Lineage(method="jlora train", recipe=made_by)
        write_adapter(written[0], adapter, fingerprints, lineage)
        if head is not None:
            written.append(output / HEAD)
            _write_head(written[-1], recipe, setup, head, labels)
    return written


def export(
    recipe: Recipe, setup: Setup, trained: PyTree, labels: Sequence[str] | None
) -> list[Path]:
    """Writes the folders that the recipe asks for, from the first process alone.

    Those that an earlier end of the same run wrote are replaced, each when the new one is whole.

    Returns:
        What was written.

    Raises:
        ValueError: A number is not finite, or PEFT has no form for the adapter.
    """
    adapter = adapter_of(setup, trained)
    written = export_folders(recipe)
    if written and jax.process_index() == 0:
        _export(recipe, setup, adapter, labels)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jlora: written")
    return written


def _write_head(
    path: Path, recipe: Recipe, setup: Setup, head: PyTree, labels: Sequence[str] | None
) -> None:
    """A new head: (width, labels) and (labels,), and what they are called."""
    assert labels is not None
    decoder = isinstance(setup.model, models.Decoder)
    pooling = recipe.classification.pooling or ("last" if decoder else "mean")
    metadata = {"labels": json.dumps(list(labels)), "pooling": pooling}
    partial = path.with_suffix(".partial")
    partial.write_bytes(
        file_bytes({name: np.asarray(array) for name, array in head.items()}, metadata)
    )
    os.replace(partial, path)


def _export(recipe: Recipe, setup: Setup, adapter: PyTree, labels: Sequence[str] | None) -> None:
    asked, output = recipe.export, Path(recipe.output)
    options = layout_of(setup.model)
    rules = None if asked.merged_base == "original" else schemes_of(recipe)
    # The codes that were trained on are those of the weights in the run's type.
    of_run = {} if rules is None else {"dtype": recipe.model.dtype, "quantize": rules}
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        # Read again, on the host: the devices hold parts of it, or another base.
        model, params = models.load(setup.folder, sharding=lambda *_: host, **of_run, **options)
        if asked.merged:
            dtype = asked.merged_dtype
            merged = merge_to(params, adapter, dtype, dequantize=True)
            with _replacing(output / "merged") as folder:
                models.save(folder, merged.params, setup.folder, dtype=dtype, **options)
                if labels is not None and getattr(model.config, "labels", None) is not None:
                    _name_labels(folder / "config.json", labels)
        for reader in _READERS:
            if getattr(asked, reader):
                with _replacing(output / reader) as folder:
                    _write_peft(recipe, model, params, adapter, reader, folder)


def _write_peft(
    recipe: Recipe,
    model: Any,
    params: PyTree,
    adapter: PyTree,
    reader: Literal["peft", "vllm"],
    folder: Path,
) -> None:
    base, task = recipe.model.path, _peft_task(recipe, model)
    peft.save(folder, adapter, model, params, base_model=base, task=task, reader=reader)


def _name_labels(path: Path, labels: Sequence[str]) -> None:
    """Writes what a head's labels are called into its config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(number): name for number, name in enumerate(labels)}
    config["label2id"] = {name: number for number, name in enumerate(labels)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _peft_task(recipe: Recipe, model: Any) -> str:
    """What PEFT calls the task; a head that is none of the model's is a file of its own."""
    if recipe.task != "classification":
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if getattr(model.config, "labels", None) is None else "SEQ_CLS"


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A name to write a folder to, which then takes the place of what is there."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    yield partial
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def prompts_of(recipe: Recipe, setup: Setup, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of the recipe's prompts, as the model is used to them; none unless it writes.

    Raises:
        ValueError: One is too long for the model.
    """
    prompts = recipe.report.prompts if recipe.task != "classification" else []
    if recipe.data.train[0].format != "chat" or tokenizer.template is None:
        found = [[*tokenizer.before, *ids] for ids in tokenizer.encode(prompts)]
    else:
        chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
        render = functools.partial(tokenizer.template.render, add_generation_prompt=True)
        found = tokenizer.encode([render(chat) for chat in chats])
    room = setup.model.config.max_length - recipe.report.max_new_tokens
    for prompt, tokens in zip(prompts, found, strict=True):
        if len(tokens) > room:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, and the model has room for "
                f"{room} before report.max_new_tokens={recipe.report.max_new_tokens}. Shorten it."
            )
    return found


def texts(
    setup: Setup,
    adapter: PyTree | None,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
) -> list[str]:
    """What the model writes after each prompt, with an adapter or without.

    Args:
        setup: Of the run.
        adapter: Of its base, as the loop has it.
        tokenizer: Of the base.
        prompts: Their tokens.
        tokens: How many are written at most.
    """
    if not prompts:
        return []
    length = max(map(len, prompts))
    rows = np.full((len(prompts), length), tokenizer.pad, np.int32)
    mask = np.zeros_like(rows)
    for row, found in enumerate(prompts):
        rows[row, length - len(found) :] = found
        mask[row, length - len(found) :] = 1
    lora = lora_transform(setup.model.apply)
    given = {"base": setup.frozen["base"], "adapter": adapter or {}}
    apply = lambda both, *inputs: lora.apply(both["base"], both["adapter"], *inputs)  # noqa: E731
    with meshes.active(setup.mesh):
        made = models.generate(
            setup.model,
            given,
            rows,
            mask,
            max_new_tokens=tokens,
            sampling=models.Sampling(stop_tokens=models.stop_tokens(setup.folder)),
            apply=apply,
        )
    return [
        tokenizer.whole.decode(row[:end].tolist(), skip_special_tokens=True)
        for row, end in zip(whole(made.tokens), whole(made.lengths), strict=True)
    ]
