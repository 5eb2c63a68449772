// Curves of the report, drawn to the width there is, and the links between its pictures.
//
// The data is columns of equal length by step (see `_curves` in page.py). Every chart shares one cursor: pointing at one,
// or moving in it with the arrow keys, reads the same step in all of them.
"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const { columns, held_out: heldOut, segments, tokens_per_step: tokensPerStep } = data;
const steps = columns.step;
const letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

// Numbers as text

/** 1234567 -> "1.23M" */
function compact(value) {
  const size = Math.abs(value);
  for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= scale * 0.9995) return trimmed(value / scale) + letter;
  }
  return trimmed(value);
}

function trimmed(value) {
  return String(Number(value.toPrecision(3)));
}

function fixed(digits) {
  return value => value.toFixed(digits);
}

function scientific(value) {
  return value === 0 ? "0" : value >= 0.01 ? trimmed(value) : value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
}

function whole(value) {
  return Math.round(value).toLocaleString("en");
}

function escaped(text) {
  return String(text).replace(/[&<>"]/g, letter => `&#${letter.charCodeAt(0)};`);
}

// What each chart shows

const charts = {
  loss: { height: 320, smallHeight: 240, format: fixed(3), tick: trimmed, fromZero: false, heldOut: true },
  tokens_per_second: { height: 170, format: compact, tick: compact, fromZero: true },
  grad_norm: { height: 170, format: trimmed, tick: trimmed, fromZero: true },
  lr: { height: 170, format: scientific, tick: scientific, fromZero: true, plain: true },
};

let axis = "step";
let cursor = null; // index into steps, or null

/** A step in the axis chosen. */
function at(step) {
  return axis === "tokens" ? step * tokensPerStep : step;
}

// Geometry

/** Round numbers, about `count` of them, that lie within low..high. */
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1) || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const gap = power * [1, 2, 2.5, 5, 10].find(factor => factor * power >= rough * 0.999);
  const found = [];
  for (let index = Math.ceil(low / gap - 1e-9); index * gap <= high + gap * 1e-9; index++) {
    found.push(Number((index * gap).toPrecision(12)));
  }
  return found;
}

/** Values between low and high as positions between from and to; one value alone stands in the middle. */
function scale(low, high, from, to) {
  return value => high === low ? (from + to) / 2 : from + (value - low) / (high - low) * (to - from);
}

/** An SVG path through points, broken where a value is missing. */
function path(xs, ys, x, y) {
  let text = "", open = false;
  xs.forEach((step, index) => {
    if (ys[index] === null) { open = false; return; }
    text += `${open ? "L" : "M"}${x(at(step)).toFixed(1)} ${y(ys[index]).toFixed(1)}`;
    open = true;
  });
  return text;
}

function extent(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return low <= high ? [low, high] : [0, 1];
}

// A chart

class Chart {
  constructor(figure) {
    this.key = figure.dataset.chart;
    this.kind = charts[this.key];
    this.raw = columns[this.key];
    this.smooth = columns[this.key + "_smooth"];
    this.plot = figure.querySelector(".plot");
    this.readout = figure.querySelector(".readout");
    new ResizeObserver(() => { if (this.plot.clientWidth !== this.width) this.draw(); }).observe(this.plot);
    this.listen();
    this.draw();
  }

