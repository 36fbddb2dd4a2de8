// A launcher card that opens the workbench's index notebook, or a new notebook with a bench where there is none.
// Written by hand in the shape JupyterLab expects of a module-federation container: no build step.
(() => {
  let shared;

  async function use(name) {
    const versions = shared[name];
    const factory = await versions[Object.keys(versions)[0]].get();
    return factory();
  }

  const ICON = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24"><rect width="24" height="24" rx="4" fill="#0072B2"/>
    <path d="M4 20c3 0 3-14 5-14s2 12 4 12 2-6 3-6 1 8 4 8" fill="none" stroke="#fff" stroke-width="2" stroke-linecap="round"/></svg>`;

  const BENCH = {
    cells: [{ cell_type: "code", id: "bench", metadata: {}, execution_count: null, outputs: [], source: "import widgets\n\nwidgets.Bench()" }],
    metadata: { kernelspec: { name: "python3", display_name: "Python 3", language: "python" } }, nbformat: 4, nbformat_minor: 5,
  };

  async function open(app, folder) {
    const contents = app.serviceManager.contents;
    for (const path of ["index.ipynb", "notebooks/index.ipynb"]) {
      const found = await contents.get(path, { content: true }).catch(() => null);
      if (found && JSON.stringify(found.content).includes("widgets.Bench")) return app.commands.execute("docmanager:open", { path });
    }
    const made = await contents.newUntitled({ path: folder || "", type: "notebook" });
    await contents.save(made.path, { type: "notebook", format: "json", content: BENCH });
    return app.commands.execute("docmanager:open", { path: made.path });
  }

  async function plugin() {
    const { ILauncher } = await use("@jupyterlab/launcher");
    const { LabIcon } = await use("@jupyterlab/ui-components");
    const icon = new LabIcon({ name: "model-workbench:icon", svgstr: ICON });
    return {
      id: "model-workbench:launcher",
      autoStart: true,
      optional: [ILauncher],
      activate: (app, launcher) => {
        app.commands.addCommand("model-workbench:open", {
          label: "Model workbench", caption: "Open the workbench's index, or a new bench", icon, execute: (args) => open(app, args.cwd),
        });
        launcher?.add({ command: "model-workbench:open", category: "Notebook", rank: 0 });
      },
    };
  }

  (window._JUPYTERLAB ??= {})["model-workbench"] = {
    init: (scope) => { shared = scope; },
    get: async () => {
      const made = await plugin();
      return () => ({ __esModule: true, default: made });
    },
  };
})();
