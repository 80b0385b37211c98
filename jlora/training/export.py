"""Outputs of a run: adapter file, head file, export folders, and sample texts."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora import models, peft
from jlora._mesh import fetch_global
from jlora._tree import PyTree
from jlora.checkpoints.adapter_file import ADAPTER_FILE, write_adapter
from jlora.checkpoints.lineage import Lineage
from jlora.checkpoints.safetensors_io import (
    replace_file_atomically,
    replace_folder_atomically,
    serialize_safetensors,
)
from jlora.convert import rebase_to_original
from jlora.merging.merge_to import merge_stored, warn_lost_updates
from jlora.models.hf.load import open_model
from jlora.optim.multi_transform import combine
from jlora.training import sharding
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.prompt_format import (
    CHAT_TEMPLATE_FILE,
    PromptFormat,
    write_chat_template,
)
from jlora.training.recipe.sections import Recipe
from jlora.training.setup import Setup, get_layer_layout_options, schemes_from_recipe
from jlora.transform import lora_transform, merge

_PEFT_READERS: tuple[Literal["peft", "vllm"], ...] = ("peft", "vllm")

HEAD_FILE = "head.safetensors"

# Fields without influence on the adapter: runs with equal adapters write equal bytes.
_LINEAGE_EXCLUDED_FIELDS: dict[str, Any] = {
    "output": True,
    "distributed": True,
    "export": True,
    "report": True,
    "optimizer": {"offload"},
}


def combine_adapter(setup: Setup, trainable: PyTree) -> dict[str, Any]:
    """Returns the adapter of a training state, with its frozen arrays."""
    return combine(trainable["adapter"], setup.frozen["adapter"])


def gather_adapter(setup: Setup, trainable: PyTree) -> dict[str, Any]:
    """Returns the adapter for the original weights of the checkpoint, in host memory."""
    adapter = jax.tree.map(fetch_global, combine_adapter(setup, trainable))
    reference = jax.tree.map(fetch_global, setup.frozen["reference"])
    if not reference:
        return adapter
    return {**adapter, **rebase_to_original({path: adapter[path] for path in reference}, reference)}


def export_folders(recipe: Recipe) -> list[Path]:
    """Returns the export folders of a recipe."""
    options, output = recipe.export, Path(recipe.output)
    return [output / name for name in ("merged", *_PEFT_READERS) if getattr(options, name)]


def check_exports(recipe: Recipe, setup: Setup) -> None:
    """Dry-runs the exports on the initial adapter, so that unsupported ones fail before training.

    Raises:
        ValueError: The adapter cannot be merged, or PEFT does not support it.
    """
    if jax.process_count() > 1:  # No process has all weights.
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
    label_names: Sequence[str] | None,
    prompt_format: PromptFormat,
) -> list[Path]:
    """Writes the adapter, a new head and the recipe's chat template, in the first process only.

    Args:
        recipe: Recipe of the run.
        setup: Arrays of the run.
        trainable: Trained arrays.
        label_names: Names of the labels; None unless the task is classification.
        prompt_format: Format of the training data's prompts and answers.

    Returns:
        Paths of the files.

    Raises:
        ValueError: An array is not finite.
    """
    output = Path(recipe.output)
    adapter = gather_adapter(setup, trainable)
    head = jax.tree.map(fetch_global, trainable.get("head"))
    written = [output / ADAPTER_FILE]
    if jax.process_index() == 0:
        fields = recipe.model_dump(mode="json", exclude=_LINEAGE_EXCLUDED_FIELDS)
        lineage = Lineage(method="jlora train", recipe=fields)
        fields = None if recipe.task == "classification" else prompt_format._asdict()
        write_adapter(written[0], adapter, setup.fingerprints, lineage, setup.base_digest, fields)
        if head is not None:
            written.append(output / HEAD_FILE)
            _write_head(written[-1], recipe, setup, head, label_names)
        if prompt_format.chat_template is not None:
            written.append(output / CHAT_TEMPLATE_FILE)
            write_chat_template(output, prompt_format.chat_template)
    return written


def write_exports(
    recipe: Recipe,
    setup: Setup,
    trainable: PyTree,
    label_names: Sequence[str] | None,
    prompt_format: PromptFormat,
) -> list[Path]:
    """Writes the export folders of a recipe, in the first process only.

    Folders that the same run wrote earlier are replaced, each once the new one is complete.

    Args:
        recipe: Recipe of the run.
        setup: Arrays of the run.
        trainable: Trained arrays.
        label_names: Names of the labels; None unless the task is classification.
        prompt_format: Format of the training data's prompts and answers.

    Returns:
        Paths of the folders.

    Raises:
        ValueError: An array is not finite, PEFT does not support the adapter, or the base's files
            changed since the run began.
    """
    adapter = gather_adapter(setup, trainable)
    written = export_folders(recipe)
    if written and jax.process_index() == 0:
        _write_export_folders(recipe, setup, adapter, label_names, prompt_format)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("jlora: written")
    return written


def _write_head(
    path: Path, recipe: Recipe, setup: Setup, head: PyTree, label_names: Sequence[str] | None
) -> None:
    """Writes a new head, kernel (hidden, labels) and bias (labels,), and the label names."""
    assert label_names is not None
    is_decoder = isinstance(setup.model, models.Decoder)
    pooling = recipe.classification.pooling or ("last" if is_decoder else "mean")
    metadata = {"labels": json.dumps(list(label_names)), "pooling": pooling}
    tensors = {name: np.asarray(array) for name, array in head.items()}
    replace_file_atomically(path, serialize_safetensors(tensors, metadata))


def _write_export_folders(
    recipe: Recipe,
    setup: Setup,
    adapter: PyTree,
    label_names: Sequence[str] | None,
    prompt_format: PromptFormat,
) -> None:
    options, output = recipe.export, Path(recipe.output)
    layout = get_layer_layout_options(setup.model)
    schemes = None if options.merge_into == "original" else schemes_from_recipe(recipe, setup.model)
    # The run quantized the weights in its own dtype; another one would give other codes.
    quantization = {} if schemes is None else {"dtype": recipe.model.dtype, "quantize": schemes}
    # Read again on the host, one weight after another: the devices hold shards, or another base.
    cpu = jax.local_devices(backend="cpu")[0]
    opened = open_model(setup.folder, device=cpu, **quantization, **layout)
    with jax.default_device(cpu), opened as (model, params):
        assert setup.base_digest is not None
        setup.base_digest.check_unchanged(setup.folder)
        if options.merged:
            dtype = options.merged_dtype
            merged = merge_stored(params, adapter, dtype)
            with replace_folder_atomically(output / "merged") as folder:
                models.save(folder, merged.params, setup.folder, dtype=dtype, **layout)
                warn_lost_updates(merged.report)
                has_head = getattr(model.config, "num_labels", None) is not None
                if label_names is not None and has_head:
                    _write_label_names(folder / "config.json", label_names)
                prompt_format.write_to_merged(folder)
                setup.base_digest.check_unchanged(setup.folder)  # `models.save` read it too.
        for reader in _PEFT_READERS:
            if getattr(options, reader):
                with replace_folder_atomically(output / reader) as folder:
                    _write_peft(recipe, model, params, adapter, reader, folder)
                    setup.base_digest.write_beside_peft(folder)
                    if recipe.task != "classification":
                        prompt_format.write_beside_peft(folder)


def _write_peft(
    recipe: Recipe,
    model: Any,
    params: PyTree,
    adapter: PyTree,
    reader: Literal["peft", "vllm"],
    folder: Path,
) -> None:
    peft.save(
        folder,
        adapter,
        model,
        params,
        base_model_name_or_path=recipe.model.path,
        task_type=_peft_task_type(recipe, model),
        file_format=reader,
    )


def _write_label_names(path: Path, label_names: Sequence[str]) -> None:
    """Writes the label names of a head to its config.json."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(number): name for number, name in enumerate(label_names)}
    config["label2id"] = {name: number for number, name in enumerate(label_names)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _peft_task_type(recipe: Recipe, model: Any) -> str:
    """Returns PEFT's task type; a new head is not part of PEFT's model but a separate file."""
    if recipe.task != "classification":
        return "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if getattr(model.config, "num_labels", None) is None else "SEQ_CLS"


def tokenize_prompts(
    recipe: Recipe, setup: Setup, tokenizer: Tokenizer, is_chat: bool
) -> list[list[int]]:
    """Returns the tokens of the recipe's prompts, in the format of the training data.

    The list is empty if the task is classification.

    Raises:
        ValueError: A prompt is too long for the model.
    """
    prompts = recipe.report.sample_prompts if recipe.task != "classification" else []
    if not is_chat or tokenizer.chat_template is None:
        tokenized = [tokenizer.add_prefix(ids) for ids in tokenizer.encode(prompts)]
    else:
        chats = ([{"role": "user", "content": prompt}] for prompt in prompts)
        render = functools.partial(tokenizer.chat_template.render, add_generation_prompt=True)
        tokenized = tokenizer.encode([render(chat) for chat in chats])
    limit = setup.model.config.max_seq_length - recipe.report.max_new_tokens
    for prompt, tokens in zip(prompts, tokenized, strict=True):
        if len(tokens) > limit:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {len(tokens)} tokens, but at most {limit} fit "
                f"before report.max_new_tokens={recipe.report.max_new_tokens}. Shorten it."
            )
    return tokenized


