"use strict";
// The page's own script: unpacks Plotly and the data, draws the figures, and keeps table, samples and locks.
// Every text goes through textContent.

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function element(tag, text, parent) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Plotly offers to upload a figure; this page sends nothing anywhere
const CONFIG = { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtonsToRemove: ["sendChartToCloud"] };

function drawFigures(figures) {
  const there = new Set();
  for (const { id, note, figure } of figures) {
    const place = document.getElementById(id);
    place.previousElementSibling.textContent = note;
    there.add(id);
    if (figure) Plotly.newPlot(place, figure.data, figure.layout, CONFIG);
  }
  for (const place of document.querySelectorAll(".figure")) {
    if (!there.has(place.id)) place.previousElementSibling.textContent = "No run has ended well yet.";
  }
}

// ---- the table: sorted by a click, filtered by a text or a bound for each column
const state = { column: 0, descending: false, filters: [] };

function fits(cell, filter) {
  const bound = filter.match(/^(<=|>=|<|>|=)\s*(-?[\d.]+(?:e[-+]?\d+)?)$/i);
  if (!bound) return cell[1].toLowerCase().includes(filter.toLowerCase());
  const value = Number(cell[0]);
  if (cell[0] === "" || Number.isNaN(value)) return false;
  const limit = Number(bound[2]);
  return { "<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit, "=": value === limit }[bound[1]];
}

function compareCells(one, other) {
  if (one === "" || other === "") return (one === "") - (other === "") || 0;
  if (typeof one === "number" && typeof other === "number") return one - other;
  return String(one).localeCompare(String(other), undefined, { numeric: true });
}

function drawRows(table) {
  const shown = table.rows.filter((row) => state.filters.every((f, at) => !f || fits(row.cells[at], f)));
  shown.sort((a, b) => {
    const [one, other] = [a.cells[state.column][0], b.cells[state.column][0]];
    const order = compareCells(one, other);
    return one === "" || other === "" || !state.descending ? order : -order; // what is empty stays last
  });
  const body = document.querySelector("#runs tbody");
  body.replaceChildren();
  for (const row of shown) {
    const line = element("tr", undefined, body);
    line.dataset.status = row.status;
    row.cells.forEach((cell, at) => {
      element("td", cell[1], line).className = table.heads[at].number ? "number" : "";
    });
  }
  document.querySelectorAll("#runs th.head").forEach((head, at) => {
    if (at === state.column) head.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  document.getElementById("count").textContent = `${shown.length} of ${table.rows.length} rows are shown.`;
}

function drawTable(table) {
  const heads = element("tr", undefined, document.querySelector("#runs thead"));
  const filters = element("tr", undefined, document.querySelector("#runs thead"));
  table.heads.forEach(({ key, title }, at) => {
    const head = element("th", title, heads);
    head.className = "head";
    head.dataset.key = key;
    head.tabIndex = 0;
    const sort = () => {
      state.descending = state.column === at && !state.descending;
      state.column = at;
      drawRows(table);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => event.key === "Enter" && sort());
    const filter = element("input", undefined, element("th", undefined, filters));
    filter.setAttribute("aria-label", `filter ${title}`);
    filter.addEventListener("input", () => {
      state.filters[at] = filter.value.trim();
      drawRows(table);
    });
  });
  drawRows(table);
}

// ---- samples: a line a prompt, a column a run
function drawSamples(runs) {
  const select = document.getElementById("samples-runs");
  runs.forEach(({ run }, at) => {
    const option = element("option", run, select);
    option.value = at;
    option.selected = at < 2;
  });
  const draw = () => {
    const chosen = [...select.selectedOptions].map((option) => runs[option.value]);
    const head = document.querySelector("#samples-table thead");
    const body = document.querySelector("#samples-table tbody");
    head.replaceChildren();
    body.replaceChildren();
    const prompts = [...new Set(chosen.flatMap(({ samples }) => samples.map(({ prompt }) => prompt)))];
    const said = (samples, prompt, when) => samples.find((sample) => sample.prompt === prompt)?.[when] ?? "";
    // runs of one base begin alike: its answers stand there once
    const begin = ({ samples }) => JSON.stringify(prompts.map((prompt) => said(samples, prompt, "before")));
    const isOneBase = new Set(chosen.map(begin)).size === 1;
    const columns = chosen.flatMap(({ run, samples }, at) => [
      ...(isOneBase && at ? [] : [[isOneBase ? "before" : `${run}: before`, samples, "before"]]),
      [isOneBase ? run : `${run}: after`, samples, "after"],
    ]);
    const titles = element("tr", undefined, head);
    for (const title of ["prompt", ...columns.map(([title]) => title)]) element("th", title, titles);
    for (const prompt of prompts) {
      const line = element("tr", undefined, body);
      const texts = columns.map(([, samples, when]) => said(samples, prompt, when));
      for (const text of [prompt, ...texts]) element("pre", text, element("td", undefined, line));
    }
  };
  select.addEventListener("change", draw);
  if (runs.length) draw();
  else select.parentElement.textContent = "No run has samples.";
}

function drawLocks(locks) {
  for (const { run, status, lock } of locks) {
    const details = element("details", undefined, document.getElementById("locks"));
    element("summary", `${run} (${status})`, details);
    const text = element("pre", undefined, details);
    details.addEventListener("toggle", () => {
      text.textContent ||= JSON.stringify(lock, null, 2);
    });
  }
}

async function main() {
  const data = JSON.parse(await unpacked("data-packed"));
  drawTable(data.table);
  drawSamples(data.samples);
  drawLocks(data.locks);
  const script = document.createElement("script");
  script.textContent = await unpacked("plotly-packed");
  document.head.append(script);
  drawFigures(data.figures);
  document.body.dataset.ready = "yes";
}

main().catch((error) => {
  document.getElementById("problem").textContent = `The page could not be drawn: ${error}`;
  throw error;
});
