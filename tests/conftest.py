"""Eight devices on one CPU, and quick compilation, before JAX looks."""

import os

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
