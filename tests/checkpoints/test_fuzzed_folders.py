"""Mutations of every kind of file that a folder has: errors are typed and name the file."""

from __future__ import annotations

import copy
import json
import math
import os
import pathlib
import random
import re
import resource
import shutil
import struct
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import yaml
from _support.training_fixtures import TEMPLATE

import jlora
from jlora import cli, diffusers, models, peft
from jlora.adapters import WeightAxes
from jlora.checkpoints import adapter_file
from jlora.checkpoints.base_digest import BaseDigest
from jlora.checkpoints.safetensors_io import serialize_safetensors
from jlora.cli.checkpoint_contents import inspect_path
from jlora.importance import Importance, WeightScore
from jlora.models.hf import load
from jlora.models.hf.weight_mapping import single_tensor_weight
from jlora.rank_search.study import Study, TrialSetting
from jlora.rank_search.trials import _read_run_result, _record_run_result
from jlora.training import recipe as recipes
from jlora.training.checkpointing import CheckpointManager
from jlora.training.data.chat_template import ChatTemplate
from jlora.training.data.tokenizer import Tokenizer
from jlora.training.metrics import read_metrics
from jlora.training.prompt_format import PromptFormat, read_prompt_format
from jlora.training.resume import resolve_defaults

# Of each kind in the slow tests; `make fuzz` damages 1,000.
NUM_DAMAGED = int(os.environ.get("NUM_DAMAGED", "300"))
PARAMS = {"w": np.arange(30, dtype=np.float32).reshape(6, 5)}
X = np.ones((2, 6), np.float32)
MAPPING = {"w": single_tensor_weight("net.w.weight", (6, 5), (1, 0))}
STATE = {"a": np.arange(300, dtype=np.float32), "b": np.float32(3)}
CHAT = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]


def product(params: Any, x: Any) -> Any:
    return x @ params["w"]


# --- mutations ------------------------------------------------------------------------------------

WORDS = ["", "w", "\0", "(", "{{", "\x1b[2J", "\ud800", "../../x", "é" * 300, "1e999", "all-linear"]
NUMBERS = [0, -1, 1, 2, 1.5, 2**31, 10**40, 1e308, float("nan"), float("inf"), True, False]


def random_value(rng: random.Random, depth: int = 2) -> Any:
    kind = rng.randrange(6 if depth else 4)
    if kind < 4:
        return rng.choice([None, *NUMBERS, *WORDS])
    inner = [random_value(rng, depth - 1) for _ in range(rng.randrange(3))]
    return inner if kind == 4 else {rng.choice(WORDS): one for one in inner}


