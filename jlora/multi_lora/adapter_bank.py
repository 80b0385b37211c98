"""Bank of adapters by name: device slots, a cache in host memory, and files."""

from __future__ import annotations

import collections
import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import get_adapter_leaves, weight_indices
from jlora.adapters.layer_layout import match_weight_shapes
from jlora.multi_lora.batched_apply import apply_per_example, check_slot_index
from jlora.multi_lora.host_cache import CachedAdapter, HostCache
from jlora.multi_lora.slots import (
    PaddedFactors,
    Slots,
    copy_and_set_slot,
    empty_slots,
    pad_to_slot,
    set_slot,
)
from jlora.transform import LoraTransform

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class UnknownAdapterError(KeyError):
    """Raised when a bank has no adapter of a name.

    Example:
        >>> from jlora.multi_lora import UnknownAdapterError
        >>> print(UnknownAdapterError("Unknown adapter 'poem'. Nearest: 'poems'."))
        Unknown adapter 'poem'. Nearest: 'poems'.
    """

    def __str__(self) -> str:
        return str(self.args[0])


class BankFullError(RuntimeError):
    """Raised when a batch uses more adapters than the bank has slots.

    Example:
        >>> from jlora.multi_lora import BankFullError
        >>> issubclass(BankFullError, RuntimeError)
        True
    """


class BankStats(NamedTuple):
    """Counts of a bank's operations since it was built.

    Attributes:
        compilations: Compilations of `apply`.
        hits: Adapters of a batch that were in a slot already.
        loads: Adapters copied from the host to a slot.
        evictions: Adapters removed from a slot to make room for another.
        disk_writes: Adapters evicted from host memory to a file.
        disk_reads: Adapters read from a file.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((2, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> bank = multi_lora.AdapterBank(lora, params, adapter, slots=2)
        >>> bank.add("poems", adapter)
        >>> for _ in range(3):
        ...     _ = bank.apply(params, ["poems", None], x)
        >>> bank.stats.compilations, bank.stats.loads, bank.stats.hits
        (1, 1, 2)
    """

    compilations: int
    hits: int
    loads: int
    evictions: int
    disk_writes: int
    disk_reads: int


