"""Writes data/: one small adapter per file, with the outputs that PEFT computes from it.

Run it once where torch and peft are installed; the tests need neither:

    python tests/parity/make_peft_data.py

A file holds float32 tensors in torch's layout, and integers for ids and positions:

    base/weight, base/bias        the layer without its adapter
    adapter/<key>                 the adapter, under the names that PEFT saves
    input, output                 of the model with the adapter
    merged/weight, merged/bias    after merge_and_unload
    indices                       the positions (row, column) of FourierFT's coefficients
    residual/weight, gradient     the weight after an initialization, and the gradient it used

A model of two layers, the second applied to the output of the first, has the layer's name in
between: base/first/weight, adapter/second/vera_lambda_b, and adapter/vera_A for shared arrays.
Every merged weight is computed here a second time, in NumPy, and the two must agree; so must the
outputs before and after merging.
"""

import dataclasses
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from peft.tuners.lora import preprocess_loraga
from safetensors.torch import save_file
from torch import nn

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-5  # Of weights and outputs below 20, in float32.
BASE_STD = 0.5
NOISE_STD = 0.3  # Enough to move every factor off its initial value, zero or not.

Tensors = dict[str, torch.Tensor]
Arrays = dict[str, np.ndarray]
Fields = dict[str, Any]
# The merged weight, from the base weight, the layer's adapter and the fields of the config.
Formula = Callable[[np.ndarray, Arrays, Fields], np.ndarray]
# The factors right after their initialization, up to the sign of each component.
Initial = Callable[[Arrays, Fields], Arrays]


class Errors(NamedTuple):
    """Errors of PEFT against the formula, and of its merged model against the unmerged one."""

    weight: float
    output: float


class Case(NamedTuple):
    """A model, the adapter that PEFT puts on it, and the formula of its merged weight."""

    model: nn.Sequential
    config: type[peft.PeftConfig]
    fields: Fields
    formula: Formula


# Models. Axes that could be confused have different sizes.


