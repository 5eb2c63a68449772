"use strict";
// Draws what belongs to the chosen row, and sorts the table.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const place = (id) => document.getElementById(id);
  const body = document.querySelector(".ranked tbody");

  const element = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const seconds = (value) => `${value.toPrecision(3)} s`;
  const bytes = (value) => `${(value / 2 ** 30).toPrecision(3)} GiB`;

  const waterfall = (plan) => {
    const rows = [];
    let at = 0;
    for (const [name, value] of plan.waterfall) {
      if (Math.abs(value) < 5e-4 * plan.seconds) { at += value; continue; }
      const low = Math.max(0, Math.min(at, at + value));
      rows.push(fall(data.words[name] || name, value, plan.seconds, low, name === "ideal" ? "ideal" : ""));
      at += value;
    }
    rows.push(fall("a step", plan.seconds, plan.seconds, 0, "sum"));
    place("waterfall").replaceChildren(...rows);
  };
  const fall = (words, value, whole, low, kind) => {
    const row = element("div", `fall ${kind}`);
    row.append(element("span", "", words), element("span", "", seconds(value)), element("span", "", `${(100 * value / whole).toFixed(1)}%`));
    if (kind !== "sum") {
      const track = element("span", "track"), bar = element("i");
      bar.style.left = `${100 * low / whole}%`;
      bar.style.width = `${100 * Math.abs(value) / whole}%`;
      track.append(bar);
      row.append(track);
    }
    return row;
  };

  const memory = (plan) => {
    const totals = plan.memory.map((held) => held.reduce((a, b) => a + b, 0));
    const widest = Math.max(plan.capacity, ...totals) * 1.02;
    place("memory").replaceChildren(...plan.memory.map((held, rank) => {
      const row = element("div", "held"), track = element("span", "track");
      held.forEach((size, category) => {
        const part = element("i", data.categories[category]);
        part.style.width = `${100 * size / widest}%`;
        part.title = `${data.categories[category]}: ${bytes(size)}`;
        track.append(part);
      });
      const limit = element("span", "limit");
      limit.style.left = `${100 * plan.capacity / widest}%`;
      limit.title = `a device: ${bytes(plan.capacity)}`;
      track.append(limit);
      row.title = `at ${plan.when[rank]}`;
      row.append(element("span", "", `rank ${rank}`), track, element("span", "", bytes(totals[rank])));
      return row;
    }));
  };

  const SVG = "http://www.w3.org/2000/svg";
  const shape = (name, attributes) => {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const KINDS = [["forward", "forward"], ["backward", "backward"], ["input", "input gradient"], ["weight", "weight gradient"]];
  const pipeline = (plan) => {
    const { pp, drawn, of, end, actions } = plan.timeline;
    const left = 46, width = 1140, high = pp > 16 ? 11 : 20, step = high + 4, scale = (width - left) / end;
    const svg = shape("svg", { viewBox: `0 0 ${width} ${pp * step + 18}`, role: "img", "aria-label": `pipeline of ${pp} ranks` });
    for (let rank = 0; rank < pp; rank += 1) {
      const label = shape("text", { x: 0, y: rank * step + high - 2 });
      label.textContent = `rank ${rank}`;
      svg.append(label, shape("rect", { x: left, y: rank * step, width: width - left, height: high, class: "lane" }));
    }
    for (const [rank, kind, chunk, microBatch, start, stop] of actions) {
      const box = shape("rect", {
        x: left + start * scale, y: rank * step, width: Math.max(0.6, (stop - start) * scale - 0.6), height: high,
        class: `${KINDS[kind][0]}${microBatch % 2 ? " odd" : ""}`,
      });
      const title = shape("title", {});
      title.textContent = `rank ${rank}: ${KINDS[kind][1]} of micro-batch ${microBatch}, chunk ${chunk}, ${seconds(stop - start)}`;
      box.append(title);
      svg.append(box);
    }
    const axis = shape("text", { x: width, y: pp * step + 12, "text-anchor": "end" });
    axis.textContent = seconds(end);
    svg.append(axis);
    place("pipeline").replaceChildren(svg);
    place("pipeline-note").textContent = drawn < of
      ? `drawn with ${drawn} of ${of} micro-batches` : `${of} micro-batches, idle ${(100 * plan.timeline.bubble / (1 + plan.timeline.bubble)).toFixed(1)}%`;
  };

  const choose = (row) => {
    const plan = data.plans[Number(row.dataset.plan)];
    for (const other of body.rows) other.classList.toggle("chosen", other === row);
    place("chosen-number").textContent = String(Number(row.dataset.plan) + 1);
    place("chosen").textContent = plan.layout.replaceAll(",", ",\u200b");
    place("chosen-note").textContent = plan.refusal ? `(not run by fiveply yet: ${plan.refusal})` : "";
    waterfall(plan);
    memory(plan);
    pipeline(plan);
  };

  place("legend").replaceChildren(...data.categories.map((name) => {
    const entry = element("span");
    entry.append(element("i", name), name);
    return entry;
  }));
  for (const row of body.rows) {
    for (const name of ["pointerenter", "focus", "click"]) row.addEventListener(name, () => choose(row));
    row.addEventListener("keydown", (event) => {
      const other = { ArrowDown: row.nextElementSibling, ArrowUp: row.previousElementSibling }[event.key];
      if (other) { event.preventDefault(); other.focus(); }
    });
  }
  const headings = [...document.querySelectorAll(".ranked thead th")];
  headings.forEach((heading, column) => heading.querySelector("button").addEventListener("click", () => {
    const falling = heading.getAttribute("aria-sort") === "ascending";
    headings.forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [Number(value(a)), Number(value(b))];
      const order = Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
      return falling ? -order : order;
    });
    body.append(...rows);
  }));
  choose(body.rows[0]);
})();
