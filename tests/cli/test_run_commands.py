"""`jlora train --resume`, `jlora generate` and `jlora inspect --targets`, run as users run them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from _support.training_fixtures import Make

import jlora
from jlora import cli, models
from jlora.checkpoints import safetensors_io
from jlora.checkpoints.adapter_file import (
    find_adapted_weights,
    fingerprint_weights,
    write_adapter,
)
from jlora.checkpoints.base_digest import BaseDigest
from jlora.checkpoints.lineage import Lineage
from jlora.training import data, recipe
from jlora.training.prompt_format import PromptFormat, read_prompt_format

main = importlib.import_module("jlora.cli.main")

HERE = pathlib.Path(__file__).parents[1]


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return status, out, error


# --- train ----------------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[recipe.Recipe, dict[str, Any]]]:
    """The calls of `train`, none of which trains."""
    calls: list[tuple[recipe.Recipe, dict[str, Any]]] = []
    module = importlib.import_module("jlora.training.train")
    monkeypatch.setattr(module, "train", lambda given, **options: calls.append((given, options)))
    return calls


def write_recipe(path: pathlib.Path, raw: dict[str, Any]) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(raw))
    return path


def begin(path: pathlib.Path, *overrides: str) -> recipe.Recipe:
    """Writes what a run leaves of its recipe."""
    begun = recipe.load(path, overrides)
    write_recipe(pathlib.Path(begun.output) / "recipe.yaml", begun.model_dump(mode="json"))
    return begun


def test_train_resume_keeps_overrides(
    recipe_of: Make, tmp_path: pathlib.Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_of())
    begun = begin(path, "--adapter.rank", "3", "--training.epochs", "2")
    status, _, error = run(capsys, "train", path, "--resume")
    assert (status, trained[-1][0], trained[-1][1]["resume"]) == (0, begun, True)
    assert f"Resuming with adapter.rank=3 of {begun.output}/recipe.yaml, not 2 of {path}." in error
    # An override changes the run; other folders are not affected.
    run(capsys, "train", path, "--resume", "--adapter.rank", "4")
    assert (trained[-1][0].adapter.rank, trained[-1][0].training.epochs) == (4, 2)
    status, _, error = run(capsys, "train", path, "--output", tmp_path / "other")
    assert (trained[-1][0].adapter.rank, error) == (2, "")
    # The folder was moved.
    shutil.move(begun.output, tmp_path / "moved")
    run(capsys, "train", path, "--resume", "--output", tmp_path / "moved")
    assert (trained[-1][0].adapter.rank, trained[-1][0].output) == (3, str(tmp_path / "moved"))
    # A full disk left an empty file.
    (tmp_path / "moved" / "recipe.yaml").write_text("")
    run(capsys, "train", path, "--resume", "--output", tmp_path / "moved")
    assert trained[-1][0].adapter.rank == 2


def test_train_prints_replaced_length(
    recipe_of: Make, tmp_path: pathlib.Path, trained: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_of(training={"steps": 6}))
    error = run(capsys, "train", path, "--training.epochs", "3")[2]
    assert f"The overrides replace training.steps=6 of {path}." in error
    assert (trained[-1][0].training.epochs, trained[-1][0].training.steps) == (3, None)
    assert run(capsys, "train", path, "--training.steps", "7")[2] == ""
    path = write_recipe(path, recipe_of(training={"epochs": 2, "steps": None}))
    assert "replace training.epochs=2" in run(capsys, "train", path, "--training.steps", "7")[2]


# --- generate -------------------------------------------------------------------------------------


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], tuple[int, ...]]]:
    """Tokens and ends of the calls of `generate`, which answers with the letters of yes."""
    calls: list[tuple[list[int], tuple[int, ...]]] = []

    def generate(_: Any, __: Any, ids: Any, *, sampling: Any, **___: Any) -> models.GenerateOutput:
        calls.append((ids[0].tolist(), sampling.eos_token_ids))
        answer = np.array([[5 + " abcdefghijklmnopqrstuvwxyz".index(c) for c in "yes"]])
        return models.GenerateOutput(answer, np.array([3]))

    monkeypatch.setattr(models, "generate", generate)
    return calls


def adapter_of_run(path: pathlib.Path, raw: dict[str, Any]) -> pathlib.Path:
    lineage = Lineage(recipe=recipe.validate(raw).model_dump(mode="json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(path, {}, {}, lineage)
    return path


def test_generate_writes_prompts_as_training(
    recipe_of: Make,
    base: pathlib.Path,
    chats: pathlib.Path,
    tmp_path: pathlib.Path,
    prompts: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = data.Tokenizer.from_folder(base)
    config = data.TokenizeConfig(max_seq_length=99)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    dataset = data.tokenize_chats([{"messages": chat}], tokenizer, config)
    tokens, learned = dataset.get_sequence(0)
    status, out, error = run(capsys, "generate", base, "hi")
    assert (status, out) == (0, "yes\n"), error
    assert prompts[-1][0] == tokens[~learned].tolist()
    assert prompts[-1][1] == (2,)
    # As they are, and with the first tokens of training on texts.
    assert run(capsys, "generate", base, "hi", "--raw")[1] == "hiyes\n"
    assert prompts[-1][0] == tokenizer.encode(["hi"])[0]
    texts = tmp_path / "a.txt"
    texts.write_text("hi")
    raw = recipe_of(data={"train": [{"path": str(texts), "format": "text"}]})
    adapter = adapter_of_run(tmp_path / "text" / "adapter.safetensors", raw)
    assert run(capsys, "generate", base, "hi", "--adapter", adapter)[1] == "hiyes\n"
    assert prompts[-1][0] == tokenizer.add_prefix(tokenizer.encode(["hi"])[0])


def test_generate_any_chat_source_is_chat(
    recipe_of: Make,
    base: pathlib.Path,
    chats: pathlib.Path,
    tmp_path: pathlib.Path,
    prompts: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = tmp_path / "a.txt"
    texts.write_text("hi")
    sources = [{"path": str(texts), "format": "text"}, {"path": str(chats), "format": "chat"}]
    raw = recipe_of(data={"train": sources})
    adapter = adapter_of_run(tmp_path / "adapter.safetensors", raw)
    assert run(capsys, "generate", base, "hi", "--adapter", adapter)[1] == "yes\n"
    tokenizer = data.Tokenizer.from_folder(base)
    assert tokenizer.decode(prompts[-1][0]) == "<user>hi</s><assistant>"


def test_generate_takes_the_runs_template(
    recipe_of: Make,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    prompts: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    text = "{% for m in messages %}{{ m.role + ':' + m.content + '<user>' }}{% endfor %}"
    text += "{% if add_generation_prompt %}assistant:{% endif %}"
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(text)
    raw = recipe_of(data={"chat_template": str(folder / "chat_template.jinja")})
    adapter = adapter_of_run(folder / "adapter.safetensors", raw)
    run(capsys, "generate", base, "hi", "--adapter", adapter)
    tokenizer = data.Tokenizer.from_folder(base)
    assert tokenizer.decode(prompts[-1][0]) == "user:hi<user>assistant:"
    # The template's end of a turn ends an answer, besides the base's.
    assert set(prompts[-1][1]) == {2, 3}
    # Alone, the file does not get the template of the base.
    (folder / "chat_template.jinja").unlink()
    out = tmp_path / "merged"
    for arguments in (
        ("generate", base, "hi", "--adapter", adapter),
        ("export", base, adapter, out),
    ):
        status, _, error = run(capsys, *arguments)
        assert status == 1
        assert f"there is no {folder / 'chat_template.jinja'}. Copy that file" in error
    assert not out.exists()


OWN_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '<user>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
FORMATS = {
    "chat": PromptFormat(True, (3,), OWN_TEMPLATE),
    "text": PromptFormat(False),
}


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.thin(2)
def test_export_keeps_the_prompt_format(
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    prompts: Any,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    # From the file alone to a PEFT folder, back to a file, and merged from each.
    model, params = models.load(base)
    leaves = jlora.peft.load(HERE / "peft" / "data" / "lora", model, params).adapter
    leaves = dict(list(leaves.items())[:1])
    first, folder, back = tmp_path / "a.safetensors", tmp_path / "peft", tmp_path / "b.safetensors"
    fingerprints = fingerprint_weights(find_adapted_weights(params, leaves), leaves)
    write_adapter(first, leaves, fingerprints, prompt_fields=FORMATS[kind]._asdict())
    assert run(capsys, "export", base, first, folder, "--format", "peft")[0] == 0
    assert run(capsys, "export", base, folder, back, "--format", "jlora")[0] == 0
    tokenizer = data.Tokenizer.from_folder(base)
    expected = {"chat": "user:hi<user>assistant:", "text": "hi"}[kind]
    assert run(capsys, "generate", base, "hi", "--adapter", folder)[0] == 0
    assert tokenizer.decode(prompts[-1][0]) == expected
    for adapter in (first, folder, back):
        assert read_prompt_format(adapter) == FORMATS[kind]
    out = tmp_path / "merged"
    assert run(capsys, "export", base, back, out)[0] == 0
    assert models.eos_token_ids(out) == {"chat": (2, 3), "text": (2,)}[kind]
    template = data.Tokenizer.from_folder(out).chat_template
    own = {"chat": OWN_TEMPLATE, "text": tokenizer.chat_template.text}  # type: ignore[union-attr]
    assert template is not None
    assert template.text == own[kind]
    # PEFT's own reader takes only the config and the tensors.
    names = {file.name for file in folder.iterdir()}
    assert {"prompt_format.json", "adapter_config.json"} <= names
    assert ("chat_template.jinja" in names) == (kind == "chat")


def test_merge_keeps_an_equal_prompt_format(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, params = models.load(base)
    leaves = jlora.peft.load(HERE / "peft" / "data" / "lora", model, params).adapter
    leaves = dict(list(leaves.items())[:1])
    fingerprints = fingerprint_weights(find_adapted_weights(params, leaves), leaves)
    paths = {kind: tmp_path / f"{kind}.safetensors" for kind in FORMATS}
    for kind, path in paths.items():
        write_adapter(path, leaves, fingerprints, prompt_fields=FORMATS[kind]._asdict())
    chat, text = paths.values()
    shutil.copy(chat, tmp_path / "again.safetensors")
    for number, other in enumerate((tmp_path / "again.safetensors", text)):
        out = tmp_path / f"{number}.safetensors"
        status, printed, error = run(capsys, "merge", base, out, chat, other)
        assert status == 0, error
        assert ("prompts of different formats" in printed) == (other == text)
        assert read_prompt_format(out) == (None if other == text else FORMATS["chat"])


@pytest.mark.parametrize("fields", ["[]", '{"is_chat": 1}', '{"is_chat": true, "more": 1}', "{"])
def test_generate_damaged_format_raises(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], fields: str
) -> None:
    (tmp_path / "prompt_format.json").write_text(fields)
    status, _, error = run(capsys, "generate", base, "hi", "--adapter", tmp_path)
    assert status == 1
    assert str(tmp_path / "prompt_format.json") in error


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chat_template_date", "yesterday", "chat_template_date, such as 2026-01-31, or null"),
        ("chat_template_date", "20260131", "chat_template_date, such as 2026-01-31, or null"),
        ("chat_template_date", 3, "chat_template_date, such as 2026-01-31, or null"),
        ("end_token_ids", [10**12], "end_token_ids, a list of token ids"),
        ("end_token_ids", [4_000], "prompts end with the token 4000, but the base has 44 tokens"),
        ("chat_template", "{% if %}", "chat_template, line 1 is not valid Jinja"),
    ],
)
def test_export_wrong_prompt_format_raises(
    first_leaf: tuple[Any, Any],
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    field: str,
    value: Any,
    message: str,
) -> None:
    params, leaf = first_leaf
    path, out = tmp_path / "a.safetensors", tmp_path / "out"
    fields = {**FORMATS["chat"]._asdict(), field: value}
    fingerprints = fingerprint_weights(find_adapted_weights(params, leaf), leaf)
    write_adapter(path, leaf, fingerprints, prompt_fields=fields)
    for arguments in (("export", base, path, out), ("merge", base, out, path)):
        status, _, error = run(capsys, *arguments)
        assert status == 1
        assert message in error
        assert f"{path}: " in error
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_generate_names_the_template_file(
    base: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    status, _, error = run(capsys, "generate", base, "hi", "--adapter", tmp_path)
    assert status == 1
    assert f"the chat template of {tmp_path} rejects the messages" in error


# --- the base of the run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_leaf(base: pathlib.Path) -> tuple[Any, Any]:
    """Parameters of the base, and an adapter of one of its weights."""
    model, params = models.load(base)
    leaves = jlora.peft.load(HERE / "peft" / "data" / "lora", model, params).adapter
    return params, dict(list(leaves.items())[:1])


@pytest.fixture(scope="module")
def of_run(
    first_leaf: tuple[Any, Any], base: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A folder with an adapter file that has the digest of its base."""
    params, leaf = first_leaf
    folder = tmp_path_factory.mktemp("run")
    fingerprints = fingerprint_weights(find_adapted_weights(params, leaf), leaf)
    digest = BaseDigest.from_folder(base)
    write_adapter(
        folder / "a.safetensors", leaf, fingerprints, None, digest, FORMATS["chat"]._asdict()
    )
    return folder


