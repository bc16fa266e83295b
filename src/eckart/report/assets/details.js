// One weight: its spectrum, how its energy adds up, and its figures; of both models where there are two.

function curve(figures, layer, curves, name, label, what) {
  const x = figures.points[String(Math.min(...layer.shape))];
  return { x, y: curves[what], name, label };
}

const FACTS = [
  ["Stable rank", ["stable_rank"], "number"],
  ["Effective rank", ["effective_rank"], "number"],
  ["Entropy rank", ["entropy_rank"], "number"],
  ["Largest value", ["largest"], "number"],
  ["Condition number", ["condition"], "number"],
  ["Tail exponent", ["tail_exponent"], "number"],
  ["Values above noise", ["above_noise"], "count"],
  ["Kept, 10 % removed", ["kept", "10%"], "share"],
  ["Kept, 20 % removed", ["kept", "20%"], "share"],
  ["Kept, 50 % removed", ["kept", "50%"], "share"],
];

function detailsOf(figures, index, { preview, close, axes }) {
  const layer = figures.layers[index], other = figures.against ? figures.against.layers[index] : null;
  const [m, n] = layer.shape;
  const spectra = [curve(figures, layer, layer.spectrum, "before", "before", "values")];
  const energies = [curve(figures, layer, layer.spectrum, "before", "before", "energy")];
  if (other) {
    spectra.push(curve(figures, layer, other.spectrum, "after", "after", "values"));
    energies.push(curve(figures, layer, other.spectrum, "after", "after", "energy"));
    if (other.difference.relative > 0) spectra.push(curve(figures, layer, other.difference.spectrum, "change", "difference", "values"));
  }
  const suggested = layer.suggested_rank && layer.suggested_rank < Math.min(m, n) ? [{ at: layer.suggested_rank, label: "suggested rank" }] : [];
  const holder = make("div", {});
  const logX = make("input", { type: "checkbox", id: "log-x", onchange: paint });
  const logY = make("input", { type: "checkbox", id: "log-y", onchange: paint });
  logX.checked = axes.logX;
  logY.checked = axes.logY;

  function paint() {
    axes.logX = logX.checked;
    axes.logY = logY.checked;
    const name = `${layer.name}, ${m} by ${n}`;
    const shared = { logX: axes.logX, xTitle: "rank", down: suggested };
    holder.replaceChildren(
      make("h3", {}, "Singular values"),
      chart(spectra, { ...shared, marksAbove: true, logY: axes.logY, low: axes.logY ? undefined : 0,
        across: layer.noise_edge ? [{ at: layer.noise_edge, label: "edge of noise" }] : [],
        about: `Singular values of ${name}: the largest is ${say(layer.largest)}, ${layer.above_noise} of ${Math.min(m, n)} are above the edge of noise.` }),
      make("h3", {}, "Energy kept by the first ranks"),
      chart(energies, { ...shared, unit: "share", low: 0, high: 1, height: 190, down: suggested,
        about: `Energy of ${name}: ${say(layer.energy["10%"], "share")} in a tenth of the ranks, ${say(layer.energy["50%"], "share")} in half of them.` }));
  }
  paint();

  const fact = ([title, path, unit]) => {
    const mine = look(layer, path), theirs = other ? look(other, path) : null;
    return make("div", {}, make("dt", {}, title), make("dd", {}, say(mine, unit),
      other && say(mine, unit) !== say(theirs, unit) ? make("span", {}, ` → ${say(theirs, unit)}`) : null));
  };
  const facts = FACTS.map(fact);
  if (layer.suggested_rank) facts.push(make("div", {}, make("dt", {}, "Suggested rank"), make("dd", {}, suggested.length ? `${layer.suggested_rank}` : "dense")));
  if (other) facts.push(make("div", {}, make("dt", {}, "Size of the difference"), make("dd", {}, say(other.difference.relative, "share"))));
  return [
    make("header", {},
      make("div", {}, make("p", { class: "small muted" }, preview ? "Under the pointer" : "Chosen weight"),
        make("h2", { id: "chosen" }, layer.name),
        make("p", { class: "small muted" }, `${m} × ${n}, ${say(layer.parameters, "count")} numbers`)),
      make("button", { class: "button close", type: "button", onclick: close, "aria-label": "Close the spectrum" }, "Close")),
    make("div", { class: "row" },
      make("div", { class: "key" }, make("span", {}, make("i"), other ? "before" : "this weight"),
        other ? make("span", {}, make("i", { class: "after" }), "after") : null,
        other && other.difference.relative > 0 ? make("span", {}, make("i", { class: "change" }), "difference") : null),
      make("div", { class: "key" }, make("label", {}, logX, " log rank"), make("label", {}, logY, " log value"))),
    holder,
    make("dl", { class: "facts" }, ...facts),
  ];
}
