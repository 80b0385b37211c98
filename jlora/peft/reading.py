"""A folder that PEFT wrote, as an adapter and the base that it belongs on."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import tree
from jlora.adapters.full import BitFit, Full
from jlora.adapters.protocol import AdapterConfig, SharedArrays, Weight
from jlora.adapters.token_rows import TokenRows
from jlora.assigning import weights_of
from jlora.checkpoints.pieces import Weight as Stored
from jlora.checkpoints.tensors import listed, open_file, read_finite
from jlora.peft import config as configs
from jlora.peft.formats import Fields, Format
from jlora.peft.layouts import Facts, to_leaf
from jlora.peft.leaves import Part, fresh, leaf_of
from jlora.peft.sites import Site, sites_of

PyTree = Any
PREFIX = "base_model.model."
TENSORS = "adapter_model.safetensors"
WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS")
TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


class LoadedAdapter(NamedTuple):
    """What a folder of PEFT's holds.

    Attributes:
        params: The base, with what the folder replaces: modules that were trained whole, biases,
            rows of tokens.
        adapter: What is added to it. What was trained whole has differences of zero here, so that
            training goes on with it.
    """

    params: PyTree
    adapter: dict[str, Any]


def read(
    folder: str | os.PathLike[str],
    fn: Callable[..., Any],
    params: PyTree,
    inputs: tuple[Any, ...],
    spellings: Sequence[Mapping[str, Stored]],
) -> LoadedAdapter:
    """See `jlora.peft.load`; of the `spellings` that one is used which knows most of the names."""
    folder = Path(folder)
    fields, form = configs.read_config(folder)
    tensors = _tensors(folder)
    stored = max(spellings, key=lambda one: _known(one, tensors))
    reader = _Reader(folder, fields, form, tensors, stored)
    used = weights_of(fn, params, *inputs)
    adapter = reader.adapter(used)
    replaced = reader.replaced(used)
    reader.finish()
    for path, config in replaced.trained.items():
        # Where factors are trained as well, what replaces the base stays as it is.
        adapter.setdefault(path, fresh(config, used[path]))
    flat = tree.flatten(params)
    leaves = [
        jnp.asarray(replaced.values[path], leaf.dtype) if path in replaced.values else leaf
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    ]
    return LoadedAdapter(jax.tree.unflatten(flat.treedef, leaves), adapter)


def _known(stored: Mapping[str, Stored], names: Iterable[str]) -> int:
    """How many names begin with a module's."""
    modules = {site.module for site in sites_of(stored)}

    def is_known(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in modules for end in range(1, len(parts)))

    return sum(map(is_known, names))


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """The file's tensors by name, without the prefix that all have.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, empty, or holds another dtype or what is not finite.
    """
    path = folder / TENSORS
    if not path.is_file() and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has no {TENSORS}, and files that end in .bin are not opened, since they can "
            f"run code. Load it in PEFT and save it anew."
        )
    found = {}
    with open_file(path) as file:
        for key in file.keys():  # noqa: SIM118 -- it is no mapping
            found[key.removeprefix(PREFIX)] = read_finite(file, key, path)
    if not found:
        raise ValueError(f"{path} holds no tensor. Save the adapter anew.")
    return found


class _Replaced(NamedTuple):
    """What a file says in the base's place."""

    values: dict[str, np.ndarray]  # By path, of those weights of which something is replaced.
    trained: dict[str, AdapterConfig]  # How training goes on with it.


