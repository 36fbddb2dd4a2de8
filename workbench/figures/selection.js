// Layers of figures: one that is clicked, or reached with the arrow keys, is marked in every figure of the page
// that shows it. A trace names its layers in meta.layers (a list for rows, rows of cells for a grid) and what each
// says in meta.clicked.
const layerFigures = (globalThis.workbenchLayerFigures ??= { shown: new Map(), selected: null });

// Of a figure: {name, said, trace, point, x, y, mark}, mark being the outline of its row or cell.
function layerCells(data) {
  const found = [];
  const axes = (trace) => [trace.xaxis || "x", trace.yaxis || "y"];
  const line = { color: "#D55E00", width: 3 };
  data.forEach((trace, index) => {
    const [x, y] = axes(trace);
    (trace.meta?.layers || []).forEach((row, i) => {
      if (!Array.isArray(row)) {
        const mark = { type: "rect", xref: `${x} domain`, yref: y, x0: 0, x1: 1, y0: i - 0.5, y1: i + 0.5, line };
        found.push({ name: row, said: trace.meta.clicked[i], trace: index, point: i, row: i, column: 0, mark });
        return;
      }
      row.forEach((name, j) => {
        if (!name) return;
        const mark = { type: "rect", xref: x, yref: y, x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line };
        found.push({ name, said: trace.meta.clicked[i][j], trace: index, point: [i, j], row: i, column: j, mark });
      });
    });
  });
  return found;
}

function markLayer(Plotly, holder, base) {
  const chosen = layerCells(holder.data || []).filter((cell) => cell.name === layerFigures.selected);
  return Plotly.relayout(holder, { shapes: [...base, ...chosen.map((cell) => cell.mark)] });
}

function selectLayer(name) {
  layerFigures.selected = name;
  for (const mark of layerFigures.shown.values()) mark();
}

// What a point says: meta.clicked has a text for each point, in rows where the trace has rows.
const saidOf = (trace, point) => [point].flat().reduce((texts, i) => texts?.[i], trace.meta?.clicked);

// The next layer in the direction of a key, from the selected one: cells of the same trace, nearest first.
function layerBeside(cells, key) {
  if (key === "Home") return cells[0];
  if (key === "End") return cells[cells.length - 1];
  const here = cells.find((cell) => cell.name === layerFigures.selected);
  if (!here) return cells[0];
  const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[key];
  const ahead = cells.filter((cell) => cell.trace === here.trace && (down
    ? cell.column === here.column && (cell.row - here.row) * down > 0
    : cell.row === here.row && (cell.column - here.column) * right > 0));
  const far = (cell) => Math.abs(cell.row - here.row) + Math.abs(cell.column - here.column);
  return ahead.sort((a, b) => far(a) - far(b))[0] || here;
}

// Makes a figure of layers walkable; `said(cell)` is told what was reached, `chosen(cell)` what Enter chose.
function walkLayers(Plotly, holder, shapes, said, chosen = () => {}) {
  layerFigures.shown.set(holder, () => markLayer(Plotly, holder, shapes()));
  const keys = ["ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Home", "End"];
  holder.addEventListener("keydown", (event) => {
    const cells = layerCells(holder.data || []);
    if (!cells.length || event.ctrlKey || event.metaKey || event.altKey) return;
    const here = cells.find((cell) => cell.name === layerFigures.selected);
    if (event.key === "Enter" && here) chosen(here);
    if (!keys.includes(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
    const cell = layerBeside(cells, event.key);
    selectLayer(cell.name);
    said(cell);
  });
}

// The numbers of a figure as CSV: a row a point or cell, with the layer's name and its value on no scale where known.
function numbersOf(data) {
  const quoted = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  const rows = [["trace", "layer", "x", "y", "value"]];
  data.forEach((trace, index) => {
    const name = trace.name ?? index, { layers, values } = trace.meta || {};
    if (trace.z) {
      [...trace.z].forEach((row, i) => [...row].forEach((z, j) => rows.push(
        [name, layers?.[i]?.[j], trace.x?.[j] ?? j, trace.y?.[i] ?? i, values ? values[i][j] : z])));
      return;
    }
    [...(trace.x ?? trace.y ?? [])].forEach((_, i) => rows.push(
      [name, layers?.[i], trace.x?.[i] ?? i, trace.y?.[i] ?? i, values?.[i]]));
  });
  return rows.map((row) => row.map(quoted).join(",")).join("\n") + "\n";
}

// Buttons of a figure's bar: its picture as SVG, and its numbers.
function figureButtons(Plotly) {
  const nameOf = (plot) => (plot.layout?.title?.text || "figure")
    .replace(/<[^>]+>/g, " ").replace(/[^\w.]+/g, "-").slice(0, 80);
  const svg = (plot) => Plotly.downloadImage(plot, { format: "svg", filename: nameOf(plot) });
  const csv = (plot) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([numbersOf(plot.data)], { type: "text/csv" }));
    link.download = `${nameOf(plot)}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  return [
    { name: "svg", title: "Download as SVG", icon: Plotly.Icons.drawclosedpath, click: svg },
    { name: "csv", title: "Download the numbers as CSV", icon: Plotly.Icons.disk, click: csv },
  ];
}
