"""Training runs: their outputs, bit-exact resumption, and errors."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib
import json
import os
import pathlib
import re
import shutil
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import yaml
from _support.training_fixtures import ANIMALS, DATA, TEMPLATE, Make, make_recipe
from _support.training_runs import After, assert_same, measured, output, run, stop

import jlora
from jlora import models
from jlora.checkpoints.base_digest import BaseDigest
from jlora.training import TrainResult, data, recipe
from jlora.training.checkpointing import CheckpointManager
from jlora.training.datasets import find_end_token_ids, load_datasets
from jlora.training.export import tokenize_prompts
from jlora.training.loop import NonFiniteError
from jlora.training.prompt_format import PromptFormat, read_prompt_format
from jlora.training.resume import resolve_defaults
from jlora.training.setup import build_setup
from jlora.training.sharding import make_mesh
from jlora.training.signals import TrainingInterrupted

# --- outputs ----------------------------------------------------------------------------


class FinishedRun(NamedTuple):
    raw: dict[str, Any]
    result: TrainResult
    base_files: dict[str, bytes]  # Before the run.


@pytest.fixture(scope="module")
def finished(
    base: pathlib.Path, chats: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A run with every kind of output."""
    raw = make_recipe(
        tmp_path_factory.mktemp("finished"),
        base,
        chats,
        data={
            "validation": [{"path": str(chats), "format": "chat"}],
            "test": [{"path": str(chats), "format": "chat", "max_examples": 9}],
        },
        training={"epochs": 6, "steps": None, "eval_steps": 4},
        report={
            "sample_prompts": ["who sees the <cat>?"],
            "max_new_tokens": 4,
            "tensorboard": True,
        },
        export={"merged": True, "merged_dtype": "float32", "peft": True, "vllm": True},
    )
    files = {f.name: f.read_bytes() for f in base.iterdir()}
    return FinishedRun(raw, run(raw), files)


def test_train_learns_and_keeps_the_best(finished: FinishedRun, base: pathlib.Path) -> None:
    result, lines = finished.result, measured(finished.raw)
    rates = {"train/loss", "train/gradient_norm", "train/learning_rate"}
    names = ({"step", "num_targets", "tokens", *rates}, {"step", "eval/loss"})
    assert all(set(line) in names for line in lines)
    assert set(result.last_metrics) == {"num_targets", "tokens", "seconds", *rates}
    events = b"".join(f.read_bytes() for f in (output(finished.raw) / "tensorboard").iterdir())
    for name in (*rates, "num_targets", "eval/loss"):
        assert name.encode() in events
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    held = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert result.stop_reason == "max_steps"
    assert len(losses) == result.step
    assert sorted(held) == sorted({*range(4, result.step + 1, 4), result.step})
    assert result.best_step == min(held, key=lambda step: held[step])
    assert min(held.values()) < losses[0] - 0.5
    before, after = result.test_metrics
    assert after["loss"] < before["loss"] - 0.5
    assert {f.name: f.read_bytes() for f in base.iterdir()} == finished.base_files
    written = json.loads((output(finished.raw) / "result.json").read_text())
    assert written["test"] == {"before": before, "after": after}
    assert written["steps"] == result.step
    assert written["best_step"] == result.best_step
    assert written["validation"]["loss"] == held[result.best_step]


def test_train_exports_compute_the_same(finished: FinishedRun, base: pathlib.Path) -> None:
    # The adapter is that of the best evaluation, and the merged checkpoint computes the same.
    folder = output(finished.raw)
    model, params = models.load(base, dtype="float32", scan_layers=True)
    adapter = jlora.load_adapter(folder / "adapter.safetensors", params)
    tokens = jnp.array([[3, 9, 17, 30]])
    apply, adapted_apply = jax.jit(model.apply), jax.jit(jlora.lora_transform(model.apply).apply)
    adapted = adapted_apply(params, adapter, tokens)
    _, merged = models.load(folder / "merged", dtype="float32", scan_layers=True)
    np.testing.assert_allclose(apply(merged, tokens), adapted, atol=2e-5)
    for name in ("peft", "vllm"):
        out = adapted_apply(*jlora.peft.load(folder / name, model, params), tokens)
        np.testing.assert_allclose(out, adapted, atol=2e-5)


def test_train_writes_report_and_recipe(finished: FinishedRun) -> None:
    folder = output(finished.raw)
    page = (folder / "report.html").read_text()
    for text in (
        "learning rate",
        "validation",
        "evaluation loss",
        "mlp/down/kernel",
        "who sees the &lt;cat&gt;?",
        "<tr><th>rank</th><td>2</td></tr>",
        "trainable params: ",
    ):
        assert text in page
    path = folder / "recipe.yaml"
    validated = recipe.validate(finished.raw)
    resolved = resolve_defaults(validated, path, True, jax.devices())
    data = resolved.data.model_copy(update={"chat_template_date": None})  # It shows no date.
    assert recipe.load(path) == resolved.model_copy(update={"data": data})


