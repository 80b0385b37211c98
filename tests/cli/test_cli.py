"""The command line, run as users run it."""

from __future__ import annotations

import importlib
import pathlib
import shutil
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from _support import cases

import jlora
from jlora import cli, models, peft
from jlora.cli import train

# The package has a function of this name.
main = importlib.import_module("jlora.cli.main")

HERE = pathlib.Path(__file__).parents[1]
BASE = HERE / "models" / "data" / "decoders" / "llama"
PEFT = HERE / "peft" / "data"
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


def test_inspect_tells_what_is_there(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path
) -> None:
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


def test_merged_checkpoints_compute_what_the_adapter_does(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ids = jnp.arange(3, 11)[None]
    model, params = models.load(BASE, dtype=jnp.float32)
    part = peft.load(PEFT / "lora", model, params).adapter
    want = jlora.lora_transform(model.apply).apply(params, part, ids)
    for number, given in enumerate((adapter, PEFT / "lora")):
        out = tmp_path / str(number)
        status, text, _ = run(capsys, "export", "merged", BASE, given, out, "--dtype", "float32")
        assert status == 0
        assert "layers_1/mlp/up/kernel" in text
        merged = models.load(out).params
        assert jax.tree.leaves(merged)[0].dtype == jnp.float32
        np.testing.assert_allclose(model.apply(merged, ids), want, atol=1e-5)  # Logits of 4.


def test_adapters_of_stacked_layers_are_taken_as_they_are(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    ids = jnp.arange(3, 11)[None]
    model, params = models.load(BASE, dtype=jnp.float32, scanned=True)
    part = peft.load(PEFT / "lora", model, params).adapter
    want = jlora.lora_transform(model.apply).apply(params, part, ids)
    given = tmp_path / "stacked.safetensors"
    jlora.save_adapter(given, part, params)
    out, to_peft = tmp_path / "merged", tmp_path / "peft"
    assert run(capsys, "export", "merged", BASE, given, out, "--dtype", "float32")[0] == 0
    merged = models.load(out, scanned=True).params
    np.testing.assert_allclose(model.apply(merged, ids), want, atol=1e-5)  # Logits of 4.
    assert run(capsys, "export", "peft", BASE, given, to_peft)[0] == 0
    one, two = (
        safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        for folder in (to_peft, PEFT / "lora")
    )
    for key in one.keys() | two.keys():
        np.testing.assert_array_equal(one[key], two[key])
    folder = with_tokenizer(tmp_path / "base")
    apart = tmp_path / "apart.safetensors"
    assert run(capsys, "export", "adapter", BASE, to_peft, apart)[0] == 0
    texts = [
        run(capsys, "generate", folder, "w5 w9", "--max-new-tokens", 6, "--adapter", adapter)
        for adapter in (given, apart)
    ]
    assert texts[0][0] == 0
    assert texts[0] == texts[1]


def test_an_adapter_goes_to_peft_and_back(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out, back = tmp_path / "peft", tmp_path / "back.safetensors"
    assert run(capsys, "export", "peft", BASE, adapter, out, "--task", "CAUSAL_LM")[0] == 0
    assert run(capsys, "export", "adapter", BASE, out, back)[0] == 0
    one, two = (safetensors.numpy.load_file(path) for path in (adapter, back))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])
    assert run(capsys, "export", "peft", BASE, adapter, tmp_path / "vllm", "--vllm")[0] == 0


def test_generate_writes_text(
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


def test_small_changes_that_rounding_loses_are_warned_of(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    model, params = models.load(BASE)
    part = peft.load(PEFT / "lora", model, params).adapter
    small = jax.tree.map(lambda x: x * 0.02, part)
    jlora.save_adapter(tmp_path / "small.safetensors", small, params)
    given = ("export", "merged", BASE, tmp_path / "small.safetensors", tmp_path / "out")
    status, _, error = run(capsys, *given)
    assert status == 0
    assert "warning: " in error
    assert "changes are lost by rounding" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "nothing"), "is no adapter file"),
        (("inspect", BASE / "config.json"), "is damaged"),
        (("inspect", BASE / "model.safetensors"), "is no adapter that jlora.save_adapter wrote"),
        (("export", "merged", BASE, PEFT / "lora", BASE), "exists and is left as it was"),
        (
            ("export", "merged", PEFT / "lora", PEFT / "lora", "out"),
            "has neither model.safetensors",
        ),
        (("export", "merged", BASE, PEFT / "lora_fused", "out"), "the model has not"),
        (("export", "adapter", BASE, PEFT / "lora_saved", "out"), "Use jlora export hf"),
        (("export", "peft", BASE, PEFT / "dora", "out", "--vllm"), "does not take DoRA"),
        (("generate", BASE, "text"), "tokenizer.json is missing"),
    ],
)
def test_errors_are_told_without_a_trace(
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
        ("train", "recipe.yaml", "--lora.rank", "3", "--output", "2024", "--resume"),
        ("train", "--lora.rank", "3", "--resume", "--output=2024", "recipe.yaml"),
        ("train", "--lora.rank", "3", "--res", "recipe.yaml", "--output", "2024"),
    ],
)
def test_overrides_stand_before_the_recipe_or_after_it(
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
    assert (given.lora.rank, given.output, options["resume"]) == (3, "2024", True)


def test_plans_take_overrides_in_any_order() -> None:
    arguments = ["--mesh.fsdp", "4", "--topology", "v5e:2x2", "recipe.yaml", "--seed=1"]
    own, overrides = main.split_overrides(train.PlanOptions, arguments)
    assert own == ["--topology", "v5e:2x2", "recipe.yaml"]
    assert overrides == ["--mesh.fsdp", "4", "--seed=1"]


def test_control_c_is_told_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from jlora.cli import inspect

    def interrupted(path: pathlib.Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "inspect", interrupted)
    assert run(capsys, "inspect", "anything") == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("command", list(main.COMMANDS))
def test_every_command_shows_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    assert caught.value.code == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"example: jlora {' '.join(command)}" in out
    assert "None" not in main.COMMANDS[command][0].__doc__.splitlines()[0]


def saved(path: pathlib.Path, seed: int, **options: Any) -> pathlib.Path:
    """An adapter file for two kinds of weight, moved off zero."""
    model, params = models.load(BASE, **options)
    lora = jlora.lora_transform(model.apply, {"(q|down)/kernel": jlora.LoRA(rank=2, alpha=4)})
    fresh = lora.init(jax.random.key(0), params, jnp.arange(3, 11)[None])
    jlora.save_adapter(path, cases.moved(fresh, seed), params)
    return path


def test_adapters_are_merged_with_their_lineage_and_what_they_share(
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


def test_methods_and_ranks_are_asked_for_by_name(
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


def test_adapters_that_lie_otherwise_are_not_merged(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stacked, out = saved(tmp_path / "s.safetensors", 1, scanned=True), tmp_path / "out.safetensors"
    status, _, error = run(capsys, "merge", BASE, out, adapter, stacked)
    assert status == 1
    assert f"{stacked} is for layers in one stack, and {adapter} for layers apart" in error
    # A folder of PEFT's is read for either.
    status, text, error = run(capsys, "merge", BASE, out, PEFT / "lora", stacked)
    assert status == 0, error
    assert "params/layers/attention/q/kernel" in text


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
    adapter: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    pair = (adapter, PEFT / "lora", "--heat-map", tmp_path / "map.png")
    status, _, error = run(capsys, "merge", BASE, tmp_path / "out.safetensors", *pair)
    assert (status, list(tmp_path.iterdir())) == (1, [])
    assert "error: --heat-map draws with matplotlib, which is missing. Use pip install" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "slerp"), "--method slerp is none of linear, magnitude, ties"),
        (("--method", "ties"), "--method ties needs --density. Give it"),
        (("--density", 0.2), "--method linear has no use for --density. Leave it out"),
        (("--method", "ties", "--density", 0.2, "--epsilon", 0.1), "has no use for --epsilon"),
        (("--method", "della", "--density", 0.5), "--method della needs --epsilon"),
        (("--seed", 3), "draws nothing, so --seed does nothing"),
        (("--weights", 1, 2, 3), "--weights has 3 numbers for 2 adapters"),
        (("--rank", 2, "--energy", 0.5), "rank=2 and energy=0.5"),
        (("--heat-map", PEFT), "exists and is left as it was"),
        (("--heat-map", "nowhere/map.png"), "nowhere is no folder that map.png could be put in"),
        (("--rank", 0), "rank=0 must be a positive integer"),
        (("--method", "ties", "--density", 2), "TIES.density=2.0 is no share"),
    ],
)
def test_merges_that_cannot_be_are_refused(
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


def test_folders_that_replace_weights_are_not_merged(
    capsys: pytest.CaptureFixture[str], adapter: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    out = tmp_path / "out.safetensors"
    status, _, error = run(capsys, "merge", BASE, out, adapter, PEFT / "lora_saved")
    assert status == 1
    assert "also replaces weights of the base" in error
