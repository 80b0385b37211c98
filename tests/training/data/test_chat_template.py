"""Chat templates: texts as transformers renders them, and the spans of the assistant's turns."""

from __future__ import annotations

import datetime
import json
import pathlib
import shutil
from typing import Any

import pytest

from jlora.training.data.chat_template import ChatTemplate

HERE = pathlib.Path(__file__).parent
CASES = json.loads((HERE / "chat.json").read_text("utf-8"))["cases"]
VARIABLES = {"bos_token": "<s>", "date_string": "01 Feb 2026"}
# What follows an answer and belongs to it, by hand.
ENDS = {"chatml": "<|im_end|>", "generation": "<|im_end|>", "rewriting": "<|im_end|>"}
ENDS |= {"llama3": "<|eot_id|>", "plain": "\n"}


def template(name: str, **variables: Any) -> ChatTemplate:
    text = (HERE / "templates" / f"{name}.jinja").read_text()
    return ChatTemplate(text, VARIABLES | variables)


def said(*texts: str) -> list[dict[str, str]]:
    return [
        {"role": ("user", "assistant")[number % 2], "content": text}
        for number, text in enumerate(texts)
    ]


def name_of(case: dict[str, Any]) -> str:
    return f"{case['template']}-{len(case['messages'])}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_render_matches_transformers(case: dict[str, Any]) -> None:
    chat, tools = template(case["template"]), case["tools"]
    assert chat.render(case["messages"], tools=tools) == case["text"]
    prompt = chat.render(case["messages"], tools=tools, add_generation_prompt=True)
    assert prompt == case["with_prompt"]


def answer(message: dict[str, Any], name: str) -> str:
    """What the assistant says in a message, its end included, as the templates write it."""
    if "tool_calls" in message:
        call = message["tool_calls"][0]["function"]
        arguments = json.dumps(call["arguments"], ensure_ascii=False)
        return f'{{"name": "{call["name"]}", "parameters": {arguments}}}{ENDS[name]}'
    thought = message.get("reasoning_content")
    return (f"<think>{thought}</think>" if thought else "") + message["content"] + ENDS[name]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_spans_contain_assistant_turns(case: dict[str, Any]) -> None:
    name, messages, tools = case["template"], case["messages"], case["tools"]
    text, spans = template(name).render_with_spans(messages, tools=tools)
    answers = [answer(m, name) for m in messages if m["role"] == "assistant"]
    assert text == case["text"]
    assert [text[start:end] for start, end in spans] == answers
    # Each is where a search from the end of the one before finds it after the prompt's last words.
    assert spans == sorted(spans)
    for start, _ in spans:
        assert text[:start].endswith(
            ("assistant\n", "assistant<|end_header_id|>\n\n", "ASSISTANT: ")
        )
    text, last = template(name).render_with_spans(messages, tools=tools, train_on="last")
    assert last == spans[-1:]
    assert case["text"].startswith(text)
    text, everything = template(name).render_with_spans(messages, tools=tools, train_on="all")
    assert (text, everything) == (case["text"], [(0, len(text))])


def test_spans_rewriting_template_only_last() -> None:
    chat = template("rewriting")
    thinking = said("A", "<think>a</think>\nB", "C", "<think>c</think>\nD")
    with pytest.raises(ValueError, match=r"row 3: the chat template renders message 1 differently"):
        chat.render_with_spans(thinking, location="row 3")
    with pytest.raises(
        ValueError, match=r"Use data.train_on=last, or a template with {% generation"
    ):
        chat.render_with_spans(thinking)
    text, spans = chat.render_with_spans(thinking, train_on="last")
    assert "<think>a" not in text
    assert [text[start:end] for start, end in spans] == ["<think>c</think>\nD<|im_end|>"]


