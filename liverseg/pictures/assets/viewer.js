// ---- the viewer. Places are voxels of the scan, canonical RAS+ (index grows to the patient's right, front, head), and
// planes are shown as a radiologist hangs them: each turned round along both of its axes.
const read = (id) => JSON.parse(byId(id).textContent);
const cases = read("cases"), windows = read("windows-hu"), nav = read("nav");
const SIDES = [["R", "L"], ["R", "L"], ["A", "P"]], NAMES = ["axial", "coronal", "sagittal"];
const ACROSS = [[1, 2], [0, 2], [0, 1]];  // rows and columns of a plane across z, y, x
const TOOLS = [["cross", "crosshair"], ["pan", "pan"], ["window", "window"]];
const ICONS = { missed: "○", "false positive": "✕", found: "●", lesion: "●" };
let current = 0, content = null, volume = null, at = [0, 0, 0], windowHu = [...windows[0].hu], loading = 0;
let tool = "cross", zoom = 1, middle = null, fill = false, active = 0, lesion = -1;
const shown = new Map();  // by layer name: what was switched stays so in the next case
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

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

async function openCase(index, place = null) {
  const ticket = ++loading;
  current = index;
  content = read("case-" + index);
  const isAt = (item) => place && place.at && item.at.every((value, axis) => value === place.at[axis]);
  lesion = content.lesions.findIndex(isAt);  // an address that was copied at a lesion
  await openVolume(place && place.volume < content.volumes.length ? place.volume : 0, ticket, place && place.at);
}

async function openVolume(number, ticket = ++loading, place = undefined) {
  const next = content.volumes[number];
  const image = untiled(await pixels(next.image), next.shape, next.columns);
  const overlay = next.overlay && untiled(await pixels(next.overlay), next.shape, next.columns);
  if (ticket !== loading) return;  // another case was asked for meanwhile
  const step = next.box.map(([first, stop], axis) => (stop - first) / next.shape[axis]);
  volume = { ...next, values: image, bytes: overlay, number, step };
  for (const layer of next.layers) if (!shown.has(layer.name)) shown.set(layer.name, layer.shown);
  if (place !== undefined) at = place || startingPoint();
  at = at.map((value, axis) => clamp(value, next.box[axis][0], next.box[axis][1] - 1));
  fit();
  drawControls();
  draw();
  document.body.dataset.ready = `${current}/${number}`;
}

const layerValue = (layer, byte) => (byte >> layer.shift) & ((1 << layer.bits) - 1);
const voxel = (axis) => clamp(Math.floor((at[axis] + .5 - volume.box[axis][0]) / volume.step[axis]), 0, volume.shape[axis] - 1);
const native = (axis, index) => Math.floor(volume.box[axis][0] + (index + .5) * volume.step[axis]);

// The first lesion; else, along each axis, the slice with most of what is drawn; else the middle.
function startingPoint() {
  if (content.lesions.length) { lesion = 0; return [...content.lesions[0].at]; }
  const [nz, ny, nx] = volume.shape, counts = [nz, ny, nx].map((n) => new Float64Array(n));
  const layers = volume.layers.filter((layer) => layer.contours);
  if (volume.bytes) for (let i = 0, z = 0; z < nz; z++) for (let y = 0; y < ny; y++) for (let x = 0; x < nx; x++, i++) {
    if (!volume.bytes[i]) continue;
    let weight = 0;
    layers.forEach((layer, rank) => {
      const value = layerValue(layer, volume.bytes[i]);
      if (value) weight = Math.max(weight, layer.kind === "share" ? value * 1000 ** rank : 1);
    });
    counts[0][z] += weight; counts[1][y] += weight; counts[2][x] += weight;
  }
  return counts.map((along, axis) => {
    const top = Math.max(...along);
    return native(axis, top ? along.indexOf(top) : along.length >> 1);
  });
}

// ---- planes: a pane shows millimetres, its middle at middle[axis], all panes at one zoom

const extentMm = (axis) => (volume.box[axis][1] - volume.box[axis][0]) * content.spacing[axis];
const mm = (axis, value) => (value + .5) * content.spacing[axis];

