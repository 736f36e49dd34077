// Paints the KV blocks on one canvas: a cell is a block (or a run of blocks), coloured by owner, hatched where shared,
// grey where cached, an outline where free. Repaints only when the data changed. Hover tells the block.
export default function (component) {
  const { data, parentElement } = component;
  const root = parentElement.querySelector(".map");
  const canvas = root.querySelector("canvas");
  const tip = root.querySelector(".tip");
  const legend = root.querySelector(".legend");
  const state = (root.state = root.state || { signature: "" });
  show(data);
  if (!state.observer) {
    document.addEventListener("quire-live", state.live = ({ detail }) => detail.fresh.block_map && show(detail.fresh.block_map));
    state.observer = new ResizeObserver(() => paint());
    state.observer.observe(root);
    canvas.addEventListener("mousemove", hover);
    canvas.addEventListener("mouseleave", () => (tip.hidden = true));
  }
  return () => {
    state.observer && state.observer.disconnect();
    state.observer = null;
    document.removeEventListener("quire-live", state.live);
  };

  function show(shown) {
    const signature = JSON.stringify(shown);
    state.data = shown;
    state.codes = new Uint16Array(bytes(shown.codes));
    canvas.setAttribute("aria-label", shown.summary);
    if (signature === state.signature) return;
    state.signature = signature;
    paint();
    writeLegend();
  }

  function bytes(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out.buffer;
  }

  function geometry() {
    const width = Math.max(200, root.clientWidth), n = state.codes.length;
    const size = Math.max(6, Math.min(18, Math.floor(Math.sqrt((width * 250) / Math.max(1, n)))));
    const columns = Math.max(1, Math.floor(width / size));
    return { size, columns, rows: Math.ceil(n / columns), width };
  }

  function paint() {
    const { size, columns, rows, width } = geometry(), scale = window.devicePixelRatio || 1;
    const d = state.data, hatched = new Uint8Array(bytes(d.hatched)), g = canvas.getContext("2d");
    canvas.width = width * scale;
    canvas.height = Math.max(size, rows * size) * scale;
    canvas.style.height = Math.max(size, rows * size) + "px";
    g.scale(scale, scale);
    const stripes = stripe(g, d.colours.background), n = state.codes.length;
    g.fillStyle = outline(g, size, d.colours.border, scale); // free cells in one stroke: most of a pool is free
    g.fillRect(0, 0, columns * size, (rows - 1) * size);
    g.fillRect(0, (rows - 1) * size, (n - (rows - 1) * columns) * size, size);
    state.codes.forEach((code, i) => {
      if (code === 0) return;
      const x = (i % columns) * size, y = Math.floor(i / columns) * size, side = size - 2;
      g.clearRect(x, y, size, size);
      g.fillStyle = code === 1 ? d.colours.cached : d.owners[code - 2].colour;
      g.fillRect(x, y, side, side);
      if (hatched[i]) { g.fillStyle = stripes; g.fillRect(x, y, side, side); }
    });
  }

  function outline(g, size, colour, scale) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = size * scale;
    const t = tile.getContext("2d");
    t.scale(scale, scale);
    t.strokeStyle = colour;
    t.strokeRect(0.5, 0.5, size - 3, size - 3);
    const pattern = g.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(1 / scale));
    return pattern;
  }

  function stripe(g, colour) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 4;
    const t = tile.getContext("2d");
    t.strokeStyle = colour;
    t.lineWidth = 1.2;
    t.beginPath(); t.moveTo(-1, 5); t.lineTo(5, -1); t.moveTo(-1, 1); t.lineTo(1, -1); t.moveTo(3, 5); t.lineTo(5, 3); t.stroke();
    return g.createPattern(tile, "repeat");
  }

  function writeLegend() {
    const d = state.data;
    legend.replaceChildren();
    for (const item of d.legend) {
      const entry = document.createElement("span"), swatch = document.createElement("i");
      swatch.className = item.kind;
      if (item.colour) swatch.style.setProperty("--c", item.colour);
      entry.append(swatch, document.createTextNode(item.label));
      legend.append(entry);
    }
  }

  function hover(event) {
    const { size, columns } = geometry(), box = canvas.getBoundingClientRect(), d = state.data;
    const i = Math.floor((event.clientY - box.top) / size) * columns + Math.floor((event.clientX - box.left) / size);
    if (i < 0 || i >= state.codes.length) { tip.hidden = true; return; }
    const code = state.codes[i], first = i * d.per_cell, last = Math.min(first + d.per_cell, d.num_blocks) - 1;
    const what = code === 0 ? "free" : code === 1 ? "cached, held by nobody" : d.owners[code - 2].label;
    const shared = new Uint8Array(bytes(d.hatched))[i] ? ", shared prefix" : "";
    tip.textContent = (first === last ? `block ${first}` : `blocks ${first}–${last}`) + `: ${what}${shared}`;
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX - box.left + 12, box.width - 180) + "px";
    tip.style.top = event.clientY - box.top + 14 + "px";
  }
}
