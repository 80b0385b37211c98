"""What a model writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jlora.cli.export import load_base_and_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
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


def run_generate(options: GenerateOptions) -> None:
    """Prints the text."""
    import jax
    import numpy as np
    from tokenizers import Tokenizer

    from jlora import models
    from jlora.checkpoints.hub import resolve_checkpoint_folder
    from jlora.transform import lora_transform

    folder = resolve_checkpoint_folder(options.model)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: jlora generate needs the tokenizer.")
    tokenizer = Tokenizer.from_file(str(file))
    given: Any = None
    apply: Callable[..., Any] | None = None
    if options.adapter is None:
        model, given = models.load(folder, dtype=options.dtype)
    else:
        model, *given = load_base_and_adapter(folder, options.adapter, dtype=options.dtype)
    if not isinstance(model, models.Decoder):
        raise ValueError(f"{folder} holds a {type(model).__name__}, which writes no text.")
    if options.adapter is not None:
        lora = lora_transform(model.apply)
        apply = lambda both, *args: lora.apply(both[0], both[1], *args)  # noqa: E731
    sampling = models.SamplingParams(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_token_ids=models.eos_token_ids(folder),
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
