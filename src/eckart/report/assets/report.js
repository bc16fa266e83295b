// The page: reads its figures, makes the parts, and keeps what is chosen.

const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const details = document.getElementById("details");
const main = document.getElementById("main");
const narrow = matchMedia("(max-width: 860px)");
const axes = { logX: false, logY: true };
const maps = [];
let chosen = -1, shown = "overview";

// What is chosen

function showDetails(index, preview = false) {
  if (index < 0) return;
  details.replaceChildren(...detailsOf(figures, index, { preview, close: closeDetails, axes }));
}

function choose(index, { open = true } = {}) {
  chosen = index;
  showDetails(index);
  for (const map of maps) map.choose(index);
  for (const row of document.querySelectorAll("tr.pick")) row.classList.toggle("chosen", row.dataset.layer === figures.layers[index].name);
  if (!open) return;
  details.classList.add("open");
  document.getElementById("live").textContent = `Spectrum of ${figures.layers[index].name} shown`;
  remember();
}

function closeDetails() {
  details.classList.remove("open");
  const cell = document.querySelector(`#panel-${shown} td.chosen`);
  if (cell) cell.focus({ preventScroll: true });
}

const hovered = (index) => { if (!narrow.matches) showDetails(index < 0 ? chosen : index, index >= 0 && index !== chosen); };
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && narrow.matches) closeDetails(); });

// Overview

const percent = (share) => `${Math.round(1000 * share) / 10} %`; // a round number stays one

function tile(title, value, note) {
  return make("div", { class: "tile" }, make("dt", {}, title), make("dd", {}, value, note ? make("small", {}, note) : null));
}

function copyButton(text) {
  const button = make("button", { class: "button", type: "button" }, "Copy");
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(text); button.textContent = "Copied"; }
    catch (error) { getSelection().selectAllChildren(button.previousSibling); button.textContent = "Selected"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  return button;
}

function overview() {
  const { model, advice } = figures;
  const kinds = [...figures.kinds].sort((a, b) => b.kept - a.kept);
  const best = kinds[0], last = kinds.at(-1);
  const lead = make("p", { class: "lead" });
  const rows = [lead];
  if (!kinds.length) lead.append("No weight was selected, so there is nothing to say about this model's ranks.");
  else if (advice) {
    lead.append("Remove ", make("b", {}, percent(advice.ratio)), " of the selected numbers: the model shrinks from ",
      make("b", {}, bytes(model.bytes)), " to ", make("b", {}, bytes(advice.bytes)), ", and the weights keep ",
      make("b", {}, say(advice.kept, "share")), " of their energy.");
    if (kinds.length > 1) lead.append(" Start with ", make("b", {}, best.short), "; leave ", make("b", {}, last.short), " for last.");
    rows.push(make("div", { class: "command" }, make("code", {}, advice.command), copyButton(advice.command)),
      make("p", { class: "small muted" }, advice.enough
        ? `The largest ratio that keeps ${percent(advice.threshold)} of the energy, and clearly more than random weights keep. `
        : `No ratio here keeps ${percent(advice.threshold)} of the energy and clearly more than random weights keep: these weights are not of low rank by themselves, so begin small. `,
        "Energy says where a cut costs least, not how good the answers stay. ",
        advice.method === "svd" ? "The method svd needs no text, and sees no inputs: a language model often does not survive it. "
          : `The method ${advice.method} fits the outputs on some text; the same ratio by plain svd can ruin a language model. `,
        "Measure with eckart eval before and after."));
  } else if (model.compressed) lead.append("This model is compressed already. Its spectra are those of what its factors multiply out to.");
  else lead.append("The weights are too small for a budget to be worth the trouble.");
  if (advice) {
    rows.push(make("dl", { class: "tiles" },
      tile("Size now", bytes(model.bytes), `${say(model.parameters, "count")} parameters`),
      tile("Size predicted", bytes(advice.bytes), `${say(1 - advice.bytes / model.bytes, "share")} less`),
      tile("Energy kept", say(advice.kept, "share"), `${percent(advice.ratio)} of the selected removed`),
      tile("Weights looked at", say(model.selected, "count"), `${say(model.selected_parameters / model.parameters, "share")} of all parameters`)));
  }
  const parts = [make("section", { class: "card wide" }, ...rows)];
  if (kinds.length) parts.push(kindsCard(kinds), depthCard());
  if (advice) parts.push(budgetCard(advice));
  parts.push(extremesCard(), readingCard());
  return make("div", { class: "grid" }, ...parts.filter(Boolean));
}

