"""Writes data/bitsandbytes.npz: a weight quantized by bitsandbytes 0.50.2, on a CPU.

Run with torch 2.13 and bitsandbytes 0.50.2: python tests/quantization/make_bitsandbytes_data.py
"""

import pathlib

import numpy as np
import torch
from bitsandbytes import functional

ROWS, COLUMNS, BLOCK = 128, 256, 64  # 512 blocks: two groups of 256 scales.


def main() -> None:
    rng = np.random.default_rng(0)
    # Rows of different sizes, so that the scales differ too.
    weight = rng.normal(size=(ROWS, COLUMNS)) * rng.gamma(2, 0.02, size=(ROWS, 1))
    # Rounded to bfloat16, which takes half the space in the file.
    weight = (weight.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    weight[3] = 0
    weight[10, 64:128] = 0
    found = {"weight": weight}
    for name, small in (("plain", False), ("double", True)):
        codes, state = functional.quantize_4bit(
            torch.tensor(weight), blocksize=BLOCK, quant_type="nf4", compress_statistics=small
        )
        found[f"{name}_codes"] = codes.numpy().reshape(ROWS, COLUMNS // 2)
        found[f"{name}_scales"] = state.absmax.numpy().reshape(ROWS, COLUMNS // BLOCK)
        if small:
            found["dense"] = functional.dequantize_4bit(codes, state).numpy()
    found["table"] = state.code.numpy()
    found["map"] = state.state2.code.numpy()
    found["largest"], found["mean"] = state.state2.absmax.numpy(), state.offset.numpy()
    folder = pathlib.Path(__file__).parent / "data"
    np.savez_compressed(folder / "bitsandbytes.npz", **found)


if __name__ == "__main__":
    main()
