// The plots: drawn when they come near the screen, in the page's colours, redrawn when those change.
"use strict";
{
  const PRINT_WIDTH = 660; // CSS pixels between the margins of A4 and of US Letter paper
  const CONTRAST = 4; // a line needs 3 to 1 against its ground, small text 4.5
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();

  const figureOf = (plot) => report.analyses[plot.dataset.analysis].figures[plot.dataset.figure].plotly;

  const channels = (text) => text.match(/[\d.]+/g).map(Number);

  function luminance(rgb) {
    const [r, g, b] = rgb.map((channel) => (channel <= 10 ? channel / 3295 : ((channel / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }

  // A figure's own colour was chosen for one ground; towards the page's ink it goes until it stands out on ours.
  function standing(own) {
    const [paper, ink] = [channels(color("var(--paper)")), channels(color("var(--ink)"))];
    const [r, g, b, alpha = 1] = channels(color(own));
    const ground = luminance(paper.slice(0, 3)) + 0.05;
    for (let share = 0; share <= 1; share += 0.05) {
      const mixed = [r, g, b].map((channel, i) => Math.round(channel + (ink[i] - channel) * share));
      const ratio = (luminance(mixed) + 0.05) / ground;
      if (Math.max(ratio, 1 / ratio) >= CONTRAST) return `rgba(${mixed}, ${alpha})`;
    }
    return own;
  }

  // "var(--name)" anywhere in a figure stands for a colour of the page.
  function resolved(value) {
    if (typeof value === "string") {
      if (value.startsWith("var(--")) return color(value);
      return /^(#[\da-f]{3,8}|rgba?\([\d., %]+\))$/i.test(value) ? standing(value) : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(resolved);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item)]));
  }

  function template() {
    const axis = {
      automargin: true, gridcolor: color("var(--grid)"), linecolor: color("var(--line)"), zerolinecolor: color("var(--soft)"),
      zerolinewidth: 1, ticks: "outside", ticklen: 4, tickcolor: "rgba(0,0,0,0)", title: { standoff: 10, font: { size: 13 } },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("var(--soft)") },
        colorway: ["blue", "vermilion", "green", "orange", "purple", "sky"].map((name) => color(`var(--${name})`)),
        xaxis: axis, yaxis: axis, hovermode: "closest",
        hoverlabel: { bgcolor: color("var(--raised)"), bordercolor: color("var(--line)"), font: { color: color("var(--ink)") } },
        margin: { l: 56, r: 16, t: 16, b: 48 },
        legend: { orientation: "h", tracegroupgap: 0, x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
        updatemenudefaults: { bgcolor: color("var(--raised)"), bordercolor: color("var(--line)"), font: { color: color("var(--ink)") } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: color("var(--soft)"), activecolor: color("var(--ink)") },
        annotationdefaults: { font: { color: color("var(--soft)") } },
        shapedefaults: { line: { color: color("var(--soft)") } },
        colorscale: { sequential: [[0, color("var(--sunken)")], [1, color("var(--blue)")]] },
      },
      data: {
        scatter: [{ line: { width: 2.25 }, marker: { size: 7 } }],
        bar: [{ marker: { line: { width: 0 } }, error_y: { color: color("var(--ink)"), thickness: 1.25 } }],
      },
    };
  }

  // How many powers of ten the data of a logarithmic axis span.
  function decades(figure, key) {
    const own = (trace) => (trace[`${key[0]}axis`] || key[0]) === key.replace("axis", "");
    const values = (figure.data || []).filter(own).flatMap((trace) => trace[key[0]] || []).filter((value) => value > 0);
    if (!values.length) return 0;
    return Math.log10(values.reduce((a, b) => Math.max(a, b)) / values.reduce((a, b) => Math.min(a, b))) + 0.5;
  }

  function layoutOf(figure, plot, width) {
    const layout = resolved(figure.layout || {});
    const narrow = (width || plot.clientWidth) < 520;
    delete layout.title; // stands above the plot as a heading
    delete layout.template;
    delete layout.width;
    delete layout.paper_bgcolor;
    delete layout.plot_bgcolor;
    for (const [key, axis] of Object.entries(layout)) {
      if (!/^[xy]axis\d*$/.test(key) || axis.type !== "log") continue;
      const room = (key[0] === "x" ? width || plot.clientWidth : 300) / 48; // labels that fit beside each other
      axis.tickformat ??= "~g"; // plotly would label 50 with a small "5"
      axis.dtick = 3 * decades(figure, key) < room ? "D2" : 1;
    }
    layout.template = template();
    if (narrow) {
      layout.font = { ...layout.font, size: 12 };
      layout.margin = { ...layout.margin, l: 46, r: 8 };
    }
    const entries = (figure.data || []).filter((trace) => trace.showlegend !== false && (trace.visible ?? true) === true).length;
    const height = layout.height || (narrow ? 280 + 19 * entries : 400); // a narrow legend has a line for each entry
    return { ...layout, uirevision: "page", autosize: !width, width: width || undefined, height };
  }

  // What the reader chose in a menu or in the legend outlasts a change of colours.
  function keepChoices(plot, data, layout) {
    if (!drawn.has(plot)) return;
    plot.data.forEach((trace, place) => { data[place].visible = trace.visible ?? true; });
    (plot.layout.updatemenus || []).forEach((menu, place) => { layout.updatemenus[place].active = menu.active ?? 0; });
  }

  function draw(plot, width) {
    const figure = figureOf(plot);
    const touch = matchMedia("(pointer: coarse)").matches;
    const [data, layout] = [resolved(figure.data || []), layoutOf(figure, plot, width)];
    keepChoices(plot, data, layout);
    if (touch) layout.dragmode = false; // a finger on a plot scrolls the page
    drawn.add(plot);
    return Plotly.react(plot, data, layout, {
      responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", scrollZoom: false,
      // Named one by one: plotly's own choice has a button that uploads the plot.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], showSendToCloud: false, plotlyServerURL: "",
    });
  }

  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      if (!drawn.has(entry.target)) draw(entry.target);
    }
  }, { rootMargin: "800px 0px" });
  for (const plot of plots) near.observe(plot);

  document.addEventListener("themechange", () => {
    for (const plot of drawn) draw(plot);
  });

  // Paper shows every plot, light, and as wide as the paper. A page that is printed cannot wait for a promise,
  // and Plotly.react draws these plots before it returns.
  addEventListener("beforeprint", () => {
    const chosen = document.documentElement.dataset.theme;
    document.documentElement.dataset.theme = "light";
    for (const plot of plots) draw(plot, PRINT_WIDTH);
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
  });
  addEventListener("afterprint", () => {
    for (const plot of plots) draw(plot);
  });
}
