"""Eight devices on one CPU, quick compilation, and no program compiled twice, before JAX looks."""

import importlib.metadata
import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Level 0 leaves out the optimisation of machine code, which is most of the tests' time. What the
# laws look at, the compiler's own program of products and fusions, is the same.
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Half the time of a compilation; later releases have one way alone, and an unknown flag ends
    # the process.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])

# Both workers and later runs find what one has compiled; the programs' text, the flags and the
# versions are the key. Most of what a test waits for is one of many thousand small programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

pytest_plugins = ["_support.training_fixtures"]

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
