// The plots: drawn when they come near the screen, in the page's colours, redrawn when those change.
"use strict";
{
  const PRINT_WIDTH = 660; // CSS pixels between the margins of A4 and of US Letter paper
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();

  const figureOf = (plot) => report.analyses[plot.dataset.analysis].figures[plot.dataset.figure].plotly;

  // "var(--name)" anywhere in a figure stands for a colour of the page.
  function resolved(value) {
    if (typeof value === "string") return value.startsWith("var(--") ? color(value) : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(resolved);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item)]));
  }

  function template() {
    const axis = {
      automargin: true, gridcolor: color("var(--grid)"), linecolor: color("var(--line)"), zerolinecolor: color("var(--soft)"),
      zerolinewidth: 1, tickcolor: color("var(--line)"), title: { standoff: 10, font: { size: 13 } },
    };
    return {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("var(--soft)") },
        colorway: ["blue", "vermilion", "green", "orange", "purple", "sky"].map((name) => color(`var(--${name})`)),
        xaxis: axis, yaxis: axis, hovermode: "closest",
        hoverlabel: { bgcolor: color("var(--raised)"), bordercolor: color("var(--line)"), font: { color: color("var(--ink)") } },
        margin: { l: 56, r: 16, t: 16, b: 48 },
        legend: { orientation: "h", x: 0, xanchor: "left", y: 0, yref: "container", yanchor: "bottom", bgcolor: "rgba(0,0,0,0)" },
        updatemenudefaults: { bgcolor: color("var(--raised)"), bordercolor: color("var(--line)"), font: { color: color("var(--ink)") } },
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

  function layoutOf(figure, plot, width) {
    const layout = resolved(figure.layout || {});
    const narrow = (width || plot.clientWidth) < 520;
    delete layout.title; // stands above the plot as a heading
    delete layout.template;
    delete layout.width;
    delete layout.paper_bgcolor;
    delete layout.plot_bgcolor;
    layout.template = template();
    if (narrow) {
      layout.font = { ...layout.font, size: 12 };
      layout.margin = { ...layout.margin, l: 46, r: 8 };
    }
    return { ...layout, uirevision: "page", autosize: !width, width: width || undefined, height: layout.height || (narrow ? 340 : 400) };
  }

  function draw(plot, width) {
    const figure = figureOf(plot);
    const touch = matchMedia("(pointer: coarse)").matches;
    const layout = layoutOf(figure, plot, width);
    if (touch) layout.dragmode = false; // a finger on a plot scrolls the page
    drawn.add(plot);
    return Plotly.react(plot, resolved(figure.data || []), layout, {
      responsive: true, displaylogo: false, displayModeBar: touch ? false : "hover", scrollZoom: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
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
