/* What the reader does, and the page that follows. */

function draw() {
  drawPicker();
  drawOverview();
  drawSpread();
  drawHead();
  drawBody();
}

function pickColumn(column) {
  Object.assign(state, { column, sort: "picked", descending: state.sort === "picked" && state.descending, page: 0 });
  draw();
}

function sortBy(key) {
  state.descending = sortKey() === key ? !state.descending : false;
  state.sort = key === "overall" && state.column === 0 ? "picked" : key;
  state.page = 0;
  drawHead();
  drawBody();
  byId("samples").querySelector(`th[data-key="${key}"] button`).focus();
}

function toggle(position) {
  state.open = state.open === position ? null : position;
  drawOverview();
  drawBody();
  focusRow(position);
}

/* From the chart: whatever page the sample is on, and whatever is filtered. */
function openSample(position) {
  state.open = position;
  if (!kept(position)) clearFilters();
  state.page = Math.floor(found().indexOf(position) / PAGE);
  drawOverview();
  drawBody();
  focusRow(position);
  byId("samples").querySelector("tr.open").scrollIntoView({ block: "start", behavior: "auto" });
}

function focusRow(position) {
  const button = byId("samples").querySelector(`tr[data-index="${data.samples[position]}"] td.index button`);
  if (button) button.focus({ preventScroll: true });
}

const FILTERS = ["side", "damaged", "flagged", "label", "pattern"];

function clearFilters() {
  for (const name of ["search", ...FILTERS]) {
    state[name] = "";
    byId(name).value = "";
  }
}

function drawPicker() {
  const focused = document.activeElement && document.activeElement.dataset.pick;
  const named = data.columns.map((column, place) => {
    const agreement = column.agreement === null ? null : element("small", { title: data.agreement }, column.agreement);
    const button = element("button", { type: "button", "aria-pressed": place === state.column, "data-pick": place }, column.name, agreement);
    button.addEventListener("click", () => pickColumn(place));
    return button;
  });
  byId("picker").replaceChildren(...named);
  if (focused) byId("picker").children[Number(focused)].focus();
  byId("trust").textContent = data.columns[state.column].trust.join(" ");
}

/* A sandboxed frame has no clipboard of its own; what is selected can be copied all the same. */
function copy(button) {
  const selection = getSelection();
  selection.selectAllChildren(button.previousElementSibling);
  const done = document.execCommand("copy");
  byId("copied").textContent = done ? "Copied." : "Selected: press Ctrl+C to copy.";
}

function fill(select, names) {
  select.append(...names.map(([value, name]) => element("option", { value }, shortened(name, 60))));
}

function start() {
  byId("overall-name").textContent = data.columns[0].name;
  byId("trust").hidden = data.columns.every((column) => column.trust.length === 0);
  byId("damaged").hidden = data.damaged === null;
  byId("label").hidden = data.labels === null || data.labels.length > 200;
  byId("pattern").hidden = queries[0].patterns === null;
  byId("pattern-rule").hidden = queries[0].patterns === null;
  if (!byId("label").hidden) fill(byId("label"), data.labels.map((name, code) => [code, name]));
  if (!byId("pattern").hidden) fill(byId("pattern"), data.patterns.slice(1).map((name) => [name, name]));
  fill(byId("query"), queries.map((one, place) => [place, one.name]));
  byId("query-choice").hidden = queries.length < 2;
  const again = () => {
    state.page = 0;
    drawBody();
  };
  for (const name of FILTERS) byId(name).addEventListener("change", (event) => { state[name] = event.target.value; again(); });
  byId("search").addEventListener("input", (event) => { state.search = event.target.value.trim().toLowerCase(); again(); });
  byId("clear").addEventListener("click", () => { clearFilters(); again(); });
  byId("query").addEventListener("change", (event) => { state.query = Number(event.target.value); state.page = 0; draw(); });
  for (const button of document.querySelectorAll(".copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }
  for (const [name, step] of [["previous", -1], ["next", 1]]) {
    byId(name).addEventListener("click", () => {
      state.page += step;
      drawBody();
      byId("samples").scrollIntoView({ block: "start" });
    });
  }
  byId("page").hidden = false;
  draw();
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    drawOverview();
    drawBody();
  }).observe(document.body);
}

start();
