// The table sorts; a case opens in three panes. Volumes are in canonical RAS+ order (index grows to the patient's
// right, front, head) and are shown as a radiologist hangs them: each plane turned round along both of its axes.
"use strict";
const byId = (id) => document.getElementById(id);
const read = (id) => JSON.parse(byId(id).textContent);
const cases = read("cases"), windows = read("windows-hu");
const SIDES = [["R", "L"], ["R", "L"], ["A", "P"]];
let current = 0, volumes = [], volume = null, at = [0, 0, 0], windowHu = windows[0].hu, loading = 0;
const shown = new Map();  // of layer names: what was switched stays so in the next case

// ---- table

function sortBy(header, column) {
  const body = byId("rows"), rising = header.getAttribute("aria-sort") === "descending";
  for (const other of header.parentNode.children) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", rising ? "ascending" : "descending");
  const value = (row) => row.children[column].dataset.value ?? row.children[column].textContent;
  const rows = [...body.children].sort((a, b) => {
    const [u, v] = [value(a), value(b)];
    if (u === "" || v === "") return (u === "") - (v === "");  // what has no value comes last either way
    const order = isNaN(u) || isNaN(v) ? u.localeCompare(v, undefined, { numeric: true }) : u - v;
    return rising ? order : -order;
  });
  body.append(...rows);
}

document.querySelectorAll("#table thead th").forEach((header, column) =>
  header.querySelector("button").addEventListener("click", () => sortBy(header, column)));
document.querySelectorAll("button.open").forEach((button) =>
  button.addEventListener("click", () => { openCase(+button.dataset.index); byId("viewer").scrollIntoView(); }));

// ---- volumes

async function pixels(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.width; canvas.height = image.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return { data: context.getImageData(0, 0, image.width, image.height).data, width: image.width };
}

function untiled(picture, [nz, ny, nx], columns) {
  const values = new Uint8Array(nz * ny * nx);
  for (let z = 0, out = 0; z < nz; z++) {
    const row = Math.floor(z / columns) * ny, column = (z % columns) * nx;
    for (let y = 0; y < ny; y++) {
      let source = ((row + y) * picture.width + column) * 4;
      for (let x = 0; x < nx; x++, source += 4) values[out++] = picture.data[source];
    }
  }
  return values;
}

async function openCase(index) {
  const ticket = ++loading;
  current = index;
  volumes = read("volumes-" + index);
  await openVolume(0, ticket);
}

async function openVolume(number, ticket = ++loading) {
  const next = volumes[number];
  const image = untiled(await pixels(next.image), next.shape, next.columns);
  const overlay = next.overlay && untiled(await pixels(next.overlay), next.shape, next.columns);
  if (ticket !== loading) return;  // another case was asked for meanwhile
  volume = { ...next, values: image, bytes: overlay, number };
  for (const layer of next.layers) if (!shown.has(layer.name)) shown.set(layer.name, layer.shown);
  at = startingPoint();
  drawControls();
  draw();
  document.body.dataset.ready = `${current}/${number}`;
}

function layerValue(layer, byte) { return (byte >> layer.shift) & ((1 << layer.bits) - 1); }

// The middle of most of the first layer that has tumour, else of what it has, else of the volume.
function startingPoint() {
  const [nz, ny, nx] = volume.shape, counts = [nz, ny, nx].map((n) => new Float64Array(n));
  const weigh = (byte) => {
    let most = 0;
    for (const layer of volume.layers) if (layer.kind === "classes" || layer.name !== "uncertainty") {
      const value = layerValue(layer, byte);
      most = Math.max(most, layer.kind === "classes" ? [0, 1, 1000, 0][value] : value * (layer.shift ? 1 : 1000));
    }
    return most;
  };
  if (volume.bytes) for (let i = 0, z = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, i++) {
    if (!volume.bytes[i]) continue;
    const weight = weigh(volume.bytes[i]);
    counts[0][z] += weight; counts[1][y] += weight; counts[2][x] += weight;
  }
  return counts.map((along) => { const top = Math.max(...along); return top ? along.indexOf(top) : along.length >> 1; });
}

// ---- planes

const ACROSS = [[1, 2], [0, 2], [0, 1]];  // rows and columns of a plane across z, y, x

