// Elements, numbers and line charts. No library: one page draws a few hundred points.

/** Make an element; text is never read as HTML, so a layer may be called anything. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

function draw(tag, attributes = {}, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.textContent = text;
  return element;
}

/** A name that may break after its dots and underscores, so that narrow columns break it there. */
function breakable(name) {
  return name.split(/(?<=[._])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
}

/** A figure for people: unit is "share", "count", "bytes" or "number". */
function say(value, unit = "number", digits = 3) {
  if (value === null || value === undefined) return "–";
  if (unit === "share") return value === 0 || value >= 0.99995 ? `${Math.round(100 * value)} %` : `${(100 * value).toFixed(value > 0.9995 || value < 0.0005 ? 2 : 1)} %`;
  if (unit === "count") return Math.round(value).toLocaleString("en-US");
  if (unit === "bytes") return bytes(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(digits - 1).replace(/\.?0+e/, "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(digits)));
}

function bytes(count) {
  let rest = count;
  for (const unit of ["B", "kB", "MB"]) {
    if (Math.abs(rest) < 999.5) return `${Number(rest.toPrecision(3))} ${unit}`;
    rest /= 1000;
  }
  return `${Number(rest.toPrecision(3))} GB`;
}

/** Round values between low and high: powers of ten where logarithmic, else four or five steps. */
function ticks(low, high, logarithmic) {
  if (logarithmic) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    if (last - first >= 1) {
      const step = Math.ceil((last - first + 1) / 6);
      return Array.from({ length: Math.floor((last - first) / step) + 1 }, (_, i) => 10 ** (first + i * step));
    }
    const small = [];
    for (let power = first - 1; power <= last + 1; power++)
      for (const digit of [1, 2, 3, 5]) small.push(digit * 10 ** power);
    return small.filter((value) => value >= low * 0.999 && value <= high * 1.001);
  }
  const raw = (high - low) / 4 || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((digit) => digit * power).find((value) => value >= raw);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) found.push(Math.abs(value) < step * 1e-6 ? 0 : value);
  return found;
}

/**
 * A line chart. lines: [{x, y, name, label}], name is a class; across: [{at, label}] horizontal, down: vertical marks.
 * options: {logX, logY, unit, xTitle, about, low, high, height, xSay, marksAbove}. Arrow keys move the guide.
 */
function chart(lines, options) {
  const box = make("div", { class: "chart", tabindex: "0", role: "group", "aria-label": `${options.about} Arrow keys read the values.` });
  const tip = make("div", { class: "tip", hidden: true, role: "status" });
  let width = 0, at = -1;
  const positive = (values) => values.filter((value) => value > 0);

  function paint() {
    const height = options.height || 230, left = 52, right = 12, top = 10, bottom = 38;
    const xs = lines.flatMap((line) => line.x);
    let ys = [...lines.flatMap((line) => line.y), ...(options.across || []).map((mark) => mark.at)];
    if (options.logY) ys = positive(ys);
    let low = options.low ?? Math.min(...ys), high = options.high ?? Math.max(...ys);
    if (!ys.length) { low = options.logY ? 0.1 : 0; high = 1; }
    if (options.logY) low = Math.max(low, high * 1e-5); // what lies below is mostly rounding
    if (low === high) { low = options.logY ? low / 2 : low - 0.5; high = options.logY ? high * 2 : high + 0.5; }
    const firstX = Math.min(...xs), lastX = Math.max(...xs);
    const scale = (value, from, to, logarithmic) =>
      logarithmic ? Math.log(value / from) / Math.log(to / from || 1) : (value - from) / (to - from || 1);
    const px = (x) => left + (width - left - right) * (firstX === lastX ? 0.5 : scale(x, firstX, lastX, options.logX));
    const py = (y) => top + (height - top - bottom) * (1 - scale(options.logY ? Math.max(y, low) : y, low, high, options.logY));

    const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    for (const value of ticks(low, high, options.logY)) {
      svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: py(value), y2: py(value) }));
      svg.append(draw("text", { x: left - 6, y: py(value) + 4, "text-anchor": "end" }, options.unit === "share" ? `${Math.round(1000 * value) / 10} %` : say(value)));
    }
    const room = Math.max(1, Math.floor((width - left - right) / 48));
    let marks = ticks(firstX, lastX, options.logX);
    if (marks.length > room) marks = marks.filter((_, i) => i % Math.ceil(marks.length / room) === 0);
    for (const value of marks) {
      svg.append(draw("line", { class: "axis", x1: px(value), x2: px(value), y1: height - bottom, y2: height - bottom + 4 }));
      svg.append(draw("text", { x: px(value), y: height - bottom + 17, "text-anchor": "middle" }, say(value, "count")));
    }
    svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
    svg.append(draw("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, options.xTitle));
    for (const mark of options.across || []) {
      if (mark.at < low || mark.at > high) continue;
      svg.append(draw("line", { class: "mark", x1: left, x2: width - right, y1: py(mark.at), y2: py(mark.at) }));
      svg.append(draw("text", { x: width - right, y: py(mark.at) - 5, "text-anchor": "end" }, mark.label));
    }
    for (const mark of options.down || []) {
      const x = px(mark.at), end = x > width * 0.6;
      svg.append(draw("line", { class: "mark", x1: x, x2: x, y1: top, y2: height - bottom }));
      svg.append(draw("text", { x: x + (end ? -5 : 5), y: options.marksAbove ? top + 10 : height - bottom - 8, "text-anchor": end ? "end" : "start" }, mark.label));
    }
    for (const line of lines) {
      const path = line.x.map((x, i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(line.y[i]).toFixed(1)}`).join("");
      svg.append(draw("path", { class: `line ${line.name}`, d: path }));
    }
    if (at >= 0) guide(svg, px, py, height - bottom, top);
    box.replaceChildren(svg, tip);
    box.px = px;
  }

  function guide(svg, px, py, bottom, top) {
    const x = lines[0].x[at];
    svg.append(draw("line", { class: "guide", x1: px(x), x2: px(x), y1: top, y2: bottom }));
    const texts = [options.xSay ? options.xSay(x) : `rank ${say(x, "count")}`];
    for (const line of lines) {
      const i = line.x.indexOf(x);
      if (i < 0) continue;
      svg.append(draw("circle", { class: line.name, cx: px(x), cy: py(line.y[i]), r: 4, style: "stroke-dasharray: none" }));
      texts.push(`${lines.length > 1 ? `${line.label} ` : ""}${say(line.y[i], options.unit, 4)}`);
    }
    tip.textContent = texts.join(" · ");
    tip.hidden = false;
    tip.style.top = "0";
    tip.style.left = px(x) > width / 2 ? "52px" : "auto";
    tip.style.right = px(x) > width / 2 ? "auto" : "0";
  }

  function nearest(clientX) {
    const x = clientX - box.getBoundingClientRect().left;
    let best = 0;
    lines[0].x.forEach((value, i) => { if (Math.abs(box.px(value) - x) < Math.abs(box.px(lines[0].x[best]) - x)) best = i; });
    return best;
  }

  function show(index) {
    if (index === at || !width) return;
    at = index;
    if (at < 0) tip.hidden = true;
    paint();
  }
  box.addEventListener("pointermove", (event) => box.px && show(nearest(event.clientX)));
  box.addEventListener("pointerleave", () => show(-1));
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", (event) => {
    const last = lines[0].x.length - 1, step = event.shiftKey ? 10 : 1;
    const next = { ArrowRight: Math.min(last, at + step), ArrowLeft: Math.max(0, at - step), Home: 0, End: last, Escape: -1 }[event.key];
    if (next === undefined) return;
    if (event.key !== "Escape") event.preventDefault();
    show(next);
  });
  new ResizeObserver(() => {
    const now = Math.round(box.clientWidth);
    if (now && now !== width) { width = now; paint(); }
  }).observe(box);
  return box;
}