@pytest.mark.slow
def test_train_exports_the_trained_chat_format(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    # Answers end with <user>, which is not the eos token of the base.
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<user>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    raw = recipe_of(
        data={"chat_template": str(own)}, training={"steps": 1}, export={"merged": True}
    )
    run(raw)
    merged = output(raw) / "merged"
    for folder in (output(raw), merged):
        assert (folder / "chat_template.jinja").read_text() == own.read_text()
    assert models.eos_token_ids(merged) == (2, 3)
    tokenizer = data.Tokenizer.from_folder(merged)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.text == own.read_text()
    config = json.loads((merged / "tokenizer_config.json").read_text())
    assert config["chat_template"] == own.read_text()


@pytest.mark.parametrize(
    ("learned", "ends"),
    [
        ([5, 9, 2], {2}),
        ([5, 9, 2, 5], {2}),  # With a blank behind it.
        ([5, 9, 30], set()),  # Truncated.
        ([3], {3}),
    ],
)
def test_find_end_token_ids(base: pathlib.Path, learned: list[int], ends: set[int]) -> None:
    tokenizer = data.Tokenizer.from_folder(base)
    builder = data.TokenizedDatasetBuilder(data.TokenizeConfig(max_seq_length=20))
    mask = np.array([False] * 2 + [True] * len(learned) + [False])
    builder.add(0, data.TokenSequence([3, 20, *learned, 4], mask))
    builder.add(1, data.TokenSequence([3, 20, *learned], mask[:-1]))
    assert find_end_token_ids(builder.build(), tokenizer) == ends


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def pairs(tmp_path: pathlib.Path) -> dict[str, str]:
    """Preferences of messages and of strings."""
    rows = []
    for animal in ANIMALS:
        answers = {name: [{"role": "assistant", "content": f"{name}."}] for name in DPO_COLUMNS}
        rows.append({"prompt": [{"role": "user", "content": f"a {animal}?"}], **answers})
    strings = [{"prompt": "a", "chosen": "good", "rejected": "bad"}]
    return {
        "messages": write_rows(tmp_path / "messages.jsonl", rows),
        "strings": write_rows(tmp_path / "strings.jsonl", strings),
    }


DPO_COLUMNS = ("chosen", "rejected")


@pytest.mark.parametrize(
    ("formats", "is_chat"),
    [
        (["chat"], True),
        (["messages"], True),
        (["strings"], False),
        (["strings", "messages"], True),
        (["text"], False),
        (["text", "chat"], True),
    ],
)
def test_load_datasets_finds_the_prompt_format(
    recipe_of: Make,
    base: pathlib.Path,
    chats: pathlib.Path,
    pairs: dict[str, str],
    tmp_path: pathlib.Path,
    formats: list[str],
    is_chat: bool,
) -> None:
    sources = {
        "chat": {"path": str(chats), "format": "chat"},
        "text": {"path": write_rows(tmp_path / "t.jsonl", [{"text": "a cat"}]), "format": "text"},
        **{name: {"path": path, "format": "preference"} for name, path in pairs.items()},
    }
    raw = recipe_of(
        data={"train": [sources[name] for name in formats]},
        report={"sample_prompts": ["a cat?"], "max_new_tokens": 4},
    )
    validated = recipe.validate(raw)
    datasets = load_datasets(validated, base, 39, slice(0, 2), slice(0, 2))
    assert datasets.prompt_format == PromptFormat(is_chat, (2,) if is_chat else ())
    setup = types.SimpleNamespace(
        model=types.SimpleNamespace(config=types.SimpleNamespace(max_seq_length=64))
    )
    prompts = tokenize_prompts(validated, setup, datasets.tokenizer, is_chat)  # type: ignore
    expected = "<user>a cat?</s><assistant>" if is_chat else "a cat?"
    assert datasets.tokenizer.decode(prompts[0]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff", "own.jinja is not text in UTF-8"),
        (b"{% if %}", "the chat template of .*own.jinja, line 1 is not valid Jinja"),
    ],
)
def test_load_datasets_names_the_template(
    recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path, content: bytes, message: str
) -> None:
    (tmp_path / "own.jinja").write_bytes(content)
    raw = recipe_of()
    raw["data"]["chat_template"] = str(tmp_path / "own.jinja")
    with pytest.raises(ValueError, match=message):
        load_datasets(recipe.validate(raw), base, 39, slice(0, 2), slice(0, 2))