def write_other_base(base: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A copy of the base with other embeddings, which the adapters do not change."""
    shutil.copytree(base, folder)
    arrays = safetensors.numpy.load_file(folder / "model.safetensors")
    arrays["model.embed_tokens.weight"] = arrays["model.embed_tokens.weight"] * 3
    safetensors.numpy.save_file(arrays, folder / "model.safetensors")
    return folder


OTHER = "has other weights than the base of its run"


def test_commands_keep_the_runs_base(
    of_run: pathlib.Path,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Each output knows the base, and so does the output of the output.
    file, folder = of_run / "a.safetensors", tmp_path / "peft"
    merged, back = tmp_path / "merged.safetensors", tmp_path / "back.safetensors"
    assert run(capsys, "export", base, file, folder, "--format", "peft")[0] == 0
    assert run(capsys, "merge", base, merged, folder)[0] == 0
    assert run(capsys, "export", base, folder, back, "--format", "jlora")[0] == 0
    other = write_other_base(base, tmp_path / "other")
    before = sorted(tmp_path.iterdir())
    for adapter in (file, folder, merged, back):
        for arguments in (
            ("generate", other, "hi", "--adapter", adapter),
            ("merge", other, tmp_path / "out.safetensors", adapter),
            ("export", other, adapter, tmp_path / "out", "--format", "hf"),
            ("export", other, adapter, tmp_path / "out", "--format", "peft"),
            ("export", other, adapter, tmp_path / "out", "--format", "jlora"),
        ):
            is_file_to_file = arguments[-1] == "jlora" and not adapter.is_dir()
            status, _, error = run(capsys, *arguments)
            assert status == 1
            assert OTHER in error or is_file_to_file, arguments
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("file_format", ["hf", "peft"])
def test_killed_export_leaves_no_folder(
    of_run: pathlib.Path,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file_format: str,
) -> None:
    def read_files(folder: pathlib.Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    class Killed(BaseException):
        """Ends the command as SIGKILL would."""

    def kill(*_: Any) -> None:
        monkeypatch.setattr(safetensors_io, "remove_path", lambda _: None)
        raise Killed

    file, out = of_run / "a.safetensors", tmp_path / "out"
    command = ("export", base, file, out, "--format", file_format)
    for name in ("write_to_merged", "write_beside_peft"):
        monkeypatch.setattr(PromptFormat, name, kill)
    with pytest.raises(Killed):
        run(capsys, *command)
    assert not out.exists()
    assert [one.name for one in tmp_path.iterdir()] == [".out.partial"]
    monkeypatch.undo()
    assert run(capsys, *command)[0] == 0
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    whole = tmp_path / "whole"
    assert run(capsys, "export", base, file, whole, "--format", file_format)[0] == 0
    assert read_files(out) == read_files(whole)


@pytest.mark.parametrize("flag", ["--adapter"])
def test_main_empty_path_raises(
    base: pathlib.Path, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["generate", str(base), "hi", flag, ""])
    assert f"argument {flag}: an empty text is no path" in capsys.readouterr().err


def test_generate_empty_prompt_raises(
    base: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, error = run(capsys, "generate", base, "", "--raw")
    assert (status, error) == (1, "error: prompt='' has no tokens. Use a longer one.\n")


# --- inspect --------------------------------------------------------------------------------------


def test_inspect_targets_lists_paths(
    recipe_of: Make,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", recipe_of())
    status, out, error = run(capsys, "inspect", path, "--targets", "--adapter.rank", "3")
    assert status == 0, error
    assert "params/layers/attention/q/kernel" in out
    assert "7 of " in out.splitlines()[-1]
    status, out, _ = run(capsys, "inspect", base, "--targets")
    assert status == 0
    assert "params/layers_0/attention/q/kernel" in out
    for arguments, message in (
        ((base, "--targets", "--adapter.rank", "3"), "applies to a recipe, but"),
        ((path, "--targets", "--importance", "fisher"), "print different tables"),
        ((path,), "not a safetensors file"),
    ):
        status, _, error = run(capsys, "inspect", *arguments)
        assert status == 1
        assert message in error


# --- messages -------------------------------------------------------------------------------------


def known_flags() -> set[str]:
    commands = {
        main.flag_from_name(field.name)
        for options, _ in main.COMMANDS.values()
        for field in dataclasses.fields(options)
    }
    properties = json.dumps(recipe.json_schema())
    fields = set(re.findall(r'"([a-z][a-z0-9_]*)": \{', properties))
    return commands | {"--help", "--version"} | {f"--{name}" for name in fields}


def test_messages_name_flags_that_exist() -> None:
    known, unknown = known_flags(), []
    for path in pathlib.Path(jlora.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*[a-z])", node.value):
                parts = f"--{flag}".split(".")
                names = [parts[0], *(f"--{part}" for part in parts[1:])]
                if any(name not in known for name in names if not name[2:].isdigit()):
                    unknown.append(f"{path.name}: --{flag}")
    # Stands for any field.
    assert [each for each in unknown if not each.endswith("--section.field")] == []
