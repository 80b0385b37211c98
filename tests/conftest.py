"""Settings before JAX starts: eight CPU devices, fast compilation, and a compilation cache."""

import importlib.metadata
import itertools
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Level 0 omits the optimization of machine code, which would be most of the time of the tests. The
# HLO of products and fusions, which the laws inspect, is the same.
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
# One piece of machine code a program: the default splits each into 32, which takes longer for
# programs as small as those of the tests.
_FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
if importlib.metadata.version("jaxlib").startswith("0.10."):
    # Halves the compilation time. Later releases have no choice of emitters, and an unknown flag
    # ends the process.
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if os.environ["JAX_PLATFORMS"] == "cpu":  # Level 0 makes kernels of GPUs compile for minutes.
    os.environ["XLA_FLAGS"] = " ".join([*_FLAGS, os.environ.get("XLA_FLAGS", "")])

# Workers and later runs share compiled programs, by text of the program, flags and versions. The
# compilation of many thousand small programs is most of the time of the tests.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

pytest_plugins = ["_support.training_fixtures", "_support.groups"]

_MAPS = pathlib.Path("/proc/self/maps")
_MAX_MAPS = 30_000
_test_count = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Clears compiled programs before they fill the table of memory maps.

    A program takes about 25 maps, and a process may have 65,530 by Linux's default. A
    compilation beyond this limit ends it with a segmentation fault.
    """
    if next(_test_count) % 25 or not _MAPS.exists():
        return
    with _MAPS.open() as maps:
        if sum(1 for _ in maps) > _MAX_MAPS:
            import jax

            jax.clear_caches()
