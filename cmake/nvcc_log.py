"""Runs one nvcc command, keeps its ptxas report beside the object, and fails when ptxas had to serialise wgmma.

ptxas only warns when it cannot keep wgmma instructions in flight (C7510) or ignores setmaxnreg (C7508); the kernel then
runs at a fraction of its speed.
"""

import subprocess
import sys
from pathlib import Path

command = sys.argv[1:]
done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
if "-o" in command:
    target = Path(command[command.index("-o") + 1])
    if target.suffix == ".o":
        target.with_suffix(".ptxas.txt").write_text(done.stderr)
shown = [
    line for line in done.stderr.splitlines() if not line.startswith("ptxas info") and "bytes stack frame" not in line
]
if shown:
    print("\n".join(shown), file=sys.stderr)
if "C7510" in done.stderr or "C7508" in done.stderr:
    sys.exit("nvcc_log: ptxas serialised wgmma (C7510) or ignored setmaxnreg (C7508): see the lines above")
sys.exit(done.returncode)
