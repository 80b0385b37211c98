"""A training step of PEFT's LoRA on transformers' Llama: eager, compiled, or on 4-bit weights.

Needs torch, transformers 5, peft and, for `--method bitsandbytes`, bitsandbytes. On a CPU, in
seconds: `python -m benchmarks.h100.peer_peft --tiny`; on one GPU:
`python -m benchmarks.h100.peer_peft --shape 1b --method compile --output peft_compile_1b.json`.
"""

# None of these libraries is among what jlora's lint installs.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

from benchmarks.h100 import common

LIBRARIES = ("torch", "transformers", "peft")
METHODS = ("eager", "compile", "bitsandbytes")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama(shape: common.Shape) -> Any:
    """A decoder of transformers with random weights, made in bfloat16 on the device."""
    config = transformers.LlamaConfig(
        num_hidden_layers=shape.layers,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.length,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with DEVICE:
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )


def to_4bit(model: Any, names: tuple[str, ...]) -> Any:
    """The model with its layers of these names in NF4, their scales quantised too.

    What loading with a `BitsAndBytesConfig` makes of a checkpoint, without writing one.
    """
    import bitsandbytes

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names:
                setattr(parent, name, _linear_4bit(bitsandbytes.nn, layer))
    model.is_loaded_in_4bit = True  # By which PEFT chooses its layers.
    return model


def _linear_4bit(nn: Any, layer: torch.nn.Linear) -> Any:
    made = nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    made.weight = nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=made,
    )
    return made.to(DEVICE)  # Which quantises.


def adapted(model: Any, shape: common.Shape, dtype: torch.dtype) -> Any:
    """The model with PEFT's LoRA on its projections, its arrays in `dtype`."""
    config = peft.LoraConfig(
        r=common.RANK,
        lora_alpha=common.ALPHA,
        lora_dropout=0.0,
        target_modules=[f"{name}_proj" for name in shape.projections],
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trained(model):
        parameter.data = parameter.data.to(dtype)
    return model.train()


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that ask for a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_gib(model: Any) -> float:
    """What the frozen parameters take; of 4-bit ones, their codes without the scales."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(parameter.nbytes for parameter in frozen) / 2**30


def training_step(
    model: Any, tokens: torch.Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer
) -> Callable[[], torch.Tensor]:
    """A function that trains once and returns the loss before, without waiting for it."""
    # float32 adapters on a bfloat16 model: what the Trainer of transformers does with bf16=True.
    mixed = dtype != torch.bfloat16
    cast = torch.autocast(DEVICE.type, torch.bfloat16) if mixed else contextlib.nullcontext()

    def step() -> torch.Tensor:
        with cast:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def wait() -> None:
    """Returns when the device has nothing left to do."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """The most that torch allocated since it was asked to forget, or None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None


def measure(options: argparse.Namespace) -> common.Row:
    """The row of PEFT's step by the method asked for."""
    torch.manual_seed(0)
    shape, dtype = common.SHAPES[options.shape], DTYPES[options.adapter_dtype]
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=DEVICE)
    model = llama(shape)
    if options.method == "bitsandbytes":
        model = to_4bit(model, tuple(f"{name}_proj" for name in shape.projections))
    if options.gradient_checkpointing:
        # The reentrant kind gives no gradient where no input of a layer asks for one.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(model, shape, dtype)
    size = sum(parameter.numel() for parameter in trained(model))
    common.check_trained(size, shape)
    details = {"adapter_dtype": options.adapter_dtype, "base_gib": base_gib(model)}
    optimizer = torch.optim.Adam(trained(model), lr=common.LEARNING_RATE, fused=True)
    model = torch.compile(model) if options.method == "compile" else model
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timing = common.timed(
        training_step(model, tokens, dtype, optimizer),
        wait,
        steps=options.steps,
        repeats=options.repeats,
    )
    with_bits = ("bitsandbytes",) if options.method == "bitsandbytes" else ()
    return common.row(
        f"peft {options.method}" + ", checkpointing" * options.gradient_checkpointing,
        options,
        timing,
        script="benchmarks.h100.peer_peft",
        libraries=LIBRARIES + with_bits,
        peak_gib=peak_gib(),
        trained=size,
        details=details,
    )


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--method", choices=METHODS, default="eager")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument(
        "--adapter-dtype",
        choices=DTYPES,
        default="bfloat16",
        help="float32 is trained under autocast; bfloat16 is faster",
    )
    return parser.parse_args(words)


def main() -> None:
    """Measures and writes."""
    options = arguments()
    common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()