def test_load_datasets_orders_labels_of_sources(
    recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """By value, and names of one number by their text, in every process."""
    labels = (["1", "0001", "10"], ["2", "01", "001", "1"])
    paths = [
        write_rows(tmp_path / f"{n}.jsonl", [{"text": "a", "label": label} for label in names])
        for n, names in enumerate(labels)
    ]
    sources = [{"path": path, "format": "classification"} for path in paths]
    validated = recipe.validate(recipe_of(data={"train": sources}))
    datasets = load_datasets(validated, base, 39, slice(0, 2), slice(0, 2))
    assert datasets.label_names == ("0001", "001", "01", "1", "2", "10")


@pytest.mark.slow
def test_train_dpo_exports_the_chat_format(
    recipe_of: Make, base: pathlib.Path, pairs: dict[str, str], tmp_path: pathlib.Path
) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<user>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    raw = recipe_of(
        data={
            "train": [{"path": pairs["messages"], "format": "preference"}],
            "chat_template": str(own),
        },
        training={"steps": 1},
        export={"merged": True, "peft": True, "vllm": True},
    )
    run(raw)
    assert models.eos_token_ids(output(raw) / "merged") == (2, 3)
    alone = shutil.copy(output(raw) / "adapter.safetensors", tmp_path / "alone.safetensors")
    for path in (output(raw) / "adapter.safetensors", alone, *map(output(raw).joinpath, PEFT)):
        known = read_prompt_format(pathlib.Path(path))
        assert known == PromptFormat(True, (3,), own.read_text())
        assert known.load_tokenizer(base).chat_template.text == own.read_text()  # type: ignore
    for name in PEFT:  # They know their base.
        digest = json.loads((output(raw) / name / "base_digest.json").read_text())
        assert digest == BaseDigest.from_folder(base).summarize()
    for name in ("merged", *PEFT):
        assert (output(raw) / name / "chat_template.jinja").read_text() == own.read_text()


PEFT = ("peft", "vllm")


def test_train_existing_run_raises(recipe_of: Make) -> None:
    raw = recipe_of()
    # An incomplete checkpoint is not a run.
    (output(raw) / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="has no checkpoint to resume from. Start without"):
        run(raw, resume=True)
    (output(raw) / "checkpoints" / "3").mkdir()
    with pytest.raises(FileExistsError, match="has a run already, which was not changed"):
        run(raw)


def test_train_existing_export_raises(recipe_of: Make, base: pathlib.Path) -> None:
    raw = recipe_of(export={"merged": True})
    kept = output(raw) / "merged" / "mine.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(FileExistsError, match="merged exists already and was not changed"):
        run(raw)
    assert kept.read_text() == "mine"
    shutil.rmtree(kept.parent)
    shutil.copytree(base, kept.parent)
    raw["model"]["path"] = str(kept.parent)
    for resume in (False, True):
        with pytest.raises(ValueError, match="which an export would replace"):
            run(raw, resume=resume)
    assert (kept.parent / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("lora", "export", "message"),
    [
        (
            {"family": "LoRAMoE", "num_experts": 2, "rank": 2},
            "merged",
            "routes by the input, so it cannot be merged",
        ),
        ({"family": "SoRA", "rank": 2}, "peft", "PEFT does not support"),
        (
            {"family": "FullDelta", "target_pattern": "/q/kernel"},
            "peft",
            "must have factors of a PEFT method",
        ),
    ],
)
@pytest.mark.thin(3)
def test_train_unsupported_export_raises(
    recipe_of: Make, lora: dict[str, Any], export: str, message: str
) -> None:
    raw = recipe_of(export={export: True}) | {"adapter": lora}
    with pytest.raises(ValueError, match=message):
        run(raw)
    assert not (output(raw) / "metrics.jsonl").exists()


def test_train_long_prompt_raises(recipe_of: Make) -> None:
    raw = recipe_of(report={"sample_prompts": ["cat " * 400], "max_new_tokens": 4})
    with pytest.raises(ValueError, match="has .* tokens, but at most .* fit before"):
        run(raw)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"mesh": {"tensor": 3}}, "has 3 devices, but 8 are available"),
        ({"mesh": {"data": 8}}, "batch size of 2 must be divisible by data=8"),
        ({"mesh": {"tensor": 8}}, r"The weight 'params/.* is not divisible by tensor=8"),
        ({"data": {"max_seq_length": 4096}}, "data.max_seq_length=4096 must be at most"),
        ({"data": {"max_seq_length": 20}}, "row 0: .* tokens are more than data.max_seq_length=20"),
        ({"adapter": {"target_pattern": "atention"}}, "'atention' matches nothing"),
        ({"model": {"path": "nowhere"}}, "nowhere"),
    ],
)
def test_train_invalid_recipe_raises(
    recipe_of: Make, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(recipe_of(**sections), devices=8 if "mesh" in sections else 1)


# --- resuming -------------------------------------------------------------------------------------

SAVING = {"save_steps": 2, "save_interval_minutes": None, "save_total_limit": 9}


@pytest.fixture(scope="module")
def whole(
    base: pathlib.Path, chats: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A run that was never interrupted, over more than one epoch."""
    raw = {
        "output": str(tmp_path_factory.mktemp("whole") / "run"),
        "model": {"path": str(base), "dtype": "float32"},
        "adapter": {"rank": 2, "alpha": 4.0, "dropout": 0.1},
        "data": {"train": [{"path": str(chats), "format": "chat"}], "max_seq_length": 64},
        "batch": {"size": 2, "gradient_accumulation_steps": 2},
        "optimizer": {"learning_rate": 1e-2, "lr_multipliers": {"b": 4.0}},
        "training": {"epochs": 3, **SAVING},
    }
    run(raw)
    return raw


def copied(whole: dict[str, Any], folder: pathlib.Path) -> dict[str, Any]:
    return {**whole, "output": str(folder / "run")}


@pytest.mark.parametrize("step", [1, 4])
@pytest.mark.slow
def test_resume_after_signal_is_bit_exact(
    whole: dict[str, Any], tmp_path: pathlib.Path, step: int
) -> None:
    raw = copied(whole, tmp_path)
    with pytest.raises(TrainingInterrupted, match="SIGTERM: step . of .* is saved") as caught:
        run(raw, callbacks=[After(step, stop)])
    assert caught.value.exit_status == 143
    assert not (output(raw) / "adapter.safetensors").exists()
    assert len(measured(raw)) < len(measured(whole))
    outcome = run(raw, resume=True)
    assert outcome.step == measured(whole)[-1]["step"]
    assert_same(raw, whole)


def scripted(monkeypatch: Any, losses: list[float], interrupted: int | None = None) -> None:
    """Gives evaluations these losses in turn; a signal arrives during one of them."""
    left, signals = list(losses), [interrupted]

    def evaluate(_: Any, is_over: Callable[[], bool]) -> dict[str, float] | None:
        if len(losses) - len(left) + 1 == signals[0]:
            signals[0] = None
            stop()
            assert is_over()
            return None
        return {"loss": left.pop(0)}

    train = importlib.import_module("jlora.training.train")
    monkeypatch.setattr(train, "make_eval_fn", lambda *_: evaluate)


def evaluated(recipe_of: Make, chats: pathlib.Path, **training: Any) -> dict[str, Any]:
    return recipe_of(
        data={"validation": [{"path": str(chats), "format": "chat", "max_examples": 2}]},
        training={
            "eval_steps": 1,
            "save_total_limit": 1,
            "save_interval_minutes": None,
            **training,
        },
    )


def checkpoints(raw: dict[str, Any]) -> list[int]:
    return sorted(int(f.name) for f in (output(raw) / "checkpoints").iterdir())


@pytest.mark.parametrize("during", ["a step", "an evaluation"])
@pytest.mark.slow
def test_resume_keeps_evaluations_and_best(
    recipe_of: Make,
    chats: pathlib.Path,
    monkeypatch: Any,
    during: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = evaluated(recipe_of, chats)
    stopped_in_evaluation = during == "an evaluation"
    scripted(monkeypatch, [5.0, 1.0, 4.0, 3.0, 2.5, 2.0], 4 if stopped_in_evaluation else None)
    recorders = [] if stopped_in_evaluation else [After(4, stop)]
    with pytest.raises(TrainingInterrupted):
        run(raw, callbacks=recorders, quiet=False)
    printed = capsys.readouterr().out
    assert "\ncompiling the training step (once)\n" in printed
    assert re.findall(r"^eval .*", printed, re.MULTILINE)[:2] == [
        "eval 1    loss 5.000  (best)",
        "eval 2    loss 1.000  (best)",
    ]
    outcome = run(raw, resume=True, quiet=False)
    printed = capsys.readouterr().out
    assert re.search(r"\ncompiling the training step \(once; \d+ s last time\)\n", printed)
    assert re.findall(r"^eval .*", printed, re.MULTILINE)[-2:] == [
        "eval 5    loss 2.500",
        "eval 6    loss 2.000",
    ]
    assert re.search(r"\nstep 6/6  loss .* tok/s  .* GiB  ETA 0:00:00\n", printed)
    assert (outcome.stop_reason, outcome.step, outcome.best_step) == ("max_steps", 6, 2)
    lines = [line for line in measured(raw) if "eval/loss" in line]
    assert [line["eval/loss"] for line in lines] == [5.0, 1.0, 4.0, 3.0, 2.5, 2.0]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert checkpoints(raw) == [2, 6]
    # A finished run makes no further step.
    adapter = (output(raw) / "adapter.safetensors").read_bytes()
    again = run(raw, resume=True)
    assert (again.step, again.best_step) == (6, 2)
    assert (output(raw) / "adapter.safetensors").read_bytes() == adapter


@pytest.mark.slow
def test_resume_after_early_stopping_stops(
    recipe_of: Make, chats: pathlib.Path, monkeypatch: Any
) -> None:
    raw = evaluated(recipe_of, chats, early_stopping_patience=2)
    scripted(monkeypatch, [5.0, 1.0, 4.0, 3.0])
    assert (first := run(raw)).stop_reason == "early_stopping"
    assert (first.step, first.best_step) == (4, 2)
    second = run(raw, resume=True)
    assert (second.stop_reason, second.step, second.best_step) == ("early_stopping", 4, 2)


@pytest.mark.slow
def test_train_without_best_uses_the_last(
    recipe_of: Make, chats: pathlib.Path, monkeypatch: Any
) -> None:
    raw = evaluated(recipe_of, chats, on_save_error="warn", early_stopping_patience=2)
    scripted(monkeypatch, [5.0, 1.0, 4.0, 3.0])
    write = CheckpointManager._write_checkpoint

    def failing(self: CheckpointManager, step: int, *rest: Any) -> None:
        if step in (2, 4):
            raise OSError(28, "No space left on device")
        write(self, step, *rest)

    monkeypatch.setattr(CheckpointManager, "_write_checkpoint", failing)
    with (
        pytest.warns(UserWarning, match="could not be written .*No space left"),
        pytest.warns(UserWarning, match="best checkpoint, of step 2, could not be written"),
    ):
        outcome = run(raw)
    assert (outcome.stop_reason, outcome.best_step) == ("early_stopping", 4)
    assert (output(raw) / "adapter.safetensors").exists()


@pytest.mark.slow
def test_resolve_defaults_keeps_the_date(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ strftime_now('%Y')[:0] }}" + TEMPLATE)
    raw = recipe_of(data={"chat_template": str(template)})
    run(raw)
    path = output(raw) / "recipe.yaml"
    made = recipe.load(path)
    assert made.data.chat_template_date is not None
    path.write_text(path.read_text().replace(made.data.chat_template_date, "2001-02-03"))
    open_ended = recipe.validate(raw)

    def date(of: Any, resume: bool) -> str | None:
        return resolve_defaults(of, path, resume, jax.devices()).data.chat_template_date

    assert date(open_ended, True) == "2001-02-03"
    assert date(open_ended, False) == made.data.chat_template_date
    assert date(made, True) == made.data.chat_template_date


def test_resolve_defaults_scan_layers_by_devices(recipe_of: Make, tmp_path: pathlib.Path) -> None:
    raw = recipe_of()
    raw["model"].pop("scan_layers", None)
    gpu = types.SimpleNamespace(platform="gpu")
    kept = tmp_path / "kept.yaml"

    def scanned(devices: Any, *, resume: bool = False, **model: Any) -> bool | None:
        of = recipe.validate({**raw, "model": {**raw["model"], **model}})
        return resolve_defaults(of, kept, resume, devices).model.scan_layers

    assert scanned([gpu]) is False
    assert scanned([gpu, gpu]) is None
    assert scanned(jax.devices()[:1]) is None
    assert scanned([gpu], scan_layers=True) is True
    # A resumed run keeps its choice on any device, because the adapter has the layers' paths.
    for began in (None, False):
        kept.write_text(yaml.safe_dump({"data": {}, "model": {"scan_layers": began}}))
        assert scanned([gpu], resume=True) is began
        assert scanned(jax.devices()[:1], resume=True) is began


@pytest.mark.slow
def test_resume_after_crash_is_bit_exact(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    raw = copied(whole, tmp_path)

    def die() -> None:
        raise KeyboardInterrupt  # Nothing catches it.

    with pytest.raises(KeyboardInterrupt):
        run(raw, callbacks=[After(5, die)])
    assert measured(raw)[-1]["step"] == 5
    run(raw, resume=True)
    assert_same(raw, whole)


@pytest.mark.slow
def test_resume_on_another_mesh_is_close(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    raw = copied(whole, tmp_path)
    with pytest.raises(TrainingInterrupted):
        run(raw, callbacks=[After(3, stop)])
    run({**raw, "mesh": {"fsdp": 2, "tensor": 2}}, resume=True, devices=4)
    for one, two in zip(measured(raw), measured(whole), strict=True):
        # Sums in another order, in float32.
        np.testing.assert_allclose(one["train/loss"], two["train/loss"], rtol=2e-5)
    one, two = (
        safetensors.numpy.load_file(output(r) / "adapter.safetensors") for r in (raw, whole)
    )
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=2e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["optimizer"].update(learning_rate=2e-2), "learning_rate.* 0.01.* 0.02"),
        (lambda raw: raw["adapter"].update(alpha=8.0), "recipe .adapter"),
        (
            lambda raw: raw["training"].update(epochs=4),
            "schedule .epochs: 3 in the checkpoint, 4 now",
        ),
        (lambda raw: raw["batch"].update(gradient_accumulation_steps=1), "differs in data"),
        (lambda raw: raw["model"].update(compute_dtype="bfloat16"), "dtypes .compute_dtype"),
        (
            lambda raw: raw["data"].update(validation=raw["data"]["train"]),
            "differs in evaluation .data: None in the checkpoint",
        ),
        (lambda raw: raw["data"]["train"][0].update(max_examples=19), "differs in data"),
        (
            lambda raw: raw["adapter"].update(rank=3),
            r"differs in recipe \(adapter.rank: 2 in the checkpoint, 3 now\). Restore",
        ),
        (
            lambda raw: raw["adapter"].update(target_pattern="/q/kernel"),
            r"recipe \(adapter.target_pattern: None in the checkpoint, /q/kernel now\)",
        ),
    ],
)
@pytest.mark.thin(9)
def test_resume_changed_recipe_raises(
    whole: dict[str, Any], tmp_path: pathlib.Path, change: Any, message: str
) -> None:
    raw = json.loads(json.dumps(whole))
    change(raw)
    shutil.copytree(output(whole), tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        run({**raw, "output": str(tmp_path / "run")}, resume=True)


def test_resume_other_layer_layout_raises(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    shutil.copytree(output(whole), tmp_path / "run")
    raw = {**whole, "model": {**whole["model"], "scan_layers": False}}
    message = "with model.scan_layers=true, and .* false.* Resume with model.scan_layers=true"
    with pytest.raises(ValueError, match=message):
        run({**raw, "output": str(tmp_path / "run")}, resume=True, allow_changes=True)


@pytest.mark.slow
def test_resume_allow_changes(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    raw = json.loads(json.dumps(whole))
    shutil.copytree(output(whole), tmp_path / "run")
    raw["training"]["epochs"] = 4
    raw["output"] = str(tmp_path / "run")
    last = measured(whole)[-1]["step"]
    outcome = run(raw, resume=True, allow_changes=True)
    assert outcome.step > last
    assert measured(raw)[: len(measured(whole))] == measured(whole)


@pytest.mark.slow
def test_resume_other_base_raises(
    whole: dict[str, Any], base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = safetensors.numpy.load_file(other / "model.safetensors")
    key = "model.layers.0.mlp.up_proj.weight"
    tensors[key] = tensors[key] * 1.5
    safetensors.numpy.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    shutil.copytree(output(whole), tmp_path / "run")
    raw = {**whole, "output": str(tmp_path / "run"), "model": {"path": str(other)}}
    raw["model"]["dtype"] = "float32"
    with pytest.raises(ValueError, match=f"the weight '{key}' has other val"):
        run(raw, resume=True)


def double_head(folder: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    name = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    tensors[name] = 2 * tensors[name]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change_epsilon(folder: pathlib.Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (double_head, "the weight '(lm_head|model.embed_tokens).weight' has other values"),
        (change_epsilon, "config .rms_norm_eps: .* in the checkpoint, 0.001 now"),
    ],
)
def test_resume_base_beside_the_adapter_raises(
    recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path, change: Any, message: str
) -> None:
    # Neither the head nor config.json is adapted.
    folder = shutil.copytree(base, tmp_path / "other")
    raw = recipe_of(model={"path": str(folder)}, training={"steps": 2})
    run(raw, pause_after_step=1)
    change(folder)
    with pytest.raises(ValueError, match=message):
        run(raw, resume=True)


@pytest.mark.slow
def test_train_exports_only_its_own_base(
    recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "other")
    raw = recipe_of(
        model={"path": str(folder)}, training={"steps": 2}, export={"merged": True, "peft": True}
    )
    with pytest.raises(ValueError, match=r"changed during the run .the weight .* is written"):
        run(raw, callbacks=[After(1, lambda: double_head(folder))])
    assert (output(raw) / "adapter.safetensors").exists()
    assert not (output(raw) / "merged").exists()
    assert not (output(raw) / "peft").exists()


@pytest.mark.slow
def test_resume_other_versions_warns(whole: dict[str, Any], tmp_path: pathlib.Path) -> None:
    raw = copied(whole, tmp_path)
    with pytest.raises(TrainingInterrupted):
        run(raw, callbacks=[After(2, stop)])
    step = measured(raw)[-1]["step"]
    path = output(raw) / f"checkpoints/{step}/run_metadata/metadata"
    facts = json.loads(path.read_text())
    facts["versions"]["jax"] = "0.1.0"
    del facts["checksum"]
    facts["checksum"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match="written with .*'jax': '0.1.0'.* and this is"):
        run(raw, resume=True)
    assert measured(raw) == measured(whole)


# --- meshes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{"data": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}],
    ids=["data", "fsdp-tensor", "all"],
)
def test_train_on_a_mesh_keeps_losses(
    recipe_of: Make, tmp_path: pathlib.Path, mesh: dict[str, int]
) -> None:
    found = []
    for number, (devices, sizes) in enumerate(((1, {}), (8, mesh))):
        raw = recipe_of(output=str(tmp_path / f"run-{number}"), batch={"size": 8}, mesh=sizes)
        run(raw, devices=devices)
        found.append([line["train/loss"] for line in measured(raw)])
    # Sums in another order, in float32, over six steps that each build on the last.
    np.testing.assert_allclose(*found, rtol=2e-5)


def test_build_setup_shards_the_state(recipe_of: Make) -> None:
    raw = recipe_of(batch={"size": 8}, mesh={"fsdp": 4, "tensor": 2})
    made = recipe.validate(raw)
    state = build_setup(
        made, make_mesh({"fsdp": 4, "tensor": 2}), total_steps=3, abstract=True
    ).state
    flat = jax.tree_util.tree_leaves_with_path(state.trainable)
    split = {jax.tree_util.keystr(path): array.sharding.spec for path, array in flat}
    assert any(any(spec) for spec in split.values())
    followed = 0
    for path, moment in jax.tree_util.tree_leaves_with_path(state.opt_state):
        of = [spec for name, spec in split.items() if jax.tree_util.keystr(path).endswith(name)]
        assert [moment.sharding.spec] == of or not moment.ndim
        followed += len(of)
    assert followed == 2 * len(split)  # Both of Adam's moments.


# --- errors ------------------------------------------------------------------------------


def broken_base(base: pathlib.Path, folder: pathlib.Path, token: int) -> pathlib.Path:
    """A base whose output is NaN wherever a token occurs."""
    shutil.copytree(base, folder)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    key = "model.embed_tokens.weight"
    tensors[key] = tensors[key].copy()
    tensors[key][token] = np.nan
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_train_nonfinite_loss_names_examples(
    recipe_of: Make, chats: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    rows[13]["messages"][0]["content"] = "quick zoo?"  # The only z.
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe_of(data={"train": [{"path": str(data), "format": "chat"}], "packing": False})
    raw["training"] = {"epochs": 2, "save_steps": 1, "save_interval_minutes": None}
    raw["model"]["path"] = str(broken_base(pathlib.Path(raw["model"]["path"]), tmp_path / "b", 31))
    with pytest.raises(NonFiniteError, match=r"loss=nan.* 0:13.*It changed nothing.*step \d+ in"):
        run(raw)
    found = measured(raw)
    assert np.isnan(found[-1]["train/loss"])

    # With skipping, the run ends and its adapter is finite.
    raw |= {"output": str(tmp_path / "skipping")}
    raw["training"] = {"epochs": 2, "on_nonfinite_loss": "skip", "max_consecutive_skips": 1}
    with pytest.warns(UserWarning, match=r"was skipped: loss=nan, .* 0:13"):
        run(raw)
    losses = [line["train/loss"] for line in measured(raw)]
    assert np.isnan(losses).sum() == 2
    assert json.loads((output(raw) / "result.json").read_text())["skipped_steps"] == 2
    adapter = safetensors.numpy.load_file(output(raw) / "adapter.safetensors")
    assert all(np.isfinite(array).all() for array in adapter.values())

    # Again and again, it stops.
    raw |= {"output": str(tmp_path / "again")}
    raw["data"]["train"][0]["max_examples"] = 14
    raw["data"]["train"][0]["path"] = str(tmp_path / "all.jsonl")
    (tmp_path / "all.jsonl").write_text((json.dumps(rows[13]) + "\n") * 14)
    with (
        pytest.raises(NonFiniteError, match="Step 2, the last of 2 in a row"),
        pytest.warns(UserWarning, match="Step 1 was skipped"),
    ):
        run(raw)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["raise", "warn"])
def test_train_save_error_raises_or_warns(recipe_of: Make, monkeypatch: Any, policy: str) -> None:
    raw = recipe_of(
        training={"save_steps": 2, "save_interval_minutes": None, "on_save_error": policy}
    )
    write = CheckpointManager._write_checkpoint

    def failing(self: CheckpointManager, step: int, *rest: Any) -> None:
        if step == 4:
            raise OSError(28, "No space left on device")
        write(self, step, *rest)

    monkeypatch.setattr(CheckpointManager, "_write_checkpoint", failing)
    if policy == "raise":
        with pytest.raises(OSError, match="could not be written .*No space left.*Earlier ones are"):
            run(raw)
        assert not (output(raw) / "adapter.safetensors").exists()
    else:
        with pytest.warns(UserWarning, match="could not be written .*No space left"):
            run(raw)
        assert (output(raw) / "adapter.safetensors").exists()
    found = CheckpointManager(output(raw) / "checkpoints", save_total_limit=2).all_steps()
    assert found == ([2] if policy == "raise" else [2, 6])


@pytest.mark.slow
def test_train_keeps_the_base(recipe_of: Make, monkeypatch: Any) -> None:
    train = importlib.import_module("jlora.training.train")

    kept: list[Any] = []
    set_up = train.build_setup
    monkeypatch.setattr(
        train, "build_setup", lambda *a, **k: kept.append(set_up(*a, **k)) or kept[-1]
    )
    raw = recipe_of()
    run(raw)
    _, params = models.load(raw["model"]["path"], dtype="float32", scan_layers=True)
    jax.tree.map(np.testing.assert_array_equal, kept[0].frozen["base"], params)
    # The optimizer state has the size of the adapter.
    held = sum(array.size for array in jax.tree.leaves(kept[0].state.opt_state))
    assert held <= 2 * sum(array.size for array in jax.tree.leaves(kept[0].state.trainable)) + 10


def test_train_out_of_memory_lists_sizes(recipe_of: Make, monkeypatch: Any) -> None:
    train = importlib.import_module("jlora.training.train")

    set_up = train.build_setup

    def full(*args: Any, **kwargs: Any) -> Any:
        def step(*_: Any) -> Any:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

        return set_up(*args, **kwargs)._replace(train_step=step)

    monkeypatch.setattr(train, "build_setup", full)
    with pytest.raises(MemoryError, match=r"weights 0.00 GiB, .*batch of 2 .*Reduce batch"):
        run(recipe_of())


@pytest.mark.slow
def test_train_early_stopping_ends(recipe_of: Make, chats: pathlib.Path) -> None:
    raw = recipe_of(
        data={"validation": [{"path": str(chats), "format": "chat", "max_examples": 5}]},
        optimizer={"learning_rate": 10.0, "schedule": "constant", "max_grad_norm": None},
        training={
            "steps": 40,
            "eval_steps": 1,
            "early_stopping_patience": 2,
            "save_total_limit": 1,
        },
    )
    outcome = run(raw)
    assert outcome.stop_reason == "early_stopping"
    assert outcome.step == outcome.best_step + 2 < 40
    steps = sorted(int(f.name) for f in (output(raw) / "checkpoints").iterdir())
    assert steps == [outcome.best_step, outcome.step]


# --- other tasks ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_classification_learns(
    recipe_of: Make, encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "labels.jsonl"
    rows = [
        {"text": f"{animal} {verb}", "label": verb}
        for verb in ("sees", "eats")
        for animal in ANIMALS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"path": str(path), "format": "classification"}
    raw = recipe_of(
        model={"path": str(encoder)},
        data={"train": [source], "validation": [source], "max_seq_length": 16},
        training={"epochs": 6, "steps": None, "metric": "accuracy"},
        export={"merged": True},
    )
    run(raw)
    best = max(line["eval/accuracy"] for line in measured(raw) if "eval/loss" in line)
    assert best > 0.9
    head = safetensors.safe_open(output(raw) / "head.safetensors", framework="numpy")
    assert json.loads(head.metadata()["labels"]) == ["eats", "sees"]
    assert head.metadata()["pooling"] == "mean"
    models.load(output(raw) / "merged")


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming_uniform", "pissa"])
def test_train_dpo_learns(recipe_of: Make, tmp_path: pathlib.Path, init: str) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"the {animal} is", "chosen": " good.", "rejected": " bad!"}
        for animal in ANIMALS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe_of(
        adapter={"init": init, "dropout": 0.0},
        data={"train": [{"path": str(path), "format": "preference"}], "max_seq_length": 32},
        training={"epochs": 4, "steps": None},
        dpo={"beta": 0.5},
    )
    run(raw)
    lines = measured(raw)
    np.testing.assert_allclose(lines[0]["train/loss"], np.log(2), rtol=1e-5)
    assert lines[-1]["train/loss"] < 0.5
    assert lines[-1]["train/accuracy"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "milora"])
def test_train_samples_before_are_the_bases(
    recipe_of: Make, init: str, monkeypatch: Any, tmp_path: pathlib.Path
) -> None:
    # A learning rate of nearly zero: before, after and a run with an update of zero agree.
    written: list[Any] = []
    monkeypatch.setattr(
        "jlora.training.report.write_report", lambda *_, **options: written.append(options)
    )
    for name in ("kaiming_uniform", init):
        raw = recipe_of(
            output=str(tmp_path / name),
            adapter={"init": name, "rank": 4, "dropout": 0.0},
            optimizer={"learning_rate": 1e-12},
            training={"steps": 2},
            report={"sample_prompts": ["who is it?"], "max_new_tokens": 12},
        )
        run(raw)
    texts = {text for made in written for text in made["samples"][0][1:]}
    assert len(texts) == 1


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_train_residual_init_keeps_the_base(
    recipe_of: Make, base: pathlib.Path, init: str, monkeypatch: Any
) -> None:
    written: dict[str, Any] = {}
    monkeypatch.setattr(
        "jlora.training.report.write_report", lambda *_, **options: written.update(options)
    )
    raw = recipe_of(
        adapter={"init": init, "rank": 2, "dropout": 0.0},
        export={"merged": True, "merged_dtype": "float32"},
    )
    run(raw)
    model, params = models.load(base, dtype="float32", scan_layers=True)
    adapter = jlora.load_adapter(output(raw) / "adapter.safetensors", params)
    leaf = adapter["params/layers/mlp/up/kernel"]
    assert leaf.rank == 4
    _, merged = models.load(output(raw) / "merged", dtype="float32", scan_layers=True)
    tokens = jnp.array([[3, 9, 17, 30]])
    adapted = jlora.lora_transform(model.apply).apply(params, adapter, tokens)
    np.testing.assert_allclose(model.apply(merged, tokens), adapted, atol=5e-5)
    # The report has the update norms of the checkpoint's own weights.
    path = ("params", "layers", "mlp", "up", "kernel")
    old, new = (functools.reduce(lambda node, key: node[key], path, p) for p in (params, merged))
    moved = np.linalg.norm(new - old, axis=(1, 2)) / np.linalg.norm(old, axis=(1, 2))
    np.testing.assert_allclose(written["update_norms"]["/".join(path)], moved, rtol=1e-3)


NAMES = {"0": "pos", "1": "neg", "2": "zed"}


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.slow
def test_train_keeps_the_heads_labels(
    recipe_of: Make, encoder: pathlib.Path, tmp_path: pathlib.Path, named: bool
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(DATA / "encoders" / "bert_sequence", folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(encoder / name, folder / name)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = NAMES if named else {number: f"LABEL_{number}" for number in NAMES}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (folder / "config.json").write_text(json.dumps(config))
    path = tmp_path / "labels.jsonl"
    rows = [{"text": a, "label": name} for a in ANIMALS[:4] for name in NAMES.values()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = recipe_of(
        model={"path": str(folder)},
        data={"train": [{"path": str(path), "format": "classification"}], "max_seq_length": 16},
        training={"steps": 1},
        export={"merged": True, "merged_dtype": "float32"},
    )
    run(raw)
    written = json.loads((output(raw) / "merged" / "config.json").read_text())["id2label"]
    assert written == (NAMES if named else {"0": "neg", "1": "pos", "2": "zed"})
    raw |= {"classification": {"labels": ["neg", "pos", "zed"]}, "output": str(tmp_path / "two")}
    if named:
        with pytest.raises(ValueError, match="the labels of the base's head"):
            run(raw)


@pytest.mark.slow
def test_train_labels_of_all_sources(
    recipe_of: Make, encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    sources = []
    for name, labels in (("one", ["b", "c"]), ("two", ["a"])):
        path = tmp_path / f"{name}.jsonl"
        rows = [{"text": a, "label": label} for a in ANIMALS[:3] for label in labels]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append({"path": str(path), "format": "classification"})
    raw = recipe_of(
        model={"path": str(encoder)},
        data={"train": sources, "max_seq_length": 16},
        training={"steps": 1},
    )
    run(raw)
    head = safetensors.safe_open(output(raw) / "head.safetensors", framework="numpy")
    assert json.loads(head.metadata()["labels"]) == ["a", "b", "c"]


@pytest.mark.slow
def test_train_bytes_are_equal_on_another_day(
    recipe_of: Make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    for number, day in enumerate(("2026-01-31", "2027-02-01")):

        class Day(datetime.date):
            @classmethod
            def today(cls) -> datetime.date:
                return cls.fromisoformat(day)  # noqa: B023 -- called in this iteration

        monkeypatch.setattr(datetime, "date", Day)
        raw = recipe_of(output=str(tmp_path / str(number)), training={"steps": 1})
        run(raw)
        files = [path for path in output(raw).glob("*") if path.name.startswith("adapter")]
        written.append({path.name: path.read_bytes() for path in files})
        assert day not in (output(raw) / "recipe.yaml").read_text()
    assert written[0] == written[1] != {}


@pytest.mark.slow
def test_train_removes_remains_of_a_killed_run(recipe_of: Make) -> None:
    raw = recipe_of(training={"steps": 1})
    folder = output(raw)
    for name in (".merged.partial", ".peft.replaced"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_bytes(b"half")
    for name in (".recipe.yaml.partial", ".metrics.jsonl.partial", ".jlora.lock", "recipe.yaml"):
        (folder / name).write_text("{hal")
    run(raw)
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert recipe.load(folder / "recipe.yaml")


@pytest.mark.slow
def test_train_outputs_follow_the_umask(recipe_of: Make) -> None:
    raw = recipe_of(training={"steps": 1}, export={"peft": True})
    previous = os.umask(0o027)
    try:
        run(raw)
    finally:
        os.umask(previous)
    paths = [path for path in output(raw).rglob("*") if "checkpoints" not in path.parts]
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_file()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in paths if path.is_dir()} == {0o750}
