// -- drawing -------------------------------------------------------------------------------------

const DENSITY_MS = 8, PRINT_WIDTH = 700, AXIS = 22, BAR = 10, STRIP = 10, CROWD = 96, PRINT_ROWS = 1500, BADGE = 11;
const small = () => window.innerWidth < 640;
const rowHeight = () => (small() ? 34 : 18);
let printing = false;
let badges = []; // [row, how many] of the last picture
let marks = []; // where something can be pointed at: [x, y, width, height, life], of the last picture

function paper(canvas, width, height) {
  const scale = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale)) canvas.width = Math.round(width * scale);
  if (canvas.height !== Math.round(height * scale)) canvas.height = Math.round(height * scale);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
  pen.textBaseline = "middle";
  return pen;
}

let hues = null; // asked for anew when the scheme changes: a style is slow to ask for
const INK = { // on paper, whatever the screen's scheme is
  alive: "#009e73", exited: "#3f8fc9", failed: "#d55e00", lost: "#b5579a", released: "#777777", unknown: "#c68a00",
  ink: "#000000", faint: "#444444", line: "#bbbbbb", band: "#f2f2f2", focus: "#0b62d6", paper: "#ffffff",
};
function colours() {
  if (printing) return { kinds: KINDS.map((kind) => INK[kind]), ...INK };
  if (hues) return hues;
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue("--" + name).trim();
  hues = { kinds: KINDS.map(of), ink: of("ink"), faint: of("faint"), line: of("line"), band: of("band"), focus: of("focus"), paper: of("paper") };
  return hues;
}

const patterns = new Map();
function hatch(pen, colour) {
  if (patterns.has(colour)) return patterns.get(colour);
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const brush = tile.getContext("2d");
  brush.strokeStyle = colour;
  brush.lineWidth = 1.4;
  for (const shift of [-6, 0, 6]) {
    brush.beginPath();
    brush.moveTo(shift, 6);
    brush.lineTo(shift + 6, 0);
    brush.stroke();
  }
  const found = pen.createPattern(tile, "repeat");
  patterns.set(colour, found);
  return found;
}

const nameWidth = (width) => (small() ? 8 : Math.min(280, Math.max(110, width * 0.2)));

function clip(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let low = 0, high = text.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (pen.measureText(text.slice(0, middle) + "…").width <= width) low = middle; else high = middle - 1;
  }
  return text.slice(0, low) + "…";
}

// When crashes happened: as high and as dark as they are many, so that many hide no few. Returns how many.
function crashStrip(pen, indexes, left, columns, y, height, hue) {
  const counts = new Int32Array(Math.max(1, Math.floor(columns)));
  let most = 0, all = 0;
  for (const index of indexes) {
    if (!crashed(index) || end[index] < state.low || end[index] > state.high) continue;
    const x = Math.min(counts.length - 1, Math.floor(((end[index] - state.low) / (state.high - state.low)) * counts.length));
    most = Math.max(most, ++counts[x]);
    all++;
  }
  pen.fillStyle = hue.kinds[2];
  for (let x = 0; x < counts.length; x++) {
    if (!counts[x]) continue;
    const share = counts[x] / most, high = Math.max(2, height * (0.35 + 0.65 * share));
    pen.globalAlpha = 0.45 + 0.55 * share;
    pen.fillRect(left + x - 0.5, y + height - high, most > 3 ? 1 : 2, high);
  }
  pen.globalAlpha = 1;
  return all;
}

// The overview: how many lived, as exact steps, and a strip of crashes; `brush` is being chosen.
let brush = null;
function crowd() {
  const hue = colours(), canvas = $("crowd");
  const width = printing ? PRINT_WIDTH : canvas.clientWidth, left = nameWidth(printing ? width : $("frame").clientWidth);
  const pen = paper(canvas, width, CROWD + STRIP);
  const columns = Math.max(1, Math.floor(width - left - 15));
  const certain = columnsOf(living, state.low, state.high, columns);
  const maybe = possible ? columnsOf(possible, state.low, state.high, columns) : certain;
  const most = Math.max(1, maybe.peak);
  const up = (n) => CROWD - 4 - (n / most) * (CROWD - 20);
  const area = (counts, fill, alpha) => {
    pen.beginPath();
    pen.moveTo(left, up(0));
    for (let x = 0; x < columns; x++) {
      pen.lineTo(left + x, up(counts[x]));
      pen.lineTo(left + x + 1, up(counts[x]));
    }
    pen.lineTo(left + columns, up(0));
    pen.globalAlpha = alpha;
    pen.fillStyle = fill;
    pen.fill();
    pen.globalAlpha = 1;
  };
  for (const [at] of ticks(state.low, state.high, columns)) {
    pen.fillStyle = hue.line;
    pen.fillRect(left + ((at - state.low) / (state.high - state.low)) * columns, 8, 1, CROWD);
  }
  area(maybe.most, hatch(pen, hue.kinds[3]), 1);
  area(certain.most, hue.paper, 1);
  area(certain.most, hue.kinds[0], 0.45);
  area(certain.least, hue.kinds[0], 0.6);
  const crashes = crashStrip(pen, inView, left, columns, CROWD + 1, STRIP - 1, hue);
  pen.fillStyle = hue.faint;
  pen.textAlign = small() ? "left" : "right";
  const edge = small() ? left + 2 : left - 8;
  pen.fillText((small() ? "most at once: " : "") + maybe.peak, edge, up(maybe.peak) + (small() ? 8 : 0));
  if (!small()) {
    pen.fillText("0", edge, up(0) - 4);
    pen.textAlign = "left";
    pen.fillText(clip(pen, "living at once", left - 40), 0, CROWD / 2);
    pen.fillText(clip(pen, "crashes", left - 40), 0, CROWD + STRIP / 2);
  }
  if (brush) {
    pen.fillStyle = hue.focus;
    pen.globalAlpha = 0.2;
    pen.fillRect(Math.min(...brush), 0, Math.abs(brush[1] - brush[0]), CROWD + STRIP);
    pen.globalAlpha = 1;
  }
  canvas.dataset.peak = maybe.peak; // for whoever cannot see it, and for tests
  canvas.dataset.least = Math.min(...certain.least.slice(0, 20000));
  canvas.dataset.crashes = crashes;
}

