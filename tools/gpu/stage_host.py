"""Stage 5: what scheduler, order and planner cost the host's CPU; needs no device."""

import os
import subprocess
import sys

from stage import OUT, ROOT, main

COMMANDS = {
    name: ["-m", f"vllm_radix_bench.micro.{name}"]
    for name in ("scheduler", "attention_plan", "ordering")
}


def run() -> bool:
    """Write all tables to one file; return whether all were made."""
    if hasattr(os, "sched_setaffinity"):
        # The other half is for the stages that time the device.
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cpus[len(cpus) // 2 :])
    good = True
    with (OUT / "5-host.txt").open("w") as out:
        with open("/proc/cpuinfo") as lines:
            out.write(next((x for x in lines if "model name" in x), "\n"))
        for name, command in COMMANDS.items():
            out.flush()
            done = subprocess.run(
                [sys.executable, *command],
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""},
                cwd=ROOT,
            )
            good = good and done.returncode == 0
            print(f"{name}: status {done.returncode}", flush=True)
    print((OUT / "5-host.txt").read_text())
    return good


if __name__ == "__main__":
    main(run)
