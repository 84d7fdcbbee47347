"use strict";
(() => {
  const COLOURS = 8;
  const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
  const FIRST_SHOWN = 6; // methods in the plots before anyone chooses; more bands than that would hide each other
  const LEGEND = 12; // lines named under a plot

  const colour = (place) => `var(--c${place % COLOURS})`;
  const round = Math.floor;

  // ---- small helpers -------------------------------------------------------------------------------------------
  function svg(name, attributes = {}, text) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }
  function html(name, attributes = {}, ...children) {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  function say(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size >= 1e6) return value.toExponential(2).replace("e+", "e");
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 1e-4) return value.toExponential(1);
    return String(Number(value.toPrecision(3)));
  }
  // A mean, and its interval if there is one: [mean] or [mean, low, high].
  function interval([mean, low, high]) {
    if (low === undefined) return say(mean);
    const decimals = (say(mean).split(".")[1] || "").length;
    const short = (value) => (Math.abs(mean) < 1e4 ? value.toFixed(decimals) : say(value));
    const [below, above] = [mean - low, high - mean];
    const same = Math.abs(below - above) <= 0.01 * Math.max(below, above) + 0.001 * Math.abs(mean); // they are rounded
    return `${say(mean)} ${same ? `± ${short(above)}` : `[${short(low)}, ${short(high)}]`}`;
  }
  // A label that may be broken after each "_".
  const breakable = (label) => label.split("_").flatMap((part, place) => (place ? ["_", html("wbr"), part] : [part]));

  function ticks(low, high, count) {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** round(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= rough * 0.999);
    const found = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(Number((n * step).toPrecision(12)));
    return found;
  }
  function logTicks(low, high) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const n of high / low < 30 ? [1, 2, 5] : [1]) {
        const value = n * 10 ** power;
        if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
      }
    }
    const every = Math.ceil(found.length / 8);
    return found.filter((_, place) => place % every === 0);
  }
  function scale(low, high, from, to, log = false) {
    const f = log ? Math.log10 : (value) => value;
    return (value) => from + ((f(value) - f(low)) / (f(high) - f(low))) * (to - from);
  }
  function marker(place, x, y, size, fill) {
    const at = { fill, stroke: "var(--card)", "stroke-width": 1.2 };
    const s = size;
    const paths = [
      null,
      `M${x - s},${y - s}h${2 * s}v${2 * s}h${-2 * s}z`,
      `M${x},${y - s * 1.3}l${s * 1.25},${s * 2.2}h${-2.5 * s}z`,
      `M${x},${y - s * 1.4}l${s * 1.4},${s * 1.4}l${-s * 1.4},${s * 1.4}l${-s * 1.4},${-s * 1.4}z`,
    ];
    const shape = round(place / COLOURS) % paths.length;
    return shape === 0 ? svg("circle", { cx: x, cy: y, r: s * 1.1, ...at }) : svg("path", { d: paths[shape], ...at });
  }

  // ---- an empty plot: frame, grid lines, ticks, names of the axes ------------------------------------------------
  function frame(box, xs, ys, options) {
    const width = Math.max(260, box.clientWidth);
    const height = options.height(width);
    const yTicks = options.logY ? logTicks(...ys) : ticks(...ys, height / 60);
    const widest = Math.max(...yTicks.map((value) => say(value).length), 3);
    const m = { left: 14 + widest * 6.7, right: 14, top: 26, bottom: 42 };
    const x = scale(...xs, m.left, width - m.right);
    const y = scale(...ys, height - m.bottom, m.top, options.logY);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
    for (const value of yTicks) {
      root.append(svg("line", { x1: m.left, x2: width - m.right, y1: y(value), y2: y(value), class: "gridline" }),
        svg("text", { x: m.left - 7, y: y(value) + 4, "text-anchor": "end", class: "tick" }, say(value)));
    }
    for (const value of ticks(...xs, (width - m.left) / 90)) {
      root.append(svg("line", { x1: x(value), x2: x(value), y1: m.top, y2: height - m.bottom, class: "gridline" }),
        svg("text", { x: Math.min(x(value), width - 3.5 * say(value).length), y: height - m.bottom + 17, "text-anchor": "middle", class: "tick" }, say(value)));
    }
    root.append(
      svg("path", { d: `M${m.left},${m.top}V${height - m.bottom}H${width - m.right}`, fill: "none", class: "frame" }),
      svg("text", { x: 2, y: 14, class: "axis" }, options.yName),
      svg("text", { x: width - m.right, y: height - 8, "text-anchor": "end", class: "axis" }, options.xName));
    const clip = `clip${frame.count = (frame.count || 0) + 1}`;
    const path = svg("clipPath", { id: clip });
    path.append(svg("rect", { x: m.left, y: m.top, width: Math.max(1, width - m.left - m.right), height: height - m.top - m.bottom }));
    const inside = svg("g", { "clip-path": `url(#${clip})` });
    root.append(path, inside);
    box.replaceChildren(root);
    return { root, inside, x, y, m, width, height };
  }

  // ---- tooltips ---------------------------------------------------------------------------------------------------
  const tip = document.getElementById("tip");
  function showTip(event, text) {
    tip.textContent = text;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${event.clientY - box.height - 12 < 4 ? event.clientY + 16 : event.clientY - box.height - 12}px`;
  }
  const hideTip = () => { tip.hidden = true; };

  // ---- the summary table ------------------------------------------------------------------------------------------
  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      button.addEventListener("click", () => {
        const before = head.getAttribute("aria-sort");
        const first = head.dataset.better === "high" ? "descending" : "ascending"; // the best on top
        const other = first === "ascending" ? "descending" : "ascending";
        const order = before === first ? other : first;
        heads.forEach((each) => each.setAttribute("aria-sort", each === head ? order : "none"));
        const body = table.tBodies[0];
        const turned = head.dataset.better === "high" ? -1 : 1; // ranks are least for the best
        const rank = (row) => {
          const { value } = row.cells[column].dataset;
          if (value === undefined) return null;
          return column === 0 ? value : turned * Number(value);
        };
        const methods = [...body.rows].filter((row) => !row.classList.contains("reference"));
        methods.sort((a, b) => {
          const [left, right] = [rank(a), rank(b)];
          if (left === null || right === null) return (left === null) - (right === null); // what has no value comes last
          const difference = column === 0 ? left.localeCompare(right, "en", { numeric: true }) : left - right;
          return order === "ascending" ? difference : -difference;
        });
        body.append(...methods);
      });
    });
  }
  // ---- forgetting against retention ---------------------------------------------------------------------------------
  function drawScatter(view) {
    const { data, shown, part } = view;
    const box = part(".scatter"), note = part(".volume"), zoom = part(".zoom");
    const [xKey, yKey] = [part(".pick-x").value, part(".pick-y").value];
    const pair = data.tradeoffs.find((each) => each.x === xKey && each.y === yKey);
    const has = (each) => each.cells[xKey] && each.cells[yKey];
    const points = data.methods.map((method, place) => ({ ...method, place, faint: !shown.has(place) })).filter(has);
    const references = data.references.filter(has);
    if (!pair || !points.length) {
      box.replaceChildren(html("p", { class: "empty" }, "No run has both metrics."));
      note.textContent = "";
      return;
    }
    const front = new Set(pair.front);
    const near = zoom.checked
      ? [...points.filter((each) => front.has(each.place)), ...references.filter((each) => each.label === "oracle")] : [];
    const inView = near.length ? near : [...points, ...references];
    const range = (key) => {
      const ends = inView.flatMap(({ cells: { [key]: cell } }) => cell);
      let [low, high] = [Math.min(...ends), Math.max(...ends)];
      if (zoom.checked) { // room for those close by: as much again as the front itself takes
        const means = inView.map((each) => each.cells[key][0]);
        const spread = Math.max(Math.max(...means) - Math.min(...means), data.bounds[key] ? 0.02 : 0.1 * Math.abs(means[0]), 1e-6);
        const others = points.map((each) => each.cells[key][0]).filter((value) => value > Math.min(...means) - 4 * spread && value < Math.max(...means) + 4 * spread);
        [low, high] = [Math.min(...means, ...others) - spread * 0.6, Math.max(...means, ...others) + spread * 0.6];
      }
      const pad = (high - low || 0.1) * 0.06;
      [low, high] = [low - pad, high + pad];
      if (data.bounds[key]) {
        const [least, most] = data.bounds[key];
        const margin = 0.04 * (Math.min(high, most) - Math.max(low, least));
        [low, high] = [Math.max(low, least - margin), Math.min(high, most + margin)];
      }
      return low < high ? [low, high] : [low - 0.5, high + 0.5];
    };
    const nameOf = (key) => data.names[key] || key;
    const arrows = { low: "← better", high: "better →" };
    const upDown = { low: "↓ better", high: "↑ better" };
    const plot = frame(box, range(xKey), range(yKey), {
      height: (width) => Math.min(460, Math.max(320, width * 0.5)),
      xName: `${nameOf(xKey)}  ${arrows[data.better[xKey]]}`, yName: `${nameOf(yKey)}  ${upDown[data.better[yKey]]}`,
    });
    const at = (each) => [plot.x(each.cells[xKey][0]), plot.y(each.cells[yKey][0])];

    // what the front dominates: from the worst corner to the steps between its points
    const far = { low: 1e6, high: -1e6 }; // where there is no corner, beyond the picture
    const [cornerX, cornerY] = pair.worst ? [plot.x(pair.worst[0]), plot.y(pair.worst[1])] : [far[data.better[xKey]], -far[data.better[yKey]]];
    const onFront = data.methods.map((each, place) => ({ ...each, place })).filter((each) => front.has(each.place)).map(at);
    onFront.sort((a, b) => (data.better[xKey] === "low" ? a[0] - b[0] : b[0] - a[0]));
    let line = `M${onFront[0][0]},${cornerY}`;
    onFront.forEach(([x, y], place) => { line += place ? `H${x}V${y}` : `V${y}`; });
    plot.inside.append(svg("path", { d: `${line}H${cornerX}V${cornerY}Z`, fill: "var(--dominated)" }),
      svg("path", { d: `${line}H${cornerX}`, fill: "none", stroke: "var(--accent)", "stroke-width": 1.5, "stroke-dasharray": "5 4" }));

    const placed = [];
    const outside = [];
    const everyone = [...references.map((each) => ({ ...each, reference: true })), ...points];
    for (const each of everyone) {
      const [x, y] = at(each);
      const [xCell, yCell] = [each.cells[xKey], each.cells[yKey]];
      if (x < plot.m.left - 1 || x > plot.width - plot.m.right + 1 || y < plot.m.top - 1 || y > plot.height - plot.m.bottom + 1) {
        outside.push(`${each.label} (${say(xCell[0])}, ${say(yCell[0])})`);
        continue;
      }
      const stroke = each.reference ? "var(--soft)" : colour(each.place);
      const whisker = { stroke, "stroke-width": 1.4, opacity: each.faint ? 0 : 0.4 };
      if (xCell.length > 1) plot.inside.append(svg("line", { x1: plot.x(xCell[1]), x2: plot.x(xCell[2]), y1: y, y2: y, ...whisker }));
      if (yCell.length > 1) plot.inside.append(svg("line", { y1: plot.y(yCell[1]), y2: plot.y(yCell[2]), x1: x, x2: x, ...whisker }));
      const dot = each.reference
        ? svg("circle", { cx: x, cy: y, r: 6, fill: "var(--card)", stroke, "stroke-width": 2.2 })
        : marker(each.place, x, y, each.faint ? 4 : 5.5, stroke);
      if (each.faint) dot.setAttribute("opacity", front.has(each.place) ? 0.8 : 0.4);
      const text = `${each.label}${front.has(each.place) && !each.reference ? " (on the front)" : ""}\n${nameOf(xKey)} ${interval(xCell)}\n${nameOf(yKey)} ${interval(yCell)}`;
      dot.addEventListener("pointermove", (event) => showTip(event, text));
      dot.addEventListener("pointerleave", hideTip);
      plot.root.append(dot);
      placed.push({ left: x - 8, right: x + 8, top: y - 8, bottom: y + 8 });
      each.at = [x, y];
    }
    // names: first those on the front, and only where they hide nothing
    const named = everyone.filter((each) => each.at && (!each.faint || front.has(each.place))).sort((a, b) => (b.reference || front.has(b.place) || 0) - (a.reference || front.has(a.place) || 0));
    let unnamed = 0;
    for (const each of named) {
      const [x, y] = each.at;
      const long = each.label.length * 6.6 + 4;
      const spots = [[x + 11, y + 4], [x - 11 - long, y + 4], [x - long / 2, y - 12], [x - long / 2, y + 21], [x + 9, y - 9],
        [x + 9, y + 18], [x - 9 - long, y - 9], [x - 9 - long, y + 18], [x + 14, y - 22], [x + 14, y + 31]];
      const spot = spots.map(([left, base]) => ({ left, base, right: left + long, top: base - 11, bottom: base + 4 })).find((box) =>
        box.left > plot.m.left && box.right < plot.width - 2 && box.top > plot.m.top - 6 && box.bottom < plot.height - plot.m.bottom
        && !placed.some((other) => box.left < other.right && box.right > other.left && box.top < other.bottom && box.bottom > other.top));
      if (!spot) { unnamed += 1; continue; }
      placed.push(spot);
      plot.root.append(svg("text", { x: spot.left, y: spot.base, class: "name" }, each.label));
    }
    const said = [];
    const [volume, low, high] = pair.hypervolume;
    if (volume !== null) {
      const to = [xKey, yKey].map((key, place) => `${nameOf(key)} ${say(pair.worst[place])}`).join(" and ");
      const ofSeeds = low === undefined ? "" : ` (95 % interval of single seeds’: ${say(low)} to ${say(high)})`;
      said.push(`Hypervolume of all methods: ${say(volume)} of the rectangle from the ideal to ${to}${ofSeeds}. `);
    } else said.push("No hypervolume: there is neither a bound nor a base to measure it against. ");
    said.push(`On the front: ${pair.front.slice(0, 12).map((place) => data.methods[place].label).join(", ")}${pair.front.length > 12 ? ` and ${pair.front.length - 12} more` : ""}.`);
    if (outside.length) said.push(` Outside the picture: ${outside.slice(0, 6).join(", ")}${outside.length > 6 ? ` and ${outside.length - 6} more` : ""}.`);
    if (unnamed) said.push(` ${unnamed} without a name for lack of room: point at them.`);
    note.textContent = said.join("");
  }

  // Zoomed at first where a method far off would squeeze all others into a corner.
  function squeezed(view) {
    const pair = view.data.tradeoffs[0];
    if (!pair) return false;
    return [pair.x, pair.y].some((key) => {
      const all = [...view.data.methods, ...view.data.references].map((each) => each.cells[key]).filter(Boolean).map((cell) => cell[0]);
      const best = pair.front.map((place) => view.data.methods[place].cells[key][0]);
      const far = Math.max(...all) - Math.min(...all);
      const middle = [...all].sort((a, b) => a - b)[round(all.length / 2)];
      return far > 4 * Math.max(...best.map((value) => Math.abs(value - middle)), 0.02);
    });
  }

  // ---- curves -------------------------------------------------------------------------------------------------------
  function drawLines(view, box) {
    const { data, shown } = view;
    const pick = (selector) => box.querySelector(selector);
    const plotBox = pick(".lines"), reading = pick(".reading");
    const [key, clock] = [pick(".pick-key").value, pick(".pick-clock").value];
    const log = pick(".log").checked;
    const lines = [];
    data.curves.forEach(({ axes, series }, place) => {
      if (!shown.has(place) || !series[key]) return;
      const [axis, mean, low, high] = series[key];
      const xs = axes[axis][clock];
      if (!xs) return;
      const keep = mean.map((value, i) => i).filter((i) => !log || (low || mean)[i] > 0);
      if (keep.length) lines.push({ place, xs: keep.map((i) => xs[i]), mean: keep.map((i) => mean[i]), low: low && keep.map((i) => low[i]), high: high && keep.map((i) => high[i]) });
    });
    plotBox.setAttribute("aria-label", `${key} over ${clock}, ${lines.length} methods`);
    reading.replaceChildren();
    if (!lines.length) {
      plotBox.replaceChildren(html("p", { class: "empty" }, "None of the chosen methods has this metric."));
      return;
    }
    const bands = lines.length <= FIRST_SHOWN;
    const all = (side) => lines.flatMap((each) => each[side] && bands ? each[side] : each.mean);
    let [low, high] = [Math.min(...all("low").map(Number)), Math.max(...all("high").map(Number))];
    if (!log) {
      const pad = (high - low || Math.abs(high) || 1) * 0.05;
      [low, high] = [low >= 0 && low < 0.4 * high ? 0 : low - pad, high + pad];
    } else if (low === high) [low, high] = [low / 2, high * 2];
    const xs = lines.flatMap((each) => [each.xs[0], each.xs.at(-1)]);
    const ends = [Math.min(...xs), Math.max(...xs)];
    const plot = frame(plotBox, ends[0] < ends[1] ? ends : [ends[0] - 1, ends[1] + 1], [low, high],
      { height: (width) => Math.min(400, Math.max(260, width * 0.42)), xName: clock, yName: data.names[key] || key, logY: log });
    const path = (xs, values) => xs.map((value, i) => `${i ? "L" : "M"}${plot.x(value).toFixed(1)},${plot.y(values[i]).toFixed(1)}`).join("");
    for (const { place, xs, low, high } of bands ? lines : []) {
      if (low) plot.inside.append(svg("path", { d: `${path(xs, high)}L${path([...xs].reverse(), [...low].reverse()).slice(1)}Z`, fill: colour(place), opacity: 0.13 }));
    }
    for (const { place, xs, mean } of lines) {
      plot.inside.append(svg("path", { d: path(xs, mean), fill: "none", stroke: colour(place), "stroke-width": 1.9, "stroke-linejoin": "round",
        "stroke-dasharray": DASHES[round(place / COLOURS) % DASHES.length] }));
    }
    // reading the values off, by pointer or by arrow keys
    const cross = svg("line", { y1: plot.m.top, y2: plot.height - plot.m.bottom, stroke: "var(--ink)", opacity: 0.6, visibility: "hidden" });
    plot.root.append(cross);
    const grid = [...new Set(lines.flatMap((each) => each.xs))].sort((a, b) => a - b);
    let where = grid.length - 1;
    const nearest = (each, x) => each.xs.reduce((best, value, i) => (Math.abs(value - x) < Math.abs(each.xs[best] - x) ? i : best), 0);
    const read = (place) => {
      where = Math.max(0, Math.min(grid.length - 1, place));
      const x = grid[where];
      cross.setAttribute("x1", plot.x(x));
      cross.setAttribute("x2", plot.x(x));
      reading.replaceChildren(`${clock} ${say(x)}:`, ...lines.slice(0, LEGEND).map((each) => html("b", {},
        html("i", { style: `background:${colour(each.place)}` }), ...breakable(data.methods[each.place].label), ` ${say(each.mean[nearest(each, x)])}`)));
      if (lines.length > LEGEND) reading.append(` and ${lines.length - LEGEND} more`);
    };
    const move = (place) => {
      cross.setAttribute("visibility", "visible");
      read(place);
    };
    read(where); // the legend: where the lines end
    plotBox.onpointermove = (event) => {
      const x = ((event.clientX - plot.root.getBoundingClientRect().left) / plot.root.getBoundingClientRect().width) * plot.width;
      move(grid.reduce((best, value, i) => (Math.abs(plot.x(value) - x) < Math.abs(plot.x(grid[best]) - x) ? i : best), 0));
    };
    plotBox.onkeydown = (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      move(where + by);
    };
  }

  // ---- cost ---------------------------------------------------------------------------------------------------------
  function drawBars(view) {
    const { data, shown, part } = view;
    const box = part(".bars");
    if (!box) return;
    box.replaceChildren(...data.costs.map((key) => {
      const panel = html("div", {}, html("h3", {}, key));
      const rows = data.methods.map((each, place) => ({ ...each, place })).filter((each) => shown.has(each.place) && each.cells[key]);
      rows.sort((a, b) => a.cells[key][0] - b.cells[key][0]);
      const most = Math.max(...rows.flatMap((each) => each.cells[key]));
      const share = (value) => `${Math.max(0, Math.min(100, (100 * value) / (most || 1)))}%`;
      for (const { label, place, cells: { [key]: [mean, low, high] } } of rows) {
        const track = html("span", { class: "track" }, html("span", { class: "fill", style: `width:${share(mean)};background:${colour(place)}` }));
        if (low !== undefined) track.append(html("span", { class: "interval", style: `left:${share(low)};width:calc(${share(high)} - ${share(low)})` }));
        panel.append(html("div", { class: "bar" }, html("span", { class: "who" }, ...breakable(label)), track, html("span", { class: "value" }, say(mean))));
      }
      return panel;
    }));
  }

  // ---- one table of runs ----------------------------------------------------------------------------------------------
  function options(select, values, names = {}) {
    select.replaceChildren(...values.map((value) => html("option", { value }, names[value] || value)));
  }

  function open(article) {
    const data = JSON.parse(article.querySelector(".data").textContent);
    const part = (selector) => article.querySelector(selector);
    const view = { data, part, shown: new Set([...data.methods.keys()].slice(0, FIRST_SHOWN)) };
    const boxes = ["curve", "lambda"].map((kind) => article.querySelector(`.${kind}`)).filter(Boolean);
    const draw = () => {
      drawScatter(view);
      boxes.forEach((box) => drawLines(view, box));
      drawBars(view);
    };

    // which methods
    const chips = data.methods.map(({ label }, place) => {
      const icon = svg("svg", { width: 26, height: 14, "aria-hidden": "true" });
      icon.append(svg("line", { x1: 0, x2: 26, y1: 7, y2: 7, stroke: colour(place), "stroke-width": 2, "stroke-dasharray": DASHES[round(place / COLOURS) % DASHES.length] }),
        marker(place, 13, 7, 4, colour(place)));
      const chip = html("button", { type: "button", class: "chip" }, icon, label);
      chip.addEventListener("click", () => {
        if (view.shown.has(place)) view.shown.delete(place); else view.shown.add(place);
        press();
      });
      return chip;
    });
    const press = () => {
      chips.forEach((chip, place) => chip.setAttribute("aria-pressed", view.shown.has(place)));
      draw();
    };
    part(".chips").append(...chips);
    part(".every").addEventListener("click", () => { view.shown = new Set(data.methods.map((_, place) => place)); press(); });
    part(".none").addEventListener("click", () => { view.shown = new Set(); press(); });

    // what is drawn
    options(part(".pick-x"), [...new Set(data.tradeoffs.map((pair) => pair.x))], data.names);
    options(part(".pick-y"), [...new Set(data.tradeoffs.map((pair) => pair.y))], data.names);
    if (!data.tradeoffs.length) part(".scatter").closest("section").hidden = true;
    part(".zoom").checked = squeezed(view);
    part(".scatter").closest("section").addEventListener("change", () => drawScatter(view));
    for (const box of boxes) {
      const lambdas = data.keys.filter((key) => key.startsWith("lambda/"));
      options(box.querySelector(".pick-key"), box.className === "lambda" ? lambdas.sort((a, b) => (b === "lambda/value") - (a === "lambda/value")) : data.keys, data.names);
      const clocks = ["steps", "images", "seconds"].filter((clock) => data.curves.some(({ axes }) => axes.some((axis) => axis[clock])));
      options(box.querySelector(".pick-clock"), clocks);
      box.addEventListener("change", () => drawLines(view, box));
    }

    // buttons
    sortable(part(".summary"));
    const all = part(".all");
    if (all) all.addEventListener("click", () => all.setAttribute("aria-pressed", part(".summary").classList.toggle("with-details")));
    const flip = part(".flip");
    if (flip) {
      const before = [...article.querySelectorAll(".grids img")].find((image) => image.alt.startsWith("Samples: before"));
      flip.hidden = !before;
      flip.addEventListener("click", () => {
        const on = flip.getAttribute("aria-pressed") !== "true";
        flip.setAttribute("aria-pressed", on);
        article.querySelectorAll(".after img").forEach((image) => {
          image.dataset.after ??= image.src;
          image.src = on ? before.src : image.dataset.after;
        });
      });
    }
    article.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
      const code = button.previousElementSibling;
      let done = "Copied";
      try {
        await navigator.clipboard.writeText(code.textContent);
      } catch { // a page from disk may not be trusted with the clipboard
        getSelection().selectAllChildren(code);
        done = "Selected";
      }
      button.textContent = done;
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    }));

    press();
    let width = article.clientWidth;
    new ResizeObserver(() => {
      if (article.clientWidth === width) return;
      width = article.clientWidth;
      draw();
    }).observe(article);
  }

  const opened = new Set();
  function show(id) {
    document.querySelectorAll("article").forEach((article) => { article.hidden = article.id !== id; });
    if (!opened.has(id)) {
      opened.add(id);
      open(document.getElementById(id));
    }
  }
  const which = document.getElementById("which");
  if (which) which.addEventListener("change", () => show(which.value));
  show(document.querySelector("article").id);
})();