def test_spans_last_turn_with_several_tags() -> None:
    parts = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<{% endgeneration"
    parts += " %}--{% generation %}{{ m.content }}>{% endgeneration %}{% else %}{{ m.content }}"
    chat = ChatTemplate(parts + "{% endif %}{% endfor %}")
    text, spans = chat.render_with_spans(said("a", "b", "c", "d", "e"), train_on="last")
    assert text == "a<--b>c<--d>"
    assert [text[start:end] for start, end in spans] == ["<", "d>"]


def test_spans_without_answer_are_empty() -> None:
    for train_on in ("assistant", "last"):
        for name in ("chatml", "generation"):
            text, spans = template(name).render_with_spans(said("Hi"), train_on=train_on)
            assert (text, spans) == ("<|im_start|>user\nHi<|im_end|>\n", [])


def test_from_folder_finds_template(tmp_path: pathlib.Path) -> None:
    shutil.copytree(HERE / "tiny", tmp_path, dirs_exist_ok=True)
    named = ChatTemplate.from_folder(tmp_path)
    assert named.text == (HERE / "templates" / "chatml.jinja").read_text()
    assert named.variables == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert ChatTemplate.from_folder(tmp_path, "{{ eos_token }}").render(said("Hi")) == "</s>"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }} of the file")
    assert ChatTemplate.from_folder(tmp_path).render(said("Hi")) == "<s> of the file"
    assert (
        ChatTemplate.from_folder(tmp_path, variables={"bos_token": "B"}).render(said("Hi"))[0]
        == "B"
    )
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"][:1]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="chat templates tool_use and none named default"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="has no chat template"):
        ChatTemplate.from_folder(tmp_path)


def test_render_with_fixed_date() -> None:
    text = "{{ strftime_now('%d %b %Y') }}"
    held = ChatTemplate(text, now=datetime.datetime(2026, 2, 1))
    assert held.render(said("Hi")) == "01 Feb 2026"
    assert ChatTemplate(text).render(said("Hi")).count(" ") == 2


@pytest.mark.parametrize(
    ("text", "dated"),
    [
        ("{{ strftime_now('%d %b %Y') }}", True),
        ("{# No #}{% if x %}{% set date = strftime_now('%d') %}{% endif %}{# date #}", True),
        ("{{ messages[0].content }}", False),
        ("{# Without\nstrftime_now. #}{{ messages[0].content }}", False),
        ("{#} strftime_now #}{{ 1 }}", False),
        ("{# A comment. #}{# Without an end: strftime_now", True),
        ("{#" * 500_000, False),
    ],
)
def test_depends_on_date_of_templates(text: str, dated: bool) -> None:
    assert ChatTemplate(text).depends_on_date == dated


