// The view of Bitmap: bytes through a palette onto off-screen tiles, drawn scaled; no work per cell on zooming or moving.

const TILE = 4096; // browsers limit the side of a canvas
const HINT = "Wheel, + and − zoom, drag moves, shift and drag zooms into a box, arrow keys read out cells, 0 shows all.";

const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

function number(value) {
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 || value === 0 ? String(+value.toPrecision(3)) : value.toExponential(2);
}

function render({ model, el }) {
  el.classList.add("wb-bitmap");
  const canvas = document.createElement("canvas");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.title = HINT;
  const frame = document.createElement("div"); // holds the marks over the picture, so that hovering redraws nothing
  frame.className = "wb-bitmap-frame";
  const mark = document.createElement("div");
  const box = document.createElement("div");
  for (const over of [mark, box]) { over.className = "wb-bitmap-mark"; over.hidden = true; }
  frame.append(canvas, mark, box);
  const scale = document.createElement("div");
  scale.className = "wb-bitmap-scale";
  const status = document.createElement("div");
  status.className = "wb-bitmap-status";
  status.setAttribute("aria-live", "polite");
  el.append(frame, scale, status);

  let tiles = [];
  let view = { x: 0, y: 0, zoom: 1 }; // x, y: the cell at the left upper corner, in columns and rows as drawn
  let cursor = null; // [x, y] of the cell read out, as drawn
  let fitted = 1; // canvas pixels a cell when everything shows

  // Matrices much taller than wide lie on their side: rows run from left to right.
  const lying = () => model.get("rows") > 1.5 * model.get("columns");
  const extent = () => lying() ? [model.get("rows"), model.get("columns")] : [model.get("columns"), model.get("rows")];
  const pixels = () => fitted * view.zoom;
  const names = () => model.get("names") ?? [];

  function paint() {
    const rows = model.get("rows"), columns = model.get("columns");
    const cells = bytes(model.get("cells"));
    const colors = new Uint32Array(bytes(model.get("palette")).slice().buffer);
    tiles = [];
    for (let top = 0; top < rows; top += TILE) {
      for (let left = 0; left < columns; left += TILE) {
        const tile = document.createElement("canvas");
        tile.width = Math.min(TILE, columns - left);
        tile.height = Math.min(TILE, rows - top);
        const image = new ImageData(tile.width, tile.height);
        const out = new Uint32Array(image.data.buffer);
        for (let row = 0, to = 0; row < tile.height; row++) {
          let from = (top + row) * columns + left;
          for (let column = 0; column < tile.width; column++) out[to++] = colors[cells[from++]];
        }
        tile.getContext("2d").putImageData(image, 0, 0);
        tiles.push({ tile, left, top });
      }
    }
  }

  function fit() {
    const [across, down] = extent();
    const width = Math.max(50, el.clientWidth - 2);
    const height = Math.max(24, Math.min(model.get("height"), Math.ceil(width * down / across)));
    canvas.width = width * devicePixelRatio;
    canvas.height = height * devicePixelRatio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    fitted = Math.min(canvas.width / across, canvas.height / down);
    draw();
  }

  function clamp() {
    const [across, down] = extent();
    view.x = Math.min(Math.max(0, view.x), Math.max(0, across - canvas.width / pixels()));
    view.y = Math.min(Math.max(0, view.y), Math.max(0, down - canvas.height / pixels()));
  }

  function draw() {
    clamp();
    const context = canvas.getContext("2d"), k = pixels();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = k < 1;
    context.imageSmoothingQuality = "high";
    if (lying()) context.setTransform(0, k, k, 0, -view.x * k, -view.y * k);
    else context.setTransform(k, 0, 0, k, -view.x * k, -view.y * k);
    for (const { tile, left, top } of tiles) context.drawImage(tile, left, top);
    canvas.setAttribute("aria-label", `${model.get("label")}, ${model.get("rows")} rows by ${model.get("columns")} columns. ${HINT}`);
    el.dataset.zoom = view.zoom.toFixed(3);
    el.dataset.drawn = String(+(el.dataset.drawn || 0) + 1);
    point();
  }

  // Marks and reads out the cell under the cursor.
  function point() {
    mark.hidden = !cursor;
    if (cursor) {
      const k = pixels() / devicePixelRatio, side = Math.max(k, 6), middle = (k - side) / 2;
      place(mark, (cursor[0] - view.x) * k + middle, (cursor[1] - view.y) * k + middle, side, side);
    }
    say();
  }

  function place(over, left, top, width, height) {
    Object.assign(over.style, { left: `${left}px`, top: `${top}px`, width: `${width}px`, height: `${height}px` });
  }

  function reading() {
    const [row, column] = lying() ? cursor : [cursor[1], cursor[0]];
    const code = bytes(model.get("cells"))[row * model.get("columns") + column];
    let value;
    if (model.get("kind") === "mask") value = code ? "set" : "empty";
    else if (model.get("kind") === "classes") value = code ? names()[code - 1] : "neither";
    else if (!code) value = "no value";
    else value = `${number(model.get("low") + (code - 1) / 254 * (model.get("high") - model.get("low")))} ${model.get("unit")}`.trim();
    return `row ${row}, column ${column}: ${value}`;
  }

  function say() {
    const size = `${model.get("rows")} × ${model.get("columns")}`;
    const where = lying() ? ", rows run left to right" : "";
    const text = [model.get("label"), size + where, `zoom ${view.zoom.toFixed(1)}×`];
    if (cursor) text.push(reading());
    status.textContent = text.filter(Boolean).join(" · ");
  }

  function legend() {
    scale.hidden = model.get("kind") === "mask";
    if (scale.hidden) return;
    const colors = bytes(model.get("palette"));
    if (model.get("kind") === "classes") {
      scale.replaceChildren(...names().map((name, index) => {
        const item = document.createElement("span"), swatch = document.createElement("span");
        item.className = "wb-bitmap-class";
        swatch.className = "wb-bitmap-swatch";
        swatch.style.background = `rgb(${colors.slice(4 * index + 4, 4 * index + 7).join(",")})`;
        item.append(swatch, document.createTextNode(name));
        return item;
      }));
      return;
    }
    const stops = [1, 64, 128, 192, 255].map((i) => `rgb(${colors[4 * i]},${colors[4 * i + 1]},${colors[4 * i + 2]})`);
    const bar = document.createElement("span");
    bar.className = "wb-bitmap-colors";
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    scale.replaceChildren(number(model.get("low")), bar, `${number(model.get("high"))} ${model.get("unit")}`);
  }

  function zoomAt(factor, px, py) {
    const before = pixels(), x = view.x + px / before, y = view.y + py / before;
    const most = Math.max(1, 48 * devicePixelRatio / fitted); // a cell of 48 pixels is large enough
    view.zoom = Math.min(most, Math.max(1, view.zoom * factor));
    view.x = x - px / pixels();
    view.y = y - py / pixels();
    draw();
  }

  const cellAt = (event) => {
    const [across, down] = extent();
    const x = Math.floor(view.x + event.offsetX * devicePixelRatio / pixels());
    const y = Math.floor(view.y + event.offsetY * devicePixelRatio / pixels());
    return x >= 0 && y >= 0 && x < across && y < down ? [x, y] : null;
  };

  function everything() { view = { x: 0, y: 0, zoom: 1 }; draw(); }

  function move(dx, dy, big) {
    const [across, down] = extent();
    const step = big ? Math.max(1, Math.round(canvas.width / pixels() / 10)) : 1;
    const [x, y] = cursor ?? [Math.floor(view.x), Math.floor(view.y)];
    cursor = [Math.min(across - 1, Math.max(0, x + dx * step)), Math.min(down - 1, Math.max(0, y + dy * step))];
    const wide = canvas.width / pixels(), high = canvas.height / pixels();
    view.x = Math.min(Math.max(view.x, cursor[0] - wide + 1), cursor[0]);
    view.y = Math.min(Math.max(view.y, cursor[1] - high + 1), cursor[1]);
    draw();
  }

  function zoomKey(factor) {
    const at = cursor ? [(cursor[0] + 0.5 - view.x) * pixels(), (cursor[1] + 0.5 - view.y) * pixels()] : [canvas.width / 2, canvas.height / 2];
    zoomAt(factor, ...at);
  }

  canvas.addEventListener("keydown", (event) => {
    const big = event.shiftKey;
    const action = {
      "+": () => zoomKey(1.25), "=": () => zoomKey(1.25), "-": () => zoomKey(0.8), "0": everything, Home: everything,
      ArrowLeft: () => move(-1, 0, big), ArrowRight: () => move(1, 0, big), ArrowUp: () => move(0, -1, big), ArrowDown: () => move(0, 1, big),
    }[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation(); // the notebook's own shortcuts stay asleep
    action();
  });
  canvas.addEventListener("wheel", (event) => {
    // At the outermost zoom, scrolling on leaves the picture: a page must not be trapped.
    if (event.deltaY > 0 && view.zoom === 1) return;
    event.preventDefault();
    zoomAt(event.deltaY < 0 ? 1.25 : 0.8, event.offsetX * devicePixelRatio, event.offsetY * devicePixelRatio);
  }, { passive: false });
  canvas.addEventListener("dblclick", everything);

  let drag = null;
  const rectangle = (event) => [
    Math.min(drag.x, event.offsetX), Math.min(drag.y, event.offsetY), Math.abs(event.offsetX - drag.x), Math.abs(event.offsetY - drag.y),
  ];
  canvas.addEventListener("pointerdown", (event) => {
    drag = { x: event.offsetX, y: event.offsetY, box: event.shiftKey };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) { cursor = cellAt(event); point(); return; }
    if (drag.box) {
      box.hidden = false;
      place(box, ...rectangle(event));
      return;
    }
    const k = pixels() / devicePixelRatio;
    view.x -= (event.offsetX - drag.x) / k;
    view.y -= (event.offsetY - drag.y) / k;
    drag.x = event.offsetX;
    drag.y = event.offsetY;
    draw();
  });
  canvas.addEventListener("pointerup", (event) => {
    const [left, top, width, height] = drag?.box ? rectangle(event) : [0, 0, 0, 0];
    drag = null;
    box.hidden = true;
    if (width < 4 || height < 4) return;
    const x = view.x + left * devicePixelRatio / pixels(), y = view.y + top * devicePixelRatio / pixels();
    zoomAt(Math.min(canvas.clientWidth / width, canvas.clientHeight / height), 0, 0);
    view.x = x;
    view.y = y;
    draw();
  });
  canvas.addEventListener("pointerleave", () => { if (!drag && document.activeElement !== canvas) { cursor = null; point(); } });

  let shape = "";
  function refresh() {
    const now = `${model.get("rows")}x${model.get("columns")}`;
    if (model.get("cells").byteLength !== model.get("rows") * model.get("columns")) return; // half of an update
    if (now !== shape) { shape = now; cursor = null; view = { x: 0, y: 0, zoom: 1 }; }
    legend();
    paint();
    fit();
  }
  const watched = ["cells", "palette", "rows", "columns", "label", "low", "high", "names"].map((name) => `change:${name}`);
  let scheduled = false;
  const changed = () => {
    if (scheduled) return;
    scheduled = true; // one state update sets several traits
    queueMicrotask(() => { scheduled = false; refresh(); });
  };
  for (const name of watched) model.on(name, changed);
  const size = new ResizeObserver(fit);
  refresh();
  size.observe(el);
  return () => {
    size.disconnect();
    for (const name of watched) model.off(name, changed);
  };
}

export default { render };
