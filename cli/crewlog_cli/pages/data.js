// -- the data: packed in the page, unpacked here ---------------------------------------------

const $ = (id) => document.getElementById(id);

async function unpack(packed) {
  const text = atob(packed), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const gunzip = new DecompressionStream("gzip"), writer = gunzip.writable.getWriter();
  writer.write(bytes); // heard of by who reads
  writer.close();
  return JSON.parse(new TextDecoder().decode(await new Response(gunzip.readable).arrayBuffer()));
}

let data;
try {
  const text = $("data").textContent;
  data = text.startsWith("{") ? JSON.parse(text) : await unpack(text);
} catch (error) {
  $("told").textContent = "This browser cannot unpack the page's data (DecompressionStream): " + error.message;
  throw error;
}

// A life: [sid, pid, began, proof, end, seq, class]; texts are numbers of data.words; times are whole ms, proof
// and end after began; end -1: it goes on, proof -1: it is the end; pid, began and seq come as differences
// to the life before. A class is what many have alike; its labels are a number of data.sets.
const [SID, PID, BEGAN, PROOF, END, SEQ, CLASS] = Array.from({ length: 7 }, (_, index) => index);
const [KIND, GENERATION, REASON, VERSION, LABELS, HOST, OWNER] = Array.from({ length: 7 }, (_, index) => index);
const { lives, classes } = data;
let [pid, moment0, seq] = [0, 0, 0];
for (const life of lives) {
  life[PID] = pid += life[PID];
  life[BEGAN] = moment0 += life[BEGAN];
  life[SEQ] = seq += life[SEQ];
  life[CLASS] = classes[life[CLASS]];
}
// What happened in a life, by its index, once it was unpacked: when, what it does to the bar, words, who…
const NONE = [];
const happened = [], more = [];
const { words, sets } = data;

const KINDS = ["alive", "exited", "failed", "lost", "released", "unknown"];
const TITLES = ["alive", "ended orderly", "crashed", "lost", "released", "not known"];
// What people type for a kind; the page's own words among them.
const KIND_WORDS = [["alive", "living"], ["exited", "ended", "orderly", "stopped"], ["crashed", "failed"], ["lost"], ["released", "removed"], ["unknown"]];

// Nobody saw the end of a lost one, nor knows of one that cannot be judged.
const sure = (life) => life[CLASS][KIND] !== 3 && life[CLASS][KIND] !== 5;
// Up to now, or the last that is known: a clock may have been ahead.
let span = Math.max(1, data.to - data.from);
for (const life of lives) span = Math.max(span, life[BEGAN] + Math.max(0, life[END]));
// By life, in ms after data.from: `known` is up to when it lived for certain. For counting, who goes on
// lives beyond the last moment, and is there at it.
const [began, proof, end, known, endCounted, knownCounted] = Array.from({ length: 6 }, () => new Float64Array(lives.length));
for (let index = 0; index < lives.length; index++) {
  const life = lives[index], on = life[END] < 0;
  began[index] = life[BEGAN];
  end[index] = on ? span : life[BEGAN] + life[END];
  proof[index] = life[PROOF] < 0 ? end[index] : life[BEGAN] + life[PROOF];
  known[index] = sure(life) ? end[index] : Math.min(end[index], proof[index]);
  endCounted[index] = on ? span + 1 : end[index];
  knownCounted[index] = on && known[index] >= span ? span + 1 : known[index];
}
const crashed = (life) => life[CLASS][KIND] === 2 || life[CLASS][KIND] === 3;
const labelsOf = (life) => sets[life[CLASS][LABELS]].map((number) => words[number]);

// What happened in the lives is unpacked once there is a picture.
async function unpackStories() {
  if (document.readyState === "loading") { // they stand behind this script
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done));
  }
  const found = await unpack($("stories").textContent);
  words.push(...found.words);
  found.steps.forEach((row, index) => {
    const steps = row.slice(1);
    for (let i = 4; i < steps.length; i += 4) steps[i] += steps[i - 4];
    happened[index] = steps;
    more[index] = row[0];
  });
}

// -- times -----------------------------------------------------------------------------------

const format = new Intl.DateTimeFormat("sv-SE", {
  year: "numeric", month: "2-digit", day: "2-digit",
  hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false,
});
const moment = (ms) => format.format(data.from + ms);

function zone() {
  const minutes = -new Date(data.to).getTimezoneOffset(), whole = Math.abs(minutes);
  const two = (n) => String(n).padStart(2, "0");
  return (minutes < 0 ? "-" : "+") + two(Math.floor(whole / 60)) + ":" + two(whole % 60);
}

function duration(ms) {
  if (ms < 1000) return Math.round(ms) + "ms";
  const s = Math.floor(ms / 1000);
  if (s < 10) return (ms / 1000).toFixed(1) + "s";
  const parts = [[Math.floor(s / 86400), "d"], [Math.floor(s / 3600) % 24, "h"], [Math.floor(s / 60) % 60, "m"], [s % 60, "s"]];
  const first = parts.findIndex(([n]) => n > 0);
  return parts.slice(first, first + 2).filter(([n]) => n > 0).map(([n, unit]) => n + unit).join("");
}

const STEP_MS = [0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000]
  .map((s) => s * 1000);

// Return where the lines of a time axis stand, and what is written at them.
function ticks(low, high, width) {
  const step = STEP_MS.find((s) => (high - low) / s <= Math.max(2, width / 110)) || STEP_MS[STEP_MS.length - 1];
  const found = [];
  const offset = (ms) => new Date(data.from + ms).getTimezoneOffset() * 60000; // another in summer
  let local = Math.floor((data.from + low - offset(low)) / step) * step;
  for (; found.length < 60; local += step) {
    const guess = local - data.from + offset(low), at = local - data.from + offset(guess);
    if (at > high) break;
    if (at < low) continue;
    const text = moment(at);
    const fine = text.slice(11) + (step < 1000 ? "." + String(Math.floor(data.from + at) % 1000).padStart(3, "0") : "");
    found.push([at, step >= 86400000 ? text.slice(0, 10) : step >= 60000 ? text.slice(5, 16) : fine]);
  }
  return found;
}
