"""Adapters by name on devices, on the host and on disk."""

from __future__ import annotations

import collections
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jlora import _tree
from jlora._tree import PyTree
from jlora.adapters.base import get_adapter_leaves, weight_indices
from jlora.multi_lora.batched_apply import apply_per_example, check_slot_index
from jlora.multi_lora.host_cache import CachedAdapter, HostCache
from jlora.multi_lora.slots import Slots, empty_slots, pad_to_slot, set_slot
from jlora.transform import LoraTransform

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")


class UnknownAdapterError(KeyError):
    """There is no adapter of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class BankFullError(RuntimeError):
    """A batch asks for more adapters than there are slots."""


class BankStats(NamedTuple):
    """What a bank has done so far.

    Attributes:
        compilations: How often `apply` was compiled.
        hits: Adapters that a batch asked for and that were on the devices.
        loads: Those that were brought there for it.
        evictions: Those that gave up their slot to another.
        disk_writes: Those that gave up the host's memory and were written to disk.
        disk_reads: Those that were read from there.
    """

    compilations: int
    hits: int
    loads: int
    evictions: int
    disk_writes: int
    disk_reads: int


class AdapterBank:
    """Adapters of one model by name, each row of a batch with its own.

    Slot 0 is the bare base, for rows that are given None. Adapters that were used least recently
    give up their slots to others; all stay on the host, or, beyond `max_host_adapters` of them, in files.
    Methods may be called from several threads, and a batch sees each adapter as it was or as it is.

        bank = AdapterBank(lora, params, adapter, slots=9, rank=16)
        bank.add("poems", adapter)
        logits = bank.apply(params, ["poems", None, "poems"], tokens)
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
        """Makes an empty bank.

        Args:
            lora: Around the model; its rules do not matter.
            params: The base, or its shapes.
            like: An adapter, or its shapes, of all weights that any adapter may change.
            slots: How many adapters are on the devices at once, the bare base counted.
            rank: The highest; that of `like` when left out.
            dtype: Of the factors; that of the weight they change when left out. Products cast them
                to the activation's type: give float32 where the model computes wider than its
                weights are.
            max_host_adapters: How many adapters the host's memory holds at most; all when left out.
            folder: For files of those beyond; needed where `max_host_adapters` is given.

        Raises:
            ValueError: When `like` does not fit, or there is no room.
        """
        flat = _tree.flatten_with_paths(params)
        where = weight_indices(flat, like)
        highest = max(getattr(leaf, "rank", 1) for leaf in get_adapter_leaves(like).values())
        dtypes = {path: dtype or flat.leaves[place].dtype for path, place in where.items()}
        self._slots = empty_slots(like, slots, highest if rank is None else rank, dtypes)
        self._num_slots = slots
        self._host_cache = HostCache(max_host_adapters, folder)
        self._slot_by_name: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._free_slots = list(range(slots - 1, 0, -1))
        self._lock = threading.RLock()
        self._num_compilations = self._num_hits = self._num_loads = self._num_evictions = 0
        self._jitted_apply = jax.jit(self._make_apply_fn(lora), static_argnums=0)

    # --- names --------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Of all adapters, sorted."""
        with self._lock:
            return sorted(self._host_cache.names)

    @property
    def resident(self) -> dict[str, int]:
        """The slots of those that are there, the least recently used first."""
        with self._lock:
            return dict(self._slot_by_name)

    @property
    def stats(self) -> BankStats:
        """What was done so far."""
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
        """The hash of an adapter's numbers and facts, as `jlora.content_hash` makes it.

        Raises:
            UnknownAdapterError: There is none of that name.
        """
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
        """Takes in an adapter. It gets a slot when it is first used.

        Args:
            name: Letters, digits, dots, dashes and underscores, at most 128.
            adapter: Of this base. Its numbers are copied.
            replace: Whether one of that name gives way; it keeps its slot.
            allow_nonfinite: Whether NaN and Inf are let in, which reach rows of this adapter alone.

        Raises:
            ValueError: For another name, one that is taken, or an adapter that does not fit; the
                bank is as it was.
        """
        if not isinstance(name, str) or not _ADAPTER_NAME.fullmatch(name) or name in (".", ".."):
            raise ValueError(
                f"name={name!r} cannot be an adapter's. Use 1 to 128 letters, digits, dots, dashes "
                f"and underscores."
            )
        factors = pad_to_slot(adapter, self._slots)
        bad = [
            path for path, pair in factors.items() if not all(_is_factor_finite(x) for x in pair)
        ]
        if bad and not allow_nonfinite:
            raise ValueError(
                f"The adapter {name!r} holds NaN or Inf for {bad[0]!r} ({len(bad)} weights), in "
                f"{factors[bad[0]].a.dtype}. Go back to a checkpoint from before it diverged."
            )
        with self._lock:
            if name in self._host_cache.names and not replace:
                raise ValueError(f"There is an adapter {name!r} already. Give replace=True.")
            self._host_cache.add(name, CachedAdapter.from_adapter(adapter, factors))
            if name in self._slot_by_name:
                self._slots = set_slot(self._slots, self._slot_by_name[name], factors)

    def replace(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Puts another adapter in the place of one, for batches from now on.

        Raises:
            UnknownAdapterError: There is none of that name.
            ValueError: It does not fit; the old one still serves.
        """
        with self._lock:
            self._check_known([name])
            self.add(name, adapter, replace=True)

    def remove(self, name: str) -> None:
        """Forgets an adapter. Batches that were begun with it end with it.

        Raises:
            UnknownAdapterError: There is none of that name.
        """
        with self._lock:
            self._check_known([name])
            self._host_cache.remove(name)
            if name in self._slot_by_name:
                # What lies there is out of reach, and overwritten when the slot is used again.
                self._free_slots.append(self._slot_by_name.pop(name))

    # --- batches ------------------------------------------------------------------------------

    def slots_for(self, names: Sequence[str | None]) -> tuple[Slots, np.ndarray]:
        """The slots with these adapters in them, and which one each row has, (rows,) integers.

        The two belong together: hand both to one call of `apply_rows`, or to a compiled function of
        your own. The next adapter that is brought to the devices gives up these arrays.

        Args:
            names: One for each row; None for the bare base.

        Raises:
            UnknownAdapterError: There is none of such a name; nothing was moved.
            BankFullError: They are more than there are slots; nothing was moved.
        """
        wanted = list(dict.fromkeys(name for name in names if name is not None))
        with self._lock:
            self._check_known(wanted)
            if len(wanted) > self._num_slots - 1:
                raise BankFullError(
                    f"The batch asks for {len(wanted)} adapters, and the bank has {self._num_slots} "
                    f"slots with the bare base. Split the batch, or make a bank of more slots."
                )
            # Those that are there become the most recent before any other takes a slot, so that
            # what gives one up is never of this batch.
            for name in wanted:
                if name in self._slot_by_name:
                    self._num_hits += 1
                    self._slot_by_name.move_to_end(name)
            for name in wanted:
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
        """What the model returns where every row has the adapter of its name.

        It is compiled once for each shape of inputs, whatever adapters there are.

        Args:
            params: The base.
            names: One name for each row; None for the bare base, whose rows are those of the base.
            *inputs: As the model takes them; what is no array is static, and has to be hashable.
            batch_axes: Along which axis of each input the rows are, as for `apply_rows`.
            **kwargs: Likewise, but shared by all rows.

        Raises:
            UnknownAdapterError: There is none of such a name; others are unaffected.
            BankFullError: They are more than there are slots.
            ValueError: The inputs have another number of rows.
        """
        flat, treedef = jax.tree.flatten((inputs, kwargs))
        arrays = [leaf for leaf in flat if _tree.is_array(leaf)]
        static = tuple(None if _tree.is_array(leaf) else (leaf,) for leaf in flat)
        axes, axesdef = jax.tree.flatten(batch_axes, is_leaf=lambda axis: axis is None)
        with self._lock:
            placed, index = self.slots_for(names)
            index = check_slot_index(index, placed)
            facts = (treedef, static, tuple(axes), axesdef)
            return self._jitted_apply(facts, params, placed, index, arrays)

    def _make_apply_fn(self, lora: LoraTransform) -> Any:
        def run(facts: Any, params: Any, placed: Any, index: Any, arrays: Any) -> Any:
            self._num_compilations += 1  # Tracing runs this, and nothing else does.
            treedef, static, axes, axesdef = facts
            following = iter(arrays)
            leaves = [next(following) if one is None else one[0] for one in static]
            inputs, kwargs = jax.tree.unflatten(treedef, leaves)
            row_axes = jax.tree.unflatten(axesdef, axes)
            return apply_per_example(
                lora, params, placed, index, *inputs, batch_axes=row_axes, **kwargs
            )

        return run

    def _load_to_device(self, name: str) -> None:
        """Brings an adapter to the devices, in the place of the least recently used."""
        factors = self._host_cache.load_factors(
            name
        )  # First: it may fail, and nothing has changed yet.
        if not self._free_slots:
            _, number = self._slot_by_name.popitem(last=False)
            self._free_slots.append(number)
            self._num_evictions += 1
        number = self._free_slots[-1]
        self._slots = set_slot(self._slots, number, factors)
        self._slot_by_name[name] = self._free_slots.pop()
        self._num_loads += 1

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._host_cache.names
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UnknownAdapterError(
                f"There is no adapter {unknown[0]!r}; the nearest are "
                f"{_tree.closest_matches(str(unknown[0]), sorted(known))}. Add it first."
            )


def _is_factor_finite(array: np.ndarray) -> bool:
    return bool(np.isfinite(array.astype(np.float32)).all())
