/* A sample, opened: as it looks, what is known of it, its influence over time. */

function detailOf(position) {
  const parts = [looks(position), aside(position)].filter(Boolean);
  const wide = data.texts[position] !== undefined || data.rows[position] !== undefined;
  return element("div", { class: wide ? "detail wide" : "detail" }, ...parts);
}

function looks(position) {
  if (data.pictures[position]) {
    const picture = element("img", { src: data.pictures[position], alt: `training sample ${data.samples[position]}`, class: "picture" });
    picture.addEventListener("load", () => picture.classList.toggle("crisp", picture.naturalWidth <= 64));
    return element("div", { class: "looks" }, picture, facts(position));
  }
  if (data.texts[position] !== undefined) {
    const cut = cutSet.has(position) ? element("p", { class: "quiet" }, "Only the beginning is kept on this page.") : null;
    return element("div", { class: "looks" }, element("div", { class: "text data", dir: "auto", tabindex: 0 }, data.texts[position]), cut, facts(position));
  }
  if (data.rows[position]) {
    const rows = Object.entries(data.rows[position]).map(([place, value]) =>
      element("tr", {}, element("th", { scope: "row" }, fromData(data.names[place])), element("td", {}, fromData(value))));
    return element("div", { class: "looks" }, element("div", { class: "row-values", tabindex: 0 }, element("table", {}, element("tbody", {}, ...rows))), facts(position));
  }
  return element("div", { class: "looks" }, facts(position));
}

function facts(position) {
  const told = [];
  const tell = (name, value) => told.push(element("dt", {}, name), element("dd", {}, value));
  tell("sample", String(data.samples[position]));
  if (label(position) !== null) tell("label", fromData(label(position)));
  if (data.notes && data.notes[position]) tell("about", fromData(data.notes[position]));
  tell("rank", rankOf(position));
  if (data.damaged !== null) tell("damaged", damagedSet.has(position) ? "yes" : "no");
  if (query().bits !== null) tell("unclear", unclear(0, position) ? "yes" : "no");
  tell("flagged", query().flagged.has(position) ? "yes" : "no");
  if (pattern(position) !== null) tell("pattern", pattern(position));
  return element("dl", { class: "facts" }, ...told);
}

function ordinal(rank) {
  const ending = rank % 100 >= 11 && rank % 100 <= 13 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[rank % 10] || "th";
  return `${rank.toLocaleString("en")}${ending}`;
}

function rankOf(position) {
  const own = score(0, position);
  if (!Number.isFinite(own)) return "–";
  const beyond = query().beyond[position];
  const side = own < 0 ? "harmful" : own > 0 ? "helpful" : "neither harmful nor helpful";
  return own === 0 ? side : `${beyond ? `${ordinal(beyond + 1)} most` : "most"} ${side} of ${data.total.toLocaleString("en")} (${data.columns[0].name})`;
}

function aside(position) {
  const exactValues = windowColumns.map((column) => exact(column, position));
  const hasExact = exactValues.some(Number.isFinite);
  const holder = element("div", { class: "over-time" });
  const key = element("p", { class: "key quiet" }, element("span", { class: "key-line" }), "estimated ");
  if (hasExact) key.append(element("span", { class: "key-exact" }, "◇"), `${exactName} (left out, retrained) `);
  key.append(element("span", { class: "key-band" }), "90 % of all samples");
  holder.draw = (width) => {
    const series = [{ values: windowColumns.map((column) => estimate(column, position)), side: "chosen", signed: true, name: "estimated" }];
    if (hasExact) series.push({ values: exactValues, side: "exact", dashed: true, name: exactName });
    const { chart } = windowChart({
      width: Math.max(240, width), height: 240, right: 12, series, band: bandOf(), picked: state.column, pick: pickColumn, yTitle: "influence",
      title: `Influence over windows of sample ${data.samples[position]}`,
    });
    holder.replaceChildren(chart, key, numbers(position));
  };
  return holder;
}

function numbers(position) {
  const told = data.columns.map((column, place) => {
    const unit = columnUnit(place);
    const value = (found) => (Number.isFinite(found) ? `${number(found, unit)} ${unitName(unit)}`.trim() : "–");
    return element("tr", {}, element("th", { scope: "row" }, column.name), element("td", {}, value(estimate(place, position))), query().exact === null ? null : element("td", {}, value(exact(place, position))));
  });
  const heads = ["window", "estimated", ...(query().exact === null ? [] : [exactName])];
  const head = element("thead", {}, element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name))));
  return element("details", { class: "numbers" }, element("summary", {}, "Numbers"), element("table", {}, head, element("tbody", {}, ...told)));
}