function fit() {
  zoom = 1;
  middle = [0, 1, 2].map((axis) => (volume.box[axis][0] + volume.box[axis][1]) / 2 * content.spacing[axis]);
}

function geometry(axis) {
  const canvas = byId("pane-" + axis), ratio = Math.min(devicePixelRatio || 1, 2), [v, u] = ACROSS[axis];
  const wide = Math.max(1, Math.round(canvas.clientWidth * ratio)), high = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== wide || canvas.height !== high) { canvas.width = wide; canvas.height = high; }
  const perMm = zoom * Math.min(wide / extentMm(u), high / extentMm(v));
  const x = (along) => wide / 2 - (along - middle[u]) * perMm, y = (along) => high / 2 - (along - middle[v]) * perMm;
  return { canvas, wide, high, ratio, perMm, u, v, x, y };
}

function plane(axis) {
  const [, ny, nx] = volume.shape, strides = [ny * nx, nx, 1], [v, u] = ACROSS[axis];
  const height = volume.shape[v], width = volume.shape[u], start = voxel(axis) * strides[axis];
  const grey = new Uint8Array(width * height), bytes = volume.bytes && new Uint8Array(width * height);
  for (let row = 0, out = 0; row < height; row++) for (let column = 0; column < width; column++, out++) {
    const i = start + (height - 1 - row) * strides[v] + (width - 1 - column) * strides[u];
    grey[out] = volume.values[i];
    if (bytes) bytes[out] = volume.bytes[i];
  }
  return { width, height, grey, bytes };
}

