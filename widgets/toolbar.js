// Copies a panel's settings as code or as a command, and gives names to what the notebook's own controls leave
// without one: slider handles, their read-outs and the progress bar.
function nameControls(panel) {
  for (const box of panel.querySelectorAll(".widget-slider, .widget-hslider, .widget-progress")) {
    const label = box.querySelector(".widget-label")?.textContent?.trim() || "progress";
    for (const handle of box.querySelectorAll(".noUi-handle")) handle.setAttribute("aria-label", label);
    for (const shown of box.querySelectorAll(".widget-readout")) {
      shown.setAttribute("role", "textbox");
      shown.setAttribute("aria-label", `${label}, value`);
    }
    const bar = box.querySelector(".progress");
    if (!bar) continue;
    const done = parseFloat(bar.querySelector(".progress-bar")?.style.width) || 0;
    const told = { role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 };
    for (const [name, value] of Object.entries({ ...told, "aria-valuenow": done })) bar.setAttribute(name, value);
  }
}

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return "copied:";
  } catch {
    return "to copy:"; // a page that may not write to the clipboard
  }
}

function render({ model, el }) {
  el.classList.add("wb-toolbar");
  const row = document.createElement("div");
  const said = document.createElement("span");
  const shown = document.createElement("pre");
  said.setAttribute("role", "status");
  shown.hidden = true;
  for (const [kind, words] of model.get("kinds")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "jupyter-button widget-button";
    button.textContent = words;
    button.addEventListener("click", () => { said.textContent = "…"; model.send({ kind }); });
    row.append(button);
  }
  row.append(said);
  el.append(row, shown);
  const answered = async (message) => {
    if (message.error) { said.textContent = message.error; shown.hidden = true; return; }
    shown.textContent = message.text;
    shown.hidden = false;
    said.textContent = await copied(message.text);
  };
  model.on("msg:custom", answered);

  let watcher = null;
  const begin = () => {
    const panel = el.closest(".wb-panel");
    if (!panel) return;
    nameControls(panel);
    let waiting = false;
    watcher = new MutationObserver(() => {
      if (waiting) return;
      waiting = true;
      setTimeout(() => { waiting = false; nameControls(panel); }, 200);
    });
    watcher.observe(panel, { childList: true, subtree: true, attributes: true, attributeFilter: ["style"] });
  };
  const placed = setTimeout(begin, 0);
  return () => { clearTimeout(placed); watcher?.disconnect(); model.off("msg:custom", answered); };
}

export default { render };
