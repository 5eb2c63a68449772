// Recorded steps, zoomable: for each rank the schedule as planned, what ran, and its collectives and transfers.
//
// `#recorded` holds what `timelines.py` calls a picture, one a step. A canvas draws the spans that lie in view; the view is
// a range of time, moved by wheel, drag, pinch, keys or buttons. `ticks` and `escaped` are page.js's.
"use strict";

const pictures = JSON.parse(document.getElementById("recorded").textContent);

const texts = {
  forward: "forward", backward: "backward", input: "input gradient", weight: "weight gradient",
  send_forward: "send activation", receive_forward: "receive activation", send_backward: "send gradient",
  receive_backward: "receive gradient", gather: "start gathering parameters", reduce: "start reducing gradients",
  finish: "finish reductions", data: "prepare micro-batches", sums: "sum loss and norm over ranks",
  optimizer: "optimiser", step: "step: what is in no other span",
};
const computes = ["forward", "backward", "input", "weight"];

/** The class whose --fill and --text, of page.css, paint a span; as `timeline.shares` counts it. */
function look(kind, operation) {
  if (kind === "wait" || kind === "issue") return kind === "wait" && operation === "receive" ? "idle" : "collective";
  if (kind === "optimizer") return "update";
  return computes.includes(kind) || ["collective", "transfer", "data", "step"].includes(kind) ? kind : "rest";
}

/** How strong a span's colour is: the plan is fainter, and so are computations of a rank's later chunks. */
function strength(span) {
  return (span.lane === "planned" ? 0.55 : 1) * (span.chunk > 0 && computes.includes(span.kind) ? 0.55 : 1);
}

/** Seconds as text, in the unit of `range` and as exact as `gap`: a hundredth of it, by itself. */
function timeText(seconds, range = seconds, gap = range / 100) {
  const [unit, name] = range < 1e-3 ? [1e-6, "µs"] : range < 2 ? [1e-3, "ms"] : [1, "s"];
  const digits = Math.max(0, Math.min(3, Math.ceil(-Math.log10(Math.max(gap / unit, 1e-3)) - 1e-9)));
  return `${(seconds / unit).toFixed(digits)} ${name}`;
}

function bytesText(bytes) {
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (bytes >= unit) return `${Number((bytes / unit).toPrecision(3))} ${name}`;
  }
  return `${bytes} B`;
}

/** A span as an object; see FIELDS in timelines.py. */
function named(names, row, lane, fields) {
  const [kind, start, end, level, stage, chunk, microBatch, axis, operation, bytes, peer, link] = fields;
  return { row, lane, kind: names[kind], start: start / 1e6, end: end / 1e6, level, stage, chunk, microBatch,
    axis: names[axis], operation: names[operation], bytes, peer, link };
}

const PLANNED = 13, COMPUTE = 28, STRIP = 9, GAP = 3, BETWEEN = 12, TOP = 26, MOST_ZOOM = 5e-6;

class Timeline {
  constructor(panel, picture) {
    this.panel = panel;
    this.picture = picture;
    this.canvas = panel.querySelector("canvas");
    this.tip = panel.querySelector(".tip");
    this.range = panel.querySelector(".range");
    this.probe = panel.appendChild(document.createElement("i")); // takes on the class whose colours are asked for
    this.probe.hidden = true;
    const { names, rows } = picture;
    this.spans = rows.flatMap((row, index) => [
      ...row.compute.map(fields => named(names, index, "compute", fields)),
      ...row.communication.map(fields => named(names, index, "communication", fields)),
    ]);
    this.planned = rows.flatMap((row, index) => picture.planned[row.pp].map(([kind, start, end, stage, chunk, microBatch]) => (
      { row: index, lane: "planned", kind: names[kind], start: start / 1e6, end: end / 1e6, level: 0, stage, chunk, microBatch,
        axis: "", operation: "", bytes: 0, peer: -1, link: -1 })));
    this.whole = [0, Math.max(picture.seconds, ...this.planned.map(span => span.end))];
    this.view = [...this.whole];
    this.picked = null;
    this.pinned = false;
    this.pointers = new Map();
    new ResizeObserver(() => this.resize()).observe(this.canvas.parentElement);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.listen();
    this.resize();
  }