function picture(cut, colour) {
  const canvas = document.createElement("canvas");
  canvas.width = cut.width; canvas.height = cut.height;
  const context = canvas.getContext("2d"), image = context.createImageData(cut.width, cut.height);
  for (let i = 0; i < cut.grey.length; i++) {
    const rgba = colour(i);
    if (rgba) image.data.set(rgba, 4 * i);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function greys() {
  const [low, high] = volume.hu;
  return Array.from({ length: 256 }, (_, byte) => {
    const hu = low + byte * (high - low) / 255, value = clamp(255 * (hu - windowHu[0]) / (windowHu[1] - windowHu[0]), 0, 255);
    return [value, value, value, 255];
  });
}

function drawPane(axis, table) {
  const place = geometry(axis), cut = plane(axis), context = place.canvas.getContext("2d");
  const edge = (a, end) => volume.box[a][end] * content.spacing[a];
  const left = place.x(edge(place.u, 1)), right = place.x(edge(place.u, 0));
  const top = place.y(edge(place.v, 1)), bottom = place.y(edge(place.v, 0));
  const put = (image) => context.drawImage(image, left, top, right - left, bottom - top);
  context.fillStyle = "#000";
  context.fillRect(0, 0, place.wide, place.high);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  put(picture(cut, (i) => table[cut.grey[i]]));
  const box = { left, top, sx: (right - left) / cut.width, sy: (bottom - top) / cut.height };
  if (cut.bytes) for (const layer of volume.layers) if (shown.get(layer.name)) drawLayer(context, cut, layer, put, box, place);
  drawCross(context, axis, place);
  drawScale(context, place);
  byId("scroll-" + axis).max = volume.shape[axis] - 1;
  byId("scroll-" + axis).value = voxel(axis);
  byId("where-" + axis).textContent = `${at[axis] + 1} of ${content.shape[axis]}`;
}

const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

function drawLayer(context, cut, layer, put, box, place) {
  const colours = layer.colours.map(rgb), most = (1 << layer.bits) - 1;
  if (fill || !layer.contours) {
    context.imageSmoothingEnabled = layer.kind === "share";
    put(picture(cut, (i) => {
      const value = layerValue(layer, cut.bytes[i]);
      if (!value) return null;
      return layer.kind === "share" ? [...colours[0], 150 * value / most] : [...colours[Math.min(value, colours.length) - 1], 70];
    }));
  }
  if (!layer.contours) return;
  context.lineWidth = (layer.dashed ? 1.4 : 2.4) * place.ratio;
  context.setLineDash(layer.dashed ? [6 * place.ratio, 4 * place.ratio] : []);
  layer.colours.forEach((colour, c) => {
    const inside = layer.kind === "share" ? (value) => 2 * value > most : layer.nested ? (value) => value > c : (value) => value === c + 1;
    context.strokeStyle = colour;
    contour(context, cut, (i) => inside(layerValue(layer, cut.bytes[i])), box);
  });
  context.setLineDash([]);
}

// Marching squares on the corners between four voxels: lines through the middles between inside and outside, joined
// to paths so that dashes run along them.
function contour(context, cut, inside, box) {
  const { width, height } = cut, mask = new Uint8Array((width + 2) * (height + 2)), stride = width + 2;
  let any = false;
  for (let row = 0, i = 0; row < height; row++) for (let column = 0; column < width; column++, i++)
    if (inside(i)) { mask[(row + 1) * stride + column + 1] = 1; any = true; }
  if (!any) return;
  // Middles of edges, in half voxels, as numbers: each is the end of two lines.
  const ends = new Map(), key = (y, x) => y * 4 * stride + x;
  const join = (a, b) => { for (const [p, q] of [[a, b], [b, a]]) { const known = ends.get(p); if (known) known.push(q); else ends.set(p, [q]); } };
  for (let row = 0; row <= height; row++) for (let column = 0; column <= width; column++) {
    const i = row * stride + column, code = mask[i] | mask[i + 1] << 1 | mask[i + stride + 1] << 2 | mask[i + stride] << 3;
    if (code === 0 || code === 15) continue;
    const up = key(2 * row, 2 * column + 1), right = key(2 * row + 1, 2 * column + 2);
    const down = key(2 * row + 2, 2 * column + 1), left = key(2 * row + 1, 2 * column);
    const crossed = [[up, mask[i] !== mask[i + 1]], [right, mask[i + 1] !== mask[i + stride + 1]],
      [down, mask[i + stride] !== mask[i + stride + 1]], [left, mask[i] !== mask[i + stride]]].filter((e) => e[1]).map((e) => e[0]);
    if (crossed.length === 2) join(crossed[0], crossed[1]);
    else if (code === 5) { join(up, right); join(down, left); }
    else { join(up, left); join(down, right); }
  }
  const x = (k) => box.left + ((k % (4 * stride)) / 2 - .5) * box.sx, y = (k) => box.top + (Math.floor(k / (4 * stride)) / 2 - .5) * box.sy;
  context.beginPath();
  for (const start of ends.keys()) {
    let here = start;
    if (!ends.get(here).length) continue;
    context.moveTo(x(here), y(here));
    for (let next; (next = ends.get(here).pop()) !== undefined; here = next) {
      const back = ends.get(next);
      back.splice(back.indexOf(here), 1);
      context.lineTo(x(next), y(next));
    }
  }
  context.stroke();
}

function drawCross(context, axis, place) {
  const x = place.x(mm(place.u, at[place.u])), y = place.y(mm(place.v, at[place.v])), { wide, high, ratio } = place, gap = 14 * ratio;
  context.strokeStyle = "rgba(255,255,255,.45)";
  context.lineWidth = ratio;
  context.beginPath();
  for (const [x0, y0, x1, y1] of [[0, y, x - gap, y], [x + gap, y, wide, y], [x, 0, x, y - gap], [x, y + gap, x, high]]) {
    context.moveTo(x0, y0); context.lineTo(x1, y1);
  }
  context.stroke();
  SIDES[axis].forEach((text, side) => label(context, text, side ? wide - 8 * ratio : 8 * ratio, high / 2, side ? "right" : "left", ratio));
}

// A bar of the longest of some round lengths that takes a third of the pane at most.
function drawScale(context, place) {
  const { wide, high, ratio } = place, length = [200, 100, 50, 20, 10, 5, 2].find((l) => l * place.perMm <= wide / 3) || 1;
  const x = wide - 10 * ratio, y = high - 10 * ratio;
  context.strokeStyle = "#fff"; context.lineWidth = 2 * ratio;
  context.beginPath(); context.moveTo(x - length * place.perMm, y); context.lineTo(x, y); context.stroke();
  label(context, length >= 10 ? `${length / 10} cm` : `${length} mm`, x, y - 10 * ratio, "right", ratio * .85);
}

function label(context, text, x, y, align, size) {
  context.font = `bold ${Math.round(14 * size)}px system-ui, sans-serif`;
  context.textBaseline = "middle"; context.textAlign = align;
  context.lineWidth = 3 * size; context.strokeStyle = "#000"; context.fillStyle = "#fff";
  context.strokeText(text, x, y); context.fillText(text, x, y);
}

let asked = false;
function draw() {  // at most once per frame
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; if (volume) drawNow(); });
}

