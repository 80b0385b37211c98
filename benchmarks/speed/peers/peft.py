"""Training step of PEFT's LoRA on transformers' Llama: eager, compiled, or on 4-bit weights.

Requires torch, transformers 5, peft and, for `--method bitsandbytes`, bitsandbytes. On a CPU, in
seconds: `python -m benchmarks.speed.peers.peft --tiny`; on one GPU:
`python -m benchmarks.speed.peers.peft --shape 1b --method compile --output peft_compile_1b.json`.
"""

# The environment of jlora's lint has none of these libraries.
# pyright resolves the name peft to this file.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

from benchmarks.speed import _common

LIBRARIES = ("torch", "transformers", "peft")
METHODS = ("eager", "compile", "bitsandbytes")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def llama(shape: _common.Shape) -> Any:
    """Returns a decoder of transformers with random bfloat16 weights on the device."""
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
    """Returns the model with the named layers in NF4, with double quantization.

    Equals a checkpoint loaded with a `BitsAndBytesConfig`, without writing one.
    """
    import bitsandbytes

    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in names:
                setattr(parent, name, _linear_4bit(bitsandbytes.nn, layer))
    model.is_loaded_in_4bit = True  # PEFT selects its layers by it.
    return model


def _linear_4bit(nn: Any, layer: torch.nn.Linear) -> Any:
    linear = nn.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    linear.weight = nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=True,
        quant_type="nf4",
        module=linear,
    )
    return linear.to(DEVICE)  # Quantizes.


def adapted(model: Any, shape: _common.Shape, dtype: torch.dtype) -> Any:
    """Returns the model with PEFT's LoRA on its projections, its factors in `dtype`."""
    config = peft.LoraConfig(
        r=_common.RANK,
        lora_alpha=_common.ALPHA,
        lora_dropout=0.0,
        target_modules=[f"{name}_proj" for name in shape.projections],
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in trainable_parameters(model):
        parameter.data = parameter.data.to(dtype)
    return model.train()


def trainable_parameters(model: Any) -> list[torch.nn.Parameter]:
    """Returns the trainable parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def base_gib(model: Any) -> float:
    """Returns the memory of the frozen parameters; for 4-bit ones, codes without scales."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return sum(parameter.nbytes for parameter in frozen) / 2**30


def training_step(
    model: Any, tokens: torch.Tensor, dtype: torch.dtype, optimizer: torch.optim.Optimizer
) -> Callable[[], torch.Tensor]:
    """Returns a function that runs one step and returns the loss before it, without a wait."""
    # float32 adapters on a bfloat16 model, as in the Trainer of transformers with bf16=True.
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
    """Blocks until the device is idle."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_gib() -> float | None:
    """Returns torch's peak of allocated memory since the last reset, or None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None


def measure(options: argparse.Namespace) -> _common.Row:
    """Returns the row of PEFT's step by the requested method."""
    torch.manual_seed(0)
    shape, dtype = _common.SHAPES[options.shape], DTYPES[options.adapter_dtype]
    tokens = torch.randint(shape.vocabulary, (shape.batch, shape.length), device=DEVICE)
    model = llama(shape)
    if options.method == "bitsandbytes":
        model = to_4bit(model, tuple(f"{name}_proj" for name in shape.projections))
    if options.gradient_checkpointing:
        # The reentrant variant has no gradient if no input of a layer requires one.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = adapted(model, shape, dtype)
    size = sum(parameter.numel() for parameter in trainable_parameters(model))
    _common.check_trainable_size(size, shape)
    details = {"adapter_dtype": options.adapter_dtype, "base_gib": base_gib(model)}
    optimizer = torch.optim.Adam(trainable_parameters(model), lr=_common.LEARNING_RATE, fused=True)
    model = torch.compile(model) if options.method == "compile" else model
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    timing = _common.time_steps(
        training_step(model, tokens, dtype, optimizer),
        wait,
        steps=options.steps,
        repeats=options.repeats,
    )
    with_bits = ("bitsandbytes",) if options.method == "bitsandbytes" else ()
    return _common.make_row(
        f"peft {options.method}" + ", checkpointing" * options.gradient_checkpointing,
        options,
        timing,
        script="benchmarks.speed.peers.peft",
        libraries=LIBRARIES + with_bits,
        peak_gib=peak_gib(),
        trained=size,
        details=details,
    )


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = _common.build_parser(__doc__)
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
    options = parse_arguments()
    _common.finish(measure(options), options.output)


if __name__ == "__main__":
    main()