def one(layer: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("layer", layer)
    return model


def two(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("first", nn.Linear(inputs, hidden))
    model.add_module("second", nn.Linear(hidden, outputs))
    return model


def linear(bias: bool = True) -> nn.Sequential:
    return one(nn.Linear(6, 10, bias=bias))


def embedding() -> nn.Sequential:
    return one(nn.Embedding(11, 6))


def conv2d() -> nn.Sequential:
    return one(nn.Conv2d(5, 8, (3, 2)))


def kron_linear() -> nn.Sequential:
    return one(nn.Linear(12, 35))  # 12 = 3 * 4 and 35 = 5 * 7


def kron_conv2d() -> nn.Sequential:
    return one(nn.Conv2d(10, 28, (3, 2)))  # 10 = 2 * 5 and 28 = 4 * 7


def example_input(model: nn.Sequential) -> torch.Tensor:
    match model[0]:
        case nn.Linear(in_features=width):
            return torch.randn(9, width)
        case nn.Embedding(num_embeddings=vocabulary):
            return torch.randint(vocabulary, (4, 5), dtype=torch.int32)
        case nn.Conv2d(in_channels=channels):
            return torch.randn(7, channels, 6, 3)
        case layer:
            raise TypeError(f"no example input for {layer}")


# Formulas, in torch's layout: weights are (out, in), (out, in, kh, kw) or (vocabulary, dim).


def low_rank(adapter: Arrays, prefix: str = "lora") -> np.ndarray:
    """The product B A, laid out like the weight."""
    if f"{prefix}_embedding_A" in adapter:
        return (adapter[f"{prefix}_embedding_B"] @ adapter[f"{prefix}_embedding_A"]).T
    suffix = ".weight" if f"{prefix}_A.weight" in adapter else ""
    a = adapter[f"{prefix}_A{suffix}"]  # (r, in, *kernel)
    b = adapter[f"{prefix}_B{suffix}"]  # (out, r, 1, ...)
    return np.tensordot(b.reshape(b.shape[:2]), a, axes=1)


def lora(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    divisor = math.sqrt(fields["r"]) if fields.get("use_rslora") else fields["r"]
    return weight + fields["lora_alpha"] / divisor * low_rank(adapter)


def dora(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    direction = lora(weight, adapter, fields)
    # The output axis of an embedding is its last; of everything else, its first.
    summed = (0,) if "lora_embedding_A" in adapter else tuple(range(1, weight.ndim))
    norm = np.sqrt(np.sum(direction**2, axis=summed, keepdims=True))
    return adapter["lora_magnitude_vector"].reshape(norm.shape) * direction / norm


def vera(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    outputs, inputs = weight.shape
    b = adapter["vera_lambda_b"][:, None] * adapter["vera_B"][:outputs]
    a = adapter["vera_lambda_d"][:, None] * adapter["vera_A"][:, :inputs]
    return weight + b @ a


def adalora(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    product = adapter["lora_B"] @ (adapter["lora_E"] * adapter["lora_A"])
    return weight + fields["lora_alpha"] / (fields["init_r"] + 1e-5) * product


def loha(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    def factor(name: str) -> np.ndarray:
        a, b = adapter[f"hada_w{name}_a"], adapter[f"hada_w{name}_b"]
        if f"hada_t{name}" in adapter:
            return np.einsum("abkl,ao,bi->oikl", adapter[f"hada_t{name}"], a, b)
        return (a @ b).reshape(weight.shape)

    return weight + fields["alpha"] / fields["r"] * factor("1") * factor("2")


def lokr(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    def factor(name: str) -> np.ndarray:
        if f"lokr_{name}" in adapter:
            return adapter[f"lokr_{name}"]
        a, b = adapter[f"lokr_{name}_a"], adapter[f"lokr_{name}_b"]
        if name == "w2" and "lokr_t2" in adapter:
            return np.einsum("abkl,ao,bi->oikl", adapter["lokr_t2"], a, b)
        return a @ b

    left, right = factor("w1"), factor("w2")
    left = left.reshape(left.shape + (1,) * (right.ndim - 2))
    scale = fields["alpha"] / fields["r"]
    return weight + scale * np.kron(left, right).reshape(weight.shape)


def hira(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    return weight * (1 + low_rank(adapter, "hira"))


def fourierft(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    spectrum = np.zeros(weight.shape)
    rows, columns = adapter["indices"]
    spectrum[rows, columns] = adapter["fourierft_spectrum"]
    return weight + fields["scaling"] * np.fft.ifft2(spectrum).real


def ia3(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    return weight * adapter["ia3_l"]  # (out, 1), or (1, in) in a feed-forward module


def vblora(weight: np.ndarray, adapter: Arrays, fields: Fields) -> np.ndarray:
    def subvectors(logits: np.ndarray) -> np.ndarray:
        """Mixtures of the top k vectors of the bank: (..., vectors) to (..., length)."""
        chosen = np.argsort(-logits, axis=-1)[..., : fields["topk"]]
        share = np.exp(np.take_along_axis(logits, chosen, axis=-1))
        share /= share.sum(axis=-1, keepdims=True)
        return np.einsum("...k,...kl->...l", share, adapter["vblora_vector_bank"][chosen])

    outputs, inputs = weight.shape
    a = subvectors(adapter["vblora_logits_A"])  # (r, in / length, length)
    b = subvectors(adapter["vblora_logits_B"])  # (out / length, r, length)
    rank = a.shape[0]
    return weight + b.swapaxes(1, 2).reshape(outputs, rank) @ a.reshape(rank, inputs)


# Initializations, each from the base weight and the other arrays of the file.


def svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)


def pissa(tensors: Arrays, fields: Fields) -> Arrays:
    rank = fields["r"]
    u, s, vh = svd(tensors["base/weight"])
    root = np.sqrt(s[:rank] * rank / fields["lora_alpha"])
    return {"lora_A.weight": root[:, None] * vh[:rank], "lora_B.weight": u[:, :rank] * root}


def olora(tensors: Arrays, fields: Fields) -> Arrays:
    q, r = np.linalg.qr(tensors["base/weight"].astype(np.float64))
    return {"lora_A.weight": r[: fields["r"]], "lora_B.weight": q[:, : fields["r"]]}


def lora_ga(tensors: Arrays, fields: Fields) -> Arrays:
    """Direction "ArB2r" and scale "stable"."""
    rank = fields["r"]
    u, s, vh = svd(tensors["gradient"])
    outputs = len(u)
    scale = outputs**0.25 / math.sqrt(fields["lora_ga_config"].stable_gamma)
    b = scale * u[:, rank : 2 * rank] * s[rank : 2 * rank]
    return {"lora_A.weight": vh[:rank], "lora_B.weight": b}


def eva(tensors: Arrays, fields: Fields) -> Arrays:
    _, _, vh = svd(tensors["input"] - tensors["input"].mean(axis=0))
    b = np.zeros((len(tensors["base/weight"]), fields["r"]))
    return {"lora_A.weight": vh[: fields["r"]], "lora_B.weight": b}


def check_initial(initial: Initial | None, tensors: Arrays, fields: Fields) -> float:
    """The greatest error of the two factors against the formula, and of the weights' sum."""
    adapter = pick(tensors, "adapter/")
    if initial is None:  # "orthogonal" is random; only its product B A, which is zero, is known.
        error = np.abs(low_rank(adapter)).max()
    else:
        expected = initial(tensors, fields)
        error = max(np.abs(np.abs(adapter[k]) - np.abs(v)).max() for k, v in expected.items())
    kept = lora(tensors["residual/weight"], adapter, fields) - tensors["base/weight"]
    return float(max(error, np.abs(kept).max()))


ADAPTERS: dict[str, Case] = {
    "lora_linear": Case(linear(), peft.LoraConfig, {"r": 3, "lora_alpha": 5}, lora),
    "lora_rs_linear": Case(
        linear(), peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_rslora": True}, lora
    ),
    "lora_embedding": Case(embedding(), peft.LoraConfig, {"r": 3, "lora_alpha": 5}, lora),
    "lora_conv2d": Case(conv2d(), peft.LoraConfig, {"r": 4, "lora_alpha": 5}, lora),
    "dora_linear": Case(
        linear(), peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}, dora
    ),
    "dora_embedding": Case(
        embedding(), peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}, dora
    ),
    "dora_conv2d": Case(
        conv2d(), peft.LoraConfig, {"r": 4, "lora_alpha": 5, "use_dora": True}, dora
    ),
    "vera": Case(two(6, 10, 7), peft.VeraConfig, {"r": 3, "d_initial": 0.1}, vera),
    "adalora": Case(
        linear(), peft.AdaLoraConfig, {"init_r": 3, "lora_alpha": 5, "total_step": 10}, adalora
    ),
    "loha_linear": Case(linear(), peft.LoHaConfig, {"r": 3, "alpha": 5}, loha),
    "loha_conv2d": Case(
        conv2d(), peft.LoHaConfig, {"r": 4, "alpha": 5, "use_effective_conv2d": False}, loha
    ),
    "loha_conv2d_effective": Case(
        conv2d(), peft.LoHaConfig, {"r": 4, "alpha": 5, "use_effective_conv2d": True}, loha
    ),
    "lokr_linear": Case(
        kron_linear(), peft.LoKrConfig, {"r": 2, "alpha": 5, "decompose_factor": -1}, lokr
    ),
    "lokr_linear_full": Case(
        kron_linear(), peft.LoKrConfig, {"r": 4, "alpha": 5, "decompose_factor": -1}, lokr
    ),
    "lokr_linear_both_decomposed": Case(
        kron_linear(),
        peft.LoKrConfig,
        {"r": 2, "alpha": 5, "decompose_factor": -1, "decompose_both": True},
        lokr,
    ),
    "lokr_conv2d": Case(
        kron_conv2d(),
        peft.LoKrConfig,
        {"r": 3, "alpha": 5, "decompose_factor": 4, "use_effective_conv2d": False},
        lokr,
    ),
    "lokr_conv2d_effective": Case(
        kron_conv2d(),
        peft.LoKrConfig,
        {"r": 3, "alpha": 5, "decompose_factor": 4, "use_effective_conv2d": True},
        lokr,
    ),
    "hira_linear": Case(linear(), peft.HiraConfig, {"r": 3}, hira),
    "hira_embedding": Case(embedding(), peft.HiraConfig, {"r": 3}, hira),
    "hira_conv2d": Case(conv2d(), peft.HiraConfig, {"r": 4}, hira),
    "fourierft": Case(
        linear(),
        peft.FourierFTConfig,
        {"n_frequency": 12, "scaling": 15.0, "random_loc_seed": 777},
        fourierft,
    ),
    "ia3": Case(linear(bias=False), peft.IA3Config, {"feedforward_modules": []}, ia3),
    "ia3_bias": Case(linear(), peft.IA3Config, {"feedforward_modules": []}, ia3),
    "ia3_feedforward": Case(linear(), peft.IA3Config, {"feedforward_modules": ["layer"]}, ia3),
    "vblora": Case(
        two(6, 15, 21),
        peft.VBLoRAConfig,
        {"r": 4, "num_vectors": 11, "vector_length": 3, "topk": 2},
        vblora,
    ),
}

INITIALIZATIONS: dict[str, tuple[Fields, Initial | None]] = {
    "pissa": ({"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}, pissa),
    "pissa_niter": ({"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa_niter_16"}, pissa),
    "olora": ({"r": 3, "lora_alpha": 5, "init_lora_weights": "olora"}, olora),
    "orthogonal": ({"r": 4, "lora_alpha": 5, "init_lora_weights": "orthogonal"}, None),
    "lora_ga": (
        {
            "r": 3,
            "lora_alpha": 5,
            "init_lora_weights": "lora_ga",
            "lora_ga_config": peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
        },
        lora_ga,
    ),
    "eva": (
        {
            "r": 3,
            "lora_alpha": 5,
            "init_lora_weights": "eva",
            "eva_config": peft.EvaConfig(rho=1.0, whiten=False),
        },
        eva,
    ),
}


def layer_names(model: nn.Sequential) -> list[str]:
    return [name for name, _ in model.named_children()]


def randomise(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=BASE_STD)


def add_noise(model: peft.PeftModel) -> None:
    """Adds noise to the adapter: the only parameters that PEFT leaves trainable."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += NOISE_STD * torch.randn_like(parameter)


def separate_spectrum(layer: nn.Linear) -> None:
    """Puts the layer's singular values far apart, so that its singular vectors are sharp."""
    u, s, vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
    layer.weight.data = u @ torch.diag(3.0 * 0.6 ** torch.arange(len(s))) @ vh


def parameters_of(model: nn.Sequential, group: str) -> Tensors:
    """A copy of the layers' weights and biases: `group/weight`, or `group/first/weight`."""
    single = len(model) == 1
    return {
        f"{group}/{name.removeprefix('layer.') if single else name.replace('.', '/', 1)}": (
            parameter.detach().clone()
        )
        for name, parameter in model.named_parameters()
    }


def adapter_of(model: peft.PeftModel, names: list[str]) -> Tensors:
    """The tensors that PEFT saves, without the path to the module."""
    saved = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    renamed = {}
    for key, tensor in saved.items():
        key = key.removeprefix("base_model.").removeprefix("model.")
        if key.split(".")[0] in names:
            layer, key = key.split(".", 1)
            key = key if len(names) == 1 else f"{layer}/{key}"
        renamed[f"adapter/{key}"] = tensor.detach().clone()
    return renamed


def results(model: peft.PeftModel, inputs: torch.Tensor) -> tuple[Tensors, float]:
    """The output, the merged weights, and the error of the merged model's output."""
    with torch.no_grad():
        output = model.eval()(inputs)
        merged = model.merge_and_unload()
        gap = (merged(inputs) - output).abs().max().item()
    tensors = {"input": inputs, "output": output, **parameters_of(merged, "merged")}
    return tensors, gap


def pick(tensors: Arrays, prefix: str) -> Arrays:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def as_arrays(tensors: Tensors) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def check_merged(case: Case, tensors: Arrays, names: list[str]) -> float:
    """The greatest error of the formula over the case's layers."""
    errors = []
    for name in names:
        path = "" if len(names) == 1 else f"{name}/"
        adapter = pick(tensors, "adapter/") | pick(tensors, f"adapter/{path}")
        if "indices" in tensors:
            adapter["indices"] = tensors["indices"]
        merged = case.formula(tensors[f"base/{path}weight"], adapter, case.fields)
        errors.append(np.abs(merged - tensors[f"merged/{path}weight"]).max())
    return float(max(errors))


def adapter_case(case: Case) -> tuple[Tensors, Errors]:
    names = layer_names(case.model)
    inputs = example_input(case.model)
    randomise(case.model)
    tensors = parameters_of(case.model, "base")
    config = case.config(target_modules=names, **case.fields)
    model = peft.get_peft_model(case.model, config)
    add_noise(model)
    tensors |= adapter_of(model, names)
    if isinstance(config, peft.FourierFTConfig):
        tensors["indices"] = model.base_model.model.layer.indices["default"].int()
    computed, gap = results(model, inputs)
    tensors |= computed
    return tensors, Errors(check_merged(case, as_arrays(tensors), names), gap)


def initialization_case(fields: Fields, initial: Initial | None) -> tuple[Tensors, Errors]:
    """One linear layer; its inputs are also the samples of EVA and of LoRA-GA's gradient."""
    base = linear()
    separate_spectrum(base.layer)
    inputs = 0.5 + torch.randn(14, 6) * 2.0 ** -torch.arange(6)
    tensors = parameters_of(base, "base")
    config = peft.LoraConfig(target_modules=["layer"], **fields)
    if config.lora_ga_config:
        weights = torch.randn(14, 10)
        preprocess_loraga(base, config, lambda: (base(inputs) * weights).sum().backward())
        tensors["gradient"] = base.layer._peft_loraga_grad.clone()
    model = peft.get_peft_model(base, config)
    if config.eva_config:
        peft.initialize_lora_eva_weights(
            model,
            dataloader=[inputs],
            forward_fn=lambda model, batch: model(batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None,
            show_progress_bar=False,
        )
    tensors |= adapter_of(model, ["layer"])
    tensors["residual/weight"] = model.base_model.model.layer.base_layer.weight.detach().clone()
    computed, gap = results(model, inputs)
    tensors |= computed
    return tensors, Errors(check_initial(initial, as_arrays(tensors), fields), gap)


def write(name: str, config: type[peft.PeftConfig], fields: Fields, tensors: Tensors) -> None:
    described = {"peft_type": config(**fields).peft_type.value, **fields}
    versions = {module.__name__: module.__version__ for module in (peft, torch)}
    save_file(
        {key: tensor.detach().contiguous() for key, tensor in tensors.items()},
        DATA / f"{name}.safetensors",
        metadata={
            "case": json.dumps(described, default=dataclasses.asdict),
            "versions": json.dumps(versions),
        },
    )


def report(name: str, errors: Errors, tensors: Tensors) -> None:
    kilobytes = (DATA / f"{name}.safetensors").stat().st_size / 1000
    print(f"{name}: error {errors.weight:.0e}, output {errors.output:.0e}, {kilobytes:.1f} kB")
    for key, tensor in tensors.items():
        print(f"    {key} {tuple(tensor.shape)}")
    assert max(errors) < TOLERANCE, f"{name}: PEFT does not compute the formula"


def main() -> None:
    warnings.simplefilter("ignore")
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir()
    for name, case in ADAPTERS.items():
        torch.manual_seed(7)
        tensors, errors = adapter_case(case)
        write(name, case.config, case.fields, tensors)
        report(name, errors, tensors)
    for name, (fields, initial) in INITIALIZATIONS.items():
        torch.manual_seed(7)
        tensors, errors = initialization_case(fields, initial)
        write(name, peft.LoraConfig, fields, tensors)
        report(name, errors, tensors)


if __name__ == "__main__":
    main()