function kindsCard(kinds) {
  const low = Math.floor(20 * Math.min(...kinds.map((kind) => Math.min(kind.kept, kind.noise_kept))) - 0.2) / 20;
  const at = (value) => `${(100 * (value - low)) / (1 - low)}%`;
  const dots = make("div", { class: "dots" });
  for (const kind of kinds) {
    dots.append(make("code", { title: kind.name }, kind.short),
      make("div", { class: "track" }, make("span", { class: "tick", style: { left: at(kind.noise_kept) } }), make("span", { class: "dot", style: { left: at(kind.kept) } })),
      make("span", { class: "number" }, say(kind.kept, "share"), make("span", { class: "hidden" }, `, a random matrix keeps ${say(kind.noise_kept, "share")}`)));
  }
  return make("section", { class: "card" }, make("h2", {}, "What to compress first"),
    make("p", { class: "small muted" }, `Median energy kept by each kind of weight when 20 % of its numbers go, from ${percent(low)} to 100 %.`),
    dots, make("div", { class: "key" }, make("span", {}, make("i", { class: "dot" }), "this model"), make("span", {}, make("i", { class: "tick" }), "a random matrix of that shape")));
}

function depthCard() {
  const rows = figures.blocks.map((block, i) => ({ label: block.label, members: figures.layers.filter((layer) => layer.block === i) }));
  if (rows.length < 2) return null;
  const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
  const kept = rows.map((row) => mean(row.members.map((layer) => layer.kept["20%"])));
  const order = kept.map((_, i) => i).sort((a, b) => kept[b] - kept[a]);
  const top = order.slice(0, Math.min(3, rows.length - 1)).map((i) => rows[i].label).join(", ");
  const line = { x: rows.map((_, i) => i), y: kept, name: "before", label: "kept" };
  return make("section", { class: "card" }, make("h2", {}, "Where it is low-rank"),
    make("p", { class: "small muted" }, `Mean energy kept in each block when 20 % of every weight goes. Blocks that keep the most: ${top}.`),
    chart([line], { unit: "share", xTitle: "block", height: 220, xSay: (i) => `block ${rows[i].label}`,
      about: `Energy kept by depth, from ${say(Math.min(...kept), "share")} to ${say(Math.max(...kept), "share")}.` }));
}

function budgetCard(advice) {
  const head = ["Removed", "Model size", "Energy kept", "by random weights", "Budget shared", "Worst weight"];
  return make("section", { class: "card wide" }, make("h2", {}, "What each budget keeps"),
    make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Budgets" },
      make("table", { class: "list", id: "budgets" }, make("thead", {}, make("tr", {}, ...head.map((title) => make("th", { scope: "col" }, title)))),
        make("tbody", {}, ...advice.steps.map((step) => make("tr", { class: step.ratio === advice.ratio ? "suggested chosen" : null },
          make("td", {}, percent(step.ratio), step.ratio === advice.ratio ? " (suggested)" : ""), make("td", {}, bytes(step.bytes)),
          make("td", {}, say(step.kept, "share")), make("td", {}, say(step.noise, "share")), make("td", {}, say(step.shared, "share")),
          make("td", { title: step.worst_layer }, say(step.worst, "share"))))))),
    make("p", { class: "small muted" }, "The same ratio for every weight, in the pivoted form that eckart compress writes by default. Shared: energy kept with --allocation threshold, which takes more from weights that lose little. Worst: what the weight keeps that loses most."));
}

