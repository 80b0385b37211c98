"""The README is code that runs, and its numbers are those of committed results."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import tomllib

import jax
import jax.numpy as jnp
import pytest
import yaml

import jlora
from benchmarks.speed import _tables
from benchmarks.speed._common import SHAPES
from jlora.training import recipe

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_readme_code_blocks_run_in_order(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # What stands for a user's own checkpoint and adapter.
    shutil.copytree(ROOT / "tests/models/data/decoders/llama", "base")
    shutil.copytree(ROOT / "tests/peft/data/lora", "peft-adapter")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)
        if "print(lora.explain" in block:
            assert capsys.readouterr().out in README


# callbacks.md has tests of its own, with a stand-in for a package that it uses.
PAGES = sorted(
    path.name
    for path in (ROOT / "docs").glob("*.md")
    if "```python" in path.read_text() and path.name != "callbacks.md"
)


@pytest.mark.parametrize("page", PAGES)
def test_page_code_blocks_run_in_order(
    page: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text()
    namespace: dict[str, object] = {"__name__": page}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"{page} block {number}", "exec"), namespace)


def test_readme_recipe_is_valid() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    recipe.validate(yaml.safe_load(block))


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_quickstart_matches_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/quickstart.json").read_text())
    for figure in result["test_accuracy"].values():
        assert f"{figure:.3f}" in README, figure


def test_readme_runs_match_results() -> None:
    results = ROOT / "benchmarks/results"
    quickstart = json.loads((results / "quickstart_recipe.json").read_text())
    assert (
        f"| {quickstart['test']['after']['accuracy']:.3f} | {quickstart['trainable_params']:,} |"
        in README
    )
    assert f"took {quickstart['seconds']:.0f} s" in README
    both = json.loads((results / "docstrings.json").read_text())
    base, run = both["stdlib-base"], both["docstrings"]
    before, after = (run["test"][when]["loss"] for when in ("before", "after"))
    assert f"from {before:.2f} to {after:.2f} nats" in README
    assert f"{base['seconds'] / 60:.0f} and {run['seconds'] / 60:.0f} minutes" in README
    saving = json.loads((results / "resume.json").read_text())
    share = saving["lost_share_at_one_a_minute"]
    for figure in (
        f"{saving['gb']:.1f} GB",
        f"{1e3 * saving['waited_s']:.0f} ms, {share:.2%} of a minute",
        f"writes for {saving['written_s']:.1f} s",
    ):
        assert figure in README, figure
    stages = json.loads((results / "input_pipeline.json").read_text())["rows"]
    speed = {row["stage"]: row["tokens_per_s"] / 1e6 for row in stages}
    assert f"{speed['batches 8 x 1024']:.0f} million tokens/s" in README
    assert f"once at {speed['rows to a corpus']:.1f} million" in README


def test_readme_step_cost_matches_results() -> None:
    result = json.loads((ROOT / "benchmarks/results/step_cost_h100.json").read_text())
    for row in result["rows"]:
        assert f"{row['step_ms']:.1f}" in README, row
        assert f"{row['tokens_per_s']:,}" in README, row


def test_readme_h100_tables_match_results() -> None:
    tables = _tables.h100_tables()
    assert len(tables) == 4
    for lines in tables.values():
        assert "\n".join(lines) + "\n" in README
    unsloth = json.loads((ROOT / "benchmarks/results/unsloth_h100.json").read_text())
    speed = f"{unsloth['tokens_per_s']:,} tokens/s in {unsloth['step_ms']} ms"
    assert f"{speed}, with NF4 {unsloth['nf4']['tokens_per_s']:,}." in README


def test_readme_names_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(name for extra in extras.values() for name in extra)]
    for requirement in needed:
        name = re.match(r"[\w-]+(\[\w+\])?", requirement)
        assert name
        assert f"`{name[0]}`" in README, requirement


def test_readme_family_tables_match_results() -> None:
    for name in ("families_stack_h100.json", "families_h100.json"):
        for row in json.loads((ROOT / "benchmarks/results" / name).read_text())["rows"]:
            cells = (
                row["method"],
                f"{row['step_ms']:.1f}",
                f"{row['step_ms'] / row['lora_ms']:.2f}",
                f"{row['peak_mib'] / 1024:.1f}",
                f"{row['trained']:,}",
            )
            assert f"| {' | '.join(cells)} |" in README, row
    result = json.loads((ROOT / "benchmarks/results/family_accuracy.json").read_text())
    for row in result["rows"]:
        line = f"| {row['family']} | {row['test_accuracy']:.3f} | {row['adapter_parameters']:,} |"
        assert line in README, row


def test_readme_quantization_bits_match_library() -> None:
    rows = re.findall(
        r"^\| `(NF4|Int4|Int8|FP8)\(block_size=(\d+)\)` \| ([\d.]+) \|", README, re.MULTILINE
    )
    assert len(rows) == 4
    weight = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
    for name, block, bits in rows:
        scheme = getattr(jlora, name)(block_size=int(block))
        assert scheme == getattr(jlora, name)()
        found = jlora.quantize({"w": weight}, {"w": scheme})["w"].bits
        assert f"{found:.3f}".rstrip("0") == bits, name
    plain = jlora.NF4(double_quantization=False)
    assert jlora.quantize({"w": weight}, {"w": plain})["w"].bits == 4.5


def test_readme_multi_lora_matches_results() -> None:
    results = ROOT / "benchmarks/results/multi"
    names = {
        "decode_1024": "decode, 1,024 tokens before",
        "decode_4096": "decode, 4,096 tokens before",
        "prefill_512": "prefill, 512 tokens",
        "train_1b": "training",
    }
    for name, step in names.items():
        for row in json.loads((results / f"{name}.json").read_text())["rows"]:
            figures = f"{row['distinct']} | {row['step_ms']:.1f} | {row['ratio']:.2f}"
            assert f"| {step} | {row['method']} | {figures} |" in README, row
    shape = SHAPES["8b"]
    factors_gb = 64 * shape.lora_size() * 2 / 1e9
    assert f"reads {factors_gb:.1f} GB of factors" in README
    ratios: dict[int, list[float]] = {}
    for row in json.loads((results / "products.json").read_text())["rows"]:
        # What a way costs beside the base's own product.
        segments, looked_up = (
            row["us"][way] - row["us"]["base alone"] for way in ("segments", "looked up")
        )
        ratios.setdefault(row["tokens"], []).append(segments / looked_up)
    least, most, prompts = min(ratios[1]), max(ratios[1]), ratios[512][0]
    told = f"{least:.0f} to {most:.0f} times as long as that for single tokens and {prompts:.0f}"
    assert told in README


def test_readme_adapter_examples_match_results() -> None:
    results = ROOT / "benchmarks/results"
    halves = json.loads((results / "task_arithmetic.json").read_text())
    for name, row in halves["test_accuracy"].items():
        assert f"| {name} | {row['first half']:.3f} | {row['second half']:.3f} |" in README, name
    texts = halves["test_texts"]
    assert f"on {texts['first']} and {texts['second']} texts" in README
    learned = json.loads((results / "continual.json").read_text())
    for way, figures in learned["figures"].items():
        names = ("shared inputs", "loss added", "forgotten", "second task")
        cells = " | ".join(f"{figures[name]['mean']:.3f}" for name in names)
        assert f"| {way} | {cells} |" in README, way
    assert f"means of {len(learned['seeds'])} seeds" in README
    users = json.loads((results / "many_users.json").read_text())
    for name, row in users["test_accuracy"].items():
        figures = " | ".join(f"{row[which]:.3f}" for which in ("never", "among others", "alone"))
        assert f"| {name} | {figures} |" in README, name
    assert f"{users['requests']:,} requests in mixed batches" in README
    assert users["bank"]["compilations"] == 1
    fused = json.loads((results / "lorahub.json").read_text())
    for name, row in fused["test_accuracy"].items():
        figures = " | ".join(f"{row[which]:.3f}" for which in ("mean", "least", "most"))
        assert f"| {name} | {figures} |" in README, name
    assert f"{fused['examples']} labeled texts, drawn {fused['draws']} times" in README


def test_readme_rank_search_matches_results() -> None:
    results = ROOT / "benchmarks/results/rank_search"
    found = json.loads((results / "search.json").read_text())
    trials = len(found["trials"])
    assert f"{trials} trials took {found['seconds']:.0f} s on a CPU" in README
    table = (results / "table.md").read_text()
    for part in ("Rank", "Confirmation against the recipe as it was"):
        text = table.split(f"## {part}\n")[1].split("\n## ")[0]
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) >= 4
        assert "\n".join(rows) + "\n" in README
    means = {}
    for trial in found["trials"]:
        if trial["total_steps"] == 30 and "30" in trial["values"] and trial["seed"] < 2:
            key = tuple(trial["setting"].values())
            means.setdefault(key, []).append(trial["values"]["30"])
    for key, values in means.items():
        # What the table says is what the trials are.
        assert f"{sum(values) / len(values):.4f}" in table, key
    command = found["command"].split(" --timeout-minutes")[0]
    recipe_text = (ROOT / "examples/recipes/rank-search.yaml").read_text()
    assert command in " ".join(recipe_text.replace("\\\n#", " ").split())