def test_from_folder_with_fixed_date(tmp_path: pathlib.Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    held = ChatTemplate.from_folder(tmp_path, now=datetime.datetime(2026, 2, 1))
    assert held.render(said("Hi")) == "01 Feb 2026"


JSON_CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls is defined %}"
    "{{ m.tool_calls | tojson }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_render_keeps_nulls_of_arguments() -> None:
    arguments = {"city": "Paris", "unit": None, "near": [None, {"a": None}]}
    call = {"id": None, "type": "function", "function": {"name": "f", "arguments": arguments}}
    tool = {"function": {"name": "f", "parameters": {"unit": {"default": None}}}}
    messages = [*said("Hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = ChatTemplate(JSON_CALLS).render(messages, tools=[tool])
    assert text.startswith(json.dumps(tool))
    assert json.dumps(call["function"]) in text
    assert '"id"' not in text  # As tables fill it.
    # Templates ask whether there is content (DeepSeek).
    assert ChatTemplate("{{ messages[1].content is none }}").render(messages) == "True"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("{{ messages[1].content }}|", "|"),
        ("{{ messages[1].content + '|' }}", "|"),
        ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", ""),
        ("{{ messages[1].content is none }}", "True"),
        ("{{ messages[1].content or '-' }}", "-"),
        ("None: {{ messages[1].content }}", "None: "),
    ],
)
def test_render_writes_no_null_content(text: str, want: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    messages = [{"role": "user", "content": ""}]
    messages += [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert ChatTemplate(text).render(messages) == want


def test_render_keeps_every_field() -> None:
    message = {"role": "user", "content": "Hi", "name": "Ada", "extra": {"a": [1, None]}}
    text = "{{ messages[0].name }} {{ messages[0].extra | tojson }}"
    assert ChatTemplate(text).render([message]) == 'Ada {"a": [1, null]}'


def in_parts(role: str, *texts: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}


LOOP = "{% for m in messages %}<{{ m.role }}>"
END = "</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
OF_PARTS = "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% endif %}"
# What a template writes of the content "one " and " two", and of the content "b", as transformers
# renders them, except that content of the other form is left out there, or an error.
CONTENT_TEMPLATES = {
    "text": (LOOP + "{{ '' + m.content }}" + END, "one  two", "b"),
    "written": (LOOP + "{{ m.content }}" + END, "one  two", "b"),
    "parts": (LOOP + OF_PARTS + "{% endfor %}" + END, "onetwo", "b"),
    "first": (LOOP + "{{ m.content[0].text }}" + END, "one  two", "b"),
    "both": (
        LOOP + "{% if m.content is string %}{{ m.content }}{% else %}" + OF_PARTS
        + "{% endfor %}{% endif %}" + END,
        "onetwo",
        "b",
    ),
    "json": (
        LOOP + "{{ m.content | tojson }}" + END,
        '[{"type": "text", "text": "one "}, {"type": "text", "text": " two"}]',
        '"b"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENT_TEMPLATES)
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_render_content_as_template_reads_it(name: str, role: str) -> None:
    text, of_parts, of_text = CONTENT_TEMPLATES[name]
    chat = [in_parts(role, "one ", " two"), {"role": role, "content": "b"}]
    want = f"<{role}>{of_parts}</s><{role}>{of_text}</s>"
    assert ChatTemplate(text).render(chat) == want


@pytest.mark.parametrize("name", CONTENT_TEMPLATES)
def test_spans_of_content_in_parts(name: str) -> None:
    text, of_parts, of_text = CONTENT_TEMPLATES[name]
    answer = in_parts("assistant", "one ", " two")
    chat = [*said("a"), answer, *said("c", "b"), *said("d"), answer]
    rendered, spans = ChatTemplate(text).render_with_spans(chat)
    want = [f"{of_parts}</s>", f"{of_text}</s>", f"{of_parts}</s>"]
    assert [rendered[start:end] for start, end in spans] == want


def test_spans_of_parts_after_thinking_prompt() -> None:
    text = CONTENT_TEMPLATES["parts"][0].replace("<assistant>{%", "<assistant><think>{%")
    chat = [*said("a"), in_parts("assistant", "<think>x</think>", "yes"), *said("b", "no")]
    rendered, spans = ChatTemplate(text).render_with_spans(chat)
    assert [rendered[a:b] for a, b in spans] == ["x</think>yes</s>", "no</s>"]


def test_roles_read_content_in_own_forms() -> None:
    """As in templates of models that see images, where users alone write parts."""
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}"
        "{% for p in m.content %}{{ p.text }}{% endfor %}|{% else %}{{ m.content + '</s>' }}"
        "{% endif %}{% endfor %}"
    )
    chat = [*said("a"), in_parts("assistant", "b"), in_parts("user", "c", "d"), *said("", "e")[1:]]
    assert ChatTemplate(text).render(chat) == "a|b</s>cd|e</s>"


def test_render_parts_without_nulls_or_type() -> None:
    text = "{% for p in messages[0].content %}{{ p | tojson }}{% endfor %}"
    chat = [{"role": "user", "content": [{"text": "a", "type": "text", "image": None}]}]
    assert ChatTemplate(text).render(chat) == '{"type": "text", "text": "a"}'
    chat = [{"role": "user", "content": [{"text": "a"}]}]
    assert ChatTemplate(text).render(chat) == '{"type": "text", "text": "a"}'
    assert template("chatml").render([{"role": "user", "content": []}]) == template(
        "chatml"
    ).render(said(""))


@pytest.mark.parametrize(
    ("written", "answer", "message"),
    [
        ("", {"content": "b"}, "message 1: the chat template does not write its content"),
        ("{{ m.parts }}", in_parts("assistant", "b"), "does not write its content"),
        ("{{ m.content }}", {"content": None, "tool_calls": [{"function": {"name": "f"}}]}, "'f'"),
        ("{{ m.content }}", {"content": "", "function_call": {"name": "f"}}, "tool_calls rather"),
        ("{{ m.content }}", {"content": None, "function_call": {"name": "f"}}, "tool_calls rather"),
    ],
)
def test_spans_unwritten_answers_raise(written: str, answer: dict[str, Any], message: str) -> None:
    text = "{% for m in messages %}<{{ m.role[0] }}>" + written + "<e>{% endfor %}"
    chat = [*said("a"), {"role": "assistant", **answer}]
    with pytest.raises(ValueError, match=message):
        ChatTemplate(text).render_with_spans(chat)
    chat[1]["train"] = False
    assert ChatTemplate(text).render_with_spans(chat)[1] == []


def test_spans_of_changed_content_are_found() -> None:
    text = "{% for m in messages %}<{{ m.content | tojson | upper }}>{% endfor %}"
    rendered, spans = ChatTemplate(text).render_with_spans(said("a", 'b "c"'))
    assert [rendered[a:b] for a, b in spans] == ['<"B \\"C\\"">']


def test_render_tool_calls_of_json_text() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}]
    chat = [*said("a"), {"role": "assistant", "content": None, "tool_calls": calls}]
    written = [chat[0], {**chat[1], "tool_calls": json.dumps(calls)}]
    want = ChatTemplate(JSON_CALLS).render_with_spans(chat)
    assert json.dumps(calls) in want[0]
    assert ChatTemplate(JSON_CALLS).render_with_spans(written) == want
    for empty in ("", "[]", "null", None):
        chat = [*said("a"), {"role": "assistant", "content": "b", "tool_calls": empty}]
        assert ChatTemplate("{{ messages[1].tool_calls or 'none' }}").render(chat) == "none"
    for wrong in ("[", "[1]", "{}", {"name": "f"}, ["f"], "\\ufdd0"):
        chat = [*said("a"), {"role": "assistant", "content": "b", "tool_calls": wrong}]
        with pytest.raises(ValueError, match="message 1: tool_calls=.* must be a list of objects"):
            template("chatml").render(chat)
    hidden = '[{"function": {"name": "\\ufdd0"}}]'
    chat = [*said("a"), {"role": "assistant", "content": "b", "tool_calls": hidden}]
    with pytest.raises(ValueError, match=r"contains U\+FDD0"):
        template("chatml").render(chat)