function extremesCard() {
  if (figures.layers.length < 4) return null;
  const order = figures.layers.map((_, i) => i).sort((a, b) => figures.layers[b].kept["20%"] - figures.layers[a].kept["20%"]);
  const count = Math.min(5, Math.floor(order.length / 2));
  const list = (title, indexes) => make("div", {}, make("h3", {}, title), make("ul", { class: "steps" },
    ...indexes.map((i) => make("li", { class: "row" }, layerLink(i), make("span", { class: "small" }, say(figures.layers[i].kept["20%"], "share"))))));
  return make("section", { class: "card" }, make("h2", {}, "The two ends"),
    list("Keep the most, 20 % removed", order.slice(0, count)), list("Keep the least", order.slice(-count).reverse()));
}

function layerLink(i) {
  return make("button", { class: "link code", type: "button", onclick: () => { open(figures.against && shown === "change" ? "change" : "map"); choose(i); } }, figures.layers[i].name);
}

function readingCard() {
  const skipped = figures.skipped;
  return make("section", { class: "card" }, make("h2", {}, "How to read this"),
    make("p", { class: "small" }, "Energy is the sum of squared singular values. What a weight keeps at a rank is the most that any matrix of that rank can keep of it. A random matrix keeps much too, and it cannot be compressed: what counts is how far a weight is above that mark."),
    make("p", { class: "small" }, "Spectra know the weights, not the inputs. Where the inputs use few directions, a model loses less than its weights do."),
    skipped.length ? make("details", {}, make("summary", { class: "small" }, `${skipped.length} weights were left out`),
      make("ul", { class: "small muted" }, ...skipped.slice(0, 40).map((item) => make("li", {}, `${item.name}: ${item.reason}`)), skipped.length > 40 ? make("li", {}, `and ${skipped.length - 40} more`) : null)) : null);
}

// All layers

const COLUMNS = [
  ["Weight", ["name"], "text"], ["Shape", ["shape"], "shape"], ["Stable", ["stable_rank"], "number"], ["Effective", ["effective_rank"], "number"],
  ["Effective / size", ["effective_share"], "share"], ["Kept 10 %", ["kept", "10%"], "share"], ["Kept 20 %", ["kept", "20%"], "share"], ["Kept 50 %", ["kept", "50%"], "share"],
  ["Above noise", ["above_noise"], "count"], ["Tail", ["tail_exponent"], "number"], ["Condition", ["condition"], "number"], ["Suggested rank", ["suggested_rank"], "count"], ["Bytes saved", ["saved_bytes"], "bytes"],
];
const CHANGED = [
  ["Weight", ["name"], "text"], ["Difference", ["difference", "relative"], "share"], ["Stable rank of it", ["difference", "stable_rank"], "number"], ["Effective rank of it", ["difference", "effective_rank"], "number"],
  ["Effective before", ["before"], "number"], ["after", ["effective_rank"], "number"], ["Numbers before", ["numbers"], "count"], ["after", ["parameters"], "count"],
];

