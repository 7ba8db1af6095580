"""Predict every kernel on every device.

    python -m bench.gpu.roofline                  # table on the terminal
    python -m bench.gpu.roofline --out            # also bench/results/predicted.json and predicted.md

Needs ``bench/results/compile.json``, which ``python -m bench.gpu.compile_report --out`` writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from bench.gpu.roofline import predict
from bench.gpu.roofline.devices import DEVICES
from bench.harness import results_file
from bench.report.kernel_tables import predicted
from bench.report.units import duration


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="bench.gpu.roofline", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--compile", type=Path, default=results_file.RESULTS / "compile.json")
    parser.add_argument("--out", action="store_true", help="write predicted.json and predicted.md")
    options = parser.parse_args(arguments)
    if not options.compile.exists():
        print(f"bench.gpu.roofline: {options.compile} must exist; python -m bench.gpu.compile_report --out writes it",
              file=sys.stderr)  # fmt: skip
        return 2
    rows = predict.load(options.compile)
    found = [predict.predict(case, device, rows) for case in predict.CASES for device in DEVICES]
    table = predicted([dataclasses.asdict(one) for one in found])
    print(table)
    if options.out:
        head = {
            "prediction": "from data-sheet peaks, counted work and compiled code; nothing here was measured",
            "assumptions": {"copy": predict.COPY, "latency_s": predict.LATENCY_S, "launch_s": predict.LAUNCH_S,
                            "issue": predict.ISSUE, "product": predict.PRODUCT},
            "versions": results_file.versions("torch", "triton"),
            "revision": results_file.revision(),
        }  # fmt: skip
        document = {**head, "rows": [dataclasses.asdict(one) for one in found]}
        (results_file.RESULTS / "predicted.json").write_text(json.dumps(document, indent=1) + "\n")
        (results_file.RESULTS / "predicted.md").write_text(
            "# Predicted, not measured\n\nA static model: bytes and operations counted from each kernel's own loads, "
            "stores and products, occupancy from the registers and shared memory of its machine code, data-sheet "
            "peaks. `bench/gpu/gpu.sh` prints what a device measures beside it.\n\nAssumptions: a copy reaches "
            f"{predict.COPY} of the memory peak, latency {predict.LATENCY_S * 1e9:.0f} ns, a launch "
            f"{duration(predict.LAUNCH_S)}, half of the issue slots, product loops at {predict.PRODUCT} of the "
            f"matrix peak.\n\n{table}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
