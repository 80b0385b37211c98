"""`jlora generate`: the answer to a prompt, or its continuation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jlora.cli.export import load_base_and_adapter

if TYPE_CHECKING:
    from jlora.training.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Generate the answer to a prompt, in the format that the model was trained in.

    Attributes:
        model: Folder of a decoder with its tokenizer.json, or its name on the Hub.
        prompt: Message to answer, or text to continue: without a chat template, with --raw, and
            for an adapter of a run none of whose data was chats.
        adapter: Adapter file of jlora, or PEFT folder; none by default.
        raw: Continue the prompt as it is, without a chat template and a first token.
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
    raw: bool = False
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    dtype: str | None = None
    example = 'jlora generate base/ "Once upon a time" --adapter adapter.safetensors'


class Prompt(NamedTuple):
    """A prompt in tokens.

    Attributes:
        ids: Token ids.
        is_chat: Whether a chat template wrote the prompt.
        end_token_ids: Tokens that end an answer, besides those of the model.
    """

    ids: list[int]
    is_chat: bool
    end_token_ids: tuple[int, ...] = ()


def run_generate(options: GenerateOptions) -> None:
    """Prints the answer of a chat model, or the prompt and its continuation.

    Raises:
        FileNotFoundError: If the model has no tokenizer.
        ValueError: If the model is not a decoder, or not the one that the adapter was trained on,
            or the prompt has no tokens.
    """
    import jax
    import numpy as np

    from jlora import models
    from jlora.checkpoints.hub import resolve_checkpoint_folder
    from jlora.transform import lora_transform

    folder = resolve_checkpoint_folder(options.model)
    tokenizer, is_chat = load_tokenizer(folder, options.adapter)
    prompt = tokenize_prompt(tokenizer, options.prompt, is_chat=is_chat, raw=options.raw)
    if not prompt.ids:
        raise ValueError(f"prompt={options.prompt!r} has no tokens. Use a longer one.")
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
        eos_token_ids=tuple({*models.eos_token_ids(folder), *prompt.end_token_ids}),
    )
    generated = models.generate(
        model,
        params,
        np.array([prompt.ids]),
        max_new_tokens=options.max_new_tokens,
        sampling=sampling,
        key=jax.random.key(options.seed),
        apply=apply,
    )
    new_ids = generated.tokens[0, : int(generated.lengths[0])].tolist()
    shown = new_ids if prompt.is_chat else [*prompt.ids, *new_ids]
    print(tokenizer.with_special_tokens.decode(shown))


def load_tokenizer(folder: Path, adapter: Path | None) -> tuple[Tokenizer, bool]:
    """Returns a model's tokenizer, and whether prompts are messages for its chat template.

    An adapter of a run has the format of the run's data, with its chat template, in its file or in
    its PEFT folder. Other models get messages if they have a chat template.

    Args:
        folder: Folder of the model.
        adapter: Adapter file of jlora or PEFT folder; None: none.

    Raises:
        FileNotFoundError: If the model has no tokenizer, or the adapter's chat template is missing.
    """
    from jlora.training.prompt_format import PromptFormat, read_prompt_format

    known = None if adapter is None else read_prompt_format(adapter)
    prompt_format = PromptFormat(is_chat=True) if known is None else known
    tokenizer = prompt_format.load_tokenizer(folder, f"the chat template of {adapter}")
    return tokenizer, prompt_format.is_chat and tokenizer.chat_template is not None


def tokenize_prompt(tokenizer: Tokenizer, prompt: str, *, is_chat: bool, raw: bool) -> Prompt:
    """Returns the tokens of a prompt, as training writes them before an answer.

    Args:
        tokenizer: Tokenizer of the model, with the chat template of training.
        prompt: Text of the prompt.
        is_chat: Whether the prompt is a message for the chat template.
        raw: Whether the prompt is used as it is.
    """
    from jlora.training.data.formats import tokenize_chats
    from jlora.training.data.tokenized_dataset import TokenizeConfig
    from jlora.training.datasets import find_end_token_ids

    if raw or not is_chat or tokenizer.chat_template is None:
        ids = tokenizer.encode([prompt])[0]
        return Prompt(ids if raw else tokenizer.add_prefix(ids), False)
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.chat_template.render(
        messages, add_generation_prompt=True, location="the prompt"
    )
    ids = tokenizer.encode([text])[0]
    answered = [{"messages": [*messages, {"role": "assistant", "content": prompt}]}]
    config = TokenizeConfig(max_seq_length=2**20, data_name="the prompt")
    try:
        ends = find_end_token_ids(tokenize_chats(answered, tokenizer, config), tokenizer)
    except ValueError:  # The template of a model whose answers have no end.
        ends = set()
    return Prompt(ids, True, tuple(sorted(ends)))
