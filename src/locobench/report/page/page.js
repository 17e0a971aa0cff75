(() => {
  "use strict";
  const { plots, local } = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const names = Object.keys(plots);
  const narrow = window.matchMedia("(hover: none)").matches;
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  // Plain numbers on log axes, plotly's own choice on linear ones.
  const axis = (name, type) => {
    const ticks = plots[name].layout.meta && plots[name].layout.meta.ticks;
    const plain = type === "log" && ticks && ticks.length;
    return {
      "yaxis.type": type,
      "yaxis.autorange": true,
      "yaxis.tickmode": plain ? "array" : "auto",
      "yaxis.tickvals": plain ? ticks : null,
      "yaxis.ticktext": plain ? ticks.map((tick) => tick.toLocaleString("en", { maximumSignificantDigits: 3, notation: tick < 1e4 ? "standard" : "compact" })) : null,
    };
  };
  const draw = async (name) => {
    const { data, layout } = plots[name];
    layout.font.family = getComputedStyle(document.body).fontFamily;
    // A finger scrolls the page; a mouse may zoom.
    layout.dragmode = narrow || name === "local" ? false : "zoom";
    await Plotly.newPlot(name, data, layout, { ...config, displayModeBar: name === "local" ? false : "hover" });
    if (layout.meta && layout.meta.ticks) await Plotly.relayout(name, axis(name, "log"));
  };

  // Methods that are shown.
  const hidden = new Set();
  const methodPlots = names.filter((name) => plots[name].data.some((trace) => trace.meta && trace.meta.method));
  const chips = all(".chip");
  const show = () => {
    for (const chip of chips) chip.setAttribute("aria-pressed", String(!hidden.has(chip.dataset.method)));
    return Promise.all(
      methodPlots.map((name) =>
        Plotly.restyle(name, { visible: plots[name].data.map((trace) => !hidden.has(trace.meta.method)) }),
      ),
    );
  };
  const setHidden = (some, hide) => {
    for (const chip of some) hidden[hide ? "add" : "delete"](chip.dataset.method);
    return show();
  };
  for (const chip of chips) chip.addEventListener("click", () => setHidden([chip], !hidden.has(chip.dataset.method)));
  for (const name of all("[data-family]")) {
    const own = [...name.parentElement.querySelectorAll(".chip")];
    name.title = "show or hide all of them";
    name.addEventListener("click", () => setHidden(own, own.every((chip) => !hidden.has(chip.dataset.method))));
  }
  byId("show-all").addEventListener("click", () => setHidden(chips, false));
  byId("show-none").addEventListener("click", () => setHidden(chips, true));

  // Linear and log axes.
  const onRadio = (group, act) =>
    all(`input[name="${group}"]`).forEach((input) => input.addEventListener("change", () => input.checked && act(input.value)));
  onRadio("loss-scale", (type) => methodPlots.map((name) => Plotly.relayout(name, axis(name, type))));
  onRadio("time-scale", (type) =>
    methodPlots
      .filter((name) => name.endsWith("-seconds") || name.endsWith("-adam-steps"))
      .map((name) => Plotly.relayout(name, { "xaxis.type": type, "xaxis.autorange": true })),
  );

  // The table: cells without a value come last in either order.
  const table = document.querySelector("table");
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => row.cells[column].dataset.key;
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  heads.forEach((head, column) =>
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const rows = [...table.tBodies[0].rows].map((row) => [key(row, column), row]);
      rows.sort(([a], [b]) => {
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return down ? compare(b, a) : compare(a, b);
      });
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      table.tBodies[0].append(...rows.map(([, row]) => row));
    }),
  );

  // The local loss: slider, list and dragging in the plot set the same two values.
  const slider = byId("target");
  const showLocal = () => {
    const target = Number(slider.value);
    const index = local.targets.findIndex((value) => Math.abs(value - target) < 0.01);
    const curves = local.transfers[byId("transfer").value];
    byId("target-value").textContent = target.toFixed(1);
    return Plotly.update("local", {
      x: [local.predictions, local.predictions, local.predictions, [target]],
      y: [curves.matching[index], local.squared[index], curves.post[index], [0]],
    });
  };
  slider.addEventListener("input", showLocal);
  byId("transfer").addEventListener("change", showLocal);
  const plot = byId("local");
  const drag = (event) => {
    const { xaxis } = plot._fullLayout;
    const value = xaxis.p2d(event.clientX - plot.getBoundingClientRect().left - xaxis._offset);
    slider.value = Math.min(3, Math.max(-3, value)).toFixed(1);
    showLocal();
  };
  plot.addEventListener("pointerdown", (event) => {
    plot.setPointerCapture(event.pointerId);
    drag(event);
  });
  plot.addEventListener("pointermove", (event) => plot.hasPointerCapture(event.pointerId) && drag(event));

  // Second order: one view at a time, and one legend for its three plots.
  const view = byId("view");
  const ordered = names.filter((name) => name.startsWith("second-order-"));
  const showView = () => {
    const shown = (trace) => trace.meta.view === view.value;
    const entries = plots[ordered[0]].data.filter(shown).map((trace) => {
      const item = document.createElement("li");
      const dash = trace.line.dash ? ` class="${trace.line.dash}"` : "";
      item.innerHTML = `<svg width="28" height="10" aria-hidden="true"><line x1="1" y1="5" x2="27" y2="5" stroke="${trace.line.color}" stroke-width="3"${dash}/></svg>`;
      item.append(trace.name);
      return item;
    });
    byId("second-order-legend").replaceChildren(...entries);
    return Promise.all(ordered.map((name) => Plotly.restyle(name, { visible: plots[name].data.map(shown) })));
  };

  Promise.all(names.map(draw)).then(async () => {
    if (view) {
      view.addEventListener("change", showView);
      await showView();
    }
    document.documentElement.dataset.ready = "yes";
  });
})();
