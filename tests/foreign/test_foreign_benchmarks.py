"""The benchmark script of Qwix, a dependency of google-tunix, with the tiny shape on the CPU."""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign_models import FOREIGN

pytestmark = [*FOREIGN, pytest.mark.filterwarnings("ignore:::qwix")]

pytest.importorskip("qwix")
from benchmarks.speed import _common  # noqa: E402
from benchmarks.speed.peers import qwix as peer_qwix  # noqa: E402

TINY = _common.SHAPES["tiny"]


def test_qwix_main_trains_and_writes_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    output = tmp_path / "row.json"
    words = ["--shape", "tiny", "--steps", "2", "--repeats", "2", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["qwix", *words])
    peer_qwix.main()
    row = json.loads(output.read_text())
    assert row["method"] == "qwix"
    assert row["trained"] == TINY.lora_size()
    assert row["details"]["adapter_dtype"] == "bfloat16"


def test_qwix_adapters_get_gradients() -> None:
    tokens = jax.random.randint(jax.random.key(0), (TINY.batch, TINY.length), 0, TINY.vocabulary)
    model = peer_qwix.adapted(TINY)
    trained, frozen = peer_qwix.parameters(model, tokens)
    step, init = peer_qwix.training_step(model)
    now, moments = trained, init(trained)
    for _ in range(2):  # `A` has no gradient before `B` has left zero.
        _, now, moments = jax.jit(step)(now, moments, frozen, tokens)
    for name, first in jax.device_get(moments[0].mu).items():
        assert np.any(np.asarray(first, jnp.float32)), name