  draw() {
    const { kind, raw, smooth } = this;
    const width = this.width = this.plot.clientWidth || 600;
    const height = width < 500 && kind.smallHeight || kind.height;
    const named = segments.length > 1;
    const top = named ? 22 : 8, bottom = height - 24;

    const shown = [...raw, ...smooth, ...(kind.heldOut ? heldOut.loss : [])];
    let [low, high] = extent(shown);
    if (kind.fromZero) low = Math.min(low, 0);
    const margin = (high - low || Math.abs(high) || 1) * 0.05;
    if (!kind.fromZero) low -= margin;
    high += margin;
    const yTicks = ticks(low, high, (bottom - top) / 40);
    const left = 10 + 7.2 * Math.max(...yTicks.map(value => kind.tick(value).length), 2);
    const right = width - 14;

    // The axis begins before the first step; a lone step stands in the middle.
    const first = at(steps.length > 1 ? steps[0] - 1 : steps[0]);
    const last = at(steps[steps.length - 1]);
    const x = this.x = scale(first, last, left, right);
    const y = this.y = scale(low, high, bottom, top);
    this.top = top;
    this.bottom = bottom;

    const xText = axis === "tokens" ? compact : whole;
    const xTicks = first === last ? [first] : ticks(first, last, (right - left) / 90)
      .filter(value => axis === "tokens" || Number.isInteger(value));
    const parts = [
      named ? this.bands(x, top, bottom) : "",
      ...yTicks.map(value => `<line class="gridline" x1="${left}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>
        <text x="${left - 8}" y="${y(value) + 4}" text-anchor="end">${kind.tick(value)}</text>`),
      ...xTicks.map(value => `<text x="${x(value)}" y="${height - 5}" text-anchor="middle">${xText(value)}</text>`),
      kind.plain ? "" : `<path class="curve raw" d="${path(steps, raw, x, y)}"/>`,
      `<path class="curve" d="${path(steps, kind.plain ? raw : smooth, x, y)}"/>`,
    ];
    if (steps.length < 12) parts.push(...steps.map((step, index) => this.dot("train-dot", step, raw[index])));
    if (kind.heldOut) {
      parts.push(`<path class="curve held-out" d="${path(heldOut.step, heldOut.loss, x, y)}"/>`);
      const radius = heldOut.step.length * 14 > width ? 2.5 : 4;
      parts.push(...heldOut.step.map((step, index) => this.dot("held-out-dot", step, heldOut.loss[index], radius)));
    }
    this.plot.innerHTML = `<svg viewBox="0 0 ${width} ${height}" aria-hidden="true">${parts.join("")}<g></g></svg>`;
    this.overlay = this.plot.querySelector("g");
    this.point();
  }

  /** Spans of other layouts: every second one shaded, each named by its text, or by its letter where that is too narrow. */
  bands(x, top, bottom) {
    return segments.map((segment, index) => {
      const start = x(at(segment.from - 1)), end = x(at(segment.to));
      const text = `${letters[index % 26]}  ${segment.layout}`;
      const label = this.key === "loss" && text.length * 7 < end - start ? text : letters[index % 26];
      return (index % 2 ? `<rect class="band" x="${start}" y="${top}" width="${end - start}" height="${bottom - top}"/>` : "")
        + (index ? `<line class="edge" x1="${start}" x2="${start}" y1="${top - 16}" y2="${bottom}"/>` : "")
        + (end - start > 10 ? `<text class="band-label" x="${start + 5}" y="${top - 6}">${escaped(label)}</text>` : "");
    }).join("");
  }

  dot(name, step, value, radius = 4) {
    return value === null ? "" : `<circle class="${name}" cx="${this.x(at(step))}" cy="${this.y(value)}" r="${radius}"/>`;
  }

  /** Show the cursor, and the values there; the last ones when nothing is pointed at. */
  point() {
    const { kind, raw, smooth } = this;
    const index = cursor ?? steps.length - 1;
    const step = steps[index];
    const parts = [];
    const value = (mark, name, number, format = kind.format) => {
      parts.push(`<span>${mark}${name} <b>${number === null || number === undefined ? "–" : format(number)}</b></span>`);
    };
    value("", axis === "tokens" ? "tokens" : "step", at(step), axis === "tokens" ? compact : whole);
    if (kind.plain) {
      value("", "", raw[index]);
    } else {
      value('<i class="smooth"></i>', kind.heldOut ? "training" : "smoothed", smooth[index]);
      value('<i class="raw"></i>', "each step", raw[index]);
    }
    let evaluated = -1;
    if (kind.heldOut && heldOut.step.length) {
      evaluated = heldOut.step.findLastIndex(other => other <= step);
      if (evaluated >= 0) {
        value('<i class="dot"></i>', `held out${heldOut.step[evaluated] === step ? "" : ` (step ${heldOut.step[evaluated]})`}`, heldOut.loss[evaluated]);
        if (heldOut.bits[evaluated] !== null) value("", "bits per character", heldOut.bits[evaluated]);
      } else {
        value('<i class="dot"></i>', "held out", null);
      }
    }
    this.readout.innerHTML = parts.join("");
    if (cursor === null) { this.overlay.innerHTML = ""; return; }
    const x = this.x(at(step));
    this.overlay.innerHTML = `<line class="cursor" x1="${x}" x2="${x}" y1="${this.top}" y2="${this.bottom}"/>`
      + this.dot("train-dot", step, kind.plain ? raw[index] : smooth[index])
      + (evaluated >= 0 ? this.dot("held-out-dot", heldOut.step[evaluated], heldOut.loss[evaluated], 5.5) : "");
  }