@pytest.mark.parametrize(
    "unread", ["{# {% generation %} #}", "{% raw %}{% generation %}{% endraw %}"]
)
def test_spans_tags_that_are_text_count_not(unread: str) -> None:
    chat, messages = template("chatml"), said("a", "b", "c", "d")
    text, spans = ChatTemplate(unread + chat.text, VARIABLES).render_with_spans(messages)
    assert [text[start:end] for start, end in spans] == ["b<|im_end|>", "d<|im_end|>"]


@pytest.mark.parametrize("tag", ["generation", "- generation", "generation -", "+ generation"])
def test_spans_tags_in_every_spelling(tag: str) -> None:
    text = "{% for m in messages %}{{ m.content }}:{%" + tag + "%}{{ m.role }}"
    text += "{% endgeneration %}{% endfor %}"
    rendered, spans = ChatTemplate(text).render_with_spans(said("a", "b"))
    assert [rendered[a:b] for a, b in spans] == ["user", "assistant"]


def test_undeclared_variables_of_template() -> None:
    text = "{{ bos_token }}{% set x = 1 %}{{ x }}{{ strftime_now('%d') }}{{ messages }}{# no #}"
    read = ChatTemplate(text + "{% if thinking %}{% endif %}", VARIABLES).undeclared_variables
    assert read == {"messages", "thinking"}


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{{ thinking }}", {"thinking"}),
        (
            "{% if messages %}{% set role = 1 %}{% else %}{% set role = 2 %}{% endif %}{{ role }}",
            set(),
        ),
        ("{% if not day is defined %}{% set day = 1 %}{% endif %}{{ day }}", {"day"}),
        ("{% set mode = mode | default('a') %}{{ mode }}", {"mode"}),
        ("{% for part in messages %}{{ part.role is defined }}{% endfor %}", set()),
        ("{% macro f(part) %}{{ part }}{% endmacro %}{{ f(messages) }}", set()),
    ],
)
def test_input_variables_of_template(text: str, read: set[str]) -> None:
    assert ChatTemplate("{{ messages }}" + text).input_variables == read | {"messages"}


def test_render_text_parts_and_sharegpt() -> None:
    chat = template("chatml")
    want = chat.render(said("one two", "three"))
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert chat.render([{"role": "user", "content": parts}, said("", "three")[1]]) == want
    sharegpt = [{"from": "human", "value": "one two"}, {"from": "gpt", "value": "three"}]
    assert chat.render(sharegpt) == want
    assert chat.render(json.dumps(sharegpt)) == want  # A cell of a .csv file.
    image = [{"role": "user", "content": [{"type": "image", "text": ""}]}]
    with pytest.raises(ValueError, match="part of type 'image', which a language model does not"):
        chat.render(image)


