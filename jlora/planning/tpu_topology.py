"""Devices of TPU slices that are not here, and what their chips can do."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError
from jax.experimental import topologies


class TPUChip(NamedTuple):
    """What one chip can do at most.

    Attributes:
        name: As in the names of topologies.
        flops_per_s: Of bfloat16 products.
        hbm_bytes: Its memory.
        hbm_bytes_per_s: Between memory and cores.
        ici_bytes_per_s: To its neighbours, over all links together, one way.
        num_ici_links: How many those are, two for each dimension of the torus.
        max_slice_chips: How many the largest slice has.
    """

    name: str
    flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    num_ici_links: int
    max_slice_chips: int


_GB, _GIB = 1e9, 2**30

TPU_CHIPS: dict[str, TPUChip] = {
    chip.name: chip
    for chip in (
        TPUChip("v4", 275e12, 32 * _GIB, 1200 * _GB, 300 * _GB, 6, 4096),
        TPUChip("v5e", 197e12, 16 * _GIB, 819 * _GB, 200 * _GB, 4, 256),
        TPUChip("v5p", 459e12, 95 * _GIB, 2765 * _GB, 600 * _GB, 6, 6144),
        TPUChip("v6e", 918e12, 32 * _GIB, 1638 * _GB, 400 * _GB, 4, 256),
    )
}

"""The chips that plans know, by name.

References:
    Google, Cloud TPU documentation, the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
    (https://cloud.google.com/tpu/docs/v4 and so on): peak compute, HBM capacity and bandwidth, and
    interconnect bandwidth, of which the pages for v5e and v6e give both ways together (400 and 800
    GB/s), and the largest slices. Jouppi et al., TPU v4, arXiv:2304.01433, table 4, for v4's six
    links of 50 GB/s.
"""

# One device for each chip's two cores, as training has it.
_TOPOLOGY_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}

# Without these libtpu asks the network which TPU its host has, and says that there is none.
_OFFLINE_TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several may compile; one at a time may hold a TPU.
}


class TPUTopology(NamedTuple):
    """A slice of a TPU pod.

    Attributes:
        name: As it was asked for.
        chip: What each of its chips can do.
        devices: One for each chip, to lower and compile for; nothing runs on them.
    """

    name: str
    chip: TPUChip
    devices: list[Any]


def get_tpu_topology(name: str) -> TPUTopology:
    """A slice by its name, such as `v5e:4x4` or `v5p:4x4x8`: a chip, and how many each way.

    Args:
        name: v5e and v6e are flat, v4 and v5p have three directions.

    Raises:
        ValueError: There is no such chip, or no slice of that form.
        ModuleNotFoundError: The compiler for TPUs is not installed.
    """
    chip, form = _parse_topology_name(name)
    for variable, value in _OFFLINE_TPU_ENV.items():
        os.environ.setdefault(variable, value)
    try:
        options = dict(_TOPOLOGY_OPTIONS.get(chip.name, {}))
        if math.prod(form) == 1:
            options["chips_per_host_bounds"] = (
                1,
                1,
                1,
            )  # Hosts have four chips if nothing is said.
        described = topologies.get_topology_desc(name, "tpu", **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ModuleNotFoundError(
                f"topology={name!r} needs the compiler for TPUs, which is not installed. Install "
                f"it with `pip install 'jlora[plan]'`; it needs no TPU.",
                name="libtpu",
            ) from error
        if not isinstance(error, JaxRuntimeError) or "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"topology={name!r} is no slice that there is: {error}. Give sides such as "
            f"{_example_topology_name(chip)!r}."
        ) from error
    devices = list(described.devices)
    assert len(devices) == math.prod(form), name
    return TPUTopology(name, chip, devices)


def _parse_topology_name(name: str) -> tuple[TPUChip, tuple[int, ...]]:
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not found or found[1] not in TPU_CHIPS:
        known: Mapping[str, str] = {
            chip.name: _example_topology_name(chip) for chip in TPU_CHIPS.values()
        }
        raise ValueError(
            f"topology={name!r} names no slice that jlora knows. Give a chip and the sides of the "
            f"slice: one of {list(TPU_CHIPS)}, such as {sorted(known.values())}."
        )
    chip, form = TPU_CHIPS[found[1]], tuple(map(int, found[2].split("x")))
    if len(form) != chip.num_ici_links // 2 or 0 in form:
        raise ValueError(
            f"topology={name!r} has {len(form)} sides, and slices of {chip.name} have "
            f"{chip.num_ici_links // 2}. Write it like {_example_topology_name(chip)!r}."
        )
    if math.prod(form) > chip.max_slice_chips:
        raise ValueError(
            f"topology={name!r} has {math.prod(form)} chips, and the largest slice of {chip.name} "
            f"has {chip.max_slice_chips}. Plan for one slice; several exchange over a slower network."
        )
    return chip, form


def _example_topology_name(chip: TPUChip) -> str:
    return f"{chip.name}:{'4x4x4' if chip.num_ici_links == 6 else '4x4'}"
