// Asks for a page's live view while the page is visible: paints HTML into its slots, hands data to the canvases, and makes
// the page run again only when its state changed. A part that has not changed comes as its digest alone. Where no answer
// comes, it asks less and less often and says how old the figures are.
export default function (component) {
  const { data, parentElement, setTriggerValue } = component;
  const note = parentElement.querySelector(".old");
  const PATIENCE_MS = 10000, LONGEST_MS = 15000, AGAIN_MS = 5000;
  const state = (note.state = note.state || { wait: data.every_ms, read: performance.now(), seen: 0, asked: -AGAIN_MS });
  state.data = data;
  state.canvases = {}; // digests; a run of the page draws the canvases from its own data
  state.runAgain = () => setTriggerValue("changed", true);
  if (!state.clock) {
    state.clock = setInterval(age, 1000);
    document.addEventListener("visibilitychange", state.onVisibility = () => { state.seen = performance.now(); plan(0); });
    plan(state.wait);
  }
  return () => {
    clearInterval(state.clock);
    clearTimeout(state.timer);
    state.clock = null;
    document.removeEventListener("visibilitychange", state.onVisibility);
    document.documentElement.classList.remove("q-old");
  };

  function plan(in_ms) {
    clearTimeout(state.timer);
    if (document.visibilityState === "visible" && !state.busy) state.timer = setTimeout(ask, in_ms);
  }

  async function ask() {
    const asked = state.data;
    state.busy = true;
    const told = await read(asked).catch(() => null); // the browser's console tells why
    state.busy = false;
    if (!state.clock) return;
    state.wait = told ? asked.every_ms : Math.min(2 * state.wait, LONGEST_MS);
    if (told && asked === state.data) take(told); // else the page ran meanwhile
    plan(state.wait);
  }

  async function read(asked) {
    const have = [...slots().map((slot) => slot.digest), ...Object.values(state.canvases)].filter(Boolean);
    const answer = await fetch(`/live/${asked.name}?${asked.parameters}&have=${have.join(".")}`, {
      signal: AbortSignal.timeout(PATIENCE_MS),
    });
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    return answer.json();
  }

  function take(told) {
    state.read = performance.now();
    age();
    for (const slot of slots()) {
      const part = told.html[slot.dataset.live];
      if (part && part.value !== undefined) paint(slot, part.value);
      if (part) slot.digest = part.digest;
    }
    const fresh = {};
    for (const [name, part] of Object.entries(told.data)) {
      if (part.value !== undefined) fresh[name] = part.value;
      state.canvases[name] = part.digest;
    }
    if (told.at_s !== null) document.dispatchEvent(new CustomEvent("quire-live", { detail: { at_s: told.at_s, fresh } }));
    if (told.state !== state.data.state && performance.now() - state.asked > AGAIN_MS) {
      state.asked = performance.now();
      state.runAgain();
    }
  }

  function slots() {
    return [...document.querySelectorAll("[data-live]")];
  }

  function paint(slot, html) {
    const made = document.createElement("template"), old = slot.firstElementChild;
    made.innerHTML = html;
    const now = made.content.firstElementChild;
    if (old && now && old.getAttribute("role") === "status" && now.getAttribute("role") === "status") {
      old.className = now.className; // a status is announced when the text of the same element changes
      if (old.textContent !== now.textContent) old.textContent = now.textContent;
    } else slot.replaceChildren(made.content);
  }

  function age() {
    const now = performance.now(), seconds = (now - state.read) / 1000;
    const isOld = now - Math.max(state.read, state.seen) > 2 * state.data.every_ms + 3000;
    document.documentElement.classList.toggle("q-old", isOld);
    if (isOld) note.lastElementChild.textContent = `last read ${Math.round(seconds)} s ago`; // each second, so not announced
    if (note.hidden === !isOld) return;
    note.hidden = !isOld;
    note.firstElementChild.textContent = isOld ? "No answer from the server:" : "";
  }
}
