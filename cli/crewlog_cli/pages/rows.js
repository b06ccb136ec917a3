// -- which lives are shown, in which rows --------------------------------------------------------

const GROUPS = { none: "each id", prefix: "id prefix", owner: "owner", host: "host" };
for (const key of new Set(sets.flat().map((number) => words[number].split("=")[0]))) {
  GROUPS["label:" + key] = "label " + key;
}
const SORTS = { recent: "living, then ended last", start: "start", end: "end", id: "id", lifetime: "lifetime", crashes: "crashes" };

const workers = data.workers; // how many ids there are

const usualGroup = workers > 300 ? "prefix" : "none";
// Everything that can be shared by a link; and what follows from it.
const state = {
  low: 0, high: span, filter: "", group: usualGroup, sort: "recent",
  hidden: new Set(), open: new Set(), chosen: -1, at: "", // a group that the keys stand at
};
let matched = [];   // lives that the filter lets through, by index
let inView = [];    // those of them that touch the period shown
let rows = [];      // {title, lives, group: its name, or ""}: what is drawn, from the top
const MANY = 20000; // from here on what may be is counted once there is a picture
let due = 0; // until then rows may count in this picture
const densities = new Map(); // group -> steps of all its lives that are matched
let living;         // steps of what is certain, of matched
let possible;       // and of what may be

const lowered = new Map();
const searched = (number) => { // many are never searched
  if (!lowered.has(number)) lowered.set(number, words[number].toLowerCase());
  return lowered.get(number);
};

// Return what says of a life whether it is wanted: every word must fit; null: each is.
function wanted(text) {
  const tests = [];
  let rest = text.trim().toLowerCase();
  rest = rest.replace(/([^\s=]+=)"([^"]*)"/g, '"$1$2"'); // role="web two" is one word, too
  rest = rest.replace(/\b(code|signal)\s+(\d+)\b/g, (_, word, number) => {
    const exact = word + " " + number;
    tests.push((life) => searched(about(life)[REASON]) === exact);
    return " ";
  });
  for (const [, quoted, plain] of rest.matchAll(/"([^"]*)"?|(\S+)/g)) {
    const word = quoted || (plain || "").replaceAll('"', "");
    if (!word) continue;
    const kind = KIND_WORDS.findIndex((every) => every.includes(word));
    const label = (life) => sets[about(life)[LABELS]].some((number) => word.includes("=") ? searched(number) === word : searched(number).includes(word));
    if (kind >= 0) tests.push((life) => kindOf[life] === kind || searched(ids[life]).includes(word));
    else tests.push((life) => searched(ids[life]).includes(word) || searched(about(life)[REASON]).includes(word) || label(life));
  }
  return tests.length ? (life) => tests.every((test) => test(life)) : null;
}

// Return the steps of what is certain, and of what may be: the same where every end is known.
function both(indexes) {
  const certain = steps(indexes, knownCounted);
  return [certain, indexes.every((index) => known[index] === end[index]) ? certain : steps(indexes, endCounted)];
}

function match() {
  const wants = wanted(state.filter), hidden = KINDS.map((_, kind) => state.hidden.has(kind));
  matched = [];
  for (let index = 0; index < total; index++) {
    if (!hidden[kindOf[index]] && (!wants || wants(index))) matched.push(index);
  }
  densities.clear();
  [living, possible] = matched.length > MANY ? [steps(matched, knownCounted), null] : both(matched);
  arrange();
}

// An id's prefix is what stands before its last number; each text is one object, so it is soon looked up.
const NUMBER = /[-_.:@]?[0-9a-f]*\d[0-9a-f-]*$/i;
const prefixes = new Array(words.length), titles = new Map();
function prefixOf(sid) {
  if (prefixes[sid] === undefined) {
    const at = words[sid].search(NUMBER), prefix = at > 0 ? words[sid].slice(0, at) : words[sid];
    if (!titles.has(prefix)) titles.set(prefix, prefix + "…");
    prefixes[sid] = titles.get(prefix);
  }
  return prefixes[sid];
}

function groupOf(life) {
  if (state.group === "prefix") return prefixOf(ids[life]);
  if (state.group === "owner") return words[about(life)[OWNER]] || "no owner";
  if (state.group === "host") return words[about(life)[HOST]] || "no host";
  const key = state.group.slice("label:".length) + "=";
  return labelsOf(life).find((label) => label.startsWith(key)) || "no " + key.slice(0, -1);
}

// The steps of a group, of all its lives and not only of those in view: so they are made once.
function densityOf(row) {
  const group = row.group;
  if (inView.length === matched.length && !densities.has(group)) densities.set(group, { indexes: row.lives, steps: null });
  if (!densities.has(group)) {
    const every = new Map();
    for (const index of matched) {
      const name = groupOf(index), found = every.get(name);
      if (found) found.push(index); else every.set(name, [index]);
    }
    for (const [name, indexes] of every) if (!densities.has(name)) densities.set(name, { indexes, steps: null });
  }
  const found = densities.get(group);
  if (!found.steps && performance.now() > due) return null; // in the next picture
  found.steps ||= both(found.indexes);
  return found.steps;
}

