"""The pictures of docs/timelines.md: trains a short run under each schedule, draws its report, and takes pictures of it.

    python docs/pictures.py [FOLDER]     # runs/pictures by default

Needs chromium. Each run is made TRIES times, and the one whose recorded step was the quickest is drawn: the one that other
work on the machine disturbed least. Runs stay in FOLDER, and are not made again when they are there. With
fewer cores than ranks a picture shows how ranks share cores, too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fiveply.timeline import read, recorded_steps

DOCS = Path(__file__).parent
FIVEPLY = [sys.executable, "-m", "fiveply.cli"]
BATCH = ["data.sequence=256", "train.global_batch=16", "train.evaluate_every=0", "data.held_out=0", "train.steps=5"]
SCHEDULES = {
    "gpipe": "pp=2,schedule=gpipe,micro_batch=2",
    "1f1b": "pp=2,schedule=1f1b,micro_batch=2",
    "interleaved": "pp=2,schedule=interleaved,vp=2,micro_batch=2",
    "zb": "pp=2,schedule=zb,micro_batch=2",
    "zbv": "pp=2,schedule=zbv,micro_batch=2",
}
RUNS = SCHEDULES | {"dp": "dp=2,micro_batch=4", "dp-pp": "dp=2,pp=2,micro_batch=2"}
OVERLAP = "dp"
TRIES = 4


def draw(folder: Path, name: str, layout: str) -> Path:
    """The report of the quickest run."""
    runs = [train(folder, f"{name}-{number}", layout) for number in range(TRIES)]
    best = min(runs, key=lambda run: read(recorded_steps(run)[-1]).seconds)
    subprocess.run([*FIVEPLY, "report", str(best)], check=True)
    return best / "report.html"


def train(folder: Path, name: str, layout: str) -> Path:
    """The run's directory."""
    run = folder / name
    if not run.is_dir():
        settings = [*BATCH, f"folder={folder}", f"name={name}", "precision.parameters=float32"]
        sets = [part for setting in settings for part in ("--set", setting)]
        command = [*FIVEPLY, "train", "--model", "2m", "--data", "shakespeare", "--layout", layout, *sets]
        subprocess.run(command, check=True)
    return run


def main(folder: Path) -> None:
    sys.path.append(str(DOCS.parent / "tests"))
    from chromium import Browser

    reports = {name: draw(folder, name, layout) for name, layout in RUNS.items()}
    with Browser() as browser:
        for name in SCHEDULES:
            browser.open(reports[name], 1100).picture(DOCS / f"timeline-{name}.png", ".recorded .picture", margin=6)
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
        page.picture(DOCS / "timeline-overlap.png", ".recorded .picture", margin=6)


if __name__ == "__main__":
    main(Path(*sys.argv[1:] or ("runs/pictures",)))