function drawNow() {
  const table = greys();
  for (let axis = 0; axis < 3; axis++) drawPane(axis, table);
  const [, ny, nx] = volume.shape, i = (voxel(0) * ny + voxel(1)) * nx + voxel(2), [low, high] = volume.hu;
  const hu = Math.round(low + volume.values[i] * (high - low) / 255);
  const parts = [`${volume.values[i] === 0 ? "≤ " : volume.values[i] === 255 ? "≥ " : ""}${hu} HU`];
  if (volume.bytes) for (const layer of volume.layers) {
    const value = layerValue(layer, volume.bytes[i]);
    parts.push(`${layer.name}: ${layer.kind === "classes" ? ["background", ...layer.names][value] : Math.round(100 * value / ((1 << layer.bits) - 1)) + " %"}`);
  }
  parts.push(`window ${Math.round(windowHu[0])} to ${Math.round(windowHu[1])} HU`);
  byId("readout").textContent = parts.join(" · ");
  remember();
}

// ---- the address holds the place

let remembering = 0;
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => history.replaceState(null, "", address()), 200);
}
function address() {
  const name = encodeURIComponent(cases[current].name);
  return `#case=${name}&part=${volume.number + 1}&z=${at[0] + 1}&y=${at[1] + 1}&x=${at[2] + 1}`;
}
function addressed() {
  const asked = new URLSearchParams(location.hash.slice(1)), index = cases.findIndex((c) => c.name === asked.get("case"));
  if (index < 0) return null;
  const place = ["z", "y", "x"].map((key) => parseInt(asked.get(key), 10) - 1);
  return { index, at: place.every(Number.isFinite) ? place : null, volume: Math.max(0, (parseInt(asked.get("part"), 10) || 1) - 1) };
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
  const group = document.activeElement.closest("#tools, #volumes, #presets, #layers, #lesions");
  const switches = () => [...group.querySelectorAll("button, input")], focused = group ? switches().indexOf(document.activeElement) : -1;
  byId("name").textContent = cases[current].name;
  byId("note").textContent = cases[current].note;
  for (const row of byId("rows").children) row.classList.toggle("current", +row.dataset.index === current);
  byId("tools").replaceChildren(...TOOLS.map(([id, name]) => button(name, tool === id, () => { tool = id; drawControls(); })));
  const parts = content.volumes;
  byId("volumes").replaceChildren(...(parts.length < 2 ? [] : parts.map((v, i) => button(v.name, i === volume.number, () => openVolume(i)))));
  byId("presets").replaceChildren(...windows.map((w) => button(w.name, w.hu.every((hu, i) => hu === windowHu[i]), () => setWindow(w.hu))));
  byId("layers").replaceChildren(...volume.layers.map(layerSwitch), ...(volume.layers.some((l) => l.contours) ? [fillSwitch()] : []));
  byId("lesions").replaceChildren(...content.lesions.map(lesionButton));
  if (lesion >= 0) reveal(byId("lesions"), byId("lesions").children[lesion]);
  if (focused >= 0) switches()[focused]?.focus({ preventScroll: true });  // all of them are new
  for (let axis = 0; axis < 3; axis++) byId("pane-" + axis).style.touchAction = tool === "cross" ? "pan-y" : "none";
}

function reveal(list, item) {  // without moving the page, as scrollIntoView would
  const beyond = (start, size, from, room) => Math.min(0, start - from) || Math.max(0, start + size - from - room);
  list.scrollLeft += beyond(item.offsetLeft - list.offsetLeft, item.offsetWidth, list.scrollLeft, list.clientWidth);
  list.scrollTop += beyond(item.offsetTop - list.offsetTop, item.offsetHeight, list.scrollTop, list.clientHeight);
}

