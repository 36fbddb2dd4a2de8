// Draws the report's figures. plotly.js lies gzipped in the page; this unpacks it once, then draws what is data until then.
(async () => {
  const button = document.getElementById("toggle-code");
  const folds = [...document.querySelectorAll("details.code")];
  if (button && !folds.length) button.hidden = true;
  button?.addEventListener("click", () => {
    const open = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(open));
    button.textContent = open ? "Hide code" : "Show code";
    for (const fold of folds) fold.open = open;
  });

  const figures = [...document.querySelectorAll("script[data-figure]")].map((script) => ({
    holder: document.getElementById(script.dataset.figure),
    spec: JSON.parse(script.textContent),
  }));
  if (!figures.length) return;

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const media = matchMedia("(prefers-color-scheme: dark)");
  let printing = false;

  // The template carries a neutral grey that reads on any page; here the page's own ink is known.
  function themed(layout) {
    const ink = printing ? "#111111" : css("--ink");
    const height = layout.height ?? layout.template?.layout?.height ?? 400;
    return { autosize: true, ...layout, height, font: { color: ink, ...(layout.font || {}) } };
  }

  // No button that would send the figure to a server.
  const LOCAL = { modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud"] };

  function fail(message) {
    for (const { holder } of figures) { holder.classList.add("failure"); holder.textContent = message; }
  }

  // What a clicked point says (trace.meta.clicked, a text for each point) stays below the figure, to be read and copied.
  function listen({ holder, spec }) {
    if (!(spec.data || []).some((trace) => trace.meta?.clicked)) return;
    const layered = spec.data.some((trace) => trace.meta?.layers);
    const said = document.createElement("pre");
    said.className = "picked";
    said.setAttribute("role", "status");
    said.textContent = layered
      ? "Click a layer, or walk with the arrow keys: what it says stays here."
      : "Click a point, bar or word: what it says stays here.";
    holder.after(said);
    const say = (words) => { said.textContent = words; said.dataset.picked = "yes"; };
    if (layered) holder.tabIndex = 0;
    if (layered) walkLayers(window.Plotly, holder, () => spec.layout?.shapes || [], (cell) => say(cell.said));
    holder.on("plotly_click", ({ points: [point] }) => {
      const words = saidOf(point.data, point.pointNumber);
      if (words === undefined) return;
      say(words);
      const layer = [point.pointNumber].flat().reduce((names, i) => names?.[i], point.data.meta.layers);
      if (layer) selectLayer(layer);
    });
  }

  if (typeof DecompressionStream === "undefined") {
    fail("This figure needs a browser of 2023 or later (DecompressionStream).");
    return;
  }
  try {
    const packed = Uint8Array.from(atob(document.getElementById("plotly-gz").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    window.PlotlyConfig = { MathJaxConfig: "local" };
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    const draw = ({ holder, spec }) => window.Plotly.react(
      holder, spec.data || [], themed(spec.layout || {}),
      { responsive: true, displaylogo: false, topojsonURL: "", ...(spec.config || {}), ...LOCAL,
        modeBarButtonsToAdd: figureButtons(window.Plotly) });
    for (const figure of figures) {
      await draw(figure);
      listen(figure);
    }
    document.documentElement.dataset.figures = "drawn";
    const redraw = async () => {
      await Promise.all(figures.map(draw));
      if (layerFigures.selected) selectLayer(layerFigures.selected);
    };
    media.addEventListener("change", redraw);
    addEventListener("beforeprint", () => { printing = true; redraw(); });
    addEventListener("afterprint", () => { printing = false; redraw(); });
  } catch (error) {
    fail(`The figures could not be drawn: ${error}`);
    throw error;
  }
})();
