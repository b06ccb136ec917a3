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
  $("caption").textContent = "This browser cannot unpack the page's data (DecompressionStream): " + error.message;
  throw error;
}

// Lives are columns, and a life is its place in them. Texts are numbers of data.words; times are whole ms,
// proof and end after began; end -1: it goes on, proof -1: it is the end; pid, began and seq come as
// differences to the life before. A class is what many have alike; its labels are a number of data.sets.
const { sid: ids, class: classOf } = data.lives;
const total = ids.length;
function sums(differences) {
  const found = new Float64Array(total);
  for (let life = 0, sum = 0; life < total; life++) found[life] = sum += differences[life];
  return found;
}
const about = (life) => data.classes[classOf[life]];
const [KIND, GENERATION, REASON, VERSION, LABELS, HOST, OWNER] = Array.from({ length: 7 }, (_, index) => index);
// What is told of a life, by its index, once it was unpacked; and what happened in it: when, what it does
// to the bar, words, who…
const NONE = [];
const happened = [], more = [];
let pids = null, seqs = null;
const pidOf = (life) => (pids ? "pid " + pids[life] : "pid …");
const { words, sets } = data;

const KINDS = ["alive", "exited", "failed", "lost", "released", "unknown"];
const TITLES = ["alive", "ended orderly", "crashed", "lost", "released", "not known"];
// What people type for a kind; the page's own words among them.
const KIND_WORDS = [["alive", "living"], ["exited", "ended", "orderly", "stopped"], ["crashed", "failed"], ["lost"], ["released", "removed"], ["unknown"]];

// Nobody saw the end of a lost one, nor knows of one that cannot be judged.
const kindOf = new Uint8Array(total), sure = (life) => kindOf[life] !== 3 && kindOf[life] !== 5;
// By life, in ms after data.from: `known` is up to when it lived for certain; `span` is now, or the last that
// is known: a clock may have been ahead. For counting, who goes on lives beyond it, and is there at it.
const began = sums(data.lives.began);
const [proof, end, known, endCounted, knownCounted] = Array.from({ length: 5 }, () => new Float64Array(total));
const goesOn = (life) => data.lives.end[life] < 0;
let span = Math.max(1, data.to - data.from);
((classes, { end: ends, proof: proofs }) => {
  const kinds = classes.map((alike) => alike[KIND]);
  for (let life = 0; life < total; life++) kindOf[life] = kinds[classOf[life]];
  for (let life = 0; life < total; life++) span = Math.max(span, began[life] + Math.max(0, ends[life]));
  for (let life = 0; life < total; life++) {
    const begin = began[life], on = ends[life] < 0, stop = on ? span : begin + ends[life];
    const until = proofs[life] < 0 ? stop : begin + proofs[life], least = sure(life) ? stop : Math.min(stop, until);
    end[life] = stop;
    proof[life] = until;
    known[life] = least;
    endCounted[life] = on ? span + 1 : stop;
    knownCounted[life] = on && least >= span ? span + 1 : least;
  }
})(data.classes, data.lives);
const crashed = (life) => kindOf[life] === 2 || kindOf[life] === 3;
const labelsOf = (life) => sets[about(life)[LABELS]].map((number) => words[number]);

// What is told of the lives is unpacked once there is a picture, or for the life that a link names.
let unpacking = null;
const stories = () => (unpacking ||= unpackStories());
async function unpackStories() {
  if (document.readyState === "loading") { // they stand behind this script
    await new Promise((done) => document.addEventListener("DOMContentLoaded", done));
  }
  const found = await unpack($("stories").textContent);
  [pids, seqs] = [found.lives.pid, found.lives.seq].map(sums);
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
