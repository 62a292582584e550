// The page's numbers as files, made in the browser from the data that the page was drawn with.
"use strict";
{
  function save(name, type, text) {
    const address = URL.createObjectURL(new Blob([text], { type }));
    const link = document.createElement("a");
    link.href = address;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  // A spreadsheet runs a cell that begins like a formula: text gets an apostrophe, numbers stay numbers.
  function cell(value) {
    if (value === null || value === undefined) return "";
    if (typeof value === "number") return String(value);
    const text = /^[=+\-@\t\r]/.test(value) && !Number.isFinite(Number(value)) ? `'${value}` : String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  const table = (rows) => rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";

  function comparisons() {
    const columns = ["name", "unit", "estimate", "low", "high", "p_value", "margin", "verdict", "seeds", "favours", "would_change"];
    const rows = report.analyses.flatMap((analysis) =>
      analysis.endpoints.map((endpoint) => [analysis.experiment, ...columns.map((column) => endpoint[column])]));
    return table([["experiment", ...columns], ...rows]);
  }

  // One row a point; a matrix gives one row a cell.
  function points(figure) {
    const rows = [["trace", "x", "y", "z", "error_x", "error_y"]];
    for (const [place, trace] of (figure.plotly.data || []).entries()) {
      const name = trace.name || `trace ${place + 1}`;
      if (Array.isArray(trace.z) && Array.isArray(trace.z[0])) {
        trace.z.forEach((line, i) => line.forEach((z, j) => rows.push([name, trace.x?.[j] ?? j, trace.y?.[i] ?? i, z, null, null])));
        continue;
      }
      const length = Math.max(trace.x?.length || 0, trace.y?.length || 0);
      for (let i = 0; i < length; i += 1) {
        rows.push([name, trace.x?.[i] ?? i, trace.y?.[i], trace.z?.[i], trace.error_x?.array?.[i], trace.error_y?.array?.[i]]);
      }
    }
    return table(rows);
  }

  const { words, ...numbers } = report;
  document.getElementById("download-json").addEventListener("click", () =>
    save("evenorm-report.json", "application/json", JSON.stringify(numbers, null, 1)));
  document.getElementById("download-csv").addEventListener("click", () =>
    save("evenorm-comparisons.csv", "text/csv", "\ufeff" + comparisons()));
  for (const button of document.querySelectorAll(".figure-data")) {
    button.addEventListener("click", () => {
      const analysis = report.analyses[button.dataset.analysis];
      const name = `evenorm-${analysis.experiment}-${Number(button.dataset.figure) + 1}.csv`;
      save(name, "text/csv", "\ufeff" + points(analysis.figures[button.dataset.figure]));
    });
  }
}
