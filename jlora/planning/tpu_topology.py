"""TPU slices that are not attached: their devices, and the performance of their chips."""

from __future__ import annotations

import math
import os
import re
from typing import Any, NamedTuple

from jax.errors import JaxRuntimeError
from jax.experimental import topologies


class TPUChip(NamedTuple):
    """Peak performance of one chip.

    Attributes:
        name: Name in topologies, such as "v5e".
        flops_per_s: Peak of bfloat16 products in FLOP/s.
        hbm_bytes: Memory capacity in bytes.
        hbm_bytes_per_s: Memory bandwidth.
        ici_bytes_per_s: Interconnect bandwidth over all links together, one way.
        num_ici_links: Number of interconnect links, two for each dimension of the torus.
        max_slice_chips: Number of chips of the largest slice.

    Example:
        >>> from jlora.planning import TPUChip
        >>> TPUChip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 4, 256).hbm_bytes_per_s
        819000000000.0
    """

    name: str
    flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    ici_bytes_per_s: float
    num_ici_links: int
    max_slice_chips: int


_GB, _GIB = 1e9, 2**30

# References:
#     Google, Cloud TPU documentation, pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e"
#     (https://cloud.google.com/tpu/docs/v4 and so on): peak compute, HBM capacity and bandwidth,
#     interconnect bandwidth, and the largest slices. The pages of v5e and v6e give the interconnect
#     in both directions together (400 and 800 GB/s).
#     Jouppi et al., TPU v4, arXiv:2304.01433, table 4: v4's six links of 50 GB/s.
TPU_CHIPS: dict[str, TPUChip] = {
    chip.name: chip
    for chip in (
        TPUChip("v4", 275e12, 32 * _GIB, 1200 * _GB, 300 * _GB, 6, 4096),
        TPUChip("v5e", 197e12, 16 * _GIB, 819 * _GB, 200 * _GB, 4, 256),
        TPUChip("v5p", 459e12, 95 * _GIB, 2765 * _GB, 600 * _GB, 6, 6144),
        TPUChip("v6e", 918e12, 32 * _GIB, 1638 * _GB, 400 * _GB, 4, 256),
    )
}

# One device for the two cores of a chip, as in training.
_TOPOLOGY_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}

# Without these libtpu queries the network for the TPU of its host, and fails without one.
_OFFLINE_TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several processes may compile at a time.
}


class TPUTopology(NamedTuple):
    """A slice of a TPU pod.

    Attributes:
        name: Name of the slice, such as "v5e:4x4".
        chip: Performance of each chip.
        devices: Devices to compile for, one per chip; nothing can run on them.

    Example:
        >>> from jlora.planning import TPUChip, TPUTopology
        >>> chip = TPUChip("v5e", 197e12, 16 * 2**30, 819e9, 200e9, 4, 256)
        >>> TPUTopology("v5e:2x2", chip, []).chip.name
        'v5e'
    """

    name: str
    chip: TPUChip
    devices: list[Any]


def get_tpu_topology(name: str) -> TPUTopology:
    """Returns a TPU slice by its name.

    Args:
        name: Chip and shape of the slice, such as "v5e:4x4" or "v5p:4x4x8". Slices of v5e and v6e
            have two dimensions, those of v4 and v5p three.

    Raises:
        ValueError: The chip is unknown, or has no slice of that shape.
        ModuleNotFoundError: The TPU compiler is not installed.

    Example:
        >>> from jlora.planning import get_tpu_topology
        >>> topology = get_tpu_topology("v5e:2x2")  # doctest: +SKIP
        >>> len(topology.devices)  # doctest: +SKIP
        4
    """
    chip, shape = _parse_topology_name(name)
    for variable, value in _OFFLINE_TPU_ENV.items():
        os.environ.setdefault(variable, value)
    try:
        options = dict(_TOPOLOGY_OPTIONS.get(chip.name, {}))
        if math.prod(shape) == 1:
            options["chips_per_host_bounds"] = (1, 1, 1)  # The default is four chips per host.
        description = topologies.get_topology_desc(name, "tpu", **options)
    except RuntimeError as error:
        if "not installed" in str(error):
            raise ModuleNotFoundError(
                f"topology={name!r} needs the TPU compiler, which is not installed. Install it "
                f"with `pip install 'jlora[plan]'`; a TPU is not needed.",
                name="libtpu",
            ) from error
        if not isinstance(error, JaxRuntimeError) or "INVALID_ARGUMENT" not in str(error):
            raise
        raise ValueError(
            f"topology={name!r} is not a valid slice: {error}. Use a shape such as "
            f"{_example_topology_name(chip)!r}."
        ) from error
    devices = list(description.devices)
    assert len(devices) == math.prod(shape), name
    return TPUTopology(name, chip, devices)


def _parse_topology_name(name: str) -> tuple[TPUChip, tuple[int, ...]]:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in TPU_CHIPS:
        examples = sorted(_example_topology_name(chip) for chip in TPU_CHIPS.values())
        raise ValueError(
            f"topology={name!r} must be a chip and the shape of a slice: one of {list(TPU_CHIPS)}, "
            f"such as {examples}."
        )
    chip, shape = TPU_CHIPS[match[1]], tuple(map(int, match[2].split("x")))
    if len(shape) != chip.num_ici_links // 2 or 0 in shape:
        raise ValueError(
            f"topology={name!r}: the shape of {chip.name} must have {chip.num_ici_links // 2} "
            f"positive dimensions, such as {_example_topology_name(chip)!r}."
        )
    if math.prod(shape) > chip.max_slice_chips:
        raise ValueError(
            f"topology={name!r} has {math.prod(shape)} chips, but the largest slice of {chip.name} "
            f"has {chip.max_slice_chips}. Plan for a single slice; several communicate over a "
            f"slower network."
        )
    return chip, shape


def _example_topology_name(chip: TPUChip) -> str:
    return f"{chip.name}:{'4x4x4' if chip.num_ici_links == 6 else '4x4'}"