// The mark at an end: its shape tells, not its colour alone.
function mark(pen, kind, x, middle) {
  pen.lineWidth = 2;
  pen.beginPath();
  switch (kind) {
    case 0: // alive: an arrow goes on
      pen.moveTo(x, middle - BAR / 2);
      pen.lineTo(x + 6, middle);
      pen.lineTo(x, middle + BAR / 2);
      pen.fill();
      break;
    case 2: // crashed: a cross
      pen.moveTo(x + 1, middle - 4);
      pen.lineTo(x + 9, middle + 4);
      pen.moveTo(x + 9, middle - 4);
      pen.lineTo(x + 1, middle + 4);
      pen.stroke();
      break;
    case 3: // lost, or not known: nobody saw it
    case 5:
      pen.fillText("?", x + 2, middle);
      break;
    default: // orderly: a stop
      pen.moveTo(x, middle - 6);
      pen.lineTo(x, middle + 6);
      pen.stroke();
  }
}

// How dark a bar is while its worker starts, is ready, drains, stops.
const SHADES = { 1: 0.45, 2: 1, 3: 0.7, 4: 0.7 };

// The parts of a bar: [from, to, shade], and where a stop was asked.
function parts(index) {
  const found = happened[index] || NONE;
  const segments = [];
  let asked = -1, from = began[index], shade = found.length ? 0.45 : 1;
  for (let i = 0; i < found.length; i += 4) {
    const told = Math.min(end[index], began[index] + found[i]), step = found[i + 1];
    const when = Math.min(known[index], told);
    if (step === 4 && asked < 0) asked = told;
    if (!(step in SHADES)) continue;
    if (when > from) segments.push([from, when, shade]);
    from = Math.max(from, when);
    shade = SHADES[step];
  }
  segments.push([from, known[index], shade]);
  return [segments, asked];
}

function density(pen, row, y, left, columns, hue) {
  const height = (small() ? 17 : rowHeight()) - 8, width = Math.max(1, Math.floor(columns));
  const both = densityOf(row);
  if (!both) return false;
  const [certain, maybe] = both.map((found) => columnsOf(found, state.low, state.high, width));
  const most = Math.max(1, maybe.peak);
  for (const [counts, fill] of [[maybe.most, hatch(pen, hue.kinds[3])], [certain.most, hue.kinds[0]]]) {
    pen.fillStyle = fill;
    for (let x = 0; x < width; x++) {
      if (counts[x]) pen.fillRect(left + x, y + 2 + height * (1 - counts[x] / most), 1, (height * counts[x]) / most);
    }
  }
  crashStrip(pen, row.lives, left, columns, y + rowHeight() - (small() ? 21 : 6), 5, hue);
  return true;
}

