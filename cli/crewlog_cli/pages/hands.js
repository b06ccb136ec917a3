// -- hands: pointer, wheel, keys, the overview's brush --------------------------------------------

const LEAST_MS = 2;
let queued = false, settle = 0;

// Draw in the next frame; what is slow and in words follows once the hand rests.
function draw() {
  clearTimeout(settle);
  settle = setTimeout(() => { if (tabled !== inView) table(); link(); }, 120);
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => {
    queued = false;
    const start = performance.now();
    possible ||= both(matched)[1];
    crowd();
    bars();
    counts();
    took.push(performance.now() - start);
    if (took.length > 600) took.shift();
  });
}
const took = []; // ms of script of the last frames, for tests

// The height of the picture follows its rows, so that a finger meets no trap.
function size() {
  const most = Math.max(180, Math.round(window.innerHeight * 0.62));
  $("frame").style.height = Math.min(most, AXIS + Math.max(10, rows.length) * rowHeight() + 6) + "px";
  $("space").style.height = Math.max(0, AXIS + rows.length * rowHeight() - $("frame").clientHeight) + "px";
}

function refresh() {
  match();
  if (state.chosen >= 0 && !matched.includes(state.chosen)) state.chosen = -1;
  size();
  tell();
  draw();
}

function show(from, to) {
  if (to - from < LEAST_MS && state.high - state.low <= LEAST_MS) return; // nearer there is nothing
  const wide = Math.min(span, Math.max(LEAST_MS, to - from));
  state.low = Math.min(Math.max(0, from), span - wide);
  state.high = state.low + wide;
  arrange();
  size();
  draw();
}

function zoom(factor, at = (state.low + state.high) / 2) {
  show(at - (at - state.low) * factor, at + (state.high - at) * factor);
}
const move = (share) => show(state.low + (state.high - state.low) * share, state.high + (state.high - state.low) * share);

function choose(index, reveal) {
  state.chosen = index;
  if (index >= 0 && reveal) {
    if (reveal === true && (began[index] > state.high || end[index] < state.low)) { // else the period stays
      const half = (state.high - state.low) / 2, middle = (began[index] + Math.min(end[index], began[index] + half)) / 2;
      show(middle - half, middle + half);
    }
    if (state.group !== "none" && !state.open.has(groupOf(index))) {
      state.open.add(groupOf(index));
      arrange();
      size();
    }
    bring(rows.findIndex((row) => !row.group && row.lives.includes(index)));
  }
  tell();
  markRow();
  draw();
}

// Walk over what is drawn, row by row: lives, and groups, which Enter opens.
function step(by) {
  const order = rows.flatMap((row) => (row.group ? [row] : row.lives.slice().sort((a, b) => began[a] - began[b])));
  if (!order.length) return;
  const at = order.findIndex((one) => (typeof one === "number" ? one === state.chosen : state.chosen < 0 && one.group === state.at));
  const next = order[at < 0 ? (by < 0 && !Number.isFinite(by) ? 0 : by > 1000 ? order.length - 1 : 0) : Math.min(order.length - 1, Math.max(0, at + by))];
  state.at = typeof next === "number" ? "" : next.group;
  choose(typeof next === "number" ? next : -1, true);
  if (state.at) bring(rows.findIndex((row) => row.group === state.at));
}

function bring(row) {
  const frame = $("frame"), y = row * rowHeight();
  if (row < 0) return;
  if (y < frame.scrollTop) frame.scrollTop = y;
  if (y + AXIS + 2 * rowHeight() > frame.scrollTop + frame.clientHeight) frame.scrollTop = y + AXIS + 2 * rowHeight() - frame.clientHeight;
}

function toggle(group) {
  if (!state.open.delete(group)) state.open.add(group);
  arrange();
  size();
  draw();
}

function focus() {
  if (state.chosen < 0) return;
  const wide = Math.max(10, end[state.chosen] - began[state.chosen]);
  show(began[state.chosen] - wide * 0.2, end[state.chosen] + wide * 0.2);
}

const KEYS = [
  [["ArrowDown"], "the next life", () => step(1)], [["ArrowUp"], "the life before", () => step(-1)],
  [["PageDown"], "twenty on", () => step(20)], [["PageUp"], "twenty back", () => step(-20)],
  [["Home"], "the first", () => step(-total)], [["End"], "the last", () => step(total)],
  [["Enter"], "open or close a group", () => { if (state.at) toggle(state.at); }],
  [["ArrowLeft", "a"], "earlier", () => move(-0.2)], [["ArrowRight", "d"], "later", () => move(0.2)],
  [["w", "+", "="], "zoom in", () => zoom(0.5)], [["s", "-"], "zoom out", () => zoom(2)],
  [["0"], "the whole period", () => show(0, span)], [["f"], "the chosen life, as wide as the picture", focus],
  [["Escape"], "let go of the chosen life", () => choose(-1, false)],
  [["?"], "these keys", () => $("help").showModal()],
];
const HANDS = [
  ["wheel, pinch", "zoom at the pointer; over the names: scroll"], ["Shift + wheel", "move in time"],
  ["drag", "move in time and rows"], ["drag on the overview", "choose a period; a double click shows all"],
  ["click", "choose a life, or open a group"], ["/", "filter"],
];

function spot(event) {
  const box = $("frame").getBoundingClientRect(), left = nameWidth($("frame").clientWidth);
  const columns = Math.max(1, $("frame").clientWidth - left - 15);
  const x = event.clientX - box.left, y = event.clientY - box.top;
  return { x, y, left, when: state.low + ((x - left) / columns) * (state.high - state.low), per: (state.high - state.low) / columns };
}