  /** Index of the step nearest to a position on the screen. */
  nearest(clientX) {
    const box = this.plot.getBoundingClientRect();
    const target = (clientX - box.left) * this.width / box.width;
    let low = 0, high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.x(at(steps[middle])) < target) low = middle + 1; else high = middle;
    }
    const before = Math.max(low - 1, 0);
    return target - this.x(at(steps[before])) < this.x(at(steps[low])) - target ? before : low;
  }

  listen() {
    const move = event => moveCursor(this.nearest(event.clientX));
    this.plot.addEventListener("pointermove", move);
    this.plot.addEventListener("pointerdown", move);
    this.plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") moveCursor(null); });
    this.plot.addEventListener("blur", () => moveCursor(null));
    this.plot.addEventListener("keydown", event => {
      const last = steps.length - 1, here = cursor ?? last, far = Math.max(1, Math.round(last / 20));
      const there = { ArrowLeft: here - 1, ArrowRight: here + 1, PageUp: here - far, PageDown: here + far, Home: 0, End: last };
      if (event.key === "Escape") moveCursor(null);
      else if (event.key in there) moveCursor(Math.min(last, Math.max(0, there[event.key])));
      else return;
      event.preventDefault();
    });
  }
}

const drawn = Array.from(document.querySelectorAll(".chart"), figure => new Chart(figure));

function moveCursor(index) {
  if (index === cursor) return;
  cursor = index;
  for (const chart of drawn) chart.point();
}

for (const input of document.querySelectorAll('input[name="axis"]')) {
  input.addEventListener("change", () => {
    axis = input.value;
    for (const chart of drawn) chart.draw();
  });
}

// The layouts of the bands, in words

if (segments.length > 1) {
  const list = document.getElementById("segments");
  list.hidden = false;
  list.innerHTML = segments.map((segment, index) =>
    `<li><b>${letters[index % 26]}</b> steps ${segment.from}–${segment.to}: <code>${escaped(segment.layout).replaceAll(",", ",<wbr>")}</code>,
    ${segment.world} rank${segment.world === 1 ? "" : "s"}</li>`).join("");
}

// A rank that is pointed at lights up in the grid and in memory, and its lane in the schedule

function light(rank, pp) {
  for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
  if (rank === undefined) return;
  for (const element of document.querySelectorAll(`.grid td[data-rank="${rank}"], .bar[data-rank="${rank}"], .lanes [data-pp="${pp}"]`)) {
    element.classList.add("lit");
  }
}

document.addEventListener("pointerover", event => {
  const element = event.target.closest?.(".grid td[data-rank], .bar");
  light(element?.dataset.rank, element?.dataset.pp);
});

// A cell of the schedule is read out below the picture

const said = document.getElementById("cell");
let picked = null;
for (const name of ["pointerover", "pointerdown"]) {
  document.querySelector(".schedule")?.addEventListener(name, event => {
    const cell = event.target.closest("g");
    if (!cell) return;
    picked?.classList.remove("picked");
    picked = cell;
    picked.classList.add("picked");
    said.textContent = cell.querySelector("title").textContent;
  });
}