function bars() {
  const hue = colours(), frame = $("frame"), canvas = $("lives"), row_ = rowHeight();
  const width = printing ? PRINT_WIDTH : frame.clientWidth;
  const height = printing ? AXIS + Math.min(rows.length, PRINT_ROWS) * row_ : frame.clientHeight;
  const top = printing ? 0 : frame.scrollTop;
  const left = nameWidth(width), columns = Math.max(1, width - left - 15);
  const pen = paper(canvas, width, height);
  const edge = (x) => Math.min(Math.max(x, left - 40), width + 40); // a canvas counts in 32 bits
  const at = (ms) => edge(left + ((ms - state.low) / (state.high - state.low)) * columns);
  let late = false;
  due = performance.now() + (printing ? Infinity : DENSITY_MS);
  marks = [];
  badges = [];
  const first = Math.max(0, Math.floor(top / row_)), last = Math.min(rows.length, first + Math.ceil(height / row_) + 1);
  const lines = ticks(state.low, state.high, columns);
  for (let number = first; number < last; number++) { // bands, then lines, then bars: lines cut none
    if (number % 2 === 0) continue;
    pen.fillStyle = hue.band;
    pen.fillRect(0, AXIS + number * row_ - top, width, row_);
  }
  pen.fillStyle = hue.line;
  for (const [when] of lines) pen.fillRect(at(when), AXIS - 4, 1, height);
  for (let number = first; number < last; number++) {
    const row = rows[number], y = AXIS + number * row_ - top;
    const sign = row.group ? (state.open.has(row.group) ? "▾ " : "▸ ") : row.inside ? "   " : "";
    const count = row.group ? " (" + idsOf(row.lives) + ")" : "";
    if (row.group && row.group === state.at && state.chosen < 0) {
      pen.strokeStyle = hue.focus;
      pen.lineWidth = 2;
      pen.strokeRect(1, y + 1, left - 10, row_ - 2);
    }
    pen.fillStyle = hue.ink;
    pen.textAlign = "left";
    if (small()) pen.fillText(clip(pen, sign + row.title + count, width - 16), 8, y + 9);
    else pen.fillText(clip(pen, sign + row.title + count, left - 14), 6, y + row_ / 2);
    pen.save();
    pen.beginPath();
    pen.rect(left - 6, y, columns + 20, row_);
    pen.clip();
    const line = small() ? y + 17 : y; // names stand above the bars where there is no room beside them
    if (row.group && !state.open.has(row.group)) late ||= !density(pen, row, line, left, columns, hue);
    else if (!row.group) lifeRow(pen, row, line, at, hue, width);
    pen.restore();
  }
  pen.fillStyle = hue.paper;
  pen.fillRect(0, 0, width, AXIS);
  pen.textAlign = "center";
  pen.fillStyle = hue.faint;
  let free = left - 30;
  for (const [when, text] of lines) {
    const x = Math.min(Math.max(at(when), left + 20), width - 44), half = pen.measureText(text).width / 2;
    if (x - half < free) continue;
    pen.fillText(text, x, AXIS / 2);
    free = x + half + 8;
  }
  if (late) draw(); // rows that had no time to count
}

function lifeRow(pen, row, y, at, hue, width) {
  const middle = y + (small() ? 8 : rowHeight() / 2), top = middle - BAR / 2;
  const ends = []; // [x, kind] of marks, to be joined where they would lie on each other
  const ordered = row.lives.slice().sort((a, b) => began[a] - began[b]);
  for (const index of ordered) {
    const x = at(began[index]), stop = at(end[index]);
    if (end[index] < state.low || began[index] > state.high) continue;
    const [segments, asked] = parts(index);
    pen.fillStyle = hue.kinds[kindOf[index]];
    for (const [from, to, shade] of segments) {
      const begin = at(from);
      pen.globalAlpha = shade;
      pen.fillRect(begin, top, Math.max(from === began[index] ? 1.5 : 0.5, at(to) - begin), BAR);
    }
    pen.globalAlpha = 1;
    if (!sure(index) && end[index] > known[index]) {
      pen.fillStyle = hatch(pen, hue.kinds[kindOf[index]]);
      pen.fillRect(at(known[index]), top, stop - at(known[index]), BAR);
    }
    if (about(index)[GENERATION] > 1) { // a start after an end
      pen.fillStyle = hue.ink;
      pen.fillRect(x - 0.5, top - 3, 1, BAR + 6);
    }
    if (asked >= 0) { // where somebody asked it to stop
      const where = at(asked);
      pen.fillStyle = hue.ink;
      pen.beginPath();
      pen.moveTo(where - 4, top - 4);
      pen.lineTo(where + 4, top - 4);
      pen.lineTo(where, top + 2);
      pen.fill();
    }
    if (index === state.chosen) {
      pen.strokeStyle = hue.focus;
      pen.lineWidth = 2;
      pen.strokeRect(x - 2, top - 3, Math.max(6, stop - x + 4), BAR + 6);
    }
    marks.push([x, y, stop - x, rowHeight(), index]);
    if (end[index] <= state.high) ends.push([stop, kindOf[index]]);
  }
  ends.sort((a, b) => a[0] - b[0]);
  for (let i = 0; i < ends.length; ) {
    let j = i;
    while (j + 1 < ends.length && ends[j + 1][0] - ends[i][0] < BADGE) j++;
    const many = j - i + 1, kind = ends.slice(i, j + 1).some(([, k]) => k === 2) ? 2 : ends[j][1];
    pen.fillStyle = pen.strokeStyle = hue.kinds[kind];
    mark(pen, kind, ends[i][0], middle);
    if (many > 1) {
      badge(pen, ends[i][0] + 10, middle, many, hue);
      badges.push([row.title, many]);
    }
    i = j + 1;
  }
}

// How many marks there are where one is drawn.
function badge(pen, x, middle, many, hue) {
  const text = "×" + many, wide = pen.measureText(text).width + 4;
  pen.fillStyle = hue.paper;
  pen.fillRect(x, middle - 7, wide, 14);
  pen.fillStyle = hue.ink;
  pen.textAlign = "left";
  pen.fillText(text, x + 2, middle);
}
