(() => {
  "use strict";
  const page = document.getElementById("page");
  const slider = document.getElementById("layer");
  const number = document.getElementById("number");
  const caption = document.getElementById("caption");
  const play = document.getElementById("play");
  const overlay = document.getElementById("overlay");
  const columns = [...page.querySelectorAll(".chart li")];
  const cells = [...page.querySelectorAll(".cells li")];
  const runs = [...page.querySelectorAll("[data-choose]")];
  const state = { layer: Number(page.dataset.layer), run: "plan" };
  let timer = null;

  const runOf = (cell) => cell.parentElement.dataset.run;

  function show() {
    const column = columns[state.layer];
    page.dataset.layer = state.layer;
    page.dataset.run = state.run;
    page.dataset.phase = column.dataset.phase;
    page.dataset.mask = column.dataset.mask;
    slider.value = state.layer;
    slider.setAttribute("aria-valuetext", `Layer ${state.layer}`);
    number.textContent = state.layer;
    const bold = document.createElement("b");
    bold.textContent = `Layer ${state.layer}${state.run === "dense" ? ", unpruned" : ""}. `;
    caption.replaceChildren(bold, column.dataset[state.run]);
    for (const one of columns) one.classList.toggle("now", one === column);
    for (const cell of cells) {
      const now = Number(cell.dataset.layer) === state.layer && runOf(cell) === state.run;
      cell.classList.toggle("now", now);
      if (!now) continue;
      for (const heat of page.querySelectorAll(".heat")) {
        heat.src = cell.querySelector(`img[data-image="${heat.dataset.image}"]`).src;
      }
    }
    for (const mask of page.querySelectorAll("g[data-mask]")) {
      mask.toggleAttribute("hidden", mask.dataset.mask !== column.dataset.mask);
    }
    for (const button of runs) {
      button.setAttribute("aria-pressed", button.dataset.choose === state.run);
    }
  }

  function go(change) {
    Object.assign(state, change);
    show();
    history.replaceState(null, "", `#layer=${state.layer}&run=${state.run}`);
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.classList.remove("on");
    play.setAttribute("aria-label", "Play through the layers");
  }

  function start() {
    if (state.layer === columns.length - 1) go({ layer: 0 });
    play.classList.add("on");
    play.setAttribute("aria-label", "Stop");
    timer = setInterval(() => {
      go({ layer: state.layer + 1 });
      if (state.layer === columns.length - 1) stop();
    }, 700);
  }

  function follow() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const layer = Number.parseInt(wanted.get("layer"), 10);
    if (layer >= 0 && layer < columns.length) state.layer = layer;
    if (runs.some((button) => button.dataset.choose === wanted.get("run"))) {
      state.run = wanted.get("run");
    }
    show();
  }

  slider.addEventListener("input", () => { stop(); go({ layer: Number(slider.value) }); });
  play.addEventListener("click", () => (timer === null ? start() : stop()));
  for (const one of columns) {
    one.addEventListener("click", () => { stop(); go({ layer: Number(one.dataset.layer) }); });
  }
  for (const cell of cells) {
    cell.addEventListener("click", () => {
      stop();
      go({ layer: Number(cell.dataset.layer), run: runOf(cell) });
    });
  }
  for (const button of runs) {
    button.addEventListener("click", () => go({ run: button.dataset.choose }));
  }
  overlay.addEventListener("click", () => {
    const off = page.dataset.overlay === "off";
    page.dataset.overlay = off ? "on" : "off";
    overlay.setAttribute("aria-pressed", off);
  });
  addEventListener("hashchange", follow);
  addEventListener("beforeprint", () => {
    for (const one of document.querySelectorAll("details")) one.open = true;
  });
  page.querySelector(".controls").hidden = false;
  follow();
})();