  // geometry

  resize() {
    const width = this.canvas.parentElement.clientWidth;
    if (!width || width === this.width) return;
    this.width = width;
    this.left = width < 700 ? 0 : 128; // names stand at the left where there is room, above their rows elsewhere
    let y = TOP;
    this.places = this.picture.rows.map(row => {
      const planned = y + (this.left ? 0 : 17);
      const compute = planned + PLANNED + GAP, strips = compute + COMPUTE + GAP;
      const place = { top: y, planned, compute, strips, bottom: strips + STRIP * Math.max(row.strips, 1) };
      y = place.bottom + BETWEEN;
      return place;
    });
    this.height = y;
    const scale = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(y * scale);
    this.canvas.style.height = `${y}px`;
    this.draw();
  }

  x(time) {
    return this.left + (time - this.view[0]) / (this.view[1] - this.view[0]) * (this.width - this.left);
  }

  time(x) {
    return this.view[0] + (x - this.left) / (this.width - this.left) * (this.view[1] - this.view[0]);
  }

  /** [x, y, width, height] on the canvas; spans within others are lower, so that these stay visible around them. */
  box(span) {
    const place = this.places[span.row];
    const x = this.x(span.start), width = Math.max(this.x(span.end) - x, 1);
    if (span.lane === "planned") return [x, place.planned, width, PLANNED];
    if (span.lane === "communication") return [x, place.strips + STRIP * span.level, width, STRIP - 1];
    const inset = Math.min(4 * Math.max(span.level - 1, 0), COMPUTE / 2 - 4);
    return [x, place.compute + inset, width, COMPUTE - 2 * inset];
  }

  /** The span at a position, the innermost first; one that is narrower than a fingertip counts from a little beside it. */
  at(x, y, reach) {
    let best = null, least = Infinity;
    for (const span of [...this.spans, ...this.planned]) {
      const place = this.places[span.row];
      if (y < place.top || y > place.bottom + BETWEEN / 2 || span.end < this.view[0] || span.start > this.view[1]) continue;
      const [left, top, width, height] = this.box(span);
      const low = span.lane === "compute" ? place.compute : top, high = span.lane === "compute" ? place.compute + COMPUTE : top + height;
      const beside = Math.max(left - x, x - left - width, 0), above = Math.max(low - y, y - high, 0);
      if (beside > reach || above > (span.lane === "compute" ? 1 : reach)) continue;
      // Nearer is better, then deeper, then shorter.
      const distance = beside + above + (span.lane === "compute" ? -1e-3 * span.level : 0) + 1e-9 * width;
      if (distance < least) [best, least] = [span, distance];
    }
    return best;
  }

  // drawing