class _Reader:
    """Takes the tensors of a file one after the other, so that what is left over is known."""

    def __init__(
        self,
        folder: Path,
        fields: dict[str, Any],
        form: Format,
        tensors: dict[str, np.ndarray],
        stored: Mapping[str, Stored],
    ) -> None:
        self.folder, self.fields, self.form = folder, fields, form
        self.left, self.stored = tensors, stored
        self.sites = {(site.module, site.parameter): site for site in sites_of(stored)}
        self.modules = list(dict.fromkeys(module for module, _ in self.sites))
        self.gains: list[tuple[Site, np.ndarray]] = []  # Biases that are scaled with outputs.

    def problem(self, what: str) -> ValueError:
        return ValueError(
            f"{self.folder}: {what} Use the two files that one `save_pretrained` wrote, with the "
            f"model that they were made for."
        )

    def adapter(self, used: Mapping[str, Weight]) -> dict[str, Any]:
        """The leaves of the method itself."""
        parts = self._parts()
        by_path: dict[str, list[Part]] = {}
        for part in parts:
            by_path.setdefault(part.site.path, []).append(part)
        adapter: dict[str, Any] = {}
        for path, some in by_path.items():
            adapter[path] = leaf_of(self.form, used[path], some, self.problem)
        if self.form.shared and by_path:
            name = next(leaf.share for leaf in adapter.values())
            some = [(used[path], parts[0].fields) for path, parts in by_path.items()]
            adapter[name] = self._shared(some)
        return adapter

    def _parts(self) -> list[Part]:
        """What the file has for each module, after checking it against the config."""
        found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for name in list(self.left):
            module, suffix = self._own(name)
            if module is None:
                continue
            found.setdefault(self._site_of(module, name), {})[suffix] = self.left.pop(name)
        sites = [self.sites[key] for key in found]
        modules = [site.module for site in sites]
        candidates = [module for module, parameter in self.sites if parameter == "weight"]
        chosen = configs.targeted(self.fields, candidates)
        plain = {site.module for site in sites if site.parameter == "weight"}
        if self.fields["target_modules"] != "all-linear":
            missing, extra = sorted(chosen - plain), sorted(plain - chosen)
            if missing:
                raise self.problem(
                    f"the config targets {listed(missing)}, for which the file has no tensor."
                )
            if extra:
                raise self.problem(
                    f"the file has tensors for {listed(extra)}, which the config does not target."
                )
        joined = [f"{s.module}.{s.parameter}" for s in sites if s.parameter != "weight"]
        for target in self.fields["target_parameters"] or []:
            if not any(name == target or name.endswith(f".{target}") for name in joined):
                raise self.problem(
                    f"target_parameters has {target!r}, and no tensor belongs to it."
                )
        configs.check_patterns(self.fields, [*modules, *joined])
        parts = []
        for site, tensors in zip(sites, found.values(), strict=True):
            name = site.module if site.parameter == "weight" else f"{site.module}.{site.parameter}"
            own = configs.own_fields(self.fields, self.form, name)
            own["is_feedforward"] = configs.is_feedforward(self.fields, site.module)
            parts.append(Part(site, own, tensors))
            bias = self.sites.get((site.module, "bias"))
            if "ia3_l" in tensors and bias and not own["is_feedforward"]:
                self.gains.append((bias, tensors["ia3_l"].astype(np.float32)))
        return parts

    def _own(self, name: str) -> tuple[str | None, str]:
        """A tensor's module and suffix, where it is one of the method's own."""
        for suffix in self.form.suffixes:
            if name.endswith(f".{suffix}"):
                return name[: -len(suffix) - 1], suffix
        return None, ""

    def _site_of(self, module: str, name: str) -> tuple[str, str]:
        """The site of a module that a tensor names."""
        if (module, "weight") in self.sites:
            return module, "weight"
        outer = module.removesuffix(".base_layer")
        both = [k for k in self.sites if k[0] == outer and k[1] not in ("weight", "bias")]
        if both:
            return self._expert_site(both, module != outer)
        raise self.problem(
            f"{name} belongs to a module {module!r} that the model has not. The nearest are "
            f"{tree.nearest(module, tuple(self.modules))}."
        )

    def _expert_site(self, both: list[tuple[str, str]], inner: bool) -> tuple[str, str]:
        """Of a module's two parameters the one meant: wrapped twice, the first is inside."""
        targets = self.fields["target_parameters"] or []
        wanted = [key for key in both if any(f"{key[0]}.{key[1]}".endswith(t) for t in targets)]
        if len(wanted) == 1 and not inner:
            return wanted[0]
        if len(wanted) != 2:
            raise self.problem(
                f"target_parameters={targets} do not say which parameters are meant."
            )
        # In the order of the module: gate and up before down.
        return sorted(wanted, key=lambda key: key[1] == "down_proj")[0 if inner else 1]

    # --- leaves -----------------------------------------------------------------------------------

    def _shared(self, some: list[tuple[Weight, Fields]]) -> SharedArrays:
        """What all modules share."""
        config = self.form.config(some[0][1], some[0][0])
        weights = [weight for weight, _ in some]
        abstract: Any = jax.eval_shape(lambda key: config.shared(key, weights), jax.random.key(0))
        values = {}
        for name, (key, layout) in self.form.shared.items():
            if key not in self.left:
                raise self.problem(
                    f"it lacks {key}, which all modules share and which only torch's generator "
                    f"could draw anew. Save the adapter with save_projection=True."
                )
            tensor = self.left.pop(key).astype(np.float32)
            facts = Facts((), weights[0].axes._replace(batch=(), inputs=(), outputs=()), (), ())
            values[name] = jnp.asarray(to_leaf(tensor, layout, facts))
        if "fan_in" in {field.name for field in dataclasses.fields(abstract)}:
            a, b = values["a"], values["b"]
            values |= {"fan_in": a.shape[0], "fan_out": b.shape[1]}
        shared = dataclasses.replace(abstract, **values)
        shapes = {name: tuple(getattr(shared, name).shape) for name in self.form.shared}
        if shapes != shared.shapes():
            raise self.problem(f"what all modules share has shapes {shapes}.")
        return shared

    # --- what replaces the base -------------------------------------------------------------------

    def replaced(self, used: Mapping[str, Weight]) -> _Replaced:
        """The tensors that stand in the base's place."""
        found = _Replaced({}, {})
        rows = self.fields["trainable_token_indices"]
        biases = self.fields["bias"] != "none"
        saved = self.fields["modules_to_save"] or []
        for site, gains in self.gains:
            self._scale(found, used, site, gains)
        before = set(self.left)
        for name in list(self.left):
            module, _, parameter = name.rpartition(".")
            if name.endswith(f".{TOKEN_ROWS}"):
                module = name.removesuffix(f".{TOKEN_ROWS}")
                self._put_rows(found, used, module, rows, self.left.pop(name))
                continue
            copied = re.fullmatch(r"(.*)\.(modules_to_save|original_module)", module)
            if copied and biases and f"{copied[1]}.{parameter}" in before:
                self.left.pop(name)  # PEFT writes a saved module's bias three times.
                continue
            wrapped = module.endswith(".base_layer")
            module = module.removesuffix(".base_layer").removesuffix(".token_adapter")
            whole = any(_is_in(module, one) for one in saved)
            site = self.sites.get((module, parameter))
            # A copy of the whole embedding beside its factors is the base's, resized perhaps.
            if site is None or not (whole or wrapped or (parameter == "bias" and biases)):
                continue
            self._put(found, used, site, self.left.pop(name))
            if whole or (parameter == "bias" and biases):
                bias = used[site.path].kind == "bias"
                found.trained[site.path] = BitFit() if bias else Full()
        for one in saved:
            # PEFT itself adds the usual names of heads for tasks that have one.
            if one in ("classifier", "score") and self.fields["task_type"] in WITH_HEAD:
                continue
            if not any(_is_in(module, one) for module in self.modules):
                raise self.problem(f"modules_to_save has {one!r}, which the model has not.")
        return found

    def _put(
        self, found: _Replaced, used: Mapping[str, Weight], site: Site, tensor: np.ndarray
    ) -> None:
        """One tensor in its place."""
        assert site.piece is not None
        if tensor.shape != site.piece.shape:
            raise self.problem(
                f"{site.module}.{site.parameter} has shape {tensor.shape} instead of "
                f"{site.piece.shape}. If the vocabulary was resized, resize the base too."
            )
        base = used[site.path].value
        target = found.values.setdefault(site.path, np.array(base))
        ends = zip(site.piece.starts, site.piece.box, strict=True)
        box = tuple(slice(start, start + size) for start, size in ends)
        target[box] = site.piece.to_box(tensor).astype(target.dtype)

    def _scale(
        self, found: _Replaced, used: Mapping[str, Weight], site: Site, gains: np.ndarray
    ) -> None:
        """A bias with the gains that PEFT's IA3 puts on it too; jlora's is on weights alone."""
        assert site.piece is not None
        target = found.values.setdefault(site.path, np.array(used[site.path].value))
        ends = zip(site.piece.starts, site.piece.box, strict=True)
        box = tuple(slice(start, start + size) for start, size in ends)
        scaled = target[box].astype(np.float32) * site.piece.to_box(gains.reshape(-1))
        target[box] = scaled.astype(target.dtype)

    def _put_rows(
        self,
        found: _Replaced,
        used: Mapping[str, Weight],
        module: str,
        rows: Any,
        tensor: np.ndarray,
    ) -> None:
        """Some rows of an embedding."""
        site = self.sites.get((module, "weight"))
        given = rows
        if isinstance(rows, Mapping):
            given = next((r for m, r in rows.items() if module.endswith(m)), None)
        if site is None or not isinstance(given, list) or len(given) != len(tensor):
            raise self.problem(
                f"{module} has {len(tensor)} rows of tokens, and trainable_token_indices={rows}."
            )
        target = found.values.setdefault(site.path, np.array(used[site.path].value))
        if tensor.shape[1:] != target.shape[1:] or max(given) >= len(target):
            raise self.problem(
                f"{module} has rows of shape {tensor.shape} for the tokens {given} of a table of "
                f"shape {target.shape}."
            )
        target[given] = tensor.astype(target.dtype)
        found.trained[site.path] = TokenRows(tokens=tuple(given))

    def finish(self) -> None:
        """Refuses what is left over."""
        if self.left:
            raise self.problem(
                f"the tensors {listed(sorted(self.left))} belong to nothing that the config and "
                f"the model have."
            )


def _is_in(module: str, saved: str) -> bool:
    """Whether a module, or one that it is part of, has a name that PEFT saves it by.

    PEFT compares the ends of names, without a dot before them.
    """
    ends = (place for place, letter in enumerate(f"{module}.") if letter == ".")
    return any(module[:end].endswith(saved) for end in ends)
