"""Eight devices on one CPU, and quick compilation, before JAX looks."""

import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Level 0 leaves out the optimisation of machine code, which is most of the tests' time. What the
# laws look at, the compiler's own program of products and fusions, is the same.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
    ]
)

_MAPS = pathlib.Path("/proc/self/maps")
_MANY = 30_000
_ended = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Lets go of compiled programs before they fill the table of memory maps.

    A program takes about 25 maps, and a process may have 65,530 by Linux's default; the next
    compilation beyond that ends it with a segmentation fault.
    """
    if next(_ended) % 25 or not _MAPS.exists():
        return
    with _MAPS.open() as maps:
        if sum(1 for _ in maps) > _MANY:
            import jax

            jax.clear_caches()