function setWindow(hu) { windowHu = [...hu]; drawControls(); draw(); }

function lesionButton(item, i) {
  const element = button(`${ICONS[item.status]} ${item.status} ${item.mm.toFixed(1)} mm, ${item.ml || "< 0.01"} mL`, i === lesion, () => goTo(i));
  element.dataset.status = item.status;
  element.setAttribute("role", "listitem");
  return element;
}

function goTo(i) {
  const n = content.lesions.length;
  if (!n) return;
  lesion = (i + n) % n;
  at = content.lesions[lesion].at.map((value, axis) => clamp(value, volume.box[axis][0], volume.box[axis][1] - 1));
  if (zoom > 1) middle = at.map((value, axis) => mm(axis, value));
  drawControls();
  draw();
}

function checkbox(id, text, checked, action) {
  const element = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.id = id; box.checked = checked;
  box.addEventListener("change", () => action(box.checked));
  element.append(box, text);
  return element;
}

function layerSwitch(layer, i) {
  const element = checkbox("layer-" + i, layer.name, shown.get(layer.name), (on) => { shown.set(layer.name, on); draw(); });
  layer.colours.forEach((colour, c) => {
    const key = document.createElement("span");
    key.className = layer.contours ? (layer.dashed ? "key dashed" : "key line") : "key";
    key.style.setProperty("--key", colour);
    key.title = layer.names[c];
    element.append(key);
    if (layer.names.length > 1) element.append(layer.names[c]);
  });
  return element;
}

const fillSwitch = () => checkbox("fill", "fill", fill, (on) => { fill = on; draw(); });

// ---- moving

function scroll(axis, steps) {
  const index = clamp(voxel(axis) + steps, 0, volume.shape[axis] - 1);
  at[axis] = native(axis, index);
  draw();
}

function place(event, axis) {
  const box = event.currentTarget.getBoundingClientRect(), here = geometry(axis);
  const x = (event.clientX - box.left) * here.wide / box.width, y = (event.clientY - box.top) * here.high / box.height;
  return { u: middle[here.u] - (x - here.wide / 2) / here.perMm, v: middle[here.v] - (y - here.high / 2) / here.perMm, here };
}

function point(event, axis) {
  const { u, v, here } = place(event, axis);
  for (const [a, along] of [[here.u, u], [here.v, v]])
    at[a] = clamp(Math.floor(along / content.spacing[a]), volume.box[a][0], volume.box[a][1] - 1);
  draw();
}

function zoomBy(factor, keep = null) {  // keep: a place of a pane that stays where it is
  const before = zoom;
  zoom = clamp(zoom * factor, 1, 20);
  if (zoom === 1) fit();
  else if (keep) for (const [a, along] of [[keep.here.u, keep.u], [keep.here.v, keep.v]])
    middle[a] = along + (middle[a] - along) * before / zoom;
  else middle = middle.map((value, axis) => mm(axis, at[axis]) + (value - mm(axis, at[axis])) * before / zoom);
  draw();
}

function pan(axis, dx, dy) {
  const here = geometry(axis);
  middle[here.u] += dx * here.ratio / here.perMm;
  middle[here.v] += dy * here.ratio / here.perMm;
  draw();
}

function dragWindow(dx, dy) {
  const width = Math.max(10, windowHu[1] - windowHu[0] + 2 * dx), level = (windowHu[0] + windowHu[1]) / 2 + dy;
  windowHu = [level - width / 2, level + width / 2];
  for (const element of byId("presets").children) element.setAttribute("aria-pressed", false);
  draw();
}