class AdapterBank:
    """Adapters of one model by name, for batches in which each example has its own adapter.

    Slot 0 is the bare base, for examples whose name is None. The least recently used adapter is
    evicted from its slot when another needs one. All adapters stay in host memory or, beyond
    `max_host_adapters` of them, in files. Methods are thread-safe: a batch uses each adapter either
    from before or from after a concurrent replacement.

    A bank is state outside of any program, so its methods are refused inside `jax.jit` and other
    transforms, which would keep the adapters of the first call. For a program of your own call
    `slots_for` outside and `apply_per_example` inside.

    References:
        Adapters in host memory, of which those of the batch are on the device: Sheng et al.,
        S-LoRA, arXiv:2311.03285.

    Example:
        >>> import jax
        >>> import numpy as np
        >>> import jlora
        >>> from jlora import multi_lora
        >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((3, 3), np.float32)
        >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
        >>> adapter = lora.init(jax.random.key(0), params, x)
        >>> bank = multi_lora.AdapterBank(lora, params, adapter, slots=3)
        >>> bank.add("poems", adapter)
        >>> bank.apply(params, ["poems", None, "poems"], x).shape
        (3, 2)
        >>> bank.resident
        {'poems': 1}
    """

    def __init__(
        self,
        lora: LoraTransform,
        params: PyTree,
        like: Mapping[str, Any],
        *,
        slots: int,
        rank: int | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        max_host_adapters: int | None = None,
        folder: str | Path | None = None,
    ) -> None:
        """Builds an empty bank.

        Args:
            lora: Transform of the model; its rules are not used.
            params: Parameters of the base, or their shapes.
            like: An adapter, or its shapes, of all weights that any adapter may adapt.
            slots: Number of slots on the devices, including slot 0 for the bare base; 2 or more.
            rank: Highest rank of any adapter. None: the rank of `like`.
            dtype: Type of the factors. None: the type of the weight that they adapt. Products cast
                factors to the type of the activations: use float32 where the model computes in a
                wider type than its weights have.
            max_host_adapters: Number of adapters in host memory. None: no limit.
            folder: Folder for files of the adapters beyond `max_host_adapters`, which needs it.

        Raises:
            ValueError: `like` does not fit `params`, `slots`, `rank` or `max_host_adapters` leaves
                no room for an adapter, or `folder` and `max_host_adapters` are not given together.
            TypeError: `lora` is not a result of `lora_transform`, or the bank is built inside a
                traced function.
        """
        _refuse_trace("AdapterBank", params, like)
        if not isinstance(lora, LoraTransform):
            raise TypeError(
                f"lora must be the result of jlora.lora_transform(fn, rules), got "
                f"{type(lora).__name__}."
            )
        flat = _tree.flatten_with_paths(params)
        indices = weight_indices(flat, like)
        max_rank = max(getattr(leaf, "rank", 1) for leaf in get_adapter_leaves(like).values())
        dtypes = {path: dtype or flat.leaves[index].dtype for path, index in indices.items()}
        self._slots = empty_slots(like, slots, max_rank if rank is None else rank, dtypes)
        self._weight_shapes = {path: flat.leaves[index].shape for path, index in indices.items()}
        self._num_slots = slots
        self._slots_are_shared = False  # With a caller of slots_for.
        self._host_cache = HostCache(max_host_adapters, folder)
        self._slot_by_name: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._free_slots = list(range(slots - 1, 0, -1))
        self._lock = threading.RLock()
        self._num_compilations = self._num_hits = self._num_loads = self._num_evictions = 0
        self._jitted_apply = jax.jit(self._make_apply_fn(lora), static_argnums=0)

    # --- names --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of all adapters, sorted.

        Raises:
            TypeError: Read inside a traced function.
        """
        _refuse_trace("AdapterBank.names")
        with self._lock:
            return sorted(self._host_cache)

    @property
    def resident(self) -> dict[str, int]:
        """Slots of the adapters on the devices by name, the least recently used first.

        Raises:
            TypeError: Read inside a traced function.
        """
        _refuse_trace("AdapterBank.resident")
        with self._lock:
            return dict(self._slot_by_name)

    @property
    def stats(self) -> BankStats:
        """Counts of operations so far.

        Raises:
            TypeError: Read inside a traced function.
        """
        _refuse_trace("AdapterBank.stats")
        with self._lock:
            return BankStats(
                self._num_compilations,
                self._num_hits,
                self._num_loads,
                self._num_evictions,
                self._host_cache.disk_writes,
                self._host_cache.disk_reads,
            )

    def content_hash(self, name: str) -> str:
        """Returns `jlora.content_hash` of an adapter: the hash of its arrays and static fields.

        Raises:
            UnknownAdapterError: The bank has no adapter of that name.
            TypeError: Called inside a traced function.
        """
        _refuse_trace("AdapterBank.content_hash")
        with self._lock:
            self._check_known([name])
            return self._host_cache.content_hash(name)

    def add(
        self,
        name: str,
        adapter: Mapping[str, Any],
        *,
        replace: bool = False,
        allow_nonfinite: bool = False,
    ) -> None:
        """Adds an adapter to the host. It gets a slot when a batch first uses it.

        Args:
            name: 1 to 128 ASCII letters, digits, dots, dashes and underscores.
            adapter: Adapter of the bank's base, for layers that are stacked or separate. Its arrays
                are copied.
            replace: Replace an adapter of that name, which keeps its slot.
            allow_nonfinite: Accept NaN and Inf, which reach only examples of this adapter.

        Raises:
            ValueError: The name is not valid or in use, or the adapter does not fit the slots or is
                not finite; the bank is unchanged.
            OSError: Another adapter could not be evicted to a file; the bank is unchanged.
            TypeError: Called inside a traced function.
        """
        _refuse_trace("AdapterBank.add", adapter)
        if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(
                f"name={_tree.shorten(name)} is not a valid adapter name. Use 1 to 128 "
                f"letters, digits, dots, dashes and underscores."
            )
        adapter = match_weight_shapes(adapter, self._weight_shapes)
        factors = pad_to_slot(adapter, self._slots)
        nonfinite = [
            path for path, pair in factors.items() if not all(_is_factor_finite(x) for x in pair)
        ]
        if nonfinite and not allow_nonfinite:
            raise ValueError(
                f"The adapter {name!r} has NaN or Inf in the factors of {nonfinite[0]!r} "
                f"({len(nonfinite)} weights), of type {factors[nonfinite[0]].a.dtype}. Use a "
                f"checkpoint from before training diverged, or set allow_nonfinite=True."
            )
        with self._lock:
            if name in self._host_cache and not replace:
                raise ValueError(
                    f"name={name!r} is in use by another adapter. Set replace=True to replace it."
                )
            self._host_cache.add(name, CachedAdapter.from_adapter(adapter, factors))
            self._empty_donated_slots()
            if name in self._slot_by_name:
                self._write_slot(self._slot_by_name[name], factors)

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Replaces an adapter, for all later batches.

        Args:
            name: Name of an adapter of the bank.
            adapter: Adapter that takes its place, and its slot.

        Raises:
            UnknownAdapterError: The bank has no adapter of that name.
            ValueError: The adapter does not fit or is not finite; the old one stays in use.
            TypeError: Called inside a traced function.
        """
        with self._lock:
            self._check_known([name])
            self.add(name, adapter, replace=True)

    def remove(self, name: str) -> None:
        """Removes an adapter. Batches that are running with it are not affected.

        Raises:
            UnknownAdapterError: The bank has no adapter of that name.
            TypeError: Called inside a traced function.
        """
        _refuse_trace("AdapterBank.remove")
        with self._lock:
            self._check_known([name])
            self._host_cache.remove(name)
            if name in self._slot_by_name:
                # The slot's factors are unreachable, and overwritten when it is used again.
                self._free_slots.append(self._slot_by_name.pop(name))

    # --- batches ------------------------------------------------------------------------------

    def slots_for(self, names: Sequence[str | None]) -> tuple[Slots, np.ndarray]:
        """Loads the adapters of a batch into slots, for a program of your own.

        The two results belong together: pass both to one call of `apply_per_example`, which may be
        inside `jax.jit`. They stay as they are when other threads load, replace or remove adapters.
        The next load then copies all slots once, because it cannot write into those of a batch. A
        program that takes the memory of the slots (`donate_argnums`) makes the bank load adapters
        anew for its next batch, and breaks batches that other threads run with these slots.

        Args:
            names: Adapter name of each example; None for the bare base.

        Returns:
            The slots, and the slot of each example as integers of shape (batch,).

        Raises:
            UnknownAdapterError: The bank has no adapter of one of the names; nothing was loaded.
            BankFullError: The batch uses more adapters than there are slots; nothing was loaded.
            OSError: An adapter's file could not be read, or another could not be evicted.
            ValueError: An adapter's file has changed.
            TypeError: Called inside a traced function, or `names` is a string.

        Example:
            >>> import jax
            >>> import numpy as np
            >>> import jlora
            >>> from jlora import multi_lora
            >>> params, x = {"w": np.ones((3, 2), np.float32)}, np.ones((2, 3), np.float32)
            >>> lora = jlora.lora_transform(lambda p, x: x @ p["w"], jlora.LoRA(rank=2, alpha=2))
            >>> adapter = lora.init(jax.random.key(0), params, x)
            >>> bank = multi_lora.AdapterBank(lora, params, adapter, slots=2)
            >>> bank.add("poems", adapter)
            >>> @jax.jit
            ... def step(params, slots, index, x):
            ...     return multi_lora.apply_per_example(lora, params, slots, index, x) ** 2
            >>> slots, index = bank.slots_for(["poems", None])
            >>> step(params, slots, index, x).shape
            (2, 2)
        """
        with self._lock:
            batch = self._load_batch("AdapterBank.slots_for", names)
            self._slots_are_shared = True
        return batch

    def _load_batch(self, caller: str, names: Sequence[str | None]) -> tuple[Slots, np.ndarray]:
        _refuse_trace(caller)
        if isinstance(names, str):
            raise TypeError(
                f"names={names!r} must be a sequence with one name for each example, such as "
                f"[{names!r}]."
            )
        names = list(names)
        distinct = list(dict.fromkeys(name for name in names if name is not None))
        with self._lock:
            self._check_known(distinct)
            self._empty_donated_slots()
            if len(distinct) > self._num_slots - 1:
                raise BankFullError(
                    f"The batch uses {len(distinct)} adapters, but slots={self._num_slots}, of "
                    f"which slot 0 is the bare base, have room for {self._num_slots - 1}. Split "
                    f"the batch, or build a bank of more slots."
                )
            # Resident adapters become the most recently used before any other is loaded, so that no
            # adapter of this batch is evicted for it.
            for name in distinct:
                if name in self._slot_by_name:
                    self._num_hits += 1
                    self._slot_by_name.move_to_end(name)
            for name in distinct:
                if name not in self._slot_by_name:
                    self._load_to_device(name)
            index = [0 if name is None else self._slot_by_name[name] for name in names]
            return self._slots, np.array(index, np.int32)

    def apply(
        self,
        params: PyTree,
        names: Sequence[str | None],
        *inputs: Any,
        batch_axes: Any = 0,
        **kwargs: Any,
    ) -> Any:
        """Returns the model's outputs with each example computed by the adapter of its name.

        Compiled once for each shape of inputs, independent of the adapters in the bank.

        Args:
            params: Parameters of the base.
            names: Adapter name of each example. None: the bare base, bit for bit.
            *inputs: Inputs of the model. Leaves that are not arrays are static and must be
                hashable.
            batch_axes: Batch axis of each input, as for `apply_per_example`.
            **kwargs: Keyword arguments of the model, shared by all examples.

        Raises:
            UnknownAdapterError: The bank has no adapter of one of the names.
            BankFullError: The batch uses more adapters than there are slots.
            OSError: An adapter's file could not be read, or another could not be evicted.
            ValueError: The inputs have another batch size than `names`, or an adapter's file has
                changed.
            TypeError: Called inside a traced function, or `names` is a string.
        """
        _refuse_trace("AdapterBank.apply", params, inputs, kwargs)
        leaves, treedef = jax.tree.flatten((inputs, kwargs))
        arrays = [leaf for leaf in leaves if _tree.is_array(leaf)]
        static = tuple(None if _tree.is_array(leaf) else _StaticInput(leaf) for leaf in leaves)
        axes, axesdef = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
        with self._lock:
            slots, index = self._load_batch("AdapterBank.apply", names)
            index = check_slot_index(index, slots)
            structure = (treedef, static, tuple(axes), axesdef)
            return self._jitted_apply(structure, params, slots, index, arrays)

    def _make_apply_fn(self, lora: LoraTransform) -> Any:
        def apply(structure: Any, params: Any, slots: Any, index: Any, arrays: Any) -> Any:
            self._num_compilations += 1  # Runs only while tracing.
            treedef, static, axes, axesdef = structure
            remaining = iter(arrays)
            leaves = [next(remaining) if leaf is None else leaf.value for leaf in static]
            inputs, kwargs = jax.tree.unflatten(treedef, leaves)
            batch_axes = jax.tree.unflatten(axesdef, axes)
            return apply_per_example(
                lora, params, slots, index, *inputs, batch_axes=batch_axes, **kwargs
            )

        return apply

    def _load_to_device(self, name: str) -> None:
        """Copies an adapter to a free slot, or to that of the least recently used adapter."""
        # First, because it may fail: nothing has changed yet.
        factors = self._host_cache.load_factors(name)
        if not self._free_slots:
            _, evicted_slot = self._slot_by_name.popitem(last=False)
            self._free_slots.append(evicted_slot)
            self._num_evictions += 1
        self._write_slot(self._free_slots[-1], factors)
        self._slot_by_name[name] = self._free_slots.pop()
        self._num_loads += 1

    def _empty_donated_slots(self) -> None:
        """Empties all slots if a caller's program took their memory; the host has the adapters."""
        arrays = jax.tree.leaves(self._slots)
        if not any(array.is_deleted() for array in arrays):
            return
        self._slots = jax.tree.map(
            lambda array: jnp.zeros(array.shape, array.dtype, device=array.sharding), self._slots
        )
        self._slots_are_shared = False
        self._slot_by_name.clear()
        self._free_slots = list(range(self._num_slots - 1, 0, -1))

    def _write_slot(self, slot: int, factors: Mapping[str, PaddedFactors]) -> None:
        # A batch of slots_for may still use the buffers, which set_slot would take.
        write = copy_and_set_slot if self._slots_are_shared else set_slot
        self._slots = write(self._slots, slot, factors)
        self._slots_are_shared = False

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = next((name for name in names if name not in self._host_cache), None)
        if unknown is not None:
            # Other requests wait for this one, so not all of many adapters are compared.
            some = itertools.islice(self._host_cache, 1000)
            nearest = _tree.closest_matches(str(unknown), some)
            raise UnknownAdapterError(
                f"Unknown adapter {_tree.shorten(unknown)}. Nearest: {nearest}. Add it first."
            )


class _StaticInput:
    """An input that is part of the compiled program. 1, 1.0 and True are equal and not the same."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self._key = type(value), value, repr(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticInput) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _refuse_trace(caller: str, *trees: Any) -> None:
    """Raises inside a traced function, where a bank would be read or changed only once.

    Raises:
        TypeError: An operation would be traced now, or an array of the trees is.
    """
    tracers = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, Tracer)]
    if tracers or isinstance(jnp.zeros(()), Tracer):
        raise TypeError(
            f"{caller} was called inside a traced function (jax.jit, vmap, grad, scan): the "
            f"program would keep the adapters of this call. Call slots, index = "
            f"bank.slots_for(names) outside, and multi_lora.apply_per_example(lora, params, slots, "
            f"index, ...) inside."
        )


def _is_factor_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())
