/* The overview of the samples that matter most, and the small bars in the table. */

const valuesOf = (position) => windowColumns.map((column) => score(column, position));
const bandOf = () => windowColumns.map((column) => query().band[column]);
const effect = () => `influence: change of ${query().name.length > 26 ? "query" : query().name}`;

function drawOverview() {
  const place = byId("overview");
  const width = Math.max(280, place.clientWidth);
  const gutter = width < 520 ? 84 : Math.min(320, Math.max(176, 0.25 * width));
  const chosen = [...query().helpful.map((position) => [position, "helpful"]), ...query().harmful.map((position) => [position, "harmful"])];
  if (state.open !== null && !chosen.some(([position]) => position === state.open)) chosen.push([state.open, "chosen"]);
  const series = chosen.map(([position, side]) => ({
    position, side, values: valuesOf(position), name: `sample ${data.samples[position]}`, open: () => openSample(position),
  }));
  const { chart, x, y, box } = windowChart({
    width, height: 340, right: gutter, series, band: bandOf(), picked: state.column, pick: pickColumn,
    yTitle: effect(), title: "Influence over windows of the most harmful and most helpful samples",
  });
  for (const one of series) one.drawn.classList.toggle("open", one.position === state.open);
  labelLines(chart, series, x, y, box, gutter);
  place.replaceChildren(chart);
}

/* Names at the lines' ends, moved apart where they would cover one another. */
function labelLines(chart, series, x, y, box, gutter) {
  const gap = 25;
  const ends = series.map((one) => {
    const last = one.values.map(Number.isFinite).lastIndexOf(true);
    return { one, last, wanted: last < 0 ? y(0) : y(one.values[last]) };
  }).sort((a, b) => a.wanted - b.wanted);
  const spread = spreadOut(ends.map((end) => end.wanted), gap, box.top + gap / 2, box.bottom - gap / 2 + 18);
  ends.forEach(({ one, last, wanted }, rank) => {
    const at = spread[rank];
    const left = box.right + 14;
    const group = drawn("g", { class: `name ${one.side}`, tabindex: 0, role: "button", "aria-label": `show sample ${data.samples[one.position]}` });
    const from = last < 0 ? box.right : x(last) + 5;
    group.append(drawn("path", { d: `M${from} ${wanted}L${Math.max(from, box.right - 2)} ${wanted}L${left - 3} ${at}`, class: "lead" }));
    const picture = data.pictures[one.position];
    if (picture) group.append(drawn("image", { href: picture, x: left, y: at - 11, width: 22, height: 22 }));
    const text = left + (picture ? 28 : 2);
    const index = `${data.samples[one.position]}`;
    const room = Math.floor((gutter - (text - box.right) - 8) / 6.4) - index.length - 2;
    const told = (picture && gutter < 240 ? label(one.position) : null) || line(one.position) || label(one.position) || "";
    const rest = gutter < 100 ? "" : shortened(told, room);
    group.append(
      drawn("rect", { x: left - 2, y: at - gap / 2, width: gutter - 14, height: gap, class: "hit" }),
      drawn("text", { x: text, y: at + 4 }, drawn("tspan", { class: "strong" }, index), drawn("tspan", { dx: 6, class: "rest" }, rest)),
    );
    group.addEventListener("click", one.open);
    group.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        one.open();
      }
    });
    for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]]) {
      group.addEventListener(event, () => {
        one.drawn.classList.toggle("lit", on);
        chart.classList.toggle("dimmed", on);
      });
    }
    chart.append(group);
  });
}

/* Places as near the wanted ones (ascending) as can be, gap apart, within the bounds if there is room. */
function spreadOut(wanted, gap, top, bottom) {
  const blocks = [];
  wanted.forEach((place, rank) => {
    blocks.push({ sum: place - rank * gap, size: 1 });
    for (let last = blocks.length - 1; last > 0 && blocks[last - 1].sum / blocks[last - 1].size > blocks[last].sum / blocks[last].size; last -= 1) {
      const { sum, size } = blocks.pop();
      blocks[last - 1].sum += sum;
      blocks[last - 1].size += size;
    }
  });
  const start = blocks.flatMap((block) => Array(block.size).fill(block.sum / block.size));
  const latest = bottom - (wanted.length - 1) * gap;
  return start.map((place, rank) => Math.max(top, Math.min(place, latest)) + rank * gap);
}