@pytest.mark.parametrize("name", ["chatml", "generation"])
@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"loss_scale": 0.0},
        {"weight": 0, "train": False},
    ],
)
def test_spans_leave_out_marked_messages(name: str, mark: dict[str, Any]) -> None:
    chat, messages = template(name), said("a", "b", "c", "d", "e", "f")
    text, spans = chat.render_with_spans(messages)
    marked = [*messages[:3], {**messages[3], **mark}, *messages[4:]]
    marked[1] = {**messages[1], "weight": 1}
    assert chat.render_with_spans(marked) == (text, [spans[0], spans[2]])
    assert chat.render(marked) == text  # A mark is not part of the text.
    last = [*messages[:5], {**messages[5], **mark}]
    assert chat.render_with_spans(last, train_on="last") == (text, [])
    _, rest = chat.render_with_spans(marked, train_on="all")
    assert rest == [(0, spans[1][0]), (spans[1][1], len(text))]


@pytest.mark.parametrize(
    ("number", "mark", "train_on", "message"),
    [
        (1, {"weight": 0.5}, "assistant", r"row 3, message 1: weight=0.5 must be 0 or 1"),
        (1, {"train": "no"}, "assistant", "train='no' must be 0 or 1, or false or true"),
        (1, {"train": True, "weight": 0}, "assistant", "disagree. Keep one"),
        (0, {"train": True}, "assistant", "message 0: a message of the user is marked for the"),
        (0, {"weight": 0}, "all", "message of the user is marked out of the loss, but .*=all sets"),
        (0, {"loss": True}, "assistant", "message 0: a message of the user is marked for the"),
        (1, {"loss_scale": 0.3}, "assistant", "loss_scale=0.3 must be 0 or 1"),
        (1, {"train_detail": [{"train": False}]}, "assistant", "train_detail=.* of another format"),
        (0, {"mask": True}, "all", "message 0: mask=True is a mark for training of another"),
        (1, {"weight": 1}, "last", "row 3, message 1 is marked for the loss, but only the last an"),
    ],
)
def test_spans_invalid_marks_raise(
    number: int, mark: dict[str, Any], train_on: Any, message: str
) -> None:
    messages: list[dict[str, Any]] = list(said("a", "b", "c", "d"))
    messages[number] = {**messages[number], **mark}
    with pytest.raises(ValueError, match=message):
        template("chatml").render_with_spans(messages, train_on=train_on, location="row 3")


def test_render_drops_null_fields() -> None:
    messages = [{**said("Hi")[0], "tool_calls": None}]
    text = "{{ messages[0].tool_calls is defined }}"
    assert ChatTemplate(text).render(messages) == "False"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages.__class__.__mro__ }}", "rejects the messages"),
        ("{% set _ = messages.append(1) %}", "rejects the messages"),
        ("{{ raise_exception('no system') }}", r"row 3: the chat template rejects .*no system"),
        ("{{ messages[0].content + 1 }}", "rejects the messages"),
        ("{{ 1 // 0 }}", r"rejects the messages \(integer division"),
        ("{{ messages[7].content.x }}", "rejects the messages"),
        ("a\n{% if %}", "line 2 is not valid Jinja"),
    ],
)
def test_render_invalid_template_raises(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(text).render(said("Hi"), location="row 3")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "row 3 must be a list of messages, got 'Hi'"),
        ([], r"row 3 must be a list of messages, got \[\]"),
        (["Hi"], "row 3, message 0 must have the fields role and content, got 'Hi'"),
        ([{"author": "human", "value": "Hi"}], "message 0 must have the fields role and content"),
        ([{"from": "bot", "value": "Hi"}], "needs one of human, .* there, and a value"),
        ([{"from": "human"}], "needs one of human, .* there, and a value"),
        ([{"role": "human", "content": "Hi"}], "role='human' must be one of system, .* Rename it"),
        ([*said("Hi"), {"role": "assistant"}], "row 3, message 1: content=None must be a string"),
        ([{"role": "user", "content": [{"type": "text"}]}], "content=.* must be a string"),
        (said("Hi \ufdd0"), r"contains U\+FDD0"),
    ],
)
def test_render_invalid_messages_raise(messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template("chatml").render_with_spans(messages, location="row 3")


def test_spans_tags_of_chat_begun_by_assistant() -> None:
    """A template that reads the first message is not given an empty chat."""
    text = (
        "{% if messages[0].role == 'system' %}!{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "three", "train": False},
    ]
    rendered, spans = ChatTemplate(text).render_with_spans(messages)
    assert [rendered[start:end] for start, end in spans] == ["one>"]