function plane(axis) {
  const [, ny, nx] = volume.shape, strides = [ny * nx, nx, 1], [v, u] = ACROSS[axis];
  const height = volume.shape[v], width = volume.shape[u], start = at[axis] * strides[axis];
  const index = (row, column) => start + (height - 1 - row) * strides[v] + (width - 1 - column) * strides[u];
  return { height, width, index, mm: [volume.spacing[v], volume.spacing[u]] };
}

function drawPane(axis) {
  const canvas = byId("pane-" + axis), cut = plane(axis), context = canvas.getContext("2d");
  const wide = Math.round(canvas.clientWidth * Math.min(devicePixelRatio || 1, 2)) || 400;
  const high = Math.max(1, Math.round(wide * (cut.height * cut.mm[0]) / (cut.width * cut.mm[1])));
  if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; }
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture(cut, (i) => grey(volume.values[i])), 0, 0, wide, high);
  if (volume.bytes) for (const layer of volume.layers) if (shown.get(layer.name)) drawLayer(context, cut, layer, wide, high);
  drawCross(context, axis, cut, wide, high);
  byId("scroll-" + axis).max = volume.shape[axis] - 1;
  byId("scroll-" + axis).value = at[axis];
  byId("where-" + axis).textContent = where(axis);
}

function grey(byte) {
  const [low, high] = volume.hu, hu = low + byte * (high - low) / 255;
  const value = Math.max(0, Math.min(255, 255 * (hu - windowHu[0]) / (windowHu[1] - windowHu[0])));
  return [value, value, value, 255];
}

function picture(cut, colour) {
  const canvas = document.createElement("canvas");
  canvas.width = cut.width; canvas.height = cut.height;
  const context = canvas.getContext("2d"), image = context.createImageData(cut.width, cut.height);
  for (let row = 0, out = 0; row < cut.height; row++) for (let column = 0; column < cut.width; column++, out += 4) {
    const rgba = colour(cut.index(row, column));
    if (rgba) image.data.set(rgba, out);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function drawLayer(context, cut, layer, wide, high) {
  const colours = layer.colours.map(rgb), most = (1 << layer.bits) - 1, fade = +byId("fade").value;
  const tint = (i) => {
    const value = layerValue(layer, volume.bytes[i]);
    if (!value) return null;
    return layer.kind === "share" ? [...colours[0], 150 * value / most] : [...colours[Math.min(value, 2) - 1], 36];
  };
  context.globalAlpha = fade;
  context.imageSmoothingEnabled = false;
  context.drawImage(picture(cut, tint), 0, 0, wide, high);
  if (layer.kind === "classes") layer.colours.forEach((colour, c) => outline(context, cut, layer, c + 1, colour, wide, high));
  context.globalAlpha = 1;
}

// Voxel edges between inside and outside, so that truth and prediction can be told apart to the voxel.
function outline(context, cut, layer, from, colour, wide, high) {
  const inside = (row, column) => row >= 0 && column >= 0 && row < cut.height && column < cut.width &&
    layerValue(layer, volume.bytes[cut.index(row, column)]) >= from;
  const sx = wide / cut.width, sy = high / cut.height;
  context.beginPath();
  for (let row = 0; row <= cut.height; row++) for (let column = 0; column <= cut.width; column++) {
    const here = inside(row, column);
    if (here !== inside(row - 1, column)) { context.moveTo(column * sx, row * sy); context.lineTo((column + 1) * sx, row * sy); }
    if (here !== inside(row, column - 1)) { context.moveTo(column * sx, row * sy); context.lineTo(column * sx, (row + 1) * sy); }
  }
  context.strokeStyle = colour;
  context.lineWidth = Math.max(1.5, wide / 300);
  context.setLineDash(layer.shift ? [wide / 90, wide / 140] : []);
  context.stroke();
  context.setLineDash([]);
}

function drawCross(context, axis, cut, wide, high) {
  const [v, u] = ACROSS[axis], x = (cut.width - at[u] - .5) * wide / cut.width, y = (cut.height - at[v] - .5) * high / cut.height;
  const gap = wide / 40;
  context.strokeStyle = "rgba(255,255,255,.4)";
  context.lineWidth = Math.max(1, wide / 600);
  context.beginPath();
  for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, wide, y], [x, 0, x, y - gap], [x, y + gap, x, high]]) {
    context.moveTo(x0, y0); context.lineTo(x1, y1);
  }
  context.stroke();
  context.font = `bold ${Math.round(wide / 26)}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.lineWidth = 3; context.strokeStyle = "#000"; context.fillStyle = "#fff";
  for (const [text, left, align] of [[SIDES[axis][0], wide * .015, "left"], [SIDES[axis][1], wide * .985, "right"]]) {
    context.textAlign = align;
    context.strokeText(text, left, high / 2); context.fillText(text, left, high / 2);
  }
}

function where(axis) {
  const n = volume.shape[axis];
  if (axis) return `${at[axis] + 1} of ${n}`;
  const [first, stop] = volume.native, native = Math.min(stop - 1, Math.floor(first + (at[0] + .5) * (stop - first) / n));
  return `${at[0] + 1} of ${n}, the scan's slice ${native + 1}`;
}

