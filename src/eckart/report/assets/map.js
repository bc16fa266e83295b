// The heat map: a table of blocks and kinds, one cell a weight, of which exactly one is in the tab order.

const RAMPS = {
  light: ["#f3f7dc", "#cfe9bd", "#95d5bb", "#52b9c4", "#2b8fbf", "#2561a6", "#1f3580"],
  dark: ["#18263f", "#21457c", "#24709f", "#2f99ad", "#62bf9f", "#a9dc8d", "#f1f3a0"],
};

function colour(share, theme) {
  const stops = RAMPS[theme], place = Math.min(0.9999, Math.max(0, share)) * (stops.length - 1), i = Math.floor(place);
  const part = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  const rgb = [0, 1, 2].map((k) => Math.round(part(stops[i], k) + (place - i) * (part(stops[i + 1], k) - part(stops[i], k))));
  const light = rgb.map((c) => ((c / 255) <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  return { back: `rgb(${rgb.join(" ")})`, text: luminance > 0.18 ? "#0b1420" : "#ffffff" };
}

/** What a map or a table shows of a layer. */
function look(layer, path) {
  return path.reduce((value, key) => (value === null || value === undefined ? null : value[key]), layer) ?? null;
}

function short(value, unit) {
  if (value === null) return "–";
  if (unit === "share") return value > 0.9995 ? "100" : (100 * value).toFixed(1);
  if (unit === "count") return value >= 10000 ? say(value, "number", 2) : String(Math.round(value));
  return say(value, "number", value >= 100 ? 3 : 2);
}

/**
 * figures: the page's figures; layers: what to show, by [block][kind] through the first model's places;
 * choices: the selectable figures; picked(index) when a cell is chosen, hovered(index or -1).
 */
function heatMap(figures, layers, choices, { id, picked, hovered }) {
  const { blocks, kinds } = figures;
  const grid = blocks.map(() => kinds.map(() => -1));
  figures.layers.forEach((layer, i) => { grid[layer.block][layer.kind] = i; });
  const cells = layers.map(() => null);
  const note = make("p", { class: "small muted" });
  const scale = make("div", { class: "scale" });
  const choice = make("select", { id: `${id}-figure`, onchange: paint },
    ...choices.map((item, i) => make("option", { value: i }, item.title)));
  const first = figures.layers.findIndex((layer) => layer.block === 0);

  const head = make("tr", {}, make("td", { class: "none" }),
    ...kinds.map((kind) => make("th", { scope: "col", title: kind.name, "aria-label": kind.name }, ...breakable(kind.short))));
  const body = blocks.map((block, row) => make("tr", { role: "row" },
    make("th", { scope: "row", role: "rowheader", title: block.name }, block.label),
    ...kinds.map((_, column) => {
      const index = grid[row][column];
      if (index < 0) return make("td", { class: "none", role: "gridcell", "aria-label": "no such weight" });
      const cell = make("td", { role: "gridcell", tabindex: index === Math.max(0, first) ? 0 : -1, "data-layer": layers[index].name });
      cells[index] = cell;
      return cell;
    })));
  head.setAttribute("role", "row");
  for (const th of head.querySelectorAll("th")) th.setAttribute("role", "columnheader");
  const table = make("table", { class: blocks.some((block) => block.label.length > 4) ? "map named" : "map", role: "grid", "aria-label": "Heat map: blocks down, kinds of weight across. Arrow keys move, Enter shows the spectrum." },
    make("colgroup", {}, make("col", { class: "head" }), ...kinds.map(() => make("col"))),
    make("thead", { role: "rowgroup" }, head), make("tbody", { role: "rowgroup" }, ...body));
  table.style.minWidth = `${40 + 38 * kinds.length}px`;

  function paint() {
    const item = choices[Number(choice.value)];
    const values = layers.map((layer) => look(layer, item.path));
    const known = values.filter((value) => value !== null && (item.scale !== "log" || value > 0)).sort((a, b) => a - b);
    const end = (share) => known[Math.round(share * (known.length - 1))];
    const [low, high] = known.length ? [end(known.length > 50 ? 0.02 : 0), end(known.length > 50 ? 0.98 : 1)] : [0, 1];
    const place = (value) => (high === low ? 0.5 : item.scale === "log"
      ? Math.log(Math.max(value, low) / low) / Math.log(high / low) : (value - low) / (high - low));
    const theme = document.documentElement.dataset.theme;
    layers.forEach((layer, i) => {
      const value = values[i], { back, text } = value === null ? { back: "transparent", text: "inherit" } : colour(place(value), theme);
      const { block, kind } = figures.layers[i];
      cells[i].textContent = short(value, item.unit);
      cells[i].style.background = back;
      cells[i].style.color = text;
      cells[i].dataset.value = value === null ? "" : String(value);
      cells[i].setAttribute("aria-label", `block ${blocks[block].label}, ${kinds[kind].name}: ${say(value, item.unit, 4)}`);
      cells[i].title = `${layer.name}: ${say(value, item.unit, 4)}`;
    });
    note.textContent = item.note;
    const ramp = RAMPS[theme].map((stop, i, all) => `${stop} ${(100 * i) / (all.length - 1)}%`).join(", ");
    scale.replaceChildren(say(low, item.unit), make("i", { style: { background: `linear-gradient(90deg, ${ramp})` } }), say(high, item.unit),
      item.unit === "share" ? " (numbers in the cells are percentages)" : "");
  }

  function move(from, rows, columns) {
    let row = figures.layers[from].block, column = figures.layers[from].kind;
    const inside = () => row >= 0 && row < blocks.length && column >= 0 && column < kinds.length;
    do { row += Math.sign(rows); column += Math.sign(columns); } while (inside() && grid[row][column] < 0);
    if (!inside()) return from;
    const far = Math.abs(rows) > 1 ? Math.min(blocks.length - 1, Math.max(0, figures.layers[from].block + rows)) : row;
    return grid[far][column] >= 0 ? grid[far][column] : grid[row][column];
  }

  function focus(index) {
    for (const cell of cells) cell.tabIndex = -1;
    cells[index].tabIndex = 0;
    cells[index].focus();
  }

  const indexOf = (target) => cells.indexOf(target.closest("td"));
  table.addEventListener("keydown", (event) => {
    const now = indexOf(event.target);
    if (now < 0) return;
    const row = grid[figures.layers[now].block].filter((i) => i >= 0);
    const all = grid.flat().filter((i) => i >= 0);
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-8, 0], PageDown: [8, 0] };
    if (event.key in steps) focus(move(now, ...steps[event.key]));
    else if (event.key === "Home") focus(event.ctrlKey ? all[0] : row[0]);
    else if (event.key === "End") focus(event.ctrlKey ? all.at(-1) : row.at(-1));
    else if (event.key === "Enter" || event.key === " ") picked(now);
    else return;
    event.preventDefault();
  });
  table.addEventListener("click", (event) => {
    const index = indexOf(event.target);
    if (index < 0) return;
    focus(index);
    picked(index);
  });
  table.addEventListener("pointerover", (event) => event.pointerType === "mouse" && hovered(indexOf(event.target)));
  table.addEventListener("pointerleave", () => hovered(-1));
  paint();
  return {
    element: make("div", { class: "card" },
      make("div", { class: "controls" }, make("label", { for: `${id}-figure` }, "Figure"), choice), note,
      make("div", { class: "scroll" }, table), scale),
    paint,
    choose(index) {
      for (const cell of cells) cell.classList.remove("chosen");
      if (index >= 0) cells[index].classList.add("chosen");
      cells.forEach((cell, i) => cell.setAttribute("aria-selected", String(i === index)));
    },
  };
}