  draw() {
    if (this.waiting || !this.width) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.paint(); });
  }

  paint() {
    const context = this.canvas.getContext("2d"), scale = devicePixelRatio || 1;
    const style = getComputedStyle(this.panel);
    const colors = new Map(["--ink", "--quiet", "--line", "--panel", "--train"].map(name => [name, style.getPropertyValue(name).trim()]));
    const color = name => colors.get(name);
    const fills = new Map();
    const fill = name => {
      if (!fills.has(name)) {
        this.probe.className = name;
        const found = getComputedStyle(this.probe);
        fills.set(name, [found.getPropertyValue("--fill").trim(), found.getPropertyValue("--text").trim()]);
      }
      return fills.get(name);
    };
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.grid(context, color);
    context.save();
    context.beginPath();
    context.rect(this.left, TOP - 4, this.width - this.left, this.height);
    context.clip();
    const visible = spans => spans.filter(span => span.end >= this.view[0] && span.start <= this.view[1]);
    const planned = visible(this.planned), recorded = visible(this.spans);
    for (const span of planned) this.span(context, span, fill(span.kind)[0], color);
    for (const span of recorded) this.span(context, span, fill(look(span.kind, span.operation))[0], color);
    for (const span of [...planned, ...recorded]) {
      if (computes.includes(span.kind)) this.label(context, span, strength(span) < 1 ? color("--ink") : fill(span.kind)[1]);
    }
    this.mark(context, color);
    context.restore();
    this.names(context, color);
    Object.assign(this.canvas.dataset, { drawn: recorded.length, planned: planned.length, from: this.view[0], to: this.view[1] });
    const [from, to] = this.view;
    this.range.textContent = `${timeText(from, to - from)} to ${timeText(to, to - from)} of ${timeText(this.whole[1])}`;
  }

  span(context, span, fill, color) {
    const [x, y, width, height] = this.box(span);
    if (strength(span) < 1) { // on ground of its own, or what lies below would show through
      context.fillStyle = color("--panel");
      context.fillRect(x, y, width, height);
    }
    context.globalAlpha = strength(span);
    context.fillStyle = fill;
    context.fillRect(x, y, width, height);
    context.globalAlpha = 1;
    if (width > 4 && span.kind !== "step") {
      context.strokeStyle = color("--panel");
      context.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
    }
  }

  /** The micro-batch of a computation, where there is room, in the middle of what is in view of it. */
  label(context, span, fill) {
    const [x, y, width, height] = this.box(span);
    const low = Math.max(x, this.left), shown = Math.min(x + width, this.width) - low;
    if (shown < 9 + 7 * String(span.microBatch).length) return;
    context.fillStyle = fill;
    context.textAlign = "center";
    context.font = span.lane === "planned" ? "10px system-ui, sans-serif" : "12px system-ui, sans-serif";
    context.fillText(span.microBatch, low + shown / 2, y + height / 2 + 0.5);
  }

  /** Outline the span that is picked and the other ends of its call, joined. */
  mark(context, color) {
    if (!this.picked) return;
    context.strokeStyle = color("--ink");
    context.lineWidth = 2;
    const marked = this.spans.filter(span => span === this.picked || span.link >= 0 && span.link === this.picked.link);
    const boxes = [...new Set([this.picked, ...marked])].map(span => this.box(span));
    for (const [x, y, width, height] of boxes) context.strokeRect(x - 1, y - 1, width + 2, height + 2);
    if (boxes.length > 1) {
      context.setLineDash([4, 3]);
      context.lineWidth = 1;
      context.beginPath();
      for (const [x, y, width, height] of boxes) context.lineTo(x + width, y + height / 2);
      context.stroke();
      context.setLineDash([]);
    }
    context.lineWidth = 1;
  }

  grid(context, color) {
    const [from, to] = this.view, room = this.width - this.left;
    context.lineWidth = 1;
    context.fillStyle = color("--line"); // which part of the step is in view
    context.fillRect(this.left, 0, room, 3);
    context.fillStyle = color("--train");
    const share = (time) => this.left + room * time / this.whole[1];
    context.fillRect(share(from), 0, Math.max(share(to) - share(from), 3), 3);
    const marks = ticks(from, to, room / (this.left ? 95 : 72));
    for (const tick of marks) {
      const x = Math.round(this.x(tick)) + 0.5;
      context.strokeStyle = color("--line");
      context.beginPath();
      context.moveTo(x, 20);
      context.lineTo(x, this.height);
      context.stroke();
      context.fillStyle = color("--quiet");
      context.textAlign = x < this.left + 24 ? "left" : x > this.width - 30 ? "right" : "center";
      context.fillText(timeText(tick, to - from, marks[1] - marks[0] || undefined), x, 12);
    }
  }

  names(context, color) {
    context.textAlign = "left";
    for (const [index, row] of this.picture.rows.entries()) {
      const place = this.places[index];
      context.fillStyle = color("--ink");
      if (!this.left) {
        context.font = "600 12px system-ui, sans-serif";
        context.fillText(`rank ${row.rank}`, 1, place.top + 7);
        const width = context.measureText(`rank ${row.rank}`).width;
        context.font = "12px system-ui, sans-serif";
        context.fillStyle = color("--quiet");
        context.fillText(row.place, width + 9, place.top + 7);
        continue;
      }
      context.font = "600 12px system-ui, sans-serif";
      context.fillText(`rank ${row.rank}`, 1, place.compute + 5);
      context.font = "12px system-ui, sans-serif";
      context.fillStyle = color("--quiet");
      context.fillText(row.place, 1, place.compute + 21);
      context.textAlign = "right";
      context.font = "10px system-ui, sans-serif";
      context.fillText("plan", this.left - 8, place.planned + PLANNED / 2);
      context.fillText("ran", this.left - 8, place.compute + COMPUTE / 2);
      context.fillText("calls", this.left - 8, place.strips + STRIP / 2);
      context.textAlign = "left";
    }
  }

  // the view

  show(from, to) {
    const length = Math.min(Math.max(to - from, MOST_ZOOM), this.whole[1]);
    const start = Math.min(Math.max(from, 0), this.whole[1] - length);
    this.view = [start, start + length];
    this.draw();
    if (!this.pinned) this.pick(null);
    else this.tell();
  }

  /** Zoom by a factor around the time at x. */
  zoom(factor, x = this.left + (this.width - this.left) / 2) {
    const time = this.time(Math.max(x, this.left)), [from, to] = this.view;
    const length = Math.min(Math.max((to - from) / factor, MOST_ZOOM), this.whole[1]);
    const before = (time - from) / (to - from);
    this.show(time - before * length, time + (1 - before) * length);
  }

  move(pixels) {
    const shift = pixels / (this.width - this.left) * (this.view[1] - this.view[0]);
    this.show(this.view[0] + shift, this.view[1] + shift);
  }

  get zoomed() {
    return this.view[1] - this.view[0] < this.whole[1] * 0.9999;
  }

  // what is pointed at

  pick(span, pinned = false) {
    this.pinned = pinned && span !== null;
    if (span !== this.picked) {
      this.picked = span;
      this.draw();
    }
    this.tell();
  }

  /** The next span of the lane that is picked, or the previous one, brought into view. */
  walk(step) {
    const lane = this.picked ?? { row: 0, lane: "compute", start: -1 };
    const line = this.spans.filter(span => span.row === lane.row && span.lane === lane.lane && span.kind !== "step");
    const here = line.indexOf(this.picked);
    const next = line[Math.min(Math.max(here + step, 0), line.length - 1)];
    if (!next) return;
    const length = this.view[1] - this.view[0];
    this.pick(next, true);
    if (next.start < this.view[0] || next.end > this.view[1]) {
      this.show((next.start + next.end - length) / 2, (next.start + next.end + length) / 2);
    }
  }

  tell() {
    const span = this.picked;
    this.tip.hidden = !span || span.end < this.view[0] || span.start > this.view[1];
    if (this.tip.hidden) return;
    this.tip.innerHTML = this.words(span).map((line, index) => index ? `<span>${escaped(line)}</span>` : `<b>${escaped(line)}</b>`).join("");
    const [x, y, width, height] = this.box(span);
    const middle = Math.min(Math.max(x, this.left) + Math.min(width, 120) / 2, this.width);
    const below = y + height + 8, room = this.tip.offsetHeight;
    this.tip.style.left = `${Math.min(Math.max(middle - this.tip.offsetWidth / 2, 0), this.width - this.tip.offsetWidth)}px`;
    this.tip.style.top = `${y - room - 8 > 0 ? y - room - 8 : below}px`;
  }

  /** What a span is, a line a matter. */
  words(span) {
    const { rows } = this.picture, row = rows[span.row];
    const call = span.operation && `${span.operation} over ${span.axis}`;
    const head = { wait: `waits for ${call}`, issue: `starts ${call}`, collective: call, transfer: call }[span.kind] ?? texts[span.kind] ?? span.kind;
    const about = [];
    if (span.microBatch >= 0) about.push(`micro-batch ${span.microBatch}`);
    if (span.stage >= 0) about.push(this.picture.vp > 1 ? `chunk ${span.chunk}, stage ${span.stage}` : `stage ${span.stage}`);
    if (span.bytes) about.push(bytesText(span.bytes));
    if (span.peer >= 0) about.push(span.operation === "receive" || span.kind.startsWith("receive") ? `from rank ${span.peer}` : `to rank ${span.peer}`);
    const others = span.link < 0 ? [] : this.spans.filter(other => other.link === span.link && other !== span);
    if (others.length && span.kind === "collective") about.push(`with rank ${others.map(other => rows[other.row].rank).join(", ")}`);
    return [
      `${span.lane === "planned" ? "planned: " : ""}${head}`,
      `rank ${row.rank}${about.length ? " · " : ""}${about.join(" · ")}`,
      `${timeText(span.end - span.start)}, from ${timeText(span.start, this.whole[1])}`,
    ];
  }

  // input

  listen() {
    const { canvas } = this;
    const inside = event => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("wheel", event => {
      const [x] = inside(event);
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.move(event.deltaX);
      else if (event.deltaY < 0 || this.zoomed) this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), x);
      else return; // all is in view: the page scrolls on
      event.preventDefault();
    }, { passive: false });
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, inside(event));
      this.dragged = this.pointers.size > 1;
    });
    canvas.addEventListener("pointermove", event => {
      const before = this.pointers.get(event.pointerId), now = inside(event);
      if (!before) {
        if (event.pointerType === "mouse" && !this.pinned) this.pick(this.at(...now, 2));
        return;
      }
      if (this.pointers.size === 2) {
        const [other] = [...this.pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
        const apart = Math.max(Math.abs(now[0] - other[0]), 8), was = Math.max(Math.abs(before[0] - other[0]), 8);
        this.zoom(apart / was, (now[0] + other[0]) / 2);
        this.move((before[0] - now[0]) / 2);
      } else if (this.dragged || Math.abs(now[0] - before[0]) > 3) {
        this.dragged = true;
        this.move(before[0] - now[0]);
      } else {
        return;
      }
      this.pointers.set(event.pointerId, now);
    });
    const leave = event => {
      const was = this.pointers.delete(event.pointerId);
      if (was && event.type === "pointerup" && !this.dragged) {
        this.pick(this.at(...inside(event), event.pointerType === "mouse" ? 2 : 10), true);
      }
    };
    canvas.addEventListener("pointerup", leave);
    canvas.addEventListener("pointercancel", leave);
    canvas.addEventListener("pointerleave", event => { if (!this.pinned && !this.pointers.size) this.pick(null); });
    canvas.addEventListener("dblclick", event => this.zoom(3, inside(event)[0]));
    const keys = {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), "0": () => this.show(...this.whole),
      Home: () => this.show(...this.whole), ArrowLeft: () => this.move(-80), ArrowRight: () => this.move(80),
      ".": () => this.walk(1), ",": () => this.walk(-1), Escape: () => this.pick(null),
    };
    canvas.addEventListener("keydown", event => {
      if (!(event.key in keys) || event.ctrlKey || event.metaKey) return;
      keys[event.key]();
      event.preventDefault();
    });
    for (const button of this.panel.querySelectorAll("button[data-key]")) {
      button.addEventListener("click", () => keys[button.dataset.key]());
    }
  }
}

const panels = [...document.querySelectorAll(".recorded")];
const timelines = panels.map((panel, index) => new Timeline(panel, pictures[index]));

for (const input of document.querySelectorAll('input[name="recorded"]')) {
  input.addEventListener("change", () => {
    for (const [index, panel] of panels.entries()) panel.hidden = index !== Number(input.value);
  });
}
