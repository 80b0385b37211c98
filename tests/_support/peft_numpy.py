"""PEFT's reading of a folder in NumPy: the modules that it adapts, and their merged weights.

The rules are those of PEFT 0.21. Unlike PEFT, missing and unexpected tensors are errors.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

PREFIX = "base_model.model."


def factorization(size: int, factor: int) -> tuple[int, int]:
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    best = 1
    for divisor in range(2, size + 1):
        if size % divisor or best >= size // best:
            continue
        if divisor + size // divisor > best + size // best or divisor > bound:
            break
        best = divisor
    return tuple(sorted((best, size // best)))  # type: ignore[return-value]


def is_target(entries: Any, module: str) -> bool:
    if isinstance(entries, str):
        return re.fullmatch(entries, module) is not None
    return module in entries or any(module.endswith(f".{entry}") for entry in entries)


def of_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    keys = [key for key in pattern if re.match(rf"(.*\.)?({key})$", module)]
    return pattern[keys[0]] if keys else default


class PeftReading:
    """Merged weights of a folder.

    Attributes:
        merged: Weights by the names of the modules.
    """

    def __init__(self, folder: pathlib.Path, base: dict[str, np.ndarray], embeddings: set[str]):
        self.config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
        self.left = {k.removeprefix(PREFIX): v.astype(np.float64) for k, v in tensors.items()}
        self.base, self.embeddings = base, embeddings
        kind = self.config["peft_type"]
        feedforward = self.config.get("feedforward_modules") or []
        target = self.config["target_modules"]
        if not isinstance(feedforward, str) and not isinstance(target, str):
            assert set(feedforward) <= set(target)
        self.targets = [module for module in base if is_target(target, module)]
        self.merged = dict(base)
        for module in self.targets:
            self.merged[module] = getattr(self, kind.lower())(module, base[module])
        for name in ("vera_A", "vera_B", "vblora_vector_bank"):
            self.left.pop(f"base_model.{name}", None)
        assert not self.left, sorted(self.left)

    def take(self, module: str, suffix: str, *shape: int) -> np.ndarray:
        tensor = self.left.pop(f"{module}.{suffix}")
        assert tensor.shape == shape, (module, suffix, tensor.shape, shape)
        return tensor

    def of(self, name: str, module: str, pattern: str) -> Any:
        return of_pattern(self.config.get(pattern) or {}, module, self.config[name])

    def factors(self, module: str, w: np.ndarray, prefix: str, end: str, r: int) -> np.ndarray:
        """The product of two factors, in the layout of the weight."""
        if module in self.embeddings:
            a = self.take(module, f"{prefix}embedding_A", r, w.shape[0])
            b = self.take(module, f"{prefix}embedding_B", w.shape[1], r)
            return (b @ a).T
        a = self.take(module, f"{prefix}A{end}", r, *w.shape[1:])
        b = self.take(module, f"{prefix}B{end}", w.shape[0], r, *[1] * (w.ndim - 2))
        return np.tensordot(b.reshape(len(b), r), a, 1)

    def lora(self, module: str, w: np.ndarray) -> np.ndarray:
        r = self.of("r", module, "rank_pattern")
        alpha = self.of("lora_alpha", module, "alpha_pattern")
        scale = alpha / (math.sqrt(r) if self.config["use_rslora"] else r)
        value = w + scale * self.factors(module, w, "lora_", ".weight", r)
        if not self.config["use_dora"]:
            return value
        embedding = module in self.embeddings
        axes = (0,) if embedding else tuple(range(1, w.ndim))
        shape = w.shape[1:] if embedding else w.shape[:1]
        shape = shape if w.ndim == 2 else (1, *shape, *[1] * (w.ndim - 2))
        magnitude = self.take(module, "lora_magnitude_vector", *shape)
        norm = np.sqrt((value**2).sum(axes, keepdims=True))
        return magnitude.reshape(norm.shape) * value / norm

    def adalora(self, module: str, w: np.ndarray) -> np.ndarray:
        all_ranks, alpha = self.config["init_r"], self.config["lora_alpha"]
        kept = (self.config.get("rank_pattern") or {}).get(f"{module}.lora_E")
        r = all_ranks if kept is None else sum(kept)
        a = self.take(module, "lora_A", r, w.shape[1]) * self.take(module, "lora_E", r, 1)
        return w + alpha / (all_ranks + 1e-5) * self.take(module, "lora_B", w.shape[0], r) @ a

    def hira(self, module: str, w: np.ndarray) -> np.ndarray:
        return w * (1 + self.factors(module, w, "hira_", "", self.config["r"]))

    def loha(self, module: str, w: np.ndarray) -> np.ndarray:
        r = self.of("r", module, "rank_pattern")
        scale = self.of("alpha", module, "alpha_pattern") / r
        window = w.shape[2:]
        products = []
        for n in (1, 2):
            if self.config["use_effective_conv2d"] and math.prod(window) > 1:
                core = self.take(module, f"hada_t{n}", r, r, *window, *[1] * (2 - len(window)))
                a = self.take(module, f"hada_w{n}_a", r, w.shape[0])
                b = self.take(module, f"hada_w{n}_b", r, w.shape[1])
                products.append(np.einsum("ijkl,jc,io->ockl", core, b, a).reshape(w.shape))
            else:
                a = self.take(module, f"hada_w{n}_a", w.shape[0], r)
                b = self.take(module, f"hada_w{n}_b", r, math.prod(w.shape[1:]))
                products.append((a @ b).reshape(w.shape))
        return w + scale * products[0] * products[1]

    def lokr(self, module: str, w: np.ndarray) -> np.ndarray:
        r = self.of("r", module, "rank_pattern")
        scale = self.of("alpha", module, "alpha_pattern") / r
        (out, rest), (inp, channels) = (
            factorization(size, self.config["decompose_factor"]) for size in w.shape[:2]
        )
        window = w.shape[2:]
        if self.config["decompose_both"] and r < max(out, inp) / 2:
            w1 = self.take(module, "lokr_w1_a", out, r) @ self.take(module, "lokr_w1_b", r, inp)
        else:
            w1 = self.take(module, "lokr_w1", out, inp)
        if r >= max(rest, channels) / 2:
            w2 = self.take(module, "lokr_w2", rest, channels, *window)
        elif self.config["use_effective_conv2d"] and math.prod(window) > 1:
            core = self.take(module, "lokr_t2", r, r, *window, *[1] * (2 - len(window)))
            a, b = (
                self.take(module, "lokr_w2_a", r, rest),
                self.take(module, "lokr_w2_b", r, channels),
            )
            w2 = np.einsum("ijkl,jc,io->ockl", core, b, a)
        else:
            b = self.take(module, "lokr_w2_b", r, channels * math.prod(window))
            w2 = self.take(module, "lokr_w2_a", rest, r) @ b
        w2 = w2.reshape(rest, channels, math.prod(window))
        product = np.einsum("oi,rcw->oricw", w1, w2)
        return w + scale * product.reshape(w.shape)

    def ia3(self, module: str, w: np.ndarray) -> np.ndarray:
        entries = self.config["feedforward_modules"]
        if isinstance(entries, str):
            is_feedforward = re.fullmatch(entries, module) is not None
        else:
            is_feedforward = any(module.endswith(entry) for entry in entries)
        ends = [1] * (w.ndim - 2)
        if w.ndim == 2:
            shape = (1, w.shape[1]) if is_feedforward else (w.shape[0], 1)
            return w * self.take(module, "ia3_l", *shape)
        size = w.shape[1] if is_feedforward else w.shape[0]
        gains = self.take(module, "ia3_l", 1, size, *ends)
        return w * (gains if is_feedforward else gains.reshape(size, 1, *ends))

    def vera(self, module: str, w: np.ndarray) -> np.ndarray:
        r = self.config["r"]
        sizes = np.max([self.base[name].shape for name in self.targets], 0)
        a, b = self.left["base_model.vera_A"], self.left["base_model.vera_B"]
        assert (a.shape, b.shape) == ((r, sizes[1]), (sizes[0], r))
        d = self.take(module, "vera_lambda_d", r)
        gain = self.take(module, "vera_lambda_b", w.shape[0])
        return w + (gain[:, None] * b[: w.shape[0]]) @ (d[:, None] * a[:, : w.shape[1]])

    def vblora(self, module: str, w: np.ndarray) -> np.ndarray:
        c = self.config
        bank = self.left["base_model.vblora_vector_bank"]
        assert bank.shape == (c["num_vectors"], c["vector_length"])

        def compose(suffix: str, *shape: int) -> np.ndarray:
            logits = self.take(module, suffix, *shape, c["num_vectors"])
            chosen = np.argsort(-logits, -1)[..., : c["topk"]]
            weights = np.exp(np.take_along_axis(logits, chosen, -1))
            weights = weights / weights.sum(-1, keepdims=True)
            return (weights[..., None] * bank[chosen]).sum(-2)

        rows, columns = (size // c["vector_length"] for size in w.shape)
        a = compose("vblora_logits_A", c["r"], columns).reshape(c["r"], -1)
        b = compose("vblora_logits_B", rows, c["r"])  # (rows, r, length)
        return w + b.transpose(0, 2, 1).reshape(-1, c["r"]) @ a

    def fourierft(self, module: str, w: np.ndarray) -> np.ndarray:
        pattern = self.config.get("n_frequency_pattern") or {}
        keys = [key for key in pattern if re.match(rf".*\.{key}$", module)]
        n = pattern.get(keys[0] if keys else module, self.config["n_frequency"])
        values = self.take(module, "fourierft_spectrum", n)
        # torch.randperm with torch's generator, which is NumPy's.
        draws = np.random.RandomState(self.config["random_loc_seed"]).randint(
            0, 2**32, w.size, dtype=np.uint32
        )
        order = np.arange(w.size)
        for i in range(w.size - 1):
            j = i + int(draws[i]) % (w.size - i)
            order[[i, j]] = order[[j, i]]
        dense = np.zeros(w.shape)
        dense.reshape(-1)[order[:n]] = values
        return w + np.fft.ifft2(dense).real * self.config["scaling"]
