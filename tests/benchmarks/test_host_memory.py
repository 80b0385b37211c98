"""Peak of host memory of operations on a checkpoint."""

from __future__ import annotations

import json

from benchmarks.speed import host_memory
from benchmarks.speed._tables import RESULTS


def test_peaks_follow_the_largest_tensor() -> None:
    result = json.loads((RESULTS / "host_memory.json").read_text())
    assert result["shape"] == host_memory.SHAPES["large"]
    peaks = {row["operation"]: row["largest_tensors"] for row in result["rows"]}
    assert {"load", "load quantized", "merge_to_dtype", "export merged", "export peft"} < {*peaks}
    assert all(peak <= 2.5 for peak in peaks.values()), peaks