// The life whose bar is there, else the nearest beside; of several, the one drawn last.
function under(x, y) {
  let best = -1, nearest = 12;
  for (const [left, top, wide, high, index] of marks) {
    if (y < top || y > top + high) continue;
    const away = Math.max(left - x, x - left - wide, 0);
    if (away < nearest || (away === nearest && away === 0)) { nearest = away; best = index; }
  }
  return best;
}

function rowUnder(y) {
  return y < AXIS ? undefined : rows[Math.floor((y - AXIS + $("frame").scrollTop) / rowHeight())];
}

let held = null; // where a drag began: {x, y, low, high, top, moved}
const fingers = new Map(); // pointers of a touch that are down: two of them pinch
let pinched = null;        // {wide, when, low, high} as two fingers came down

function pinch() {
  const [a, b] = [...fingers.values()], wide = Math.max(10, Math.abs(a.clientX - b.clientX));
  const middle = { clientX: (a.clientX + b.clientX) / 2, clientY: a.clientY };
  if (!pinched) {
    pinched = { wide, when: spot(middle).when, low: state.low, high: state.high };
    return;
  }
  const factor = pinched.wide / wide;
  show(pinched.when - (pinched.when - pinched.low) * factor, pinched.when + (pinched.high - pinched.when) * factor);
}

function hold() {
  const frame = $("frame");
  let dragged = false;
  frame.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    if (event.pointerType === "touch") fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      held = null;
      pinched = null;
      pinch();
      return;
    }
    held = { x: event.clientX, y: event.clientY, low: state.low, high: state.high, top: frame.scrollTop, moved: false, touch: event.pointerType === "touch" };
  });
  window.addEventListener("pointermove", (event) => {
    if (fingers.has(event.pointerId)) fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      dragged = true;
      pinch();
      return;
    }
    if (held && event.buttons === 0) held = null; // it was let go of where nobody heard
    if (!held) {
      const at = spot(event), inside = event.target === $("lives") || event.target === frame;
      tip(inside ? under(at.x, at.y) : -1, event.clientX, event.clientY);
      return;
    }
    const dx = event.clientX - held.x, dy = event.clientY - held.y;
    if (!held.moved && Math.abs(dx) + Math.abs(dy) < 5) return;
    held.moved = true;
    tip(-1);
    const per = (held.high - held.low) / Math.max(1, frame.clientWidth - nameWidth(frame.clientWidth) - 15);
    show(held.low - dx * per, held.high - dx * per);
    if (!held.touch) frame.scrollTop = held.top - dy;
  });
  const letGo = (event) => {
    dragged = (held !== null && held.moved) || pinched !== null;
    fingers.delete(event.pointerId);
    if (fingers.size === 0) pinched = null;
    held = null;
  };
  window.addEventListener("pointerup", letGo);
  window.addEventListener("pointercancel", letGo);
  frame.addEventListener("click", (event) => { // not before: what opens under a finger would take it
    if (dragged) return;
    const at = spot(event), row = rowUnder(at.y), index = under(at.x, at.y);
    if (index >= 0) {
      choose(index, false);
      if (small()) $("pane").scrollIntoView({ block: "end" });
    } else if (row && row.group) {
      toggle(row.group);
    } else choose(-1, false);
  });
  frame.addEventListener("pointerleave", () => tip(-1));
  frame.addEventListener("wheel", (event) => {
    const at = spot(event), pinch = event.ctrlKey || event.metaKey;
    if (event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY)) {
      event.preventDefault();
      const by = (event.deltaX || event.deltaY) * at.per;
      show(state.low + by, state.high + by);
    } else if (pinch || at.x >= at.left) {
      event.preventDefault();
      zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * (pinch ? 0.01 : 0.004)), at.when);
    }
  }, { passive: false });
  frame.addEventListener("scroll", draw);
}

function overview() {
  const canvas = $("crowd");
  const when = (x) => {
    const left = nameWidth($("frame").clientWidth), columns = Math.max(1, Math.floor(canvas.clientWidth - left - 15));
    return state.low + (Math.max(0, Math.min(columns, x - left)) / columns) * (state.high - state.low);
  };
  const x = (event) => event.clientX - canvas.getBoundingClientRect().left;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    brush = [x(event), x(event)];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (brush && event.buttons === 0) brush = null;
    if (brush) { brush[1] = x(event); draw(); }
  });
  canvas.addEventListener("pointercancel", () => { brush = null; draw(); });
  canvas.addEventListener("pointerup", () => {
    const was = brush;
    brush = null;
    if (was && Math.abs(was[1] - was[0]) > 4) show(Math.min(when(was[0]), when(was[1])), Math.max(when(was[0]), when(was[1])));
    draw();
  });
  canvas.addEventListener("dblclick", () => show(0, span));
}

function keys() {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName) && document.activeElement.type !== "checkbox";
    if (event.key === "Escape" && typing) document.activeElement.blur();
    if (typing) return;
    if (event.key === "/") {
      event.preventDefault();
      $("filter").focus();
      return;
    }
    const found = KEYS.find(([names]) => names.includes(event.key));
    if (!found) return;
    const here = document.activeElement, aside = here !== document.body && here !== $("frame");
    if (aside && /^(Arrow|Page|Home|End|Enter)/.test(event.key)) return; // theirs: a button, the pane, a row
    event.preventDefault();
    found[2]();
  });
  for (const [name, told] of [...KEYS.map(([names, told]) => [names.join(" or "), told]), ...HANDS]) {
    const row = $("keylist").insertRow();
    row.insertCell().textContent = name;
    row.insertCell().textContent = told;
  }
}