function draw() {
  for (let axis = 0; axis < 3; axis++) drawPane(axis);
  const [, ny, nx] = volume.shape, i = (at[0] * ny + at[1]) * nx + at[2], [low, high] = volume.hu;
  const hu = Math.round(low + volume.values[i] * (high - low) / 255);
  const parts = [`${volume.values[i] === 0 ? "≤ " : volume.values[i] === 255 ? "≥ " : ""}${hu} HU`];
  if (volume.bytes) for (const layer of volume.layers) {
    const value = layerValue(layer, volume.bytes[i]);
    parts.push(`${layer.name}: ${layer.kind === "classes" ? ["background", "liver", "tumour"][value] :
      Math.round(100 * value / ((1 << layer.bits) - 1)) + " %"}`);
  }
  byId("readout").textContent = parts.join(" · ");
}

// ---- controls

function button(text, pressed, action) {
  const element = document.createElement("button");
  element.type = "button"; element.textContent = text;
  element.setAttribute("aria-pressed", pressed);
  element.addEventListener("click", action);
  return element;
}

function drawControls() {
  byId("name").textContent = cases[current].name;
  byId("note").textContent = cases[current].note;
  for (const row of byId("rows").children) row.classList.toggle("current", +row.dataset.index === current);
  byId("volumes").replaceChildren(...(volumes.length < 2 ? [] : volumes.map((v, i) => button(v.name, i === volume.number, () => openVolume(i)))));
  byId("presets").replaceChildren(...windows.map((w) =>
    button(w.name, w.hu === windowHu, () => { windowHu = w.hu; drawControls(); draw(); })));
  byId("layers").replaceChildren(...volume.layers.map(layerSwitch));
  byId("fading").hidden = !volume.layers.length;
}

function layerSwitch(layer, i) {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.id = "layer-" + i; box.checked = shown.get(layer.name);
  box.addEventListener("change", () => { shown.set(layer.name, box.checked); draw(); });
  label.append(box, layer.name, ...layer.colours.map((colour, c) => {
    const key = document.createElement("span");
    key.className = "key"; key.style.background = colour;
    key.title = layer.kind === "classes" ? ["liver", "tumour"][c] : layer.name;
    return key;
  }));
  return label;
}

function scroll(axis, steps) {
  at[axis] = Math.max(0, Math.min(volume.shape[axis] - 1, at[axis] + steps));
  draw();
}

function point(event, axis) {
  const box = event.currentTarget.getBoundingClientRect(), [v, u] = ACROSS[axis];
  const place = (share, n) => n - 1 - Math.max(0, Math.min(n - 1, Math.floor(share * n)));
  at[u] = place((event.clientX - box.left) / box.width, volume.shape[u]);
  at[v] = place((event.clientY - box.top) / box.height, volume.shape[v]);
  draw();
}

const KEYS = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10 };

for (let axis = 0; axis < 3; axis++) {
  const canvas = byId("pane-" + axis);
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); scroll(axis, event.deltaY < 0 ? 1 : -1); }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); canvas.focus(); point(event, axis); });
  canvas.addEventListener("pointermove", (event) => { if (event.buttons) point(event, axis); });
  canvas.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    scroll(axis, KEYS[event.key]);
  });
  byId("scroll-" + axis).addEventListener("input", (event) => { at[axis] = +event.target.value; draw(); });
}
byId("fade").addEventListener("input", draw);
const order = () => [...byId("rows").children].map((row) => +row.dataset.index);
const step = (by) => { const all = order(); openCase(all[(all.indexOf(current) + by + all.length) % all.length]); };
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
addEventListener("resize", () => volume && draw());
openCase(order()[0]);
