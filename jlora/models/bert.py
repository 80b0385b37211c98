"""A BERT encoder in Flax Linen that reads and writes Hugging Face folders.

The layout is that of BERT, MiniLM and their kin: word, position and type embeddings, then blocks
whose layer norm comes after the residual sum. Dense kernels are laid out (in, out).

References:
    Devlin et al., BERT, arXiv:1810.04805, section 3. The order of operations is that of
    `BertModel` in transformers.
"""

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}

# What a config.json may say about the parts of BERT that this file has only one form of.
_ONLY_FORM: dict[str, Any] = {
    "model_type": "bert",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The sizes of one encoder, under the names they have in config.json.

    Attributes:
        hidden_size: Width of the residual stream; a multiple of `num_attention_heads`.
        intermediate_size: Width inside the feed-forward block.
        max_position_embeddings: Longest sequence, in tokens.
        hidden_act: One of gelu (exact), gelu_new, gelu_pytorch_tanh, relu, silu.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise ValueError(
                    f"BertConfig.{field.name}={value!r} is no size. "
                    f"Give a whole number of 1 or more."
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"BertConfig.hidden_size={self.hidden_size} does not split into "
                f"num_attention_heads={self.num_attention_heads} equal heads. Make it a multiple."
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"BertConfig.hidden_act={self.hidden_act!r} is not implemented. "
                f"Use a checkpoint with one of {sorted(_ACTIVATIONS)}."
            )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Self:
        """The config that `folder/config.json` describes.

        Raises:
            ValueError: A size is missing, or a form of BERT is asked for that is not implemented.
        """
        path = Path(folder) / "config.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(
                f"{path} is not JSON ({error}). Copy it anew from its source."
            ) from error
        for name, only in _ONLY_FORM.items():
            if raw.get(name, only) != only:
                raise ValueError(
                    f"{path}: {name}={raw[name]!r} is not implemented; this encoder is the one of "
                    f"{name}={only!r}. Choose a BERT or MiniLM checkpoint that says so."
                )
        fields = dataclasses.fields(cls)
        missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in raw]
        if missing:
            raise ValueError(
                f"{path} has no {missing}. Copy them from the config.json the checkpoint came with."
            )
        return cls(**{f.name: raw[f.name] for f in fields if f.name in raw})


class Embeddings(nn.Module):
    """Token ids to the first hidden states: word + position + type, normalised."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids: jax.Array, token_type_ids: jax.Array, deterministic: bool
    ) -> jax.Array:
        config, width, length = self.config, self.config.hidden_size, input_ids.shape[-1]
        # JAX would clamp a position past the table and go on with the last one.
        if length > config.max_position_embeddings:
            raise ValueError(
                f"input_ids of length {length} run past max_position_embeddings="
                f"{config.max_position_embeddings}. Truncate the texts when tokenising."
            )
        hidden = (
            nn.Embed(config.vocab_size, width, name="word")(input_ids)
            + nn.Embed(config.max_position_embeddings, width, name="position")(jnp.arange(length))
            + nn.Embed(config.type_vocab_size, width, name="type")(token_type_ids)
        )
        hidden = _layer_norm(config)(hidden)
        return nn.Dropout(config.hidden_dropout_prob)(hidden, deterministic)


class Attention(nn.Module):
    """Multi-head self-attention with its residual sum and norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        by_head = (*hidden.shape[:-1], config.num_attention_heads, -1)
        query, key, value = (
            nn.Dense(config.hidden_size, name=name)(hidden).reshape(by_head)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        # The softmax sums in float32, whatever the dtype of the hidden states.
        scores = jnp.where(mask, scores.astype(jnp.float32), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores).astype(hidden.dtype)
        weights = nn.Dropout(config.attention_probs_dropout_prob)(weights, deterministic)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        out = nn.Dense(config.hidden_size, name="output")(context.reshape(hidden.shape))
        out = nn.Dropout(config.hidden_dropout_prob)(out, deterministic)
        return _layer_norm(config)(hidden + out)


class Mlp(nn.Module):
    """The feed-forward block with its residual sum and norm."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        inner = nn.Dense(config.intermediate_size, name="up")(hidden)
        inner = _ACTIVATIONS[config.hidden_act](inner)
        out = nn.Dense(config.hidden_size, name="down")(inner)
        out = nn.Dropout(config.hidden_dropout_prob)(out, deterministic)
        return _layer_norm(config)(hidden + out)


class Block(nn.Module):
    """One layer of the encoder."""

    config: BertConfig

    @nn.compact
    def __call__(self, hidden: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        hidden = Attention(self.config, name="attention")(hidden, mask, deterministic)
        return Mlp(self.config, name="mlp")(hidden, deterministic)


class BertEncoder(nn.Module):
    """The encoder; `model.apply(params, input_ids, attention_mask)` gives its hidden states."""

    config: BertConfig

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        token_type_ids: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states (batch, length, width).

        Args:
            input_ids: (batch, length) token numbers; one past the vocabulary makes its text NaN.
            attention_mask: (batch, length), 1 or True for tokens, 0 or False for padding. Padding
                is not seen by the other positions, but gets a hidden state of its own.
            token_type_ids: (batch, length) segment numbers; all 0 when left out.
            deterministic: False turns dropout on and needs `rngs={"dropout": key}`.
        """
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {attention_mask.shape}, input_ids {input_ids.shape}. "
                f"Give one mask entry per token."
            )
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        mask = attention_mask.astype(bool)[:, None, None, :]  # (batch, heads, query, key)
        embed = Embeddings(self.config, name="embeddings")
        hidden = embed(input_ids, token_type_ids, deterministic)
        for number in range(self.config.num_hidden_layers):
            hidden = Block(self.config, name=f"layer_{number}")(hidden, mask, deterministic)
        return hidden


