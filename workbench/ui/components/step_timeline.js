// Paints panels over one time axis on one canvas. Hover shows a bin's figures; a click (or Enter on the focused canvas)
// picks its time. Nothing is animated: a refresh costs one pass over at most 5,000 values.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const root = parentElement.querySelector(".timeline");
  const canvas = root.querySelector("canvas");
  const tip = root.querySelector(".tip");
  const state = (root.state = root.state || {});
  const LEFT = 60, RIGHT = 8, TOP = 22, GAP = 34, HEIGHT = 74;
  const { at_s, ...first } = data;
  state.at_s = at_s;
  state.pick = setTriggerValue;
  show(first);
  if (!state.observer) {
    document.addEventListener("quire-live", state.live = ({ detail }) => {
      state.at_s = detail.at_s;
      if (detail.fresh.timeline) show(detail.fresh.timeline);
    });
    state.observer = new ResizeObserver(() => paint());
    state.observer.observe(root);
    canvas.addEventListener("mousemove", (e) => { state.cursor = bin(e); paint(); hover(e.clientX, e.clientY); });
    canvas.addEventListener("mouseleave", () => { state.cursor = null; tip.hidden = true; paint(); });
    canvas.addEventListener("click", (e) => choose(bin(e)));
    canvas.addEventListener("keydown", onKey);
  }
  return () => {
    state.observer && state.observer.disconnect();
    state.observer = null;
    document.removeEventListener("quire-live", state.live);
  };

  function show(shown) {
    state.data = shown;
    state.panels = shown.panels.map((p) => ({ ...p, series: p.series.map((s) => ({ ...s, v: floats(s.values) })) }));
    canvas.setAttribute("aria-label", shown.summary);
    const signature = JSON.stringify(shown);
    if (signature !== state.signature) { state.signature = signature; paint(); }
  }
  function floats(text) {
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return new Float32Array(out.buffer);
  }
  function plotWidth() { return Math.max(120, root.clientWidth - LEFT - RIGHT); }
  function bin(event) {
    const x = event.clientX - canvas.getBoundingClientRect().left - LEFT;
    const i = Math.floor((x / plotWidth()) * state.data.bins);
    return i >= 0 && i < state.data.bins ? i : null;
  }
  function choose(i) { // the time at which the bin ends
    if (i !== null && state.data.pickable) state.pick("pick", state.at_s - state.data.window_s * (1 - (i + 1) / state.data.bins));
  }
  function onKey(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Enter") { choose(state.cursor ?? null); return; }
    if (!step) return;
    const n = state.data.bins, from = state.cursor ?? n;
    state.cursor = Math.max(0, Math.min(n - 1, from + step));
    const box = canvas.getBoundingClientRect();
    paint();
    hover(box.left + LEFT + (plotWidth() * (state.cursor + 0.5)) / n, box.top + 30);
    event.preventDefault();
  }

  function paint() {
    const d = state.data, g = canvas.getContext("2d"), scale = window.devicePixelRatio || 1, width = plotWidth();
    const height = state.panels.length * (HEIGHT + GAP) + TOP;
    canvas.width = (width + LEFT + RIGHT) * scale;
    canvas.height = height * scale;
    canvas.style.height = height + "px";
    g.scale(scale, scale);
    g.font = "12px " + getComputedStyle(root).fontFamily;
    state.panels.forEach((panel, k) => {
      const y = TOP + k * (HEIGHT + GAP), max = top(panel);
      title(g, panel, y, d);
      grid(g, y, width, max, d);
      panel.series.forEach((s, i) => (panel.kind === "lines" ? line(g, s, y, width, max) : bars(g, panel, i, y, width, max)));
    });
    times(g, width, height, d);
    if (state.cursor !== null && state.cursor !== undefined) mark(g, LEFT + (width * (state.cursor + 0.5)) / d.bins, height, d.colours.muted);
    if (d.marker !== null) mark(g, LEFT + width * d.marker, height, d.colours.accent);
  }

  function top(panel) {
    if (panel.max) return panel.max;
    let most = 0;
    for (let b = 0; b < state.data.bins; b++) {
      let sum = 0;
      for (const s of panel.series) { const v = s.v[b] || 0; sum = panel.kind === "lines" ? Math.max(sum, v) : sum + v; }
      most = Math.max(most, sum);
    }
    if (most <= 0) return panel.floor;
    const unit = Math.pow(10, Math.floor(Math.log10(most)));
    return Math.max(panel.floor, [1, 2, 4, 5, 10].map((m) => m * unit).find((m) => m >= most * 1.02) || 10 * unit);
  }

  function title(g, panel, y, d) {
    g.textAlign = "left";
    g.fillStyle = d.colours.text;
    g.fillText(panel.title, LEFT, y - 8);
    let x = LEFT + g.measureText(panel.title).width + 16;
    for (const s of panel.series) {
      g.fillStyle = s.colour;
      g.fillRect(x, y - 17, 10, 10);
      g.fillStyle = d.colours.muted;
      g.fillText(s.label, x + 14, y - 8);
      x += 28 + g.measureText(s.label).width;
    }
  }

  function grid(g, y, width, max, d) {
    g.textAlign = "right";
    for (const part of [0, 0.5, 1]) {
      const at = y + HEIGHT * (1 - part);
      g.strokeStyle = d.colours.border;
      g.beginPath(); g.moveTo(LEFT, at + 0.5); g.lineTo(LEFT + width, at + 0.5); g.stroke();
      g.fillStyle = d.colours.muted;
      g.fillText(short(max * part), LEFT - 6, at + 4);
    }
  }

  function bars(g, panel, i, y, width, max) {
    const n = state.data.bins, w = width / n;
    g.fillStyle = panel.series[i].colour;
    g.beginPath();
    for (let b = 0; b < n; b++) {
      const v = panel.series[i].v[b];
      if (!(v > 0)) continue;
      let below = 0;
      for (let j = 0; j < i; j++) below += panel.series[j].v[b] || 0;
      const h = (HEIGHT * v) / max;
      g.rect(LEFT + b * w, y + HEIGHT - (HEIGHT * below) / max - h, Math.max(1, w - (w > 4 ? 1 : 0)), h);
    }
    g.fill();
  }

  function line(g, s, y, width, max) {
    const n = state.data.bins;
    g.strokeStyle = s.colour;
    g.lineWidth = 1.8;
    g.setLineDash(s.dash ? [5, 3] : []);
    g.beginPath();
    let down = false;
    for (let b = 0; b < n; b++) {
      const v = s.v[b];
      if (Number.isNaN(v)) { down = false; continue; }
      const at = y + HEIGHT - (HEIGHT * v) / max, x = LEFT + (width * b) / n;
      down ? g.lineTo(x, at) : g.moveTo(x, at);
      g.lineTo(x + width / n, at);
      down = true;
    }
    g.stroke();
    g.setLineDash([]);
    g.lineWidth = 1;
  }

  function times(g, width, height, d) {
    g.fillStyle = d.colours.muted;
    for (let k = 0; k <= 4; k++) {
      g.textAlign = k === 0 ? "left" : k === 4 ? "right" : "center";
      g.fillText(d.ticks[k], LEFT + (width * k) / 4, height - 8);
    }
  }

  function mark(g, x, height, colour) {
    g.strokeStyle = colour;
    g.beginPath(); g.moveTo(x, TOP - 4); g.lineTo(x, height - 24); g.stroke();
  }

  function short(v) {
    if (!(v > 0)) return "0";
    if (v >= 1e6) return (v / 1e6).toPrecision(3) + " M";
    if (v >= 1e4) return Math.round(v / 1e3) + " k";
    return v >= 100 ? String(Math.round(v)) : String(Number(v.toPrecision(3)));
  }

  function hover(clientX, clientY) {
    const b = state.cursor, d = state.data, box = canvas.getBoundingClientRect();
    if (b === null) { tip.hidden = true; return; }
    tip.replaceChildren();
    row(d.times[0] + (d.times[1] - d.times[0]) * (b / d.bins), d.step_ids[b]);
    for (const panel of state.panels) for (const s of panel.series) add(`${s.label}: ${Number.isNaN(s.v[b]) ? "–" : short(s.v[b])} ${panel.unit}`);
    tip.hidden = false;
    const x = clientX - box.left;
    tip.style.left = (x > box.width / 2 ? x - tip.offsetWidth - 14 : x + 14) + "px";
    tip.style.top = Math.max(0, clientY - box.top - 20) + "px";

    function row(seconds, id) { add(`${seconds.toFixed(1)} s` + (id >= 0 ? `, step ${id}` : ", no step")); }
    function add(text) { const div = document.createElement("div"); div.textContent = text; tip.append(div); }
  }
}
