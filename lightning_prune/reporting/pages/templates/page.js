"use strict";
(() => {
  const root = document.documentElement;
  const narrow = () => window.innerWidth < 640;

  // Colours are names of the style sheet, "$pruned", so that charts follow light and dark.
  const resolve = (value, style) => {
    if (typeof value === "string") return value[0] === "$" ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
    if (Array.isArray(value)) return value.map((each) => resolve(each, style));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, each]) => [key, resolve(each, style)]));
    return value;
  };

  const axis = (own) => ({ gridcolor: "$line", zerolinecolor: "$line", linecolor: "$line", automargin: true, ...own,
    title: { font: { size: 12, color: "$soft" }, standoff: 6, ...(own || {}).title } });

  const themed = (chart) => {
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: "system-ui, sans-serif", size: 12, color: "$ink" },
      margin: { l: 8, r: 14, t: 26, b: 8 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 } },
      hoverlabel: { bgcolor: "$panel", bordercolor: "$line", font: { color: "$ink" } }, hovermode: "closest", showlegend: true,
      dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
      ...chart.layout, xaxis: axis(chart.layout.xaxis), yaxis: axis(chart.layout.yaxis),
    };
    return resolve({ data: chart.data, layout }, getComputedStyle(root));
  };

  const chosen = (figure, spec) => {
    const parts = [...figure.querySelectorAll("select")].map((select) => select.value);
    return parts.length ? spec[parts.join("/")] : spec;
  };

  const draw = (figure) => {
    const spec = chosen(figure, JSON.parse(figure.querySelector("script").textContent));
    const plot = figure.querySelector(".plot");
    if (spec.width) plot.style.minWidth = spec.width + "px"; // more axes than a phone is wide: it scrolls
    const { data, layout } = themed(spec);
    return Plotly.react(plot, data, layout, { responsive: true, displaylogo: false, displayModeBar: false }).then(() => link(plot));
  };

  // A run is marked in the table and among the lines when one of both is touched.
  const mark = (number) => {
    document.querySelectorAll("tr[data-run]").forEach((row) => row.classList.toggle("hot", row.dataset.run === String(number)));
  };
  const link = (plot) => {
    if (plot.linked) return;
    plot.linked = true;
    const lines = plot.data.every((trace) => trace.customdata && new Set(trace.customdata).size === 1);
    plot.on("plotly_hover", (event) => {
      const point = event.points[0];
      if (point.customdata === undefined || !document.querySelector("tr[data-run]")) return;
      mark(point.customdata);
      if (lines) Plotly.restyle(plot, { opacity: plot.data.map((_, number) => (number === point.curveNumber ? 1 : 0.15)) });
    });
    plot.on("plotly_unhover", () => {
      if (lines) Plotly.restyle(plot, { opacity: 1 });
    });
  };

  const unpack = async (element) => {
    const bytes = Uint8Array.from(atob(element.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    element.remove();
  };

  const drawAll = async () => {
    const packed = document.getElementById("plotly");
    const figures = [...document.querySelectorAll("figure.chart")].filter((figure) => figure.querySelector(".plot"));
    if (!packed || !figures.length) return void (root.dataset.charts = "none");
    if (!("DecompressionStream" in window)) {
      figures.forEach((figure) => (figure.querySelector(".plot").textContent = "Charts need a browser of 2023 or later."));
      return void (root.dataset.charts = "unsupported");
    }
    await unpack(packed);
    for (const figure of figures) {
      await draw(figure);
      figure.querySelectorAll("select").forEach((select) => select.addEventListener("change", () => draw(figure)));
    }
    root.dataset.charts = "drawn";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(draw));
  };

  // Numbers before texts, and empty cells last in both directions.
  const compare = (left, right, sign) => {
    if (left === "" || right === "") return (left === "") - (right === "");
    const numbers = [Number(left), Number(right)];
    const order = numbers.some(Number.isNaN) ? left.localeCompare(right, undefined, { numeric: true }) : numbers[0] - numbers[1];
    return sign * order;
  };
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.querySelectorAll("th")];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => compare(a.cells[column].dataset.value, b.cells[column].dataset.value, sign));
      table.tBodies[0].append(...rows);
    }));
  });

  document.querySelectorAll(".code button").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "copied";
    } catch { // pages opened from disk may not write to the clipboard
      getSelection().selectAllChildren(code);
      button.textContent = "selected: Ctrl+C";
    }
    setTimeout(() => (button.textContent = "copy"), 2000);
  }));

  drawAll();
})();
