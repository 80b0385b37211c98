"""`jlora inspect --importance`, run as users run it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from _support.training_fixtures import Make

from jlora import cli, importance, models
from jlora.importance import from_recipe
from jlora.training import datasets, recipe
from jlora.training.setup import rules_from_recipe

OF_LAYERS = {f"attention/{n}/kernel" for n in "qkvo"} | {
    f"mlp/{n}/kernel" for n in ("gate", "up", "down")
}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return status, out, error


def written(raw: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_inspect_importance_of_checkpoint(
    capsys: pytest.CaptureFixture[str], base: pathlib.Path
) -> None:
    status, out, _ = run(capsys, "inspect", base, "--importance", "stable_rank")
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["weight", "shape", "stable_rank", "share"]
    assert lines[-1] == "15 weights."  # Seven in each of two layers, and the head.
    _, params = models.load(base)
    rows = {line.split()[0]: line.split()[2] for line in lines[2:-1]}
    kernel = np.float64(params["params"]["layers_1"]["mlp"]["up"]["kernel"])
    s = np.linalg.svd(kernel, compute_uv=False)
    assert rows["params/layers_1/mlp/up/kernel"] == f"{(s**2).sum() / s[0] ** 2:.4g}"


@pytest.mark.slow
def test_inspect_budget_prints_recipe_sections(
    capsys: pytest.CaptureFixture[str], recipe_of: Make, base: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    biases = {"family": "BitFit", "target_pattern": "norm"}
    raw = recipe_of(
        adapters=[biases],
        frozen_modules=["layers/mlp/gate"],
        batch={"size": 8, "gradient_accumulation_steps": 1},
    )
    path = written(raw, tmp_path)
    status, out, error = run(
        capsys, "inspect", path, "--importance", "fisher", "--batches", 1, "--budget", "900"
    )
    assert status == 0, error
    table, _, text = out.partition(
        "\n# Sections for the recipe, with at most 900 trainable parameters:\n"
    )
    assert table.splitlines()[-1] == "6 weights, measured on 8 examples."
    sections = yaml.safe_load(text)
    assert sections["adapters"][-1] == biases
    assert sections["frozen_modules"] == ["layers/mlp/gate"]
    rules = rules_from_recipe(recipe.validate({**raw, **sections}), models.model_from_config(base))
    start = "^params/layers/"
    found = {pattern: config for pattern, config in rules.items() if pattern.startswith(start)}
    assert {name.removeprefix(start).rstrip("$") for name in found} == OF_LAYERS - {
        "mlp/gate/kernel"
    }
    prices = {"q": 48, "k": 32, "v": 32, "o": 48, "up": 60, "down": 60}  # Two layers of (in + out).
    spent = sum(
        prices[pattern.split("/")[-2]] * config.rank
        for pattern, config in found.items()
        if config is not None
    )
    assert 900 - 60 < spent <= 900
    assert all(c is None or (c.alpha / c.rank == 2 and c.dropout == 0.1) for c in found.values())


@pytest.mark.slow
def test_recipe_importance_matches_mean_loss(recipe_of: Make, base: pathlib.Path) -> None:
    read_recipe = recipe.validate(recipe_of())
    found = from_recipe.measure_recipe_importance(
        read_recipe, importance.GradientNorm(), num_batches=1, devices=jax.devices()[:1]
    )
    model, params = models.load(base, dtype="float32", scan_layers=True)
    data = datasets.load_datasets(
        read_recipe, base, model.config.vocab_size, slice(0, 2), slice(0, 0)
    )
    _, batch = next(iter(data.train.batches()))
    tokens, targets, learn, segments, positions = (x[0] for x in batch.arrays)

    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        logits = model.apply(params, tokens, segments, positions).astype(jnp.float32)
        right = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(right * learn).sum() / learn.sum()

    layers = gradient(params)["params"]["layers"]
    for path, one in found.weights.items():
        _, _, part, name, _ = path.split("/")
        g = np.float64(layers[part][name]["kernel"])
        # Float32 through two layers, fused otherwise.
        np.testing.assert_allclose(one.scores, np.sqrt((g**2).sum((1, 2))), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gradient_norm", "sensitivity", "activation", "condition"])
def test_inspect_importance_every_method(
    capsys: pytest.CaptureFixture[str], recipe_of: Make, tmp_path: pathlib.Path, method: str
) -> None:
    path = written(recipe_of(batch={"size": 8}), tmp_path)
    status, out, error = run(
        capsys, "inspect", path, "--importance", method, "--budget=700", "--adapter.rank", "3"
    )
    assert status == 0, error
    assert all(name in out for name in OF_LAYERS)
    config = recipe.validate(
        {**recipe_of(), **yaml.safe_load(out.partition("#")[2].partition("\n")[2])}
    )
    assert config.adapter.to_config().alpha == pytest.approx(
        4 / 3 * config.adapter.to_config().rank
    )


@pytest.mark.slow
def test_inspect_importance_of_new_head(
    capsys: pytest.CaptureFixture[str], encoder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = tmp_path / "texts.jsonl"
    rows = [{"text": f"a {word}", "label": word[0]} for word in ("cat", "dog", "cow", "den")]
    data.write_text("\n".join(map(json.dumps, rows)))
    raw = {
        "output": str(tmp_path / "run"),
        "model": {"path": str(encoder), "dtype": "float32"},
        "data": {"train": [{"path": str(data), "format": "classification"}], "max_seq_length": 16},
        "batch": {"size": 8},
    }
    path = written(raw, tmp_path)
    status, _, error = run(capsys, "inspect", path, "--importance", "fisher")
    assert status == 1
    assert "a new one starts at zero" in error
    status, out, error = run(capsys, "inspect", path, "--importance", "activation")
    assert status == 0, error
    assert "measured on 1 batch" in out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("base", "--importance", "fischer"), "--importance fischer must be one of gradient_norm"),
        (("base", "--importance", "fisher"), "is measured on data"),
        (
            ("base", "--importance", "condition", "--budget", "9"),
            "--budget: 9 applies only to recipes",
        ),
        (("base", "--importance", "condition", "--adapter.rank", "9"), "applies only to recipes"),
        (("recipe", "--importance", "condition", "--batches", "9"), "uses only the weights"),
        (
            ("recipe", "--importance", "fisher", "--batches", "0"),
            "batches=0 must be a positive integer",
        ),
        (("recipe", "--importance", "fisher", "--quantize.scheme", "nf4"), "--quantize null"),
        (("base", "--budget", "9"), "--budget requires --importance"),
        (("base", "--budget", "0"), "--budget requires --importance"),
        (
            ("base", "--importance", "condition", "--budget", "0"),
            "--budget: 0 applies only to recipes",
        ),
        (("base", "--batches", "9"), "--batches requires --importance"),
        (("base", "--adapter.rank", "9"), "--adapter.rank 9 requires --importance"),
        (("nowhere.yaml", "--importance", "fisher"), "nowhere.yaml is not a file"),
    ],
)
def test_inspect_unused_options_raise(
    capsys: pytest.CaptureFixture[str],
    recipe_of: Make,
    base: pathlib.Path,
    tmp_path: pathlib.Path,
    arguments: tuple[str, ...],
    match: str,
) -> None:
    paths = {"base": base, "recipe": written(recipe_of(), tmp_path)}
    status, out, error = run(
        capsys, "inspect", paths.get(arguments[0], arguments[0]), *arguments[1:]
    )
    assert (status, out) == (1, "")
    assert match in error


def test_allocate_other_rule_options_raise(recipe_of: Make) -> None:
    alike = {"target_pattern": "mlp/.*kernel", "rank": 1, "alpha": 1.0}
    raw = {**recipe_of(), "adapter": {"rank": 2, "alpha": 4.0}, "adapters": [alike]}
    nothing = importance.Importance("by_hand", {})
    # Alike but for the rank, it comes to the allocation, which has nothing to go by.
    with pytest.raises(ValueError, match="scores every weight zero"):
        from_recipe.allocate_recipe_ranks(recipe.validate(raw), nothing, 100)
    for other in ({"family": "DoRA"}, {"dropout": 0.1}):
        read = recipe.validate({**raw, "adapters": [{**alike, **other}]})
        with pytest.raises(
            ValueError, match="adapters.0 must equal the main adapter except for rank and alpha"
        ):
            from_recipe.allocate_recipe_ranks(read, nothing, 100)


def test_allocate_family_without_rank_raises(recipe_of: Make) -> None:
    read = recipe.validate({**recipe_of(), "adapter": {"family": "IA3"}})
    with pytest.raises(TypeError, match=r"adapter.family=IA3 has no rank.*--adapter.family LoRA"):
        from_recipe.allocate_recipe_ranks(read, importance.Importance("by_hand", {}), 100)
