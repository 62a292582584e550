// One unit of a trained layer: the activation's curve with the distribution of its inputs, moved by γ and β.
"use strict";
if (report.layer) {
  const { layer, words } = report;
  const AXIS = 8; // inputs are shown from −8 to 8, where a sigmoid has long been flat
  const BINS = 64;
  const POINTS = 160; // dots on the curve; more only darken it
  const ACTIVATIONS = {
    sigmoid: { of: (z) => 1 / (1 + Math.exp(-z)), low: 0, high: 1, flat: (z) => Math.abs(z) > 4, word: words.saturated_share, stretch: words.straight_stretch },
    tanh: { of: Math.tanh, low: -1, high: 1, flat: (z) => Math.abs(z) > 2, word: words.saturated_share, stretch: words.straight_stretch },
    relu: { of: (z) => Math.max(0, z), low: 0, high: AXIS, flat: (z) => z <= 0, word: words.cut_share, stretch: "−1 … 1" },
  };

  const byId = (id) => document.getElementById(id);
  const inputs = { gamma: byId("gamma"), beta: byId("beta") };
  const standardised = layer.pre_activations.map((x) => (x - layer.mean) / layer.std);

  const signed = (value, digits = 2) => value.toFixed(digits).replace(/^-(?=[0.]*$)/, "").replace("-", "−");
  const percent = (share) => `${(100 * share).toFixed(share > 0.995 && share < 1 ? 1 : 0)} %`;
  const share = (values, test) => values.filter(test).length / values.length;
  const average = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

  function spread(values) {
    const mean = average(values);
    return { mean, std: Math.sqrt(average(values.map((value) => (value - mean) ** 2))) };
  }

  // The least-squares line through (input, output), and the part of the output's variance that it explains.
  function straightLine(z, a) {
    const [input, output] = [spread(z), spread(a)];
    const covariance = average(z.map((value, i) => (value - input.mean) * (a[i] - output.mean)));
    const slope = input.std > 0 ? covariance / input.std ** 2 : 0;
    const explained = output.std > 1e-12 && input.std > 0 ? covariance ** 2 / (input.std * output.std) ** 2 : 1;
    return { slope, at: output.mean - slope * input.mean, explained };
  }

  function counts(values, low, high, bins) {
    const result = new Array(bins).fill(0);
    for (const value of values) {
      const bin = Math.floor(((value - low) / (high - low)) * bins);
      if (bin >= 0 && bin < bins) result[bin] += 1;
      else if (value === high) result[bins - 1] += 1;
    }
    return result;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function mark(parent, name, attributes, text) {
    const element = parent.appendChild(document.createElementNS(SVG, name));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  }

  function bars(svg, tallies, place, className) {
    const highest = Math.max(...tallies, 1);
    const path = tallies.map((tally, bin) => (tally ? place(bin, tally / highest) : "")).join("");
    mark(svg, "path", { class: className, d: path });
  }

  function drawCurve(svg, z, a, activation) {
    const [width, height] = [svg.clientWidth, svg.clientHeight];
    const box = { left: 34, right: width - Math.min(96, width * 0.18), top: 10, bottom: height - 40 };
    const pad = 0.06 * (activation.high - activation.low);
    const [low, high] = [activation.low - pad, activation.high + pad];
    const across = (value) => box.left + ((value + AXIS) / (2 * AXIS)) * (box.right - box.left);
    const up = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);

    mark(svg, "rect", { class: "stretch", x: across(-1), y: box.top, width: across(1) - across(-1), height: box.bottom - box.top });
    mark(svg, "text", { class: "stretch-label", x: across(-1) - 7, y: box.top + 12, "text-anchor": "end" }, activation.stretch);
    for (const tick of [-8, -6, -4, -2, 0, 2, 4, 6, 8]) {
      mark(svg, "path", { class: "grid", d: `M${across(tick)} ${box.top}V${box.bottom}` });
      mark(svg, "text", { x: across(tick), y: box.bottom + 17, "text-anchor": "middle" }, signed(tick, 0));
    }
    for (const tick of [activation.low, (activation.low + activation.high) / 2, activation.high]) {
      mark(svg, "path", { class: "grid", d: `M${box.left} ${up(tick)}H${box.right}` });
      mark(svg, "text", { x: box.left - 7, y: up(tick) + 4, "text-anchor": "end" }, signed(tick, Number.isInteger(tick) ? 0 : 1));
    }
    mark(svg, "text", { x: (box.left + box.right) / 2, y: height - 4, "text-anchor": "middle" }, words.input);
    mark(svg, "text", { x: box.right + 6, y: height - 4 }, words.output);

    const step = (box.right - box.left) / BINS;
    const tall = 0.3 * (box.bottom - box.top);
    bars(svg, counts(z, -AXIS, AXIS, BINS), (bin, size) =>
      `M${box.left + bin * step + 0.5} ${box.bottom}v${-size * tall}h${step - 1}v${size * tall}z`, "histogram");
    const rise = (box.bottom - box.top) / BINS;
    const wide = width - box.right - 8;
    bars(svg, counts(a, low, high, BINS), (bin, size) =>
      `M${box.right + 6} ${box.bottom - bin * rise - 0.5}h${size * wide}v${-(rise - 1)}h${-size * wide}z`, "outputs");

    const line = straightLine(z, a);
    const clip = (value) => Math.min(high, Math.max(low, value));
    const reach = line.slope ? [low, high].map((value) => (value - line.at) / line.slope).sort((p, q) => p - q) : [-AXIS, AXIS];
    const [from, to] = [Math.max(-AXIS, reach[0]), Math.min(AXIS, reach[1])];
    if (from < to) {
      const at = (value) => `${across(value)} ${up(clip(line.at + line.slope * value))}`;
      mark(svg, "path", { class: "straight", d: `M${at(from)}L${at(to)}` });
      const room = to < 0.3 * AXIS; // for the label, to the right of the line's upper end
      const [x, y] = [across(to) + (room ? 6 : 0), up(clip(line.at + line.slope * to)) + (room ? 10 : to < AXIS ? -7 : 18)];
      mark(svg, "text", { x, y, "text-anchor": room ? "start" : "end" }, words.best_line);
    }
    const curve = Array.from({ length: 201 }, (_, i) => -AXIS + (i * 2 * AXIS) / 200);
    mark(svg, "path", { class: "curve", d: "M" + curve.map((value) => `${across(value).toFixed(1)} ${up(activation.of(value)).toFixed(1)}`).join("L") });
    const every = Math.ceil(z.length / POINTS);
    z.forEach((value, i) => {
      if (i % every === 0 && Math.abs(value) <= AXIS) mark(svg, "circle", { class: "points", cx: across(value), cy: up(a[i]), r: 3.5 });
    });
    const beyond = share(z, (value) => Math.abs(value) > AXIS);
    if (beyond > 0) mark(svg, "text", { x: box.right, y: box.bottom - 6, "text-anchor": "end" }, `${percent(beyond)} ${words.beyond_axis}`);
  }

  function drawStage(key, values, low, high) {
    const svg = byId(`stage-${key}`);
    const [width, height] = [svg.clientWidth, svg.clientHeight];
    const [floor, bins] = [height - 18, 40];
    const across = (value) => ((value - low) / (high - low)) * width;
    svg.replaceChildren();
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    bars(svg, counts(values, low, high, bins), (bin, size) =>
      `M${(bin * width) / bins + 0.5} ${floor}v${-size * floor}h${width / bins - 1}v${size * floor}z`, "histogram");
    mark(svg, "path", { class: "axis", d: `M0 ${floor + 0.5}H${width}` });
    for (const [tick, anchor] of [[low, "start"], [high, "end"]]) {
      mark(svg, "text", { x: across(tick), y: height - 3, "text-anchor": anchor }, signed(tick, Math.abs(tick) < 10 && !Number.isInteger(tick) ? 1 : 0));
    }
    if (low < 0 && high > 0) {
      mark(svg, "path", { class: "axis", d: `M${across(0)} 0V${floor}` });
      const middle = across(0) > 30 && across(0) < width - 30;
      if (middle) mark(svg, "text", { x: across(0), y: height - 3, "text-anchor": "middle" }, "0");
    }
    const { mean, std } = spread(values);
    byId(`stage-${key}-text`).textContent = words.mean_std.replace("{mean}", signed(mean)).replace("{std}", signed(std));
  }

  // The text is built from the table of words and from numbers; nothing is parsed as HTML.
  function readout(rows) {
    byId("layer-readout").replaceChildren(...rows.map(([value, text]) => {
      const row = document.createElement("div");
      row.appendChild(document.createElement("dt")).textContent = value;
      row.appendChild(document.createElement("dd")).textContent = text;
      return row;
    }));
  }

  function update() {
    if (byId("layer-curve").clientWidth < 120) return; // not laid out, or no room to draw in
    const [gamma, beta] = [Number(inputs.gamma.value), Number(inputs.beta.value)];
    const activation = ACTIVATIONS[document.querySelector("input[name=activation]:checked").value];
    const z = standardised.map((value) => gamma * value + beta);
    const a = z.map(activation.of);
    byId("gamma-value").textContent = signed(gamma);
    byId("beta-value").textContent = signed(beta);
    drawCurve(byId("layer-curve"), z, a, activation);
    readout([
      [percent(share(z, (value) => Math.abs(value) <= 1)), words.straight_share],
      [percent(straightLine(z, a).explained), words.straight_fit],
      [percent(share(z, activation.flat)), activation.word],
    ]);
    const raw = [Math.min(...layer.pre_activations), Math.max(...layer.pre_activations)];
    const room = 0.04 * (raw[1] - raw[0]) || 1;
    drawStage("before", layer.pre_activations, raw[0] - room, raw[1] + room);
    drawStage("standardised", standardised, -4, 4);
    drawStage("scaled", z, -AXIS, AXIS);
    drawStage("after", a, activation.low, activation.high);
  }

  let moving = 0;
  function glide(gamma, beta) {
    cancelAnimationFrame(moving);
    const [from, start] = [[Number(inputs.gamma.value), Number(inputs.beta.value)], performance.now()];
    const duration = matchMedia("(prefers-reduced-motion: reduce)").matches ? 0 : 600;
    const frame = (now) => {
      const time = duration ? Math.min(1, Math.max(0, (now - start) / duration)) : 1;
      const eased = 1 - (1 - time) ** 3;
      inputs.gamma.value = from[0] + (gamma - from[0]) * eased;
      inputs.beta.value = from[1] + (beta - from[1]) * eased;
      update();
      if (time < 1) moving = requestAnimationFrame(frame);
    };
    moving = requestAnimationFrame(frame);
  }

  for (const input of Object.values(inputs)) {
    input.addEventListener("input", () => {
      cancelAnimationFrame(moving);
      update();
    });
  }
  for (const choice of document.querySelectorAll("input[name=activation]")) choice.addEventListener("change", update);
  byId("neutral").addEventListener("click", () => glide(1, 0));
  byId("learned").addEventListener("click", () => glide(layer.gamma, layer.beta));
  new ResizeObserver(update).observe(byId("layer-curve"));
  addEventListener("beforeprint", update);
  update();
}