def generate_texts(
    setup: Setup,
    adapter: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_token_ids: Sequence[int] = (),
) -> list[str]:
    """Returns the text that the model generates for each prompt.

    Args:
        setup: Arrays of the run.
        adapter: Adapter of the run's base; `setup.frozen["reference"]` for the checkpoint.
        tokenizer: Tokenizer of the base.
        prompts: Tokens of each prompt.
        max_new_tokens: Maximum number of generated tokens.
        end_token_ids: Tokens that end a text, besides those of the base.
    """
    if not prompts:
        return []
    length = max(map(len, prompts))
    input_ids = np.full((len(prompts), length), tokenizer.pad_token_id, np.int32)
    mask = np.zeros_like(input_ids)  # (prompts, length), left-padded.
    for row, tokens in enumerate(prompts):
        input_ids[row, length - len(tokens) :] = tokens
        mask[row, length - len(tokens) :] = 1
    # Kernels of training take no cache.
    is_decoder = isinstance(setup.model, models.Decoder)
    model = setup.model.clone(attention_implementation=None) if is_decoder else setup.model
    lora = lora_transform(model.apply)
    params = {"base": setup.frozen["base"], "adapter": adapter}

    def apply(params: Any, *inputs: Any) -> Any:
        return lora.apply(params["base"], params["adapter"], *inputs)

    with sharding.use_mesh(setup.mesh):
        generated = models.generate(
            model,
            params,
            input_ids,
            mask,
            max_new_tokens=max_new_tokens,
            sampling=models.SamplingParams(
                eos_token_ids=tuple({*models.eos_token_ids(setup.folder), *end_token_ids})
            ),
            apply=apply,
        )
    rows = zip(fetch_global(generated.tokens), fetch_global(generated.lengths), strict=True)
    return [
        tokenizer.with_special_tokens.decode(row[:end].tolist(), skip_special_tokens=True)
        for row, end in rows
    ]
