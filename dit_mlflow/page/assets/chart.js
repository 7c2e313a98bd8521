/* A chart over windows: one place for each, lines of samples above and below zero. */

function niceStep(span, wanted) {
  const rough = span / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  return power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
}

function valueRange(series, band) {
  const values = [0, ...series.flatMap((one) => one.values), ...(band || []).filter(Boolean).flat()].filter(Number.isFinite);
  const low = Math.min(...values);
  const high = Math.max(...values);
  return low === high ? [-1, 1] : [low, high];
}

/*
 * options: width, height, right (room for labels), series: [{values, side, name, dashed, open, decorate}], band,
 * picked (column), pick(column), yTitle, title. Values are by place in windowColumns.
 */
function windowChart(options) {
  const { width, height, right, series, band } = options;
  const box = { left: width < 520 ? 58 : 76, top: 12, right: width - right, bottom: height - 46 };
  const [low, high] = valueRange(series, band);
  const unit = unitOf([low, high]);
  const step = niceStep(high - low, 5);
  const from = Math.floor(low / step) * step;
  const to = Math.ceil(high / step) * step;
  const places = windowColumns.length;
  const slot = (box.right - box.left) / places;
  const x = (place) => box.left + (place + 0.5) * slot;
  const y = (value) => box.bottom - ((value - from) / (to - from)) * (box.bottom - box.top);
  const chart = drawn("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": options.title, class: "chart" });

  drawColumns(chart, options, box, slot);
  const decimals = Math.max(0, Math.ceil(-Math.log10(step / 10 ** unit.power) - 1e-9));
  for (let tick = Math.round(from / step); tick <= Math.round(to / step); tick += 1) {
    const at = tick * step;
    chart.append(drawn("line", { x1: box.left, x2: box.right, y1: y(at), y2: y(at), class: tick === 0 ? "zero" : "grid" }));
    const text = tick === 0 ? "0" : number(at, { ...unit, decimals });
    chart.append(drawn("text", { x: box.left - 8, y: y(at) + 4, class: "tick end" }, text));
  }
  chart.append(
    drawn("text", { transform: `translate(14 ${(box.top + box.bottom) / 2}) rotate(-90)`, class: "axis middle" }, [options.yTitle, unitName(unit)].join(" ").trim()),
    drawn("text", { x: (box.left + box.right) / 2, y: height - 4, class: "axis middle" }, "window (training steps)"),
  );
  if (band) drawBand(chart, band, x, y, slot);
  for (const one of series) drawSeries(chart, one, x, y);
  return { chart, x, y, box };
}

function drawColumns(chart, options, box, slot) {
  const widest = Math.max(...windowColumns.map((column) => data.columns[column].name.length)) * 6.6 + 10;
  const every = Math.max(1, Math.ceil(widest / slot));
  windowColumns.forEach((column, place) => {
    const name = data.columns[column].name;
    const picked = options.picked === column && column > 0;
    const area = { x: box.left + place * slot, y: box.top, width: slot, height: box.bottom - box.top };
    const shown = drawn("rect", { ...area, class: picked ? "slot picked" : "slot" }, drawn("title", {}, name));
    if (options.pick) {
      shown.classList.add("pickable");
      shown.dataset.column = column;
      shown.addEventListener("click", () => options.pick(column));
    }
    chart.append(shown);
    if (place % every === 0) {
      chart.append(drawn("text", { x: box.left + (place + 0.5) * slot, y: box.bottom + 18, class: picked ? "tick middle strong" : "tick middle" }, name));
    }
  });
}

/* Half of a slot to either side, so that a single window has a band too. */
function drawBand(chart, band, x, y, slot) {
  const points = (side) => band.flatMap((bounds, place) => {
    if (!bounds) return [];
    const reach = band.length === 1 ? slot / 4 : 0;
    return reach ? [[x(place) - reach, y(bounds[side])], [x(place) + reach, y(bounds[side])]] : [[x(place), y(bounds[side])]];
  });
  const outline = [...points(1), ...points(0).reverse()];
  if (outline.length) chart.append(drawn("polygon", { points: outline.map((point) => point.join(",")).join(" "), class: "band" }));
}

function drawSeries(chart, one, x, y) {
  const group = drawn("g", { class: `series ${one.side}` });
  let path = "";
  let pen = "M";
  one.values.forEach((value, place) => {
    if (!Number.isFinite(value)) {
      pen = "M";
      return;
    }
    path += `${pen}${x(place).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  group.append(drawn("path", { d: path || "M0 0", class: one.dashed ? "line dashed" : "line" }));
  one.values.forEach((value, place) => {
    if (!Number.isFinite(value)) return;
    const [cx, cy] = [x(place), y(value)];
    const shape = one.dashed
      ? drawn("path", { d: `M${cx} ${cy - 5}L${cx + 5} ${cy}L${cx} ${cy + 5}L${cx - 5} ${cy}Z`, class: "point hollow" })
      : drawn("circle", { cx, cy, r: one.signed ? 4 : 3.2, class: one.signed && value !== 0 ? `point ${value > 0 ? "above" : "below"}` : "point" });
    const told = `${one.name}, ${data.columns[windowColumns[place]].name}: ${number(value, unitOf([value]))} ${unitName(unitOf([value]))}`;
    shape.append(drawn("title", {}, told.trim()));
    group.append(shape);
  });
  if (one.open) {
    group.classList.add("openable");
    group.addEventListener("click", one.open);
  }
  chart.append(group);
  one.drawn = group;
}