def _layer_norm(config: BertConfig) -> nn.LayerNorm:
    # E[x^2] - E[x]^2 loses the digits of a small variance; an epsilon of 1e-12 does not hide it.
    return nn.LayerNorm(epsilon=config.layer_norm_eps, use_fast_variance=False, name="norm")


def mean_pool(hidden: jax.Array, mask: jax.typing.ArrayLike) -> jax.Array:
    """The mean hidden state of each text's tokens, (batch, width); zeros where all is padding."""
    weight = jnp.asarray(mask, jnp.float32)  # A narrower type does not count past 256.
    total = jnp.einsum("blw,bl->bw", hidden, weight)
    return total / jnp.maximum(weight.sum(axis=1, keepdims=True), 1)


# Checkpoints: one table of names, read in both directions.

_MODULES = {
    "embeddings/word": "embeddings.word_embeddings",
    "embeddings/position": "embeddings.position_embeddings",
    "embeddings/type": "embeddings.token_type_embeddings",
    "embeddings/norm": "embeddings.LayerNorm",
    "layer_{}/attention/query": "encoder.layer.{}.attention.self.query",
    "layer_{}/attention/key": "encoder.layer.{}.attention.self.key",
    "layer_{}/attention/value": "encoder.layer.{}.attention.self.value",
    "layer_{}/attention/output": "encoder.layer.{}.attention.output.dense",
    "layer_{}/attention/norm": "encoder.layer.{}.attention.output.LayerNorm",
    "layer_{}/mlp/up": "encoder.layer.{}.intermediate.dense",
    "layer_{}/mlp/down": "encoder.layer.{}.output.dense",
    "layer_{}/mlp/norm": "encoder.layer.{}.output.LayerNorm",
}
_LEAVES = {"kernel": "weight", "bias": "bias", "scale": "weight", "embedding": "weight"}

# Tensors that the encoder does not compute with; `save_encoder` copies them from the source.
_CARRIED = re.compile(r"(pooler|cls)\.|embeddings\.position_ids$")
_COMPANIONS = (
    "config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)
_WEIGHTS = "model.safetensors"
_DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32}


class _Stored(NamedTuple):
    """Where and how a file stores one weight of the model."""

    key: str
    dtype: str  # as safetensors names it
    shape: tuple[int, ...]  # as Flax lays the weight out


