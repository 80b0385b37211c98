"""What a run leaves: the adapter, the head, exports, and the report."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from jlora import models, peft
from jlora.checkpoints.adapter_file import write_adapter
from jlora.checkpoints.hosts import whole
from jlora.checkpoints.tensors import file_bytes
from jlora.conversion import on_original_base
from jlora.merging.export import merge_to
from jlora.optim.labels import combine
from jlora.training import mesh as meshes
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup
from jlora.transform import lora_transform

PyTree = Any
_READERS: tuple[Literal["peft", "vllm"], ...] = ("peft", "vllm")
ADAPTER, HEAD = "adapter.safetensors", "head.safetensors"


def whole_adapter(setup: Setup, trained: PyTree) -> dict[str, Any]:
    """The adapter that the loop trains, with its frozen arrays."""
    return combine(trained["adapter"], setup.frozen["adapter"])


def adapter_of(setup: Setup, trained: PyTree) -> dict[str, Any]:
    """The adapter for the checkpoint's own base, in host memory."""
    held = jax.tree.map(whole, whole_adapter(setup, trained))
    if setup.fresh is None:
        return held
    return on_original_base(held, jax.tree.map(whole, setup.fresh))


def write(
    recipe: Recipe,
    setup: Setup,
    trained: PyTree,
    fingerprints: Mapping[str, str],
    labels: Sequence[str] | None,
) -> list[Path]:
    """Writes what the recipe asks for into its folder, from the first process alone.

    Files and folders of those names that an earlier end of the same run wrote are replaced.

    Returns:
        What was written.

    Raises:
        ValueError: A number is not finite, or PEFT has no form for the adapter.
    """
    output = Path(recipe.output)
    adapter = adapter_of(setup, trained)
    head = jax.tree.map(whole, trained.get("head"))
    written = [output / ADAPTER]
    if jax.process_index() == 0:
        write_adapter(written[0], adapter, fingerprints)
        if head is not None:
            written.append(output / HEAD)
            _write_head(written[-1], recipe, setup, head, labels)
        written += _exported(recipe, setup, adapter, output)
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


def _exported(recipe: Recipe, setup: Setup, adapter: PyTree, output: Path) -> list[Path]:
    asked = recipe.export
    if not (asked.merged or asked.peft or asked.vllm):
        return []
    # Read again, on the host: the devices hold parts of it, or another base.
    options: dict[str, Any] = {}
    if isinstance(setup.model, models.Decoder):
        options = {"scanned": recipe.model.scanned}
    host = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        model, params = models.load(setup.folder, sharding=lambda *_: host, **options)
        written: list[Path] = []
        if asked.merged:
            written.append(_replaced(output / "merged"))
            merged = merge_to(params, adapter, asked.merged_dtype)
            models.save(
                written[-1], merged.params, setup.folder, dtype=asked.merged_dtype, **options
            )
        for reader in _READERS:
            if not getattr(asked, reader):
                continue
            written.append(_replaced(output / reader))
            base, task = recipe.model.path, _peft_task(recipe, model)
            peft.save(
                written[-1], adapter, model, params, base_model=base, task=task, reader=reader
            )
    return written


def _peft_task(recipe: Recipe, model: Any) -> str:
    """What PEFT calls the task; a head that is none of the model's is a file of its own."""
    if recipe.task != "classification":
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if getattr(model.config, "labels", None) is None else "SEQ_CLS"


def _replaced(folder: Path) -> Path:
    """A name that is free: what an earlier end of the run wrote there goes."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def prompts_of(recipe: Recipe, tokenizer: Tokenizer) -> list[list[int]]:
    """The tokens of the recipe's prompts, as the model is used to them; none unless it writes."""
    prompts = recipe.report.prompts if recipe.task != "classification" else []
    if recipe.data.train[0].format != "chat" or tokenizer.template is None:
        return [[*tokenizer.before, *ids] for ids in tokenizer.encode(prompts)]
    chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
    render = functools.partial(tokenizer.template.render, add_generation_prompt=True)
    return tokenizer.encode([render(chat) for chat in chats])


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
    given: Any = setup.frozen["base"]
    apply = None
    if adapter is not None:
        given = {"base": given, "adapter": adapter}
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
    ends = np.asarray(made.lengths)
    return [
        tokenizer.whole.decode(np.asarray(row[:end]).tolist(), skip_special_tokens=True)
        for row, end in zip(made.tokens, ends, strict=True)
    ]
