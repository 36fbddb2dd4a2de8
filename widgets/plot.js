// The view of PlotView. State in, picture out: whatever arrives last is drawn, and nothing queues up behind it.

const ARRAYS = {
  float32: Float32Array, float64: Float64Array, int8: Int8Array, uint8: Uint8Array,
  int16: Int16Array, uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array,
};

// {buffer, dtype, shape} -> typed array, or an array of rows. The copy aligns the bytes for the typed array.
function unpacked(value) {
  if (Array.isArray(value)) return value.map(unpacked);
  if (!value || value.constructor !== Object) return value;
  if (!value.buffer) return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, unpacked(v)]));
  const { buffer: view, dtype, shape } = value;
  const flat = new ARRAYS[dtype](view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
  if (shape.length === 1) return flat;
  return Array.from({ length: shape[0] }, (_, row) => flat.subarray(row * shape[1], (row + 1) * shape[1]));
}

// plotly.js, unpacked and run once for the page, however many figures it holds.
function loadPlotly(model) {
  const version = model.get("library_version");
  const loaded = (globalThis.workbenchPlotly ??= {});
  return (loaded[version] ??= fetchPlotly(model).catch((error) => { delete loaded[version]; throw error; }));
}

async function fetchPlotly(model) {
  const library = await model.widget_manager.get_model(model.get("library").slice("IPY_MODEL_".length));
  const packed = new Blob([library.get("code")]).stream().pipeThrough(new DecompressionStream("gzip"));
  const code = await new Response(packed).text();
  const module = { exports: {} };
  // As a CommonJS module, so that neither a loader nor a global of the page is touched.
  new Function("module", "exports", "define", code)(module, module.exports, undefined);
  return module.exports.newPlot ? module.exports : globalThis.Plotly;
}

// The template's grey reads on any page; on this one the theme's own ink is known. A colour the author chose stays.
function themed(layout, el) {
  const ink = getComputedStyle(el).getPropertyValue("--jp-ui-font-color1").trim() || getComputedStyle(el).color;
  const height = layout.height ?? layout.template?.layout?.height ?? 400;
  return { autosize: true, uirevision: "keep", ...layout, height, font: { color: ink, ...(layout.font || {}) } };
}

// No button that would send the figure to a server.
const CONFIG = { responsive: false, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud"] };

async function render({ model, el }) {
  el.classList.add("wb-plot");
  const holder = document.createElement("div");
  holder.className = "wb-plot-figure";
  holder.setAttribute("role", "group"); // not img: what is in an image cannot be reached
  holder.setAttribute("aria-roledescription", "figure");
  holder.textContent = "loading the plot…";
  const said = document.createElement("pre"); // what the last clicked point says (trace.meta.clicked)
  said.className = "wb-plot-picked";
  said.setAttribute("role", "status");
  said.hidden = true;
  el.append(holder, said);

  let Plotly = null, gone = false, drawing = false;
  let listening = false, shapes = [], buttons = [];
  let outdated = true, resized = false; // what is left to do; Plotly must not be called while it draws
  const empty = () => model.get("spec").data.length === 0;

  async function draw() {
    if (drawing || !Plotly) return;
    drawing = true;
    try {
      while ((outdated || resized) && !gone) {
        const whole = outdated;
        outdated = resized = false;
        el.hidden = empty();
        if (el.hidden) continue;
        if (whole) await drawAll();
        else if (holder.isConnected && holder.clientWidth) await Plotly.Plots.resize(holder);
      }
    } catch (error) {
      holder.textContent = `The figure could not be drawn: ${error}`;
      holder.classList.add("wb-error");
      throw error;
    } finally {
      drawing = false;
    }
  }

  async function drawAll() {
    const began = performance.now();
    const revision = model.get("revision"), spec = unpacked(model.get("spec"));
    const title = spec.layout?.title?.text || "figure";
    holder.setAttribute("aria-label", (model.get("alt") || spec.layout?.meta?.alt || title).replace(/<[^>]+>/g, " "));
    await Plotly.react(holder, spec.data, themed(spec.layout || {}, el), { ...CONFIG, modeBarButtonsToAdd: buttons });
    shapes = spec.layout?.shapes || [];
    const layered = spec.data.some((trace) => trace.meta?.layers);
    holder.tabIndex = layered ? 0 : -1;
    said.hidden = !spec.data.some((trace) => trace.meta?.clicked);
    if (el.dataset.revision !== String(revision)) said.textContent = layered
      ? "Click a layer, or walk with the arrow keys: what it says stays here."
      : "Click a point, bar or word: what it says stays here.";
    if (!listening) {
      holder.on("plotly_click", clicked); // `on` is there once Plotly has drawn
      walkLayers(Plotly, holder, () => shapes, (cell) => { said.textContent = cell.said; }, chosen);
    }
    listening = true;
    if (layered && layerFigures.selected) await markLayer(Plotly, holder, shapes);
    el.dataset.milliseconds = (performance.now() - began).toFixed(1);
    el.dataset.revision = revision;
  }

  const redraw = () => { outdated = true; draw(); };
  const theme = new MutationObserver(redraw);
  const size = new ResizeObserver(() => { resized = true; draw(); });

  // Loading may take longer than the widget framework waits for a view, so it goes on after this function returned.
  el.hidden = empty();
  loadPlotly(model).then(async (library) => {
    if (gone) return;
    Plotly = library;
    buttons = figureButtons(Plotly);
    holder.textContent = "";
    await draw();
    if (gone) return;
    theme.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-theme"] });
    size.observe(el);
  }).catch((error) => { holder.textContent = `The figure could not be drawn: ${error}`; holder.classList.add("wb-error"); });

  function clicked(event) {
    const point = event.points[0];
    said.textContent = saidOf(point.data, point.pointNumber) ?? said.textContent;
    const layer = [point.pointNumber].flat().reduce((names, i) => names?.[i], point.data.meta?.layers) ?? null;
    if (layer) selectLayer(layer);
    model.set("clicked", { trace: point.curveNumber, point: point.pointNumber ?? null, x: point.x, y: point.y, layer });
    model.save_changes();
  }

  // Enter on a layer that was reached with the arrow keys is a click on it.
  function chosen(cell) {
    model.set("clicked", { trace: cell.trace, point: cell.point, x: null, y: null, layer: cell.name });
    model.save_changes();
  }

  // The figure as a picture, dark on white: what is kept of it in the notebook's file.
  async function picture(message) {
    if (!message.picture || !Plotly || empty()) return;
    const spec = unpacked(model.get("spec"));
    const layout = { ...spec.layout, font: { color: "#222" }, paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
    const height = layout.height ?? layout.template?.layout?.height ?? 400;
    const url = await Plotly.toImage({ data: spec.data, layout }, { format: "png", width: 900, height });
    model.send({ picture: url });
  }

  model.on("change:spec", redraw);
  model.on("msg:custom", picture);
  return () => {
    gone = true;
    theme.disconnect();
    size.disconnect();
    model.off("change:spec", redraw);
    model.off("msg:custom", picture);
    layerFigures.shown.delete(holder);
    if (Plotly) Plotly.purge(holder);
  };
}

export default { render };