def load_encoder(
    folder: str | os.PathLike[str], dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[BertEncoder, dict[str, Any]]:
    """The model and its variables `{"params": ...}`, read from a Hugging Face folder.

    Args:
        folder: Holds config.json and model.safetensors. The tensors' names may start with `bert.`,
            and the layer norms may say gamma and beta. Tensors are read one at a time.
        dtype: Of the variables, whatever the file stores.

    Raises:
        ValueError: The config is not implemented, the file is damaged, or its tensors are not those
            that the config describes.
    """
    model = BertEncoder(BertConfig.from_folder(folder))
    with _open(folder) as file:
        leaves = {
            path: jnp.asarray(_turned(path, file.get_tensor(stored.key)), dtype)
            for path, stored in _match(file, model, folder).items()
        }
    return model, {"params": traverse_util.unflatten_dict(leaves, sep="/")}


def save_encoder(
    folder: str | os.PathLike[str], params: Mapping[str, Any], source: str | os.PathLike[str]
) -> None:
    """Write a Hugging Face folder that holds `params` and is otherwise a copy of `source`.

    Names, dtypes and metadata of the tensors are the source's; tensors that the encoder does not
    compute with (the pooler, say) and the tokenizer's files are copied. The folder appears whole or
    not at all.

    Args:
        folder: Must not exist yet.
        params: `{"params": ...}`, as `load_encoder` returns it.
        source: The folder that `params` were loaded from.

    Raises:
        FileExistsError: `folder` exists; it is left as it was.
        ValueError: `params` are not the source's weights by name and shape, or not finite.
    """
    folder, source = Path(folder), Path(source)
    if os.path.lexists(folder):
        raise FileExistsError(
            f"folder={str(folder)!r} exists and is left as it was. Choose another name."
        )
    with _open(source) as file:
        weights = _match(file, BertEncoder(BertConfig.from_folder(source)), source)
        tensors = _tensors(params, weights)
        tensors |= {key: file.get_tensor(key) for key in set(file.keys()) - set(tensors)}
        metadata = file.metadata()
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        save_file(tensors, partial / _WEIGHTS, metadata=metadata)
        _copy_companions(source, partial)
        # safetensors makes its files readable by their owner alone.
        shutil.copymode(partial / "config.json", partial / _WEIGHTS)
        _sync(partial)
        os.rename(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _open(folder: str | os.PathLike[str]) -> Any:
    """The folder's tensors, behind the lazy reader of safetensors."""
    path = Path(folder) / _WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. One safetensors file is read, neither pickles nor shards; write "
            f"it with `BertModel.save_pretrained(folder, max_shard_size='50GB')`."
        )
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it anew from its source.") from error


def _match(file: Any, model: BertEncoder, folder: str | os.PathLike[str]) -> dict[str, _Stored]:
    """Where the file stores each path of the model; a file that is not this model's is refused."""
    shapes, every = _shapes(model), sorted(file.keys())
    names = {_canonical(key): key for key in every}
    keys = {path: names[_key(path)] for path in shapes if _key(path) in names}
    # Where two keys share a canonical name, `names` keeps one; the other counts as unknown.
    known = {*keys.values(), *(key for name, key in names.items() if _CARRIED.match(name))}
    problems = [f"{key} is unknown" for key in every if key not in known]
    problems += [f"{_key(path)} is missing" for path in shapes if path not in keys]
    for path, key in keys.items():
        shape, dtype = tuple(file.get_slice(key).get_shape()), file.get_slice(key).get_dtype()
        expected = shapes[path][::-1] if _is_turned(path) else shapes[path]
        if shape != expected:
            problems.append(f"{key} has shape {shape} instead of {expected}")
        if dtype not in _DTYPES:
            problems.append(f"{key} has dtype {dtype}, which is none of {', '.join(_DTYPES)}")
    if problems:
        raise ValueError(
            f"{Path(folder) / _WEIGHTS} is not the file that its config.json describes: "
            f"{_listed(problems)}. Use the two files that one `BertModel.save_pretrained` wrote."
        )
    return {
        path: _Stored(key, file.get_slice(key).get_dtype(), shapes[path])
        for path, key in keys.items()
    }


def _tensors(params: Mapping[str, Any], weights: Mapping[str, _Stored]) -> dict[str, np.ndarray]:
    """The values of `params` by the file's keys, in the file's layout and dtypes."""
    leaves = _flat(params.get("params", {}))
    problems = [f"{path} is unknown" for path in leaves if path not in weights]
    problems += [f"{path} is missing" for path in weights if path not in leaves]
    problems += [
        f"{path} has shape {leaves[path].shape} instead of {stored.shape}"
        for path, stored in weights.items()
        if path in leaves and leaves[path].shape != stored.shape
    ]
    if problems:
        raise ValueError(
            f"params are not the weights of the source: {_listed(problems)}. Give the variables "
            f"{{'params': ...}} that load_encoder(source) returned, merged but not reshaped."
        )
    tensors = {}
    for path, stored in weights.items():
        tensor = np.asarray(jnp.asarray(leaves[path]).astype(_DTYPES[stored.dtype]))
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{path} holds NaN or Inf in the source's dtype {stored.dtype}; nothing was "
                f"written. Export an earlier checkpoint, or train with a lower learning rate."
            )
        tensors[stored.key] = np.ascontiguousarray(_turned(path, tensor))
    return tensors


def _shapes(model: BertEncoder) -> dict[str, tuple[int, ...]]:
    """The shape of every weight of the model, by path."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)
    return {path: leaf.shape for path, leaf in _flat(variables["params"]).items()}


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves of a tree of modules, by `/`-joined path."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def _key(path: str) -> str:
    """The Hugging Face name of a Flax path."""
    module, leaf = path.rsplit("/", 1)
    template = _MODULES[re.sub(r"\d+", "{}", module)]
    return f"{template.format(*re.findall(r'[0-9]+', module))}.{_LEAVES[leaf]}"


def _canonical(key: str) -> str:
    """A tensor's name as current `BertModel` checkpoints spell it."""
    key = key.removeprefix("bert.")
    return re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", key))


def _is_turned(path: str) -> bool:
    """Whether the weight is (in, out) in Flax and (out, in) in the file."""
    return path.endswith("/kernel")


def _turned(path: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor as the other side lays it out; its own inverse."""
    return tensor.T if _is_turned(path) else tensor


def _listed(problems: list[str], most: int = 6) -> str:
    """The first problems, and how many are left."""
    more = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join(problems[:most] + more)


def _copy_companions(source: Path, folder: Path) -> None:
    """Copy the files that stand beside the weights: config, tokenizer, pooling."""
    for file in (file for pattern in _COMPANIONS for file in source.glob(pattern)):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _sync(folder: Path) -> None:
    """Flush the folder's files to disk, so that the rename does not outrun their contents."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
