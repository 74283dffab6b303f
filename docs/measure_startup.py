"""What the plugin adds to napari's start-up: with and without it in turn, each in a new process.

$ xvfb-run -a python docs/measure_startup.py [ROUNDS]
"""

import statistics
import subprocess
import sys

_START = """
import importlib.metadata as metadata, sys, time
start = time.perf_counter()
# Both look at each name, so that both pay for that.
left_out = "napari-semanticblur" if sys.argv[1] == "without" else "nothing"
found = metadata.distributions
metadata.distributions = lambda **how: (d for d in found(**how) if d.metadata["Name"] != left_out)
import napari
viewer = napari.Viewer()
print(time.perf_counter() - start)
import npe2
names = {manifest.name for manifest in npe2.PluginManager.instance().iter_manifests()}
assert ("napari-semanticblur" in names) == (sys.argv[1] == "with"), names
viewer.close()
"""


def main(n_rounds: int) -> None:
    """Measure and print."""
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for i in range(n_rounds + 1):
        for which in seconds if i % 2 else reversed(seconds):
            ran = subprocess.run(
                [sys.executable, "-c", _START, which], capture_output=True, text=True, check=True
            )
            if i:  # the first is for the disk's cache
                seconds[which].append(float(ran.stdout.split()[-1]))
    without, whole = (statistics.median(seconds[which]) for which in ("without", "with"))
    differences = [b - a for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    print(
        f"napari opens in {without:.3f} s, with the plugin in {whole:.3f} s; median difference of "
        f"{n_rounds} pairs {statistics.median(differences) * 1e3:.0f} ms, of the fastest of each "
        f"{(min(seconds['with']) - min(seconds['without'])) * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main(int((sys.argv[1:] or ["12"])[0]))
