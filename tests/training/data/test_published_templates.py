"""Templates of published models: what is learned of a chat, by hand.

The templates are short forms of the models' own: how they begin and end turns, where they put
system messages, what they do at the end of a chat, and what they ask for in a generation prompt.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from jlora.training.data.chat_template import ChatTemplate


class Published(NamedTuple):
    """A template, and what it makes of an answer.

    Attributes:
        text: Template.
        header: Text before every answer, which is not learned.
        end: Text that ends an answer and is learned.
        last: Text that ends the last answer, if another one.
        system: Whether it takes system messages.
    """

    text: str
    header: str
    end: str
    last: str | None = None
    system: bool = True


def loop(body: str, prompt: str = "", before: str = "", after: str = "") -> str:
    """A template with a body for each message `m`, and a generation prompt."""
    asked = "{% if add_generation_prompt %}" + prompt + "{% endif %}"
    return before + "{% for m in messages %}" + body + "{% endfor %}" + after + asked


def by_role(user: str, assistant: str, system: str = "") -> str:
    return (
        "{% if m.role == 'user' %}" + user + "{% elif m.role == 'assistant' %}" + assistant
        + "{% else %}" + system + "{% endif %}"
    )  # fmt: skip


NO_SYSTEM = "{{ raise_exception('no system messages') }}"
CHATML = loop("<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n")
HEADED = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
GRANITE = "<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n"
TABLE = {
    "chatml": Published(CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "qwen2.5": Published(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n"
        "{% endif %}" + CHATML,
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    # Thinking is asked for in the prompt, and an answer without it begins with other text.
    "qwen3-no-thinking": Published(
        CHATML.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%"),
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "smollm2": Published(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are SmolLM.<|im_end|>\n"
        "{% endif %}" + CHATML,
        "<|im_start|>assistant\n",
        "<|im_end|>",
    ),
    "yi": Published(CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "internlm2": Published("{{ bos_token }}" + CHATML, "<|im_start|>assistant\n", "<|im_end|>"),
    "llama2": Published(
        loop(
            by_role(
                "{{ bos_token }}[INST] {{ system_text }}{{ m.content }} [/INST]",
                " {{ m.content | trim }} {{ eos_token }}",
                "{% set system_text = '<<SYS>>' + m.content + '<</SYS>>' %}",
            )
        ),
        "[/INST]",
        " </s>",
    ),
    "llama3": Published(
        loop(HEADED, "<|start_header_id|>assistant<|end_header_id|>\n\n", "{{ bos_token }}"),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama3.1": Published(
        loop(
            HEADED,
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: "
            "December 2023\n\n<|eot_id|>",
        ),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    "llama4": Published(
        loop(
            "<|header_start|>{{ m.role }}<|header_end|>\n\n{{ m.content | trim }}<|eot|>",
            "<|header_start|>assistant<|header_end|>\n\n",
            "{{ bos_token }}",
        ),
        "<|header_start|>assistant<|header_end|>\n\n",
        "<|eot|>",
    ),
    "mistral-7b-v0.1": Published(
        loop(
            by_role("[INST] {{ m.content }} [/INST]", "{{ m.content }}{{ eos_token }} ", NO_SYSTEM),
            before="{{ bos_token }}",
        ),
        "[/INST]",
        "</s>",
        system=False,
    ),
    "mistral-7b-v0.3": Published(
        loop(
            by_role("[INST] {{ m.content }}[/INST]", " {{ m.content | trim }}{{ eos_token }}"),
            before="{{ bos_token }}",
        ),
        "[/INST]",
        "</s>",
    ),
    "mistral-nemo": Published(
        loop(
            by_role("[INST]{{ m.content }}[/INST]", "{{ m.content }}{{ eos_token }}"),
            before="{{ bos_token }}",
        ),
        "[/INST]",
        "</s>",
    ),
    "mixtral": Published(
        loop(
            by_role(" [INST] {{ m.content }} [/INST]", " {{ m.content }}{{ eos_token }}"),
            before="{{ bos_token }}",
        ),
        "[/INST]",
        "</s>",
    ),
    "zephyr": Published(
        loop("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n", "<|assistant|>\n"),
        "<|assistant|>\n",
        "</s>",
    ),
    "gemma": Published(
        loop(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n",
            "<start_of_turn>model\n",
            "{{ bos_token }}{% if messages[0].role == 'system' %}" + NO_SYSTEM + "{% endif %}",
        ),
        "<start_of_turn>model\n",
        "<end_of_turn>",
        system=False,
    ),
    "gemma3": Published(
        loop(
            "{% if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else "
            "m.role }}\n{% if loop.index0 == 1 and messages[0].role == 'system' %}"
            "{{ messages[0].content }}\n\n{% endif %}{{ m.content | trim }}<end_of_turn>\n"
            "{% endif %}",
            "<start_of_turn>model\n",
            "{{ bos_token }}",
        ),
        "<start_of_turn>model\n",
        "<end_of_turn>",
    ),
    # It ends the whole chat with eos, unless an answer is asked for.
    "phi3": Published(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|assistant|>\n",
        "<|end|>",
        "<|end|>\n</s>",
    ),
    "phi4": Published(
        loop(
            "<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>",
            "<|im_start|>assistant<|im_sep|>",
        ),
        "<|im_start|>assistant<|im_sep|>",
        "<|im_end|>",
    ),
    "phi4-mini": Published(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        "<|assistant|>",
        "<|end|>",
        "<|end|></s>",
    ),
    "deepseek-v2": Published(
        loop(
            by_role(
                "User: {{ m.content }}\n\n",
                "Assistant: {{ m.content }}{{ eos_token }}",
                "{{ m.content }}\n\n",
            ),
            "Assistant:",
            "{{ bos_token }}",
        ),
        "Assistant:",
        "</s>",
    ),
    "deepseek-v3": Published(
        loop(
            by_role("<User>{{ m.content }}", "<Assistant>{{ m.content }}</s>", "{{ m.content }}"),
            "<Assistant>",
            "{{ bos_token }}",
        ),
        "<Assistant>",
        "</s>",
    ),
    # The prompt asks for thoughts, which are left out of answers.
    "deepseek-r1-distill": Published(
        loop(
            by_role(
                "<User>{{ m.content }}",
                "<Assistant>{{ m.content.split('</think>')[-1] }}</s>",
                "{{ m.content }}",
            ),
            "<Assistant><think>\n",
            "{{ bos_token }}",
        ),
        "<Assistant>",
        "</s>",
    ),
    "nemotron-nano": Published(
        loop(
            "<SPECIAL_10>{{ m.role | capitalize }}\n{{ m.content }}\n<SPECIAL_11>",
            "<SPECIAL_10>Assistant\n<think>\n",
        ),
        "<SPECIAL_10>Assistant\n",
        "\n<SPECIAL_11>",
    ),
    "vicuna": Published(
        loop(
            by_role("USER: {{ m.content }} ", "ASSISTANT: {{ m.content }}</s>", "{{ m.content }} "),
            "ASSISTANT:",
        ),
        "ASSISTANT:",
        "</s>",
    ),
    "openchat": Published(
        loop(
            "GPT4 Correct {{ m.role | title }}: {{ m.content }}<|end_of_turn|>",
            "GPT4 Correct Assistant:",
            "{{ bos_token }}",
        ),
        "GPT4 Correct Assistant:",
        "<|end_of_turn|>",
    ),
    "command-r": Published(
        loop(
            "<|START_OF_TURN_TOKEN|><|{{ 'CHATBOT' if m.role == 'assistant' else m.role | upper }}"
            "_TOKEN|>{{ m.content | trim }}<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "{{ bos_token }}",
        ),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Published(
        loop(GRANITE, "<|start_of_role|>assistant<|end_of_role|>"),
        "<|start_of_role|>assistant<|end_of_role|>",
        "<|end_of_text|>",
    ),
    "tulu": Published(
        loop(
            by_role(
                "<|user|>\n{{ m.content }}\n",
                "<|assistant|>\n{{ m.content }}{{ eos_token }}{% if not loop.last %}\n{% endif %}",
                "<|system|>\n{{ m.content }}\n",
            ),
            "<|assistant|>\n",
        ),
        "<|assistant|>\n",
        "</s>",
    ),
    "olmo": Published(
        loop(
            by_role(
                "<|user|>\n{{ m.content }}\n",
                "<|assistant|>\n{{ m.content }}{% if loop.last %}{{ eos_token }}{% else %}"
                "{{ eos_token }}\n{% endif %}",
                "<|system|>\n{{ m.content }}\n",
            ),
            "<|assistant|>\n",
            "{{ eos_token }}",
        ),
        "<|assistant|>\n",
        "</s>",
    ),
    "exaone": Published(
        loop(
            "[|{{ m.role }}|]{{ m.content }}{{ '\n' if m.role == 'user' else '[|endofturn|]\n' }}",
            "[|assistant|]",
        ),
        "[|assistant|]",
        "[|endofturn|]",
    ),
    # A turn ends where the next one begins, and the last one at the end of the chat.
    "glm4": Published(
        loop("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>", "[gMASK]<sop>"),
        "<|assistant|>",
        "",
    ),
    "solar": Published(
        loop(
            by_role(
                "### User:\n{{ m.content }}\n\n",
                "### Assistant:\n{{ m.content }}</s>\n\n",
                "### System:\n{{ m.content }}\n\n",
            ),
            "### Assistant:\n",
        ),
        "### Assistant:\n",
        "</s>",
    ),
    "falcon3": Published(
        loop(
            "<|{{ m.role }}|>\n{{ m.content }}{{ eos_token if m.role == 'assistant' }}"
            "{{ '' if loop.last and m.role == 'assistant' else '\n' }}",
            "<|assistant|>\n",
        ),
        "<|assistant|>\n",
        "</s>",
    ),
    # A last answer is of the final channel, as the prompt does not say.
    "gpt-oss": Published(
        loop(
            by_role(
                "<|start|>user<|message|>{{ m.content }}<|end|>",
                "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
                "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}",
                "<|start|>developer<|message|>{{ m.content }}<|end|>",
            ),
            "<|start|>assistant",
        ),
        "<|start|>assistant",
        "<|end|>",
        "<|return|>",
    ),
}
# Their answers end with nothing.
ENDLESS = {"glm4"}
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "system_text": ""}
ONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
TWO = [
    *ONE,
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "see <you>"},
]
SYSTEM = [{"role": "system", "content": "be brief"}]
CHATS = {"one": ONE, "two": TWO, "system": [*SYSTEM, *TWO]}


def learned(name: str, messages: list[Any], **options: Any) -> tuple[list[str], list[str]]:
    """What is learned, and the texts before it."""
    template = ChatTemplate(TABLE[name].text, VARIABLES)
    text, spans = template.render_with_spans(messages, **options)
    assert text == template.render(messages)
    return [text[a:b] for a, b in spans], [text[:a] for a, _ in spans]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", sorted(TABLE.keys() - ENDLESS))
def test_published_template_spans(name: str, chat: str) -> None:
    one, messages = TABLE[name], CHATS[chat]
    if chat == "system" and not one.system:
        with pytest.raises(ValueError, match="rejects the messages .*no system messages"):
            learned(name, messages)
        return
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    ends = [one.end] * (len(answers) - 1) + [one.end if one.last is None else one.last]
    spans, before = learned(name, messages)
    for span, earlier, answer, end in zip(spans, before, answers, ends, strict=True):
        assert span.endswith(f"{answer}{end}")
        # A blank or a channel between the prompt and the answer is learned.
        lead = span.removesuffix(f"{answer}{end}")
        assert lead in ("", " ", "<|channel|>final<|message|>")
        assert earlier.endswith(one.header)
    last, _ = learned(name, messages, train_on="last")
    assert last == spans[-1:]


@pytest.mark.parametrize("name", sorted(TABLE.keys() - ENDLESS))
def test_published_template_marks(name: str) -> None:
    marked = [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]
    spans, before = learned(name, TWO)
    assert learned(name, marked) == (spans[1:], before[1:])
    everything, _ = learned(name, marked, train_on="all")
    text = ChatTemplate(TABLE[name].text, VARIABLES).render(TWO)
    assert "".join(everything) == before[0] + text[len(before[0] + spans[0]) :]


# Parts of headers and of end tokens, and what both have.
SHORT = ("a", "s", "ant", "n", ">", "|>", "<", "1", "/s>")


@pytest.mark.parametrize("name", sorted(TABLE.keys() - ENDLESS))
def test_published_template_short_answers(name: str) -> None:
    want, before = learned(name, TWO)
    for answer in SHORT:
        for place in (1, 3):
            chat = [*TWO[:place], {"role": "assistant", "content": answer}, *TWO[place + 1 :]]
            spans, earlier = learned(name, chat)
            wanted, turn = list(want), place // 2
            wanted[turn] = wanted[turn].replace(TWO[place]["content"], answer)
            assert spans == wanted
            assert earlier[turn] == before[turn]


@pytest.mark.parametrize("name", sorted(TABLE.keys() - ENDLESS))
def test_published_template_assistant_first(name: str) -> None:
    one, chat = TABLE[name], [TWO[1], *TWO[2:]]
    try:
        ChatTemplate(one.text, VARIABLES).render(chat)
    except ValueError:  # It wants the user to begin.
        with pytest.raises(ValueError, match="rejects the messages"):
            learned(name, chat)
        return
    spans, before = learned(name, chat)
    usual, _ = learned(name, TWO)
    assert spans[1:] == usual[1:]
    assert spans[0].lstrip() == usual[0].lstrip()
    # The header of some is the end of the user's turn.
    assert before[0].endswith(one.header) or "INST" in one.header
    assert before[1].endswith(one.header)


@pytest.mark.parametrize("content", ["", None])
def test_tool_call_after_thinking_prompt(content: str | None) -> None:
    # The prompt asks for thoughts, which the turn of a call lacks.
    text = loop(
        "<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for call in m.tool_calls or [] %}"
        "<tool_call>{{ call.function.name }}</tool_call>{% endfor %}<|im_end|>\n",
        "<|im_start|>assistant\n<think>\n",
    )
    calls = [{"function": {"name": "f", "arguments": {}}}]
    chat = [ONE[0], {"role": "assistant", "content": content, "tool_calls": calls}]
    chat += [{"role": "tool", "content": "1"}, ONE[1]]
    rendered, spans = ChatTemplate(text).render_with_spans(chat)
    assert [rendered[a:b] for a, b in spans] == [
        "<tool_call>f</tool_call><|im_end|>",
        "hello<|im_end|>",
    ]


def test_unwritten_content_is_not_in_the_header() -> None:
    text = loop("<{{ m.role }}>{{ m.content if not m.tool_calls }}</s>", "<assistant><think>")
    call = {"role": "assistant", "content": "ant", "tool_calls": [{"function": {"name": "f"}}]}
    with pytest.raises(ValueError, match="message 1 differently"):
        ChatTemplate(text).render_with_spans([ONE[0], call])


def test_answer_begins_as_the_prompt_goes_on() -> None:
    text = loop("{{ m.role }}: {{ m.content }}</s>", "assistant: Let us think.")
    chat = [ONE[0], {"role": "assistant", "content": "Let it be."}]
    rendered, spans = ChatTemplate(text).render_with_spans(chat)
    assert [rendered[a:b] for a, b in spans] == ["Let it be.</s>"]


@pytest.mark.parametrize("name", sorted(ENDLESS))
def test_endless_template_raises(name: str) -> None:
    with pytest.raises(ValueError, match=r"row 3: the chat template writes nothing after message"):
        learned(name, TWO, location="row 3")