const dragOf = (event) => event.buttons === 2 ? "window" : event.buttons === 4 || event.shiftKey ? "pan" : tool;
const KEYS = {
  ArrowUp: () => scroll(active, 1), ArrowRight: () => scroll(active, 1), ArrowDown: () => scroll(active, -1), ArrowLeft: () => scroll(active, -1),
  PageUp: () => scroll(active, 10), PageDown: () => scroll(active, -10), "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(.8),
  0: () => { fit(); draw(); }, n: () => goTo(lesion + 1), b: () => goTo(lesion - 1), j: () => step(1), k: () => step(-1),
  f: () => { fill = !fill; drawControls(); draw(); }, v: () => openVolume((volume.number + 1) % content.volumes.length),
  w: () => setWindow(windows[(windows.findIndex((w) => w.hu.every((hu, i) => hu === windowHu[i])) + 1) % windows.length].hu),
  "?": () => byId("help").showModal(),
};
for (const i of [0, 1, 2]) KEYS[i + 1] = () => { const box = byId("layer-" + i); if (box) box.click(); };

addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, dialog[open]"), onPane = event.target.closest(".pane canvas");
  if (!volume || typing || event.ctrlKey || event.metaKey || event.altKey || !(event.key in KEYS)) return;
  if (event.key.length > 1 && !onPane) return;  // elsewhere arrows and page keys scroll the page
  event.preventDefault();
  KEYS[event.key]();
});

const touches = new Map();  // pointers that are down, by id: two of them pinch
function spread() { const [a, b] = [...touches.values()]; return Math.hypot(a.x - b.x, a.y - b.y); }

for (let axis = 0; axis < 3; axis++) {
  const canvas = byId("pane-" + axis);
  let last = null;
  canvas.addEventListener("pointerenter", () => { active = axis; });
  canvas.addEventListener("focus", () => { active = axis; });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (event.ctrlKey) zoomBy(event.deltaY < 0 ? 1.15 : 1 / 1.15, place(event, axis));
    else scroll(axis, event.deltaY < 0 ? 1 : -1);
  }, { passive: false });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("pointerdown", (event) => {
    active = axis;
    canvas.setPointerCapture(event.pointerId);
    canvas.focus({ preventScroll: true });
    touches.set(event.pointerId, { x: event.clientX, y: event.clientY });
    last = { x: event.clientX, y: event.clientY };
    // A finger that goes on to scroll the page must not move the crosshair: it does so when it is lifted.
    if (event.pointerType !== "touch" && dragOf(event) === "cross") point(event, axis);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!event.buttons || !last) return;
    const apart = touches.size === 2 ? spread() : 0, dx = event.clientX - last.x, dy = event.clientY - last.y;
    touches.set(event.pointerId, { x: event.clientX, y: event.clientY });
    last = { x: event.clientX, y: event.clientY };
    if (touches.size === 2) { if (apart) zoomBy(spread() / apart, place(event, axis)); return; }
    ({ cross: () => point(event, axis), pan: () => pan(axis, dx, dy), window: () => dragWindow(dx, dy) })[dragOf(event)]();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (event.pointerType === "touch" && touches.size === 1 && tool === "cross") point(event, axis);
    touches.delete(event.pointerId); last = null;
  });
  canvas.addEventListener("pointercancel", (event) => { touches.delete(event.pointerId); last = null; });
  byId("scroll-" + axis).addEventListener("input", (event) => { at[axis] = native(axis, +event.target.value); draw(); });
  new ResizeObserver(draw).observe(canvas);
}

byId("zoom-in").addEventListener("click", () => zoomBy(1.5));
byId("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
byId("fit").addEventListener("click", () => { fit(); draw(); });
byId("help-open").addEventListener("click", () => byId("help").showModal());
const order = () => [...byId("rows").children].map((row) => +row.dataset.index);
function step(by) {
  if (nav.next) { location.href = by > 0 ? nav.next : nav.previous; return; }
  const all = order();
  openCase(all[(all.indexOf(current) + by + all.length) % all.length]);
}
byId("previous").addEventListener("click", () => step(-1));
byId("next").addEventListener("click", () => step(1));
if (!nav.next && cases.length < 2) { byId("previous").hidden = true; byId("next").hidden = true; }
document.querySelectorAll("button.open").forEach((element) =>
  element.addEventListener("click", () => { openCase(+element.dataset.index); byId("viewer").scrollIntoView(); }));
function openAddress() { const place = addressed(); if (place) openCase(place.index, place); return place; }
addEventListener("hashchange", openAddress);
if (openAddress()) byId("viewer").scrollIntoView();
else openCase(order()[0], { volume: 0, at: null });
