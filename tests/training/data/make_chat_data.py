"""Writes tiny/ and chat.json: a small tokenizer, and chats as transformers renders and masks them.

Run it once where transformers 5 is installed; the tests do not need it:

    python tests/training/data/make_chat_data.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
# Those of whole alphabets of bytes, so that no text is unknown.
SENTENCES = [
    "The assistant answers what the user asks, and the user asks again.",
    "A low-rank update leaves the frozen weight as it is.",
    "Größe, naïve café, 日本語 and 🙂🙂 take several bytes per character.",
    "def answer(question):\n    return question + 1\n",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a <place> in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def said(*texts: str) -> list[dict[str, Any]]:
    """Messages by turns, the user's first."""
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


CODE = "def f():\n    return 1"
SYSTEM = {"role": "system", "content": " Be brief. "}
CALL = {"function": {"name": "weather", "arguments": {"city": "Zürich"}}}
# The templates that each conversation is for, its messages and tools.
CHATS: list[tuple[list[str], list[dict[str, Any]], list[dict[str, Any]] | None]] = [
    (["chatml", "llama3", "generation", "plain", "rewriting"], said("Hi", "Hello there"), None),
    (
        ["chatml", "llama3", "generation", "plain"],
        [
            SYSTEM,
            *said("Größe?", "日本語 🙂 é", CODE, "Yes.\n\n    x = 1", "Bye"),
        ],
        None,
    ),
    (["chatml", "llama3", "generation"], said("Two", "one", "more", "two") + said("a", "b"), None),
    (["chatml", "generation"], said("A", "", "B", "C"), None),
    (["generation"], [{"role": "developer", "content": "left out"}, *said("A", "B")], None),
    (
        ["generation"],
        [*said("A", "B", "C"), {"role": "assistant", "content": "D", "reasoning_content": "hm"}],
        None,
    ),
    (
        ["llama3"],
        [
            SYSTEM,
            *said("How warm is Zürich?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": '{"degrees": 31}'},
            {"role": "assistant", "content": "31 °C."},
        ],
        [WEATHER],
    ),
]


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, with offsets trimmed and a token before every text as Llama 3's has them."""
    tiny = tokenizers.Tokenizer(models.BPE())
    tiny.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tiny.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tiny.train_from_iterator(SENTENCES * 4, trainer)
    tiny.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", 0)]
            ),
        ]
    )
    (HERE / "tiny").mkdir(exist_ok=True)
    tiny.save(str(HERE / "tiny" / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken", "special": True},
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": None,
        "chat_template": [
            {"name": "tool_use", "template": "{{ raise_exception('not this one') }}"},
            {"name": "default", "template": (HERE / "templates" / "chatml.jinja").read_text()},
        ],
    }
    (HERE / "tiny" / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return transformers.PreTrainedTokenizerFast.from_pretrained(HERE / "tiny")


def rendered(tiny: Any, name: str, messages: list[dict[str, Any]], tools: Any) -> dict[str, Any]:
    """One chat in one template, as transformers has it."""
    given: dict[str, Any] = {
        "chat_template": (HERE / "templates" / f"{name}.jinja").read_text(),
        "tools": tools,
        "date_string": "01 Feb 2026",
    }
    text = tiny.apply_chat_template(messages, tokenize=False, **given)
    prompt = tiny.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
    made = tiny.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=name == "generation", **given
    )
    case = {"template": name, "messages": messages, "tools": tools, "text": text}
    case |= {"with_prompt": prompt, "tokens": made["input_ids"]}
    if name == "generation":
        case["mask"] = made["assistant_masks"]
    return case


def main() -> None:
    """Writes the tokenizer, then what transformers makes of the chats."""
    tiny = tokenizer()
    cases = [
        rendered(tiny, name, messages, tools) for names, messages, tools in CHATS for name in names
    ]
    result = {"transformers": transformers.__version__, "cases": cases}
    text = json.dumps(result, ensure_ascii=False, indent=1)
    (HERE / "chat.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