/* Text for SVG, which cannot isolate what turns the direction of writing: without those characters. */
function shortened(text, longest) {
  const plain = Array.from(text.slice(0, 400).replace(/[\u202a-\u202e\u2066-\u2069\s]+/g, " "));
  return plain.length > longest ? `${plain.slice(0, Math.max(1, longest - 1)).join("")}…` : plain.join("");
}

function sparkline(position) {
  const [width, height] = [Math.min(100, Math.max(56, 10 * windowColumns.length)), 30];
  const values = valuesOf(position);
  const largest = Math.max(...values.filter(Number.isFinite).map(Math.abs), 0) || 1;
  const slot = width / values.length;
  const bars = drawn("svg", { width, height, class: "spark", "aria-hidden": "true" });
  values.forEach((value, place) => {
    if (windowColumns[place] === state.column && state.column > 0) {
      bars.append(drawn("rect", { x: place * slot, y: 0, width: slot, height, class: "here" }));
    }
    if (!Number.isFinite(value) || value === 0) return;
    const size = Math.max(1, (Math.abs(value) / largest) * (height / 2 - 1));
    const box = { x: place * slot + slot * 0.12, width: slot * 0.76, y: value > 0 ? height / 2 - size : height / 2, height: size };
    bars.append(drawn("rect", { ...box, class: value > 0 ? "helpful" : "harmful" }));
  });
  bars.append(drawn("line", { x1: 0, x2: width, y1: height / 2, y2: height / 2, class: "zero" }));
  return bars;
}

/* How the scores of all samples spread, where the page has no room for all of them. */
function drawSpread() {
  const place = byId("spread");
  const found = query().histogram && query().histogram[state.column];
  place.hidden = !found;
  if (!found) return;
  const [width, height, gap] = [Math.min(720, place.parentElement.clientWidth), 74, 14];
  const unit = unitOf([found.from, found.to]);
  const slot = (width - 2 * gap) / found.counts.length;
  const x = (value) => gap + ((value - found.from) / (found.to - found.from)) * (width - 2 * gap);
  const most = Math.log1p(Math.max(...found.counts));
  const name = data.columns[state.column].name;
  const told = `influence of all ${data.total.toLocaleString("en")} samples, ${name}, from ${number(found.from, unit)} to ${number(found.to, unit)} ${unitName(unit)}`;
  const chart = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": told, class: "chart" });
  found.counts.forEach((many, bin) => {
    const tall = (Math.log1p(many) / most) * (height - 24);
    const middle = found.from + ((bin + 0.5) / found.counts.length) * (found.to - found.from);
    const bar = { x: gap + bin * slot, y: height - 20 - tall, width: Math.max(1, slot - 1), height: tall };
    chart.append(drawn("rect", { ...bar, class: middle < 0 ? "bar harmful" : "bar helpful" }, drawn("title", {}, many.toLocaleString("en"))));
  });
  chart.append(
    drawn("line", { x1: gap, x2: width - gap, y1: height - 20, y2: height - 20, class: "zero" }),
    drawn("text", { x: gap, y: height - 5, class: "tick" }, number(found.from, unit)),
    drawn("text", { x: width - gap, y: height - 5, class: "tick end" }, `${number(found.to, unit)} ${unitName(unit)}`.trim()),
  );
  if (found.from < 0 && found.to > 0) chart.append(drawn("text", { x: x(0), y: height - 5, class: "tick middle" }, "0"));
  place.firstElementChild.replaceChildren(chart);
  place.lastElementChild.textContent = `All ${data.total.toLocaleString("en")} samples by influence (${name}); heights grow with the logarithm of the number.`;
}