// How many ids these lives have.
const counted = new Uint32Array(words.length); // by the number of an id: which count it was last part of
let count = 0;
function idsOf(lives) {
  let found = 0;
  count++;
  for (const life of lives) {
    if (counted[ids[life]] === count) continue;
    counted[ids[life]] = count;
    found++;
  }
  return found;
}

// Sort so that what matters stands first; a row is what its lives in view say.
function order(found) {
  const latest = (row) => row.lives.reduce((most, index) => Math.max(most, goesOn(index) ? Infinity : end[index]), -Infinity);
  const keys = {
    recent: (row) => [-latest(row), -row.lives.reduce((most, index) => Math.max(most, began[index]), 0)],
    start: (row) => [row.lives.reduce((least, index) => Math.min(least, began[index]), Infinity), 0],
    end: (row) => [latest(row), 0],
    lifetime: (row) => [-row.lives.reduce((sum, index) => sum + known[index] - began[index], 0), 0],
    crashes: (row) => [-row.lives.reduce((sum, index) => sum + (crashed(index) ? 1 : 0), 0), -latest(row)],
    id: () => [0, 0],
  };
  const key = keys[state.sort];
  const keyed = found.map((row) => [key(row), row]);
  keyed.sort(([a, x], [b, y]) => (a[0] === b[0] ? 0 : a[0] - b[0]) || (a[1] === b[1] ? 0 : a[1] - b[1]) || (x.title < y.title ? -1 : 1));
  return keyed.map(([, row]) => row);
}

function perSid(indexes, group) {
  const found = new Map();
  for (const index of indexes) {
    const sid = ids[index], row = found.get(sid);
    if (row) row.lives.push(index); else found.set(sid, { title: words[sid], lives: [index], group: "", inside: group });
  }
  return order([...found.values()]);
}

// Put the lives in view into rows: rows with nothing in view are not there.
function arrange() {
  const whole = state.low <= 0 && state.high >= span;
  inView = whole ? matched : matched.filter((index) => began[index] <= state.high && end[index] >= state.low);
  if (state.group === "none") {
    rows = perSid(inView, "");
    return;
  }
  const groups = new Map();
  for (const index of inView) {
    const name = groupOf(index), row = groups.get(name);
    if (row) row.lives.push(index); else groups.set(name, { title: name, lives: [index], group: name });
  }
  rows = order([...groups.values()]).flatMap((row) => (state.open.has(row.group) ? [row, ...perSid(row.lives, row.group)] : [row]));
}

// -- a link: the fragment says what is shown ------------------------------------------------------

function link() {
  const found = new URLSearchParams();
  if (state.low > 0 || state.high < span) found.set("view", Math.round(data.from + state.low) + "-" + Math.round(data.from + state.high));
  if (state.filter) found.set("filter", state.filter);
  found.set("group", state.group);
  found.set("sort", state.sort);
  if (state.hidden.size) found.set("without", [...state.hidden].map((kind) => KINDS[kind]).join(","));
  if (state.open.size) found.set("open", JSON.stringify([...state.open]));
  if (state.chosen >= 0 && seqs) found.set("life", seqs[state.chosen] + ":" + words[ids[state.chosen]]);
  const hash = "#" + found;
  if (location.hash !== hash) history.replaceState(null, "", hash);
}

// What a link says; the life that it names is known by its seq, so await stories() before.
function follow() {
  const found = new URLSearchParams(location.hash.slice(1));
  const view = /^(\d+)-(\d+)$/.exec(found.get("view") || "");
  state.low = 0;
  state.high = span;
  if (view && Number(view[1]) < Number(view[2])) {
    state.low = Math.max(0, Math.min(span - 1, view[1] - data.from));
    state.high = Math.max(state.low + 1, Math.min(span, view[2] - data.from));
  }
  state.filter = found.get("filter") || "";
  state.group = Object.hasOwn(GROUPS, found.get("group")) ? found.get("group") : usualGroup;
  state.sort = Object.hasOwn(SORTS, found.get("sort")) ? found.get("sort") : "recent";
  state.hidden = new Set((found.get("without") || "").split(",").map((name) => KINDS.indexOf(name)).filter((kind) => kind >= 0));
  try {
    state.open = new Set(JSON.parse(found.get("open") || "[]"));
  } catch (error) {
    state.open = new Set(); // a link that was cut
  }
  const life = /^(\d+):(.*)$/s.exec(found.get("life") || "");
  state.chosen = -1;
  if (life) state.chosen = ids.findIndex((id, index) => seqs[index] === Number(life[1]) && words[id] === life[2]);
}
