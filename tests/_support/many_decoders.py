"""A decoder, three adapters of different ranks, and a bank that holds them."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import numpy as np

import jlora
from _support.cases import moved
from jlora import models, multi_lora

DECODER = pathlib.Path(__file__).parent.parent / "models/data/decoders/llama"
TARGETS = r"(attention|mlp)/.*kernel"


@dataclasses.dataclass(frozen=True)
class Setting:
    model: Any
    params: Any
    lora: jlora.LoraTransform
    adapters: dict[str, Any]

    @property
    def like(self) -> Any:
        """Adapter of the highest rank."""
        return self.adapters["c"]

    def bank(self, slots: int = 4, **options: Any) -> multi_lora.AdapterBank:
        """An empty bank."""
        return multi_lora.AdapterBank(self.lora, self.params, self.like, slots=slots, **options)

    def filled(self, slots: int = 4, **options: Any) -> multi_lora.AdapterBank:
        """A bank with all adapters."""
        bank = self.bank(slots, **options)
        for name, adapter in self.adapters.items():
            bank.add(name, adapter)
        return bank

    @functools.cached_property
    def shared(self) -> multi_lora.AdapterBank:
        """Bank with all adapters, compiled once for all tests, which must not change it."""
        return self.filled()

    @functools.cached_property
    def alone(self) -> Any:
        """Compiled forward function with one adapter for the batch."""
        return jax.jit(self.lora.apply)

    @functools.cached_property
    def bare(self) -> Any:
        """Compiled forward function of the base."""
        return jax.jit(self.model.apply)

    def tokens(self, rows: int, length: int, seed: int = 5) -> np.ndarray:
        """Random tokens."""
        random = np.random.default_rng(seed)
        return random.integers(0, self.model.config.vocab_size, (rows, length), np.int32)

    def expected(self, names: list[str | None], tokens: np.ndarray) -> np.ndarray:
        """Outputs of single calls, one per example with its adapter."""
        rows = [
            self.bare(self.params, row[None])
            if name is None
            else self.alone(self.params, self.adapters[name], row[None])
            for name, row in zip(names, tokens, strict=True)
        ]
        return np.concatenate([np.asarray(row) for row in rows])


@functools.cache
def setting(scanned: bool, dtype: str) -> Setting:
    model, params = models.load(DECODER, dtype=dtype, scan_layers=scanned)
    tokens = np.zeros((1, 2), np.int32)
    adapters = {}
    for number, name in enumerate("abc"):
        # Ranks, scales and targets differ, so that errors in padding or targets are found.
        targets = r"attention/(q|v)/kernel" if name == "b" else TARGETS
        config = jlora.LoRA(rank=number + 1, alpha=2.0 + number, use_rslora=number == 1)
        lora = jlora.lora_transform(model.apply, {targets: config})
        adapters[name] = moved(lora.init(jax.random.key(number), params, tokens), number)
    return Setting(model, params, jlora.lora_transform(model.apply), adapters)
