"""The pictures of docs/timelines.md: trains a short run under each schedule, draws its report, and takes pictures of it.

    python docs/pictures.py [FOLDER]

Needs chromium. Runs stay in FOLDER where one is given, and are not trained again when they are there. On a machine of fewer
cores than ranks the pictures show the cores' sharing, too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "tests"))
from chromium import Browser  # noqa: E402

BATCH = ["data.sequence=256", "train.global_batch=16", "train.evaluate_every=0", "data.held_out=0", "train.steps=12"]
SCHEDULES = {
    "gpipe": "pp=2,schedule=gpipe,micro_batch=2",
    "1f1b": "pp=2,schedule=1f1b,micro_batch=2",
    "interleaved": "pp=2,schedule=interleaved,vp=2,micro_batch=2",
    "zb": "pp=2,schedule=zb,micro_batch=2",
    "zbv": "pp=2,schedule=zbv,micro_batch=2",
}
RUNS = SCHEDULES | {"dp": "dp=2,micro_batch=4", "dp-pp": "dp=2,pp=2,micro_batch=2"}
OVERLAP = "dp"


def train(folder: Path, name: str, layout: str) -> Path:
    """The run's directory, with its report."""
    run = folder / name
    fiveply = [sys.executable, "-m", "fiveply.cli"]
    if not run.is_dir():
        settings = [*BATCH, f"folder={folder}", f"name={name}", "precision.parameters=float32"]
        sets = [part for setting in settings for part in ("--set", setting)]
        command = [*fiveply, "train", "--model", "2m", "--data", "shakespeare", "--layout", layout, *sets]
        subprocess.run(command, check=True)
    subprocess.run([*fiveply, "report", str(run)], check=True)
    return run


def main(folder: Path) -> None:
    reports = {name: train(folder, name, layout) / "report.html" for name, layout in RUNS.items()}
    with Browser() as browser:
        for name in SCHEDULES:
            browser.open(reports[name], 1100).picture(DOCS / f"timeline-{name}.png", ".recorded .picture")
        browser.open(reports["dp-pp"], 1280).picture(DOCS / "timeline.png", "section[aria-labelledby=steps]")
        narrow = browser.open(reports["dp-pp"], 390, touch=True)
        narrow.picture(DOCS / "timeline-narrow.png", "section[aria-labelledby=steps]")
        page = browser.open(reports[OVERLAP], 1100)
        # The last micro-batch's backward on rank 0 and what follows it, read at the largest reduction.
        page.run("""(() => {
            const [timeline] = timelines, own = timeline.spans.filter(span => span.row === 0);
            const last = own.filter(span => span.kind === "backward").at(-1);
            const end = own.find(span => span.kind === "sums").start, margin = 0.03 * (end - last.start);
            timeline.show(last.start - margin, end + margin);
            const reductions = own.filter(span => span.axis === "dp" && span.kind === "collective");
            timeline.pick(reductions.reduce((a, b) => a.bytes < b.bytes ? b : a), true);
        })()""")
        page.settle()
        page.picture(DOCS / "timeline-overlap.png", ".recorded .picture")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as made:
            main(Path(made))
