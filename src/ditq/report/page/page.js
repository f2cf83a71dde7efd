"use strict";
// The interactive parts. The page is complete without them: tables, charts and thumbnails are plain HTML.

const one = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const data = JSON.parse(one("#data").textContent);
const state = { model: 1, frame: 0, playing: false };

// ------------------------------------------------------------------------------------------------ theme

const theme = one("#theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (document.documentElement.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
}
function showTheme() {
  theme.setAttribute("aria-pressed", isDark());
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  showTheme();
});
prefersDark.addEventListener("change", showTheme);
showTheme();

// ----------------------------------------------------------------------------------- images and videos

const viewer = one(".viewer");
const stage = one(".stage");
const layers = [one("#before"), one("#after")];
const frameInput = one("#frame");
let strips = []; // the two <img> that the canvases show: the reference and the chosen model

async function showPair() {
  const chosen = one(".thumb:has(:checked)");
  const pair = [0, state.model].map((model) => one(`img[data-model="${model}"]`, chosen));
  strips = pair;
  await Promise.all(pair.map((image) => image.decode()));
  if (strips !== pair) return; // another pair was chosen meanwhile
  const after = pair[1];
  one("#after-name").textContent = after.alt;
  layers.forEach((canvas, i) => canvas.setAttribute("aria-label", `${pair[i].alt}: ${chosen.dataset.prompt}`));
  const details = document.createElement("small");
  details.textContent = `seed ${chosen.dataset.seed}, PSNR ${after.dataset.psnr} dB`;
  one("#shown-prompt").replaceChildren(`${chosen.dataset.prompt} `, details);
  drawFrame(state.frame);
}

// Both canvases are drawn together, from decoded strips, so that they always show the same frame.
function drawFrame(frame) {
  const frames = Number(strips[0].dataset.frames);
  state.frame = frame % frames;
  layers.forEach((canvas, i) => {
    const { naturalWidth: width, naturalHeight } = strips[i];
    const height = naturalHeight / frames;
    canvas.width = width;
    canvas.height = height;
    canvas.getContext("2d").drawImage(strips[i], 0, state.frame * height, width, height, 0, 0, width, height);
    canvas.dataset.frame = state.frame;
  });
  if (frameInput) {
    frameInput.max = frames - 1;
    frameInput.value = state.frame;
    frameInput.setAttribute("aria-valuetext", `frame ${state.frame + 1} of ${frames}`);
    one("#frame-number").textContent = `${state.frame + 1} / ${frames}`;
  }
}

const split = one("#split");
split.addEventListener("input", () => {
  stage.style.setProperty("--at", `${split.value}%`);
  split.setAttribute("aria-valuetext", `${data.reference} on the left ${split.value} %`);
});
for (const input of all('input[name="view"]')) {
  input.addEventListener("change", () => { viewer.dataset.view = input.value; });
}
for (const input of all('input[name="prompt"]')) {
  input.addEventListener("change", showPair);
}

if (frameInput) {
  const play = one("#play");
  let due = 0;
  const tick = (now) => {
    if (!state.playing) return;
    if (now >= due) {
      drawFrame(state.frame + 1);
      due = now + 1000 / data.frames_per_second;
    }
    requestAnimationFrame(tick);
  };
  const setPlaying = (playing) => {
    state.playing = playing;
    play.textContent = playing ? "Pause" : "Play";
    if (playing) {
      due = performance.now() + 1000 / data.frames_per_second;
      requestAnimationFrame(tick);
    }
  };
  play.addEventListener("click", () => setPlaying(!state.playing));
  frameInput.addEventListener("input", () => {
    setPlaying(false);
    drawFrame(Number(frameInput.value));
  });
  showPair().then(() => setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches));
}

// -------------------------------------------------------------------- the chosen model of the whole page

function showModel(model) {
  state.model = model;
  for (const input of all('input[data-switch="model"]')) input.checked = Number(input.value) === model;
  for (const panel of all(".per-model")) panel.hidden = Number(panel.dataset.model) !== model;
  for (const image of all(".strips img")) image.hidden = !["0", String(model)].includes(image.dataset.model);
  showPair();
  showFiltered();
}
for (const input of all('input[data-switch="model"]')) {
  input.addEventListener("change", () => showModel(Number(input.value)));
}

// ------------------------------------------------------------------------------------------- heat maps

for (const panel of all(".per-model:has(.map)")) {
  const errors = data.errors[Number(panel.dataset.model)];
  const map = one(".map", panel);
  const [cells, cursor, readout] = [one(".cells", map), one(".cursor", map), one(".readout", panel)];
  const at = { row: 0, column: 0 };
  const size = (name) => Number(cells.getAttribute(name));

  const move = (row, column) => {
    at.row = Math.min(Math.max(row, 0), errors.layers.length - 1);
    at.column = Math.min(Math.max(column, 0), errors.timesteps.length - 1);
    const width = size("width") / errors.timesteps.length;
    const height = size("height") / errors.layers.length;
    cursor.setAttribute("x", size("x") + at.column * width);
    cursor.setAttribute("y", size("y") + at.row * height);
    cursor.setAttribute("visibility", "visible");
    const value = errors.sqnr_db[at.row][at.column]?.toFixed(1).replace("-", "−") ?? "–";
    const strong = document.createElement("b");
    strong.textContent = `${value} dB`;
    readout.replaceChildren(
      strong, ` at t = ${Math.round(errors.timesteps[at.column])}, ${errors.layers[at.row]} (${errors.roles[at.row]})`);
  };
  const point = (event) => {
    const box = cells.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * errors.layers.length);
    const column = Math.floor((event.clientX - box.left) / box.width * errors.timesteps.length);
    if (row >= 0 && row < errors.layers.length && column >= 0 && column < errors.timesteps.length) move(row, column);
  };
  map.addEventListener("pointermove", point);
  map.addEventListener("pointerdown", point);
  map.addEventListener("focus", () => { if (map.matches(":focus-visible")) move(at.row, at.column); });
  map.addEventListener("keydown", (event) => {
    const goals = {
      ArrowUp: [at.row - 1, at.column], ArrowDown: [at.row + 1, at.column],
      ArrowLeft: [at.row, at.column - 1], ArrowRight: [at.row, at.column + 1],
      PageUp: [at.row - 10, at.column], PageDown: [at.row + 10, at.column],
      Home: [at.row, 0], End: [at.row, errors.timesteps.length - 1],
    };
    if (event.key in goals && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      move(...goals[event.key]);
    }
  });
  for (const button of all(".worst button", panel)) {
    button.addEventListener("click", () => {
      move(Number(button.dataset.row), Number(button.dataset.column));
      map.scrollIntoView({ block: "nearest" });
    });
  }
}

// ------------------------------------------------------------------------------------------------ plan

const filter = one("#filter");
function showFiltered() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = all(`#plan .per-model[data-model="${state.model}"] tbody tr`);
  for (const row of rows) {
    const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
  }
  one("#count").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} layers`;
}
filter.addEventListener("input", showFiltered);

// ---------------------------------------------------------------------------------------- reproduction

const copy = one("#copy");
copy.addEventListener("click", async () => {
  const command = one("#command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch { // not every browser lets a file from disk write to the clipboard
    getSelection().selectAllChildren(command);
    copy.textContent = "Selected";
  }
  setTimeout(() => { copy.textContent = "Copy"; }, 2000);
});

showModel(1);
