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
  const here = cells.find((cell) => cell.name === layerFigures.selected);
  if (!here) return cells[0];
  if (key === "Home") return cells[0];
  if (key === "End") return cells[cells.length - 1];
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
