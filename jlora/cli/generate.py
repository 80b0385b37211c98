"""`jlora generate`: the continuation of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.cli.export import load_base_and_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generate the continuation of a prompt.

    Attributes:
        model: Folder of a decoder with its tokenizer.json, or its name on the Hub.
        prompt: Text to continue.
        adapter: Adapter file of jlora, or PEFT folder; none by default.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy decoding.
        top_k: Number of most likely tokens to sample from; all by default.
        top_p: Minimum total probability of the tokens to sample from.
        seed: Random seed of sampling.
        dtype: Type of the weights; that of the files by default.
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


def run_generate(options: GenerateOptions) -> None:
    """Prints the prompt and its continuation.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
        ValueError: If the model is not a decoder.
    """
    import jax
    import numpy as np

    from jlora import models
    from jlora.checkpoints.hub import resolve_checkpoint_folder
    from jlora.checkpoints.text_files import name_file_in_errors
    from jlora.training.data.tokenizer import load_tokenizer_json
    from jlora.transform import lora_transform

    folder = resolve_checkpoint_folder(options.model)
    tokenizer = load_tokenizer_json(folder)
    params: Any = None
    apply: Callable[..., Any] | None = None
    if options.adapter is None:
        model, params = models.load(folder, dtype=options.dtype)
    else:
        model, *params = load_base_and_adapter(folder, options.adapter, dtype=options.dtype)
    if not isinstance(model, models.Decoder):
        raise ValueError(f"{folder} must be a decoder, got {type(model).__name__}.")
    if options.adapter is not None:
        lora = lora_transform(model.apply)
        apply = lambda pair, *args: lora.apply(pair[0], pair[1], *args)  # noqa: E731
    sampling = models.SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_token_ids=models.eos_token_ids(folder),
    )
    with name_file_in_errors(folder / "tokenizer.json"):
        ids = tokenizer.encode(options.prompt).ids
    generated = models.generate(
        model,
        params,
        np.array([ids]),
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
        apply=apply,
    )
    new_ids = np.asarray(generated.tokens[0, : int(generated.lengths[0])])
    print(tokenizer.decode([*ids, *new_ids]))
