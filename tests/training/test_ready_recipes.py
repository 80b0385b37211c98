"""Every recipe of examples/recipes trains."""

from __future__ import annotations

import json
import pathlib

import jax
import pytest
from _support.training_fixtures import ANIMALS

from jlora.training import recipe
from jlora.training.train import train

RECIPES = pathlib.Path(__file__).parents[2] / "examples" / "recipes"
NAMES = sorted(path.name for path in RECIPES.glob("*.yaml"))
ROWS = {
    "chat": {
        "messages": [
            {"role": "user", "content": "who sees the cat?"},
            {"role": "assistant", "content": "a dog."},
        ]
    },
    "completion": {"prompt": "who?", "completion": " a dog."},
    "text": {"text": "the cat sees a dog."},
    "preference": {"prompt": "who?", "chosen": " a dog.", "rejected": " a cat."},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_example_recipe_trains(
    name: str, base: pathlib.Path, encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    given = recipe.load(RECIPES / name)
    changes = ["--output", str(tmp_path / "run"), "--training.steps", "2", "--batch.size", "2"]
    folder = encoder if given.task == "classification" else base
    length = 16 if folder is encoder else 64
    changes += ["--model.path", str(folder), "--model.dtype", "float32"]
    changes += ["--data.max_seq_length", str(length)]
    if given.data.buckets:
        changes += ["--data.buckets", f"[{length // 2}, {length}]"]
    # Large ranks exceed a tiny base, and narrow types round away the changes of two steps.
    if given.adapter.family != "FullDelta":
        changes += ["--adapter.rank", "2"]
    for number in range(len(given.adapters)):
        changes += [f"--adapters.{number}.rank", "2"]
    changes += ["--export.merged_dtype", "float32"]
    changes += ["--report.max_new_tokens", "2", "--training.save_interval_minutes", "null"]
    for part in ("train", "validation", "test"):
        for number, source in enumerate(getattr(given.data, part)):
            path = tmp_path / f"{part}-{number}.jsonl"
            rows = [ROWS[source.format]] * 6 if source.format in ROWS else labelled()
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changes += [f"--data.{part}.{number}.path", str(path)]
    truncation = "split" if given.data.truncation == "split" else "truncate"
    made = recipe.load(RECIPES / name, [*changes, "--data.truncation", truncation])
    result = train(made, quiet=True, devices=jax.devices()[:1])
    assert result.step == 2
    assert all(path.exists() for path in result.output_paths)


def labelled() -> list[dict[str, str]]:
    return [{"text": animal, "label": animal[0]} for animal in ANIMALS[:6]]