def places(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of nested lists and dicts."""
    pairs = enumerate(value) if isinstance(value, list) else value.items()
    found = []
    for key, inner in list(pairs):
        found.append((value, key))
        if isinstance(inner, list | dict):
            found += places(inner)
    return found


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        found = places(tree) if isinstance(tree, list | dict) else []
        kind = rng.randrange(8)
        if not found or kind == 0:
            return random_value(rng)
        container, key = rng.choice(found)
        if kind == 1:
            del container[key]
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice(WORDS)] = container.pop(key)
        elif kind == 3:
            deep: Any = container[key]
            for _ in range(rng.choice([1, 200])):
                deep = [deep] if rng.random() < 0.5 else {"a": deep}
            container[key] = deep
        elif kind == 4 and isinstance(container[key], int | float):
            container[key] = container[key] * rng.choice([-1, 0, 2, 10**9, 0.5])
        elif kind == 5 and isinstance(container[key], str):
            letters = bytearray(container[key], "utf-8", "surrogatepass")
            container[key] = mutate_bytes(bytes(letters), rng).decode("utf-8", "replace")
        else:
            container[key] = random_value(rng)
    return tree


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        place = rng.randrange(len(changed) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            changed[place:] = b""
        elif kind == 1:
            changed[place:place] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 2:
            del changed[place : place + rng.randrange(1, 9)]
        elif kind == 3:
            changed[place:place] = changed[place : place + 40] * rng.choice([1, 100])
        elif kind == 4:
            changed[place:place] = rng.choice([b"[", b"{", b'"', b"\\", b"&a ", b"*a", b"\xff"]) * 3
        elif place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    if rng.random() < 0.01:
        return b"[" * 100_000
    return json.dumps(mutate_tree(json.loads(content), rng)).encode()


def mutate_yaml(content: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutate_bytes(content, rng)
    return yaml.safe_dump(mutate_tree(yaml.safe_load(content), rng)).encode("utf-8", "replace")


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A mutation of the header, of the JSON in its metadata, or of any byte."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    names = [name for name in metadata if metadata[name].startswith("{")]
    if names and rng.random() < 0.8:
        name = rng.choice(names)
        metadata[name] = mutate_json(metadata[name].encode(), rng).decode("utf-8", "replace")
    else:
        header = mutate_tree(header, rng)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


# --- kinds of files -------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        file: Path in the folder.
        mutate: Function from the content and a generator to other content.
        read: Function that reads everything that the file determines, from the folder.
    """

    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    read: Callable[[pathlib.Path], Any]


def read_adapter(folder: pathlib.Path) -> Any:
    path = folder / "adapter.safetensors"
    for read in (
        inspect_path,
        adapter_file.read_quantization_schemes,
        adapter_file.adapted_weight_paths,
        adapter_file.read_lineage,
    ):
        str(read(path))
    return jlora.load_adapter(path, PARAMS)


def read_peft(folder: pathlib.Path) -> Any:
    str(inspect_path(folder / "peft"))
    return peft.load(folder / "peft", product, PARAMS, X, checkpoint_mapping=MAPPING)


def read_prompts(folder: pathlib.Path) -> Any:
    known = read_prompt_format(folder / "peft")
    assert known is not None
    known.load_tokenizer(folder / "base")


def read_digest(folder: pathlib.Path) -> Any:
    adapter_file.check_base_checkpoint(folder / "peft", folder, DIGEST)


DIGEST = BaseDigest({"hidden_size": 4}, {"w": "0"})


def read_diffusers(folder: pathlib.Path) -> Any:
    return diffusers.load(
        folder / "lora.safetensors", product, PARAMS, X, checkpoint_mapping=MAPPING
    )


def read_importance(folder: pathlib.Path) -> Any:
    try:
        return Importance.from_json((folder / "importance.json").read_text())
    except UnicodeDecodeError:  # The text is the caller's.
        raise ValueError("importance.json") from None
    except ValueError as error:
        raise ValueError(f"importance.json: {error}") from error


def read_model(folder: pathlib.Path) -> Any:
    str(inspect_path(folder / "base"))
    load.check_loadable(folder / "base")


def read_eos(folder: pathlib.Path) -> Any:
    assert all(token >= 0 for token in models.eos_token_ids(folder / "base"))


def read_tokenizer(folder: pathlib.Path) -> Any:
    tokenizer = Tokenizer.from_folder(folder / "base")
    assert tokenizer.vocab_size
    if tokenizer.chat_template is not None:
        tokenizer.encode([tokenizer.chat_template.render(CHAT)])
    return tokenizer.decode([0])


def read_template(folder: pathlib.Path) -> Any:
    template = ChatTemplate.from_folder(folder / "base")
    return template.render_with_spans(CHAT)


def read_recipe(folder: pathlib.Path) -> Any:
    return recipes.load(folder / "recipe.yaml", ["--adapter.rank", "3"])


def read_saved_recipe(folder: pathlib.Path) -> Any:
    loaded = recipes.load(folder / "original.yaml")
    return resolve_defaults(loaded, folder / "recipe.yaml", True, jax.devices())


def read_study(folder: pathlib.Path) -> Any:
    study = Study.resume(folder, STUDY_METADATA)
    study.check_data(0, {"train": "x", "validation": "y"})
    for trial in study.trials.values():
        trial.score(50, "loss")
        str(trial.setting)
    study.folder = folder / "peft"  # Another folder: the file is read again.
    study.save()


STUDY_METADATA = {"recipe": {"seed": 0}, "options": {"num_rungs": 3}}


def read_result(folder: pathlib.Path) -> Any:
    result = _read_run_result(folder)
    assert result is not None
    study = Study(folder, {}, {})
    trial = study.get_or_add_trial("rank", TrialSetting(1, "all", 0.1, 1.0), 0, 10)
    _record_run_result(trial, result, "loss", folder)


def read_metric_lines(folder: pathlib.Path) -> Any:
    return read_metrics(folder / "metrics.jsonl")


KINDS: dict[str, Kind] = {
    "adapter": Kind("adapter.safetensors", mutate_safetensors, read_adapter),
    "peft weights": Kind("peft/adapter_model.safetensors", mutate_safetensors, read_peft),
    "peft config": Kind("peft/adapter_config.json", mutate_json, read_peft),
    "prompt format": Kind("peft/prompt_format.json", mutate_json, read_prompts),
    "peft template": Kind("peft/chat_template.jinja", mutate_bytes, read_prompts),
    "base digest": Kind("peft/base_digest.json", mutate_json, read_digest),
    "diffusers": Kind("lora.safetensors", mutate_safetensors, read_diffusers),
    "importance": Kind("importance.json", mutate_json, read_importance),
    "model weights": Kind("base/model-00001-of-*.safetensors", mutate_safetensors, read_model),
    "model config": Kind("base/config.json", mutate_json, read_model),
    "model index": Kind("base/model.safetensors.index.json", mutate_json, read_model),
    "generation config": Kind("base/generation_config.json", mutate_json, read_eos),
    "tokenizer": Kind("base/tokenizer.json", mutate_json, read_tokenizer),
    "special tokens": Kind("base/special_tokens_map.json", mutate_json, read_tokenizer),
    "tokenizer config": Kind("base/tokenizer_config.json", mutate_json, read_tokenizer),
    "template": Kind("base/chat_template.jinja", mutate_bytes, read_template),
    "recipe": Kind("recipe.yaml", mutate_yaml, read_recipe),
    "saved recipe": Kind("recipe.yaml", mutate_yaml, read_saved_recipe),
    "study": Kind("search.json", mutate_json, read_study),
    "result": Kind("result.json", mutate_json, read_result),
    "metrics": Kind("metrics.jsonl", mutate_bytes, read_metric_lines),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: pathlib.Path) -> pathlib.Path:
    """A folder with a good file of every kind."""
    folder = tmp_path_factory.mktemp("good")
    lora = jlora.lora_transform(product, jlora.LoRA(rank=2, alpha=3))
    adapter = lora.init(jax.random.key(0), PARAMS, X)
    lineage = jlora.checkpoints.Lineage(method="trained", recipe={"model": {"path": "b"}})
    jlora.save_adapter(folder / "adapter.safetensors", adapter, PARAMS, lineage)
    peft.save(folder / "peft", adapter, product, PARAMS, X, checkpoint_mapping=MAPPING)
    PromptFormat(True, (2,), TEMPLATE, "2026-01-31").write_beside_peft(folder / "peft")
    DIGEST.write_beside_peft(folder / "peft")
    diffusers.save(
        folder / "lora.safetensors", adapter, product, PARAMS, X, checkpoint_mapping=MAPPING
    )
    axes = WeightAxes((), (0,), (1,))
    scores = {"w": WeightScore((6, 5), axes, np.array(2.0))}
    text = Importance("gradient_norm", scores, count=3, power=2).to_json()
    (folder / "importance.json").write_text(text)
    _, params = models.load(base)
    models.save(folder / "base", params, base, max_shard_size=6_000)
    (folder / "base" / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    (folder / "base" / "chat_template.jinja").write_text(TEMPLATE)
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "base" / "special_tokens_map.json").write_text(json.dumps(tokens))
    raw = {
        "output": "run",
        "model": {"path": "base", "dtype": "float32"},
        "data": {"train": [{"path": "x.jsonl", "format": "chat"}], "chat_template_date": None},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    (folder / "original.yaml").write_text(yaml.safe_dump(raw))
    study = Study.create(folder, {"date": "2026-01-01", **STUDY_METADATA})
    study.get_or_add_trial("rank", TrialSetting(8, "all", 2e-4, 16.0), 0, 100).values[50] = 0.5
    study.check_data(0, {"train": "x", "validation": "y"})
    study.save()
    result = {"validation": {"loss": 0.5}, "trainable_params": 3, "seconds": 1.5}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.5}\n{"step": 2}\n')
    return folder


def fuzz(kind: Kind, folder: pathlib.Path, seeds: range) -> None:
    (file,) = folder.glob(kind.file)
    content = file.read_bytes()
    kind.read(folder)
    if kind.file == "peft/chat_template.jinja":
        (folder / "peft" / "prompt_format.json").unlink()  # A folder of another program.
    for seed in seeds:
        mutated = kind.mutate(content, random.Random(seed))
        file.write_bytes(mutated)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kind.read(folder)
            except (ValueError, OSError) as error:
                message = str(error)
                is_known = kind.read is read_digest and "trained on another base" in message
                assert is_known or file.name in message, (seed, mutated[:2000], message)
            except BaseException as error:
                raise AssertionError((seed, mutated[:2000])) from error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    checkpoints = CheckpointManager(folder, save_total_limit=2)
    checkpoints.save(1, STATE, METADATA)
    checkpoints.close()
    return folder


METADATA = {"progress": {"step": 1, "best_score": -math.inf}, "recipe": {"seed": [0, None]}}


def fuzz_checkpoint(good: pathlib.Path, folder: pathlib.Path, seeds: range) -> None:
    files = sorted(p.relative_to(good) for p in (good / "1").rglob("*") if p.is_file())
    target = jax.device_put(STATE)
    for seed in seeds:
        rng = random.Random(seed)
        file = rng.choice(files)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        (folder / file).write_bytes(mutate_bytes((good / file).read_bytes(), rng))
        manager = CheckpointManager(folder, save_total_limit=2)
        try:
            found = manager.restore(target)
        except (ValueError, OSError) as error:
            message = str(error)
        except BaseException as error:
            raise AssertionError((seed, file)) from error
        else:
            message = ""
            for name, array in STATE.items():
                np.testing.assert_array_equal(found.state[name], array)
            assert {name: found.metadata[name] for name in METADATA} == METADATA
        finally:
            manager.close()
        assert not message or f"Step 1 in {folder}" in message, (seed, file, message)


# Orbax leaves tasks of its event loop behind when a file cannot be read.
ignore_tasks = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@ignore_tasks
def test_damaged_checkpoint_is_named(checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    fuzz_checkpoint(checkpoint, tmp_path / "copy", range(12))


@ignore_tasks
@pytest.mark.slow
def test_many_damaged_checkpoints_are_named(
    checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    fuzz_checkpoint(checkpoint, tmp_path / "copy", range(NUM_DAMAGED))


@pytest.fixture
def copied(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("name", KINDS)
def test_damaged_file_is_named(name: str, copied: pathlib.Path) -> None:
    fuzz(KINDS[name], copied, range(36))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files_are_named(name: str, copied: pathlib.Path) -> None:
    fuzz(KINDS[name], copied, range(NUM_DAMAGED))


def make_dangling(path: pathlib.Path) -> None:
    path.symlink_to("nowhere")


def make_loop(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "importance"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_dangling, make_loop])
def test_irregular_file_is_named(
    name: str, make: Callable[[pathlib.Path], None], copied: pathlib.Path
) -> None:
    # None of them is a missing file, and a FIFO that is opened would never answer.
    kind = KINDS[name]
    (file,) = copied.glob(kind.file)
    file.unlink()
    make(file)
    with pytest.raises((ValueError, OSError), match=re.escape(file.name)):
        kind.read(copied)


def test_save_keeps_no_link_to_nothing(folder: pathlib.Path, copied: pathlib.Path) -> None:
    (copied / "base" / "tokenizer.model").symlink_to("nowhere")
    _, params = models.load(folder / "base")
    with pytest.raises(FileNotFoundError, match=r"tokenizer.model is a link to nowhere, which do"):
        models.save(copied / "out", params, copied / "base")
    assert not (copied / "out").exists()


# --- commands, terminals and disks ----------------------------------------------------------------

COMMANDS = {
    "adapter.safetensors": ["inspect", "adapter.safetensors"],
    "peft/adapter_config.json": ["inspect", "peft"],
    "base/config.json": ["inspect", "base"],
    "base/tokenizer.json": ["generate", "base", "hi"],
    "recipe.yaml": ["train", "recipe.yaml"],
}


@pytest.mark.parametrize("file", COMMANDS)
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"[" * 100_000, b"\xff\x00"])
def test_command_damaged_file_is_an_error(
    file: str,
    content: bytes,
    copied: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(copied)
    (copied / file).write_bytes(content)
    status = cli.main(COMMANDS[file])
    printed = capsys.readouterr()
    # Of a folder with other values, the reason is a line of the table.
    is_table = content == b"{}" and file in ("peft/adapter_config.json", "base/config.json")
    assert status == (0 if is_table else 1)
    text = printed.out if is_table else printed.err
    assert text.startswith("error: ") or is_table
    assert pathlib.Path(file).name in text


def test_inspect_escapes_control_characters(tmp_path: pathlib.Path) -> None:
    lineage = {"parents": [], "method": "\x1b]0;title\x07\x1b[2J", "recipe": None}
    metadata = {"format": "jlora", "adapter": "{}", "lineage": json.dumps(lineage)}
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(serialize_safetensors({"w": np.ones(1, np.float32)}, metadata))
    printed = str(inspect_path(path))
    assert r"\x1b]0;title\x07\x1b[2J" in printed
    assert "\x1b" not in printed


def test_full_disk_is_an_error_of_the_output(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    _, params = models.load(folder / "base")
    adapter = jlora.load_adapter(folder / "adapter.safetensors", PARAMS)
    writers = [
        lambda: models.save(tmp_path / "merged", params, folder / "base"),
        lambda: peft.save(
            tmp_path / "peft", adapter, product, PARAMS, X, checkpoint_mapping=MAPPING
        ),
        lambda: jlora.save_adapter(tmp_path / "adapter.safetensors", adapter, PARAMS),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        for write in writers:
            with pytest.raises(OSError, match="File too large"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())
