"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const count = data.samples.length;
const windowColumns = data.columns.length > 1 ? data.columns.map((_, k) => k).slice(1) : [0];
const damagedSet = new Set(data.damaged || []);
const cutSet = new Set(data.cut);
const byId = (id) => document.getElementById(id);

/* What is picked, sorted by, filtered and open; positions are places in data.samples. */
const state = {
  query: 0, column: 0, sort: "picked", descending: false, page: 0, open: null,
  search: "", side: "", damaged: "", flagged: "", label: "", pattern: "",
};

function bytes(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

const floats = (text) => new Float32Array(bytes(text).buffer);

/* Exact scores stand in the place of estimates, where they answer the same question: all is ranked and drawn by these. */
function rankedOf(estimated, known) {
  const ranked = estimated.slice();
  if (known === null || !data.exact_ranks) return ranked;
  data.columns.forEach((_, column) => data.known.forEach((position, place) => {
    const value = known[column * data.known.length + place];
    if (Number.isFinite(value)) ranked[column * count + position] = value;
  }));
  return ranked;
}

const queries = data.queries.map((query) => {
  const estimated = floats(query.scores);
  const known = query.exact === null ? null : floats(query.exact);
  const bits = query.unclear === null ? null : bytes(query.unclear);
  return { ...query, estimated, exact: known, bits, ranked: rankedOf(estimated, known), flagged: new Set(query.flagged) };
});
const knownPlace = new Map((data.known || []).map((position, place) => [position, place]));

const query = () => queries[state.query];
const score = (column, position) => query().ranked[column * count + position];
const estimate = (column, position) => query().estimated[column * count + position];

function unclear(column, position) {
  const place = column * count + position;
  return query().bits !== null && Boolean((query().bits[place >> 3] >> (7 - (place & 7))) & 1);
}

function exact(column, position) {
  const place = knownPlace.get(position);
  return query().exact === null || place === undefined ? NaN : query().exact[column * knownPlace.size + place];
}

const replaced = (column, position) => data.exact_ranks && Number.isFinite(exact(column, position));
const exactName = data.removed === null ? "exact" : "alone, exact";

const label = (position) => (data.label === null || data.label[position] < 0 ? null : data.labels[data.label[position]]);
const pattern = (position) => (query().patterns === null ? null : data.patterns[query().patterns[position]]);

function rowText(position) {
  const row = data.rows[position];
  if (!row) return null;
  return Object.entries(row).map(([place, value]) => `${data.names[place]}=${value}`).join(" · ");
}

/* One line on a sample: what is told of it, else its text, else its row. */
function line(position) {
  return (data.notes && data.notes[position]) || data.texts[position] || rowText(position) || "";
}

const searched = new Map();
function searchText(position) {
  if (!searched.has(position)) {
    const parts = [data.samples[position], label(position), data.notes && data.notes[position]];
    searched.set(position, [...parts, data.texts[position], rowText(position)].filter((part) => part !== null).join(" ").toLowerCase());
  }
  return searched.get(position);
}

/* Numbers of one column share a power of ten, so that they can be compared at a glance. */
function unitOf(values) {
  let largest = 0;
  for (const value of values) if (Math.abs(value) > largest) largest = Math.abs(value);
  let power = largest > 0 ? 3 * Math.floor(Math.log10(largest) / 3) : 0;
  if (largest >= 0.1 && largest < 1000) power = 0;
  const scaled = largest / 10 ** power;
  return { power, decimals: scaled < 10 ? 3 : scaled < 100 ? 2 : 1, largest };
}

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
function unitName(unit) {
  if (unit.power === 0) return "";
  const digits = String(Math.abs(unit.power)).replace(/\d/g, (digit) => SUPERSCRIPTS[Number(digit)]);
  return `×10${unit.power < 0 ? "⁻" : ""}${digits}`;
}

function number(value, unit) {
  if (!Number.isFinite(value)) return "–";
  const text = Math.abs(value / 10 ** unit.power).toFixed(unit.decimals);
  return `${value < 0 ? "−" : value > 0 ? "+" : ""}${text}`;
}

const units = new Map();
function columnUnit(column) {
  const key = `${state.query} ${column}`;
  if (!units.has(key)) units.set(key, unitOf(query().ranked.subarray(column * count, (column + 1) * count)));
  return units.get(key);
}

function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

/* Strings become text nodes: no string of the data is ever read as HTML. */
function filled(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const fromData = (text, attributes = {}) => element("bdi", { class: "data", ...attributes }, text);
