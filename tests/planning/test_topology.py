"""TPU slices by name, and errors of invalid names."""

from __future__ import annotations

from typing import Any

import pytest
from jax.experimental import topologies

from jlora.planning import tpu_topology
from jlora.training import sharding


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", r"must be a chip and the shape .*\['v4', 'v5e', 'v5p', 'v6e'\], such as"),
        ("v5e", "must be a chip and the shape of a slice"),
        ("v5e:4x", "must be a chip and the shape"),
        ("v5e:4x4x4", "the shape of v5e must have 2 positive dimensions, such as 'v5e:4x4'"),
        ("v5p:4x4", "the shape of v5p must have 3 positive dimensions, such as 'v5p:4x4x4'"),
        ("v5e:0x4", "must have 2 positive dimensions"),
        ("v6e:32x32", "has 1024 chips, but the largest slice of v6e has 256"),
    ],
)
def test_get_tpu_topology_invalid_name_raises(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tpu_topology.get_tpu_topology(name)


def test_get_tpu_topology_without_libtpu_raises(monkeypatch: Any) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jlora\[plan\]'"):
        tpu_topology.get_tpu_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "sizes", "shape"),
    [
        ("v4:2x2x2", {"fsdp": 4, "tensor": 2}, (1, 4, 2)),  # One device for each chip's two cores.
        ("v5e:1x1", {}, (1, 1, 1)),
        ("v5e:16x16", {"fsdp": -1}, (1, 256, 1)),
        ("v5p:4x4x4", {"fsdp": 32, "tensor": 2}, (1, 32, 2)),  # Axes that split sides of the torus.
        ("v5p:8x8x8", {"fsdp": 64}, (8, 64, 1)),
        ("v6e:4x4", {"fsdp": 8}, (2, 8, 1)),
    ],
)
def test_make_mesh_of_unattached_chips(name: str, sizes: Any, shape: Any) -> None:
    pytest.importorskip("libtpu")
    found = tpu_topology.get_tpu_topology(name)
    assert sharding.make_mesh(sizes, found.devices).devices.shape == shape
    assert found.chip.name == name.split(":")[0]
    assert found.devices[0].platform == "tpu"


def test_get_tpu_topology_invalid_shape_raises() -> None:
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match="'v5e:3x5' is not a valid slice.*such as 'v5e:4x4'"):
        tpu_topology.get_tpu_topology("v5e:3x5")


def test_tpu_chips_bandwidth_per_link() -> None:
    each = {
        name: chip.ici_bytes_per_s / chip.num_ici_links / 1e9
        for name, chip in tpu_topology.TPU_CHIPS.items()
    }
    assert each == {"v4": 50, "v5e": 50, "v5p": 100, "v6e": 100}
