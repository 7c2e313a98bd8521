/* The table of samples: filtered, sorted, in pages. */

const PAGE = 50;
const collator = new Intl.Collator("en", { numeric: true });

const COLUMNS = [
  { key: "sample", name: "sample", kind: "sample", value: (at) => line(at) || null },
  { key: "index", name: "index", kind: "number", value: (at) => data.samples[at] },
  { key: "label", name: "label", value: label, there: () => data.labels !== null },
  { key: "overall", name: () => data.columns[0].name, kind: "number", column: () => 0, value: (at) => score(0, at) },
  { key: "picked", name: () => data.columns[state.column].name, kind: "number", column: () => state.column, value: (at) => score(state.column, at), there: () => state.column > 0 },
  { key: "estimate", name: "estimated", kind: "number", column: () => state.column, value: (at) => (replaced(state.column, at) ? estimate(state.column, at) : NaN), there: () => query().exact !== null && data.exact_ranks },
  { key: "exact", name: exactName, kind: "number", column: () => state.column, value: (at) => exact(state.column, at), there: () => query().exact !== null && !data.exact_ranks },
  { key: "spark", name: "over training", there: () => data.columns.length > 1 },
  { key: "marks", name: "marks", value: (at) => -(2 * query().flagged.has(at) + damagedSet.has(at)) },
  { key: "pattern", name: "pattern", value: pattern, there: () => query().patterns !== null },
];

const shownColumns = () => COLUMNS.filter((column) => !column.there || column.there());
const sortKey = () => (state.sort === "picked" && state.column === 0 ? "overall" : state.sort);
const nameOf = (column) => (typeof column.name === "function" ? column.name() : column.name);
const missing = (value) => value === null || Number.isNaN(value);

function kept(position) {
  const own = score(state.column, position);
  const is = (wanted, held) => wanted === "" || (wanted === "yes") === held;
  return (state.side === "" || (state.side === "harmful" ? own < 0 : own > 0))
    && is(state.damaged, damagedSet.has(position))
    && is(state.flagged, query().flagged.has(position))
    && (state.label === "" || data.label[position] === Number(state.label))
    && (state.pattern === "" || pattern(position) === state.pattern)
    && (state.search === "" || searchText(position).includes(state.search));
}

/* Missing values come last, whichever way is sorted; equal ones in the order of the samples. */
function found() {
  const column = shownColumns().find((one) => one.key === sortKey()) || COLUMNS[1];
  const positions = [];
  for (let position = 0; position < count; position += 1) if (kept(position)) positions.push(position);
  const values = new Map(positions.map((position) => [position, column.value(position)]));
  const turn = state.descending ? -1 : 1;
  return positions.sort((a, b) => {
    const [first, second] = [values.get(a), values.get(b)];
    if (missing(first) || missing(second)) return missing(first) - missing(second) || a - b;
    return turn * (typeof first === "string" ? collator.compare(first, second) : first - second) || a - b;
  });
}

function drawHead() {
  const cells = shownColumns().map((column) => {
    const sorted = sortKey() === column.key;
    const unit = column.column ? unitName(columnUnit(column.column())) : "";
    const attributes = { scope: "col", class: `${column.kind || ""} ${column.key}`, "data-key": column.key };
    if (!column.value) return element("th", attributes, nameOf(column));
    const arrow = sorted ? element("span", { class: "arrow", "aria-hidden": "true" }, state.descending ? "▼" : "▲") : null;
    const button = element("button", { type: "button" }, nameOf(column), arrow, unit ? element("small", {}, ` ${unit}`) : null);
    button.addEventListener("click", () => sortBy(column.key));
    return element("th", { ...attributes, "aria-sort": sorted ? (state.descending ? "descending" : "ascending") : "none" }, button);
  });
  byId("samples").tHead.replaceChildren(element("tr", {}, ...cells));
}

function drawBody() {
  const positions = found();
  const pages = Math.max(1, Math.ceil(positions.length / PAGE));
  state.page = Math.min(state.page, pages - 1);
  const shown = positions.slice(state.page * PAGE, (state.page + 1) * PAGE);
  const rows = shown.flatMap((position) => (position === state.open ? [sampleRow(position), detailRow(position)] : [sampleRow(position)]));
  byId("samples").tBodies[0].replaceChildren(...rows);
  for (const holder of document.querySelectorAll(".over-time")) holder.draw(holder.clientWidth);
  byId("count").textContent = `${positions.length.toLocaleString("en")} of ${count.toLocaleString("en")} samples${count < data.total ? " on this page" : ""}`;
  byId("page-number").textContent = `page ${state.page + 1} of ${pages}`;
  byId("previous").disabled = state.page === 0;
  byId("next").disabled = state.page >= pages - 1;
}

function sampleRow(position) {
  const row = element("tr", { class: position === state.open ? "sample open" : "sample", "data-index": data.samples[position] });
  row.append(...shownColumns().map((column) => element("td", { class: `${column.kind || ""} ${column.key}` }, ...cell(column, position, row))));
  row.addEventListener("click", () => toggle(position));
  row.addEventListener("keydown", (event) => rowKey(event, row));
  return row;
}

function cell(column, position, row) {
  if (column.key === "sample") return [sampleCell(position)];
  if (column.key === "index") {
    const opened = position === state.open;
    return [element("button", { type: "button", class: "plain", "aria-expanded": opened, "aria-label": `sample ${data.samples[position]}` }, String(data.samples[position]))];
  }
  if (column.key === "spark") return [sparkline(position)];
  if (column.key === "marks") {
    return [query().flagged.has(position) ? element("span", { class: "badge flag" }, "flagged") : null, unclear(state.column, position) ? element("span", { class: "badge", title: "the 95 % interval contains 0" }, "unclear") : null, damagedSet.has(position) ? element("span", { class: "badge" }, "damaged") : null];
  }
  const value = column.value(position);
  if (missing(value)) return ["–"];
  if (!column.column) return [fromData(value, { title: value })];
  const unit = columnUnit(column.column());
  const strength = unit.largest > 0 ? Math.min(1, Math.sqrt(Math.abs(value) / unit.largest)) : 0;
  const shown = element("span", { class: value < 0 ? "value harmful" : "value helpful" }, number(value, unit));
  shown.style.setProperty("--strength", `${Math.round(34 * strength)}%`);
  if (column.key === "estimate" || column.key === "exact") return [shown];
  if (unclear(column.column(), position)) shown.classList.add("unclear");
  return replaced(column.column(), position) ? [element("span", { class: "exact-mark", title: "exact" }, "◇"), shown] : [shown];
}

function sampleCell(position) {
  const picture = data.pictures[position];
  const text = line(position);
  const image = picture ? element("img", { src: picture, alt: "", class: "thumb", loading: "lazy" }) : null;
  return element("div", { class: "sample-cell" }, image, text ? fromData(text.slice(0, 300), { title: text.slice(0, 300), dir: "auto" }) : picture ? null : "–");
}

function detailRow(position) {
  return element("tr", { class: "detail-row" }, element("td", { colspan: shownColumns().length }, detailOf(position)));
}

/* From one sample's button to the next; the button itself opens the sample. */
function rowKey(event, row) {
  const steps = { ArrowDown: 1, ArrowUp: -1 };
  if (!(event.key in steps) || !event.target.matches("td.index button")) return;
  event.preventDefault();
  const rows = [...byId("samples").querySelectorAll("tr.sample")];
  (rows[rows.indexOf(row) + steps[event.key]] || row).querySelector("td.index button").focus();
}