function layerTable(id, columns, rows, sortedBy) {
  const limit = 400;
  let sorted = { column: sortedBy, down: true }, all = rows.length <= limit, text = "";
  const body = make("tbody", {}), more = make("button", { class: "button", type: "button", onclick: () => { all = true; fill(); } });
  const count = make("span", { class: "small muted", role: "status" });
  const heads = columns.map(([title], i) => make("th", { scope: "col" }, make("button", { class: "sort", type: "button", onclick: () => {
    sorted = { column: i, down: sorted.column === i ? !sorted.down : i > 0 }; fill();
  } }, title)));
  const search = make("input", { type: "search", id: `${id}-search`, placeholder: "for instance q_proj", oninput: () => { text = search.value.trim().toLowerCase(); fill(); } });

  function fill() {
    const [, path, unit] = columns[sorted.column];
    const key = (row) => (unit === "shape" ? row.shape[0] * row.shape[1] : look(row, path));
    let found = rows.map((row, i) => [row, i]).filter(([row]) => row.name.toLowerCase().includes(text));
    if (unit !== "text" || sorted.down) found.sort(([a], [b]) => { // text going up is the model's order
      const [x, y] = [key(a), key(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? 1 : x > y ? -1 : 0) * (sorted.down ? 1 : -1);
    });
    heads.forEach((head, i) => {
      head.setAttribute("aria-sort", i === sorted.column ? (sorted.down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = columns[i][0] + (i === sorted.column ? (sorted.down ? " ↓" : " ↑") : "");
    });
    count.textContent = `${found.length} of ${rows.length}`;
    const visible = all ? found : found.slice(0, limit);
    more.hidden = visible.length === found.length;
    more.textContent = `Show all ${found.length}`;
    body.replaceChildren(...visible.map(([row, i]) => make("tr", { class: i === chosen ? "pick chosen" : "pick", "data-layer": row.name, onclick: () => choose(i) },
      ...columns.map(([, where, unit]) => make("td", {}, unit === "text" ? make("button", { class: "link code", type: "button" }, row.name)
        : unit === "shape" ? row.shape.join(" × ") : say(look(row, where), unit))))));
  }
  fill();
  return make("div", { class: "card" }, make("div", { class: "controls" }, make("label", { for: `${id}-search` }, "Find"), search, count),
    make("div", { class: "scroll long", tabindex: "0", role: "region", "aria-label": "All weights" },
      make("table", { class: "list", id }, make("thead", {}, make("tr", {}, ...heads)), body)), more);
}

// Before and after

function change() {
  const { model, against } = figures;
  const layers = against.layers;
  const sizes = layers.map((layer) => layer.difference.relative);
  const order = sizes.map((_, i) => i).sort((a, b) => sizes[a] - sizes[b]);
  const changedCount = sizes.filter((size) => size > 0).length;
  const middle = layers.length ? sizes[order[Math.floor(order.length / 2)]] : 0, most = order.at(-1);
  const lead = make("p", { class: "lead" }, make("b", {}, `${changedCount} of ${layers.length}`), " weights differ between ",
    make("b", {}, model.name), " and ", make("b", {}, against.model.name), changedCount ? "; in the middle by " : ".");
  if (changedCount) lead.append(make("b", {}, say(middle, "share")), " of their norm, most in ", layerLink(most), ` (${say(sizes[most], "share")}).`);
  const map = heatMap(figures, layers, [
    { path: ["difference", "relative"], title: "Size of the difference", unit: "share", scale: "linear", note: "Frobenius norm of the difference over that of the weight before." },
    { path: ["difference", "stable_rank"], title: "Stable rank of the difference", unit: "number", scale: "log", note: "Low: the change goes in a few directions." },
    { path: ["difference", "effective_rank"], title: "Effective rank of the difference", unit: "number", scale: "log", note: "Exponential of the entropy of the singular values of the difference." },
    { path: ["stable_rank"], title: "Stable rank after", unit: "number", scale: "log", note: "Squared Frobenius norm over the largest squared singular value." },
    { path: ["effective_share"], title: "Effective rank over size, after", unit: "share", scale: "linear", note: "Exponential of the entropy of the singular values, over full rank." },
  ], { id: "change", picked: choose, hovered });
  maps.push(map);
  const rows = layers.map((layer, i) => ({ ...layer, before: figures.layers[i].effective_rank, numbers: figures.layers[i].parameters }));
  const sign = (now, then) => `${now <= then ? "−" : "+"}${say(Math.abs(1 - now / then), "share")}`;
  return make("div", { class: "grid" },
    make("section", { class: "card wide" }, lead, make("dl", { class: "tiles" },
      tile("Size before", bytes(model.bytes), `${say(model.parameters, "count")} parameters`),
      tile("Size after", bytes(against.model.bytes), `${sign(against.model.bytes, model.bytes)}, ${say(against.model.parameters, "count")} parameters`),
      tile("Middle difference", say(middle, "share"), "of the norm of a weight"),
      tile("Largest difference", say(sizes[most] ?? 0, "share"), figures.layers[most]?.name))),
    make("div", { class: "wide" }, map.element), make("div", { class: "wide" }, layerTable("changes", CHANGED, rows, 1)));
}

// Parts, theme, address

const parts = [["overview", "Overview", overview], ["map", "Heat map", () => {
  const map = heatMap(figures, figures.layers, figures.map, { id: "map", picked: choose, hovered });
  maps.push(map);
  return map.element;
}], ["layers", "All weights", () => layerTable("layers", COLUMNS, figures.layers, 6)]];
if (figures.against) parts.push(["change", "Before and after", change]);

const tabs = document.getElementById("tabs"), panels = document.getElementById("panels");
for (const [id, title] of parts) {
  tabs.append(make("button", { type: "button", role: "tab", id: `tab-${id}`, "aria-controls": `panel-${id}`, "aria-selected": "false", tabindex: "-1", onclick: () => open(id) }, title));
  panels.append(make("section", { id: `panel-${id}`, role: "tabpanel", "aria-labelledby": `tab-${id}`, hidden: true }));
}
tabs.addEventListener("keydown", (event) => {
  const all = [...tabs.children], now = all.indexOf(event.target);
  const next = { ArrowRight: (now + 1) % all.length, ArrowLeft: (now + all.length - 1) % all.length, Home: 0, End: all.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  open(parts[next][0]);
  all[next].focus();
});

function open(id) {
  shown = id;
  for (const [name, , build] of parts) {
    const tab = document.getElementById(`tab-${name}`), panel = document.getElementById(`panel-${name}`), here = name === id;
    tab.setAttribute("aria-selected", String(here));
    tab.tabIndex = here ? 0 : -1;
    panel.hidden = !here;
    if (here && !panel.childElementCount) { // made when it is first looked at
      panel.append(build());
      if (chosen >= 0) for (const map of maps) map.choose(chosen);
    }
  }
  const withDetails = id !== "overview" && figures.layers.length > 0;
  main.classList.toggle("with-details", withDetails);
  details.hidden = !withDetails;
  if (!withDetails) details.classList.remove("open");
  remember();
}

function remember() {
  try { history.replaceState(null, "", `#${shown}${chosen >= 0 ? `/${encodeURIComponent(figures.layers[chosen].name)}` : ""}`); } catch (error) { /* not in every viewer */ }
}

const button = document.getElementById("theme");
function paintTheme() { button.textContent = root.dataset.theme === "dark" ? "Light" : "Dark"; button.setAttribute("aria-label", `${button.textContent} colours`); for (const map of maps) map.paint(); }
function setTheme(theme) { root.dataset.theme = theme; paintTheme(); }
button.addEventListener("click", () => {
  setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  try { localStorage.setItem("eckart-theme", root.dataset.theme); } catch (error) { /* a file may not be allowed to store */ }
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));

const { model } = figures;
document.getElementById("about").textContent = `${model.architecture} · ${say(model.parameters, "count")} parameters · ${bytes(model.bytes)} in ${model.dtype} · ${model.selected} weights looked at`
  + (figures.against ? ` · against ${figures.against.model.name}` : "");
const [wantedPart, wantedLayer] = location.hash.slice(1).split("/").map(decodeURIComponent);
const named = figures.layers.findIndex((layer) => layer.name === wantedLayer);
const steepest = figures.layers.reduce((best, layer, i, all) => (best < 0 || layer.kept["20%"] > all[best].kept["20%"] ? i : best), -1);
if (figures.layers.length) choose(named >= 0 ? named : steepest, { open: named >= 0 });
open(parts.some(([id]) => id === wantedPart) ? wantedPart : "overview");
paintTheme();
