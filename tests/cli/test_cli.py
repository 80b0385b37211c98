"""The command line, run as by a user."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import tokenizers
from _support import cases

import jlora
from jlora import cli, models, peft
from jlora.cli import export, train
from jlora.training import recipe

# The package has a function of this name.
main = importlib.import_module("jlora.cli.main")

HERE = pathlib.Path(__file__).parents[1]
BASE = HERE / "models" / "data" / "decoders" / "llama"
PEFT = HERE / "peft" / "data"
RECIPES = HERE.parent / "examples" / "recipes"
ADAPTER = "adapter_model.safetensors"
WORDS = {f"w{number}": number for number in range(44)}


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    return status, out, error


def with_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the base whose every token is a word."""
    shutil.copytree(BASE, folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    model, params = models.load(BASE)
    jlora.save_adapter(path, peft.load(PEFT / "lora", model, params).adapter, params)
    return path


def test_inspect_prints_contents(capsys: pytest.CaptureFixture[str], adapter: pathlib.Path) -> None:
    for path, parts in (
        (BASE, ["model", "LlamaForCausalLM", "3,180", "6,360", "BF16 (21 tensors)", "yes"]),
        (PEFT / "lora_patterns", ["PEFT adapter", "2 x 3, 3 x 2, 4 x 1", "516", "down_proj x 2"]),
        (PEFT / "lora_saved", ["modules_to_save=['lm_head', 'model.norm']"]),
        (adapter, ["jlora adapter", "lora x 14", "3 x 14", "layers_*/attention/q/kernel x 2"]),
    ):
        status, out, _ = run(capsys, "inspect", path)
        assert status == 0
        for part in parts:
            assert part in out, (path, part)


@pytest.mark.slow
def test_export_hf_computes_as_adapter(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ids = jnp.arange(3, 11)[None]
    model, params = models.load(BASE, dtype=jnp.float32)
    part = peft.load(PEFT / "lora", model, params).adapter
    want = jlora.lora_transform(model.apply).apply(params, part, ids)
    for number, given in enumerate((adapter, PEFT / "lora")):
        out = tmp_path / str(number)
        status, text, _ = run(capsys, "export", BASE, given, out, "--dtype", "float32")
        assert status == 0
        assert "layers_1/mlp/up/kernel" in text
        merged = models.load(out).params
        assert jax.tree.leaves(merged)[0].dtype == jnp.float32
        np.testing.assert_allclose(model.apply(merged, ids), want, atol=1e-5)  # Logits of 4.


@pytest.mark.slow
def test_export_stacked_adapter_every_format(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    ids = jnp.arange(3, 11)[None]
    model, params = models.load(BASE, dtype=jnp.float32, scan_layers=True)
    part = peft.load(PEFT / "lora", model, params).adapter
    want = jlora.lora_transform(model.apply).apply(params, part, ids)
    given = tmp_path / "stacked.safetensors"
    jlora.save_adapter(given, part, params)
    out, to_peft = tmp_path / "merged", tmp_path / "peft"
    assert run(capsys, "export", BASE, given, out, "--dtype", "float32")[0] == 0
    merged = models.load(out, scan_layers=True).params
    np.testing.assert_allclose(model.apply(merged, ids), want, atol=1e-5)  # Logits of 4.
    assert run(capsys, "export", "--format", "peft", BASE, given, to_peft)[0] == 0
    one, two = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (to_peft, PEFT / "lora")
    )
    for key in one.keys() | two.keys():
        np.testing.assert_array_equal(one[key], two[key])
    folder = with_tokenizer(tmp_path / "base")
    apart = tmp_path / "apart.safetensors"
    assert run(capsys, "export", "--format", "jlora", BASE, to_peft, apart)[0] == 0
    texts = [
        run(capsys, "generate", folder, "w5 w9", "--max-new-tokens", 6, "--adapter", adapter)
        for adapter in (given, apart)
    ]
    assert texts[0][0] == 0
    assert texts[0] == texts[1]


def test_export_peft_and_jlora_round_trip(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, back = tmp_path / "peft", tmp_path / "back.safetensors"
    assert (
        run(capsys, "export", "--format", "peft", BASE, adapter, out, "--task", "CAUSAL_LM")[0] == 0
    )
    assert run(capsys, "export", "--format", "jlora", BASE, out, back)[0] == 0
    one, two = (safetensors.numpy.load_file(path) for path in (adapter, back))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert run(capsys, "export", "--format", "vllm", BASE, adapter, tmp_path / "vllm")[0] == 0


def test_export_peft_writes_task_and_base_name(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    options = ("--task", "CAUSAL_LM", "--base-name", "owner/name")
    for name in ("peft", "vllm"):
        out = tmp_path / name
        status, text, error = run(capsys, "export", BASE, adapter, out, "--format", name, *options)
        assert (status, text) == (0, f"Wrote {out}.\n"), error
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == "owner/name"


def test_export_hf_shard_gb_splits_files(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "merged"
    status, _, error = run(capsys, "export", BASE, PEFT / "lora", out, "--shard-gb", 2e-6)
    assert status == 0, error
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    # One tensor may exceed the limit of 2,000 bytes; files with several do not.
    for file in files:
        tensors = safetensors.safe_open(file, "np")
        keys = tensors.keys()
        sizes = [2 * np.prod(tensors.get_slice(key).get_shape()) for key in keys]
        assert len(keys) == 1 or sum(sizes) <= 2000
    assert (out / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hf", "--task", "CAUSAL_LM"), "--task applies only to --format peft and vllm, got --fo"),
        (("peft", "--dtype", "float32"), "--dtype applies only to --format hf, got --format peft"),
        (("vllm", "--shard-gb", 1), "--shard-gb applies only to --format hf, got --format vllm. L"),
        (("jlora", "--base-name", "a"), "--base-name applies only to --format peft and vllm, got"),
    ],
)
def test_export_option_of_other_format_raises(
    arguments: tuple[Any, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
) -> None:
    out = tmp_path / "out"
    status, _, error = run(capsys, "export", BASE, PEFT / "lora", out, "--format", *arguments)
    assert status == 1
    assert message in error
    assert not out.exists()


def test_export_unknown_format_raises(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["export", str(BASE), str(PEFT / "lora"), "out", "--format", "gguf"])
    assert caught.value.code == 2
    assert "invalid choice: 'gguf' (choose from" in capsys.readouterr().err
    options = export.ExportOptions(
        base=str(BASE), adapter=PEFT / "lora", out=pathlib.Path("out"), format="gguf"
    )
    with pytest.raises(ValueError, match="format='gguf' must be one of hf, peft, vllm, jlora"):
        export.run_export(options)


def test_export_jlora_of_jlora_file_raises(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out.safetensors"
    status, _, error = run(capsys, "export", "--format", "jlora", BASE, adapter, out)
    assert (status, out.exists()) == (1, False)
    assert "must be a PEFT folder for --format jlora" in error


def test_main_version_prints_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"jlora {jlora.__version__}\n"


def test_init_prints_recipe_or_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "init") == (0, recipe.default_recipe_yaml() + "\n", "")
    status, out, _ = run(capsys, "init", "--schema")
    assert (status, json.loads(out)) == (0, recipe.json_schema())


@pytest.mark.slow
def test_generate_prints_continuation(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = with_tokenizer(tmp_path / "base")
    prompt, ids = "w5 w9 w17", np.array([[5, 9, 17]])
    model, params = models.load(folder)
    sampling = models.SamplingParams(eos_token_ids=(2,))
    want = models.generate(model, params, ids, max_new_tokens=6, sampling=sampling)
    few = ("--max-new-tokens", 6)
    status, out, _ = run(capsys, "generate", folder, prompt, *few)
    assert status == 0
    new = np.asarray(want.tokens[0, : int(want.lengths[0])])
    assert out.split() == prompt.split() + [f"w{number}" for number in new]
    adapted = run(capsys, "generate", folder, prompt, *few, "--adapter", adapter)
    assert adapted[0] == 0
    assert adapted[1] != out
    drawn = [
        run(capsys, "generate", folder, prompt, *few, "--temperature", 1.5, "--seed", seed)[1]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_export_hf_rounded_update_warns(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    model, params = models.load(BASE)
    part = peft.load(PEFT / "lora", model, params).adapter
    small = jax.tree.map(lambda x: x * 0.02, part)
    jlora.save_adapter(tmp_path / "small.safetensors", small, params)
    given = ("export", BASE, tmp_path / "small.safetensors", tmp_path / "out")
    status, _, error = run(capsys, *given)
    assert status == 0
    assert "warning: " in error
    assert "updates are lost by rounding" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nothing"), "is neither an adapter file"),
        (("inspect", "recipe.yaml"), "recipe.yaml is neither an adapter file nor a folder"),
        (("inspect", "recipe.yaml"), "It does not exist."),
        (("inspect", RECIPES / "chat.yaml"), "is a recipe. Add --importance"),
        (("generate", PEFT / "lora" / ADAPTER, "hi"), f"{ADAPTER} is a file, and may be an adap"),
        (("export", BASE / "config.json", PEFT / "lora", "out"), "config.json is a file. Give th"),
        (("merge", PEFT / "lora" / ADAPTER, "out", PEFT / "lora"), "Give the folder of the base"),
        (("generate", "nothing", "hi"), "nothing is not a folder. Pass the folder of a check"),
        (("train", BASE), "llama is a folder. Give a recipe, which is a YAML file."),
        (("plan", RECIPES), "recipes is a folder. Give a recipe, which is a YAML file."),
        (("rank-search", PEFT / "lora" / ADAPTER), "is not a recipe, which is a YAML file."),
        (("inspect", BASE / "config.json"), "is damaged"),
        (
            ("inspect", BASE / "model.safetensors"),
            "is not an adapter written by jlora.save_adapter",
        ),
        (("export", BASE, PEFT / "lora", BASE), "already exists and is not overwritten"),
        (
            ("export", PEFT / "lora", PEFT / "lora", "out"),
            "has neither model.safetensors",
        ),
        (("export", BASE, PEFT / "lora_fused", "out"), "which the model does not have"),
        (("export", "--format", "jlora", BASE, PEFT / "lora_saved", "out"), "Use --format hf"),
        (("export", "--format", "vllm", BASE, PEFT / "dora", "out"), "vLLM does not support DoRA"),
        (("generate", BASE, "text"), "tokenizer.json is missing"),
    ],
)
def test_main_error_prints_one_line(
    arguments: tuple[Any, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, error = run(capsys, *arguments)
    assert status == 1
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "recipe.yaml", "--adapter.rank", "3", "--output", "2024", "--resume"),
        ("train", "--adapter.rank", "3", "--resume", "--output=2024", "recipe.yaml"),
        ("train", "--adapter.rank", "3", "--res", "recipe.yaml", "--output", "2024"),
    ],
)
def test_train_overrides_in_any_position(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Any
) -> None:
    train = importlib.import_module("jlora.training.train")

    monkeypatch.chdir(tmp_path)
    pathlib.Path("recipe.yaml").write_text(
        "output: run\nmodel: {path: base}\ndata: {train: [{path: x.jsonl, format: chat}]}\n"
    )
    seen: list[Any] = []
    monkeypatch.setattr(train, "train", lambda *args, **options: seen.append((*args, options)))
    status, _, error = run(capsys, *arguments)
    assert status == 0, error
    ((given, options),) = seen
    assert (given.adapter.rank, given.output, options["resume"]) == (3, "2024", True)


def test_split_overrides_of_plan_in_any_order() -> None:
    arguments = ["--mesh.fsdp", "4", "--topology", "v5e:2x2", "recipe.yaml", "--seed=1"]
    own, overrides = main.split_overrides(train.PlanOptions, arguments)
    assert own == ["--topology", "v5e:2x2", "recipe.yaml"]
    assert overrides == ["--mesh.fsdp", "4", "--seed=1"]


def test_main_keyboard_interrupt_returns_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jlora.cli import checkpoint_contents

    def interrupted(path: pathlib.Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_contents, "inspect_path", interrupted)
    assert run(capsys, "inspect", "anything") == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_help_shows_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"example: jlora {command} " in out
    assert "None" not in main.COMMANDS[command][0].__doc__.splitlines()[0]


def saved(path: pathlib.Path, seed: int, **options: Any) -> pathlib.Path:
    """An adapter file for two kinds of weight, moved off zero."""
    model, params = models.load(BASE, **options)
    lora = jlora.lora_transform(model.apply, {"(q|down)/kernel": jlora.LoRA(rank=2, alpha=4)})
    fresh = lora.init(jax.random.key(0), params, jnp.arange(3, 11)[None])
    jlora.save_adapter(path, cases.moved(fresh, seed), params)
    return path


@pytest.mark.slow
def test_merge_writes_lineage_and_interference(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from jlora.checkpoints.adapter_file import read_lineage
    from jlora.checkpoints.lineage import ParentAdapter, content_hash

    one, out = saved(tmp_path / "one.safetensors", 1), tmp_path / "both.safetensors"
    picture = tmp_path / "map.png"
    weights = ("--weights", 1, -0.5, "--heat-map", picture)
    status, text, error = run(capsys, "merge", BASE, out, one, PEFT / "lora", *weights)
    assert status == 0, error
    assert "params/layers_0/attention/q/kernel" in text
    assert "one / lora" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    model, params = models.load(BASE)
    parts = [jlora.load_adapter(one, params), peft.load(PEFT / "lora", model, params).adapter]
    changes = [jlora.delta(params, part) for part in parts]
    got = jlora.delta(params, jlora.load_adapter(out, params))
    assert got.keys() == changes[0].keys() | changes[1].keys()
    for path, change in got.items():
        want = changes[0].get(path, 0) - 0.5 * changes[1].get(path, 0)
        np.testing.assert_allclose(change, want, rtol=1e-5, atol=1e-5)  # Sums of five products.
    lineage = read_lineage(out)
    assert lineage.method == "jlora merge: Linear()"
    assert lineage.parents == (
        ParentAdapter(str(one), content_hash(parts[0]), 1.0),
        ParentAdapter(str(PEFT / "lora"), content_hash(parts[1]), -0.5),
    )
    told = run(capsys, "inspect", out)[1]
    assert f"1 x {one} ({content_hash(parts[0])[:12]})" in told
    assert "jlora merge: Linear()" in told


@pytest.mark.slow
def test_merge_method_options_match_library(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    from jlora import merging
    from jlora.checkpoints.adapter_file import read_lineage

    files = [saved(tmp_path / f"{seed}.safetensors", seed) for seed in (1, 2)]
    _, params = models.load(BASE)
    parts = [jlora.load_adapter(file, params) for file in files]
    for number, (arguments, method, options, told) in enumerate(
        [
            (("ties", "--density", 0.5, "--rank", 3), merging.TIES(0.5), {"rank": 3}, "rank=3"),
            (
                ("dare-ties", "--density", 0.5, "--seed", 7, "--energy", 0.9),
                merging.DARE(0.5, elect_signs=True),
                {"energy": 0.9, "key": jax.random.key(7)},
                "energy=0.9, seed=7",
            ),
        ]
    ):
        out = tmp_path / f"out-{number}.safetensors"
        status, _, error = run(capsys, "merge", BASE, out, *files, "--method", *arguments)
        assert status == 0, error
        want = merging.combine_adapters(parts, method=method, **options).adapter
        got = jlora.load_adapter(out, params)
        for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(one, two)
        assert read_lineage(out).method == f"jlora merge: {method}, {told}"


@pytest.mark.slow
def test_merge_different_layouts_is_same(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    from jlora import merging

    stacked, out = (
        saved(tmp_path / "s.safetensors", 1, scan_layers=True),
        tmp_path / "out.safetensors",
    )
    status, _, error = run(capsys, "merge", BASE, out, adapter, stacked)
    assert status == 0, error
    _, params = models.load(BASE)
    parts = [jlora.load_adapter(file, params) for file in (adapter, stacked)]
    want = merging.combine_adapters(parts).adapter
    got = jlora.load_adapter(out, params)
    for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(one, two)
    status, text, error = run(
        capsys, "merge", BASE, tmp_path / "other.safetensors", PEFT / "lora", stacked
    )
    assert status == 0, error
    assert "params/layers_0/attention/q/kernel" in text


def test_merge_heat_map_without_matplotlib_raises(
    capsys: pytest.CaptureFixture[str],
    adapter: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pair = (adapter, PEFT / "lora", "--heat-map", tmp_path / "map.png")
    status, _, error = run(capsys, "merge", BASE, tmp_path / "out.safetensors", *pair)
    assert (status, list(tmp_path.iterdir())) == (1, [])
    assert "error: --heat-map requires matplotlib, which is not installed. Use pip install" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "slerp"), "--method slerp must be one of linear, magnitude, ties"),
        (("--method", "ties"), "--method ties requires --density. Give it"),
        (("--density", 0.2), "--method linear does not use --density. Leave it out"),
        (("--method", "ties", "--density", 0.2, "--epsilon", 0.1), "does not use --epsilon"),
        (("--method", "della", "--density", 0.5), "--method della requires --epsilon"),
        (("--seed", 3), "is not random. Leave --seed out"),
        (
            ("--weights", 1, 2, 3),
            "--weights must have one number for each of the 2 adapters, got 3",
        ),
        (("--rank", 2, "--energy", 0.5), "rank=2 and energy=0.5"),
        (("--heat-map", PEFT), "already exists and is not overwritten"),
        (("--heat-map", "nowhere/map.png"), "nowhere is not a folder. Create it to write map.png"),
        (("--rank", 0), "rank=0 must be a positive integer"),
        (("--method", "ties", "--density", 2), "TIES.density=2.0 must be a fraction"),
    ],
)
def test_merge_invalid_options_raise(
    arguments: tuple[Any, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    adapter: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    out = tmp_path / "out.safetensors"
    status, _, error = run(capsys, "merge", BASE, out, adapter, PEFT / "lora", *arguments)
    assert status == 1
    assert message in error
    assert not out.exists()


def test_merge_modules_to_save_raises(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out.safetensors"
    status, _, error = run(capsys, "merge", BASE, out, adapter, PEFT / "lora_saved")
    assert status == 1
    assert "also replaces weights of the base" in error


@pytest.mark.parametrize("command", ["inspect", "export"])
def test_main_run_folder_names_its_adapter(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"")
    arguments = {
        "inspect": ("inspect", tmp_path),
        "export": ("export", BASE, tmp_path, tmp_path / "out"),
    }[command]
    status, _, error = run(capsys, *arguments)
    assert status == 1
    assert str(tmp_path / "adapter.safetensors") in error
