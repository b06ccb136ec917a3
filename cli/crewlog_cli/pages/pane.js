// -- what is told in words: the pane of the chosen life, the tooltip, the table, the counts -------

const STEP = 200;
const COLUMNS = [
  ["id", (index) => words[lives[index][SID]]],
  ["pid", (index) => lives[index][PID]],
  ["began", (index) => began[index]],
  ["last proof of life", (index) => known[index]],
  ["ended", (index) => (lives[index][END] < 0 ? Infinity : end[index])],
  ["how", (index) => words[lives[index][CLASS][REASON]]],
  ["proven lifetime", (index) => known[index] - began[index]],
];
let tableSort = 4, tableDown = true, listed = 0, ordered = [], tabled = null;

function ending(index) {
  const life = lives[index];
  if (life[END] < 0) return life[CLASS][KIND] === 5 ? "nobody can tell whether it lives" : "still listed";
  return sure(life) ? "ended " + moment(end[index]) : "died between " + moment(known[index]) + " and " + moment(end[index]);
}

function facts(index) {
  const life = lives[index], version = words[life[CLASS][VERSION]], labels = labelsOf(life).join(" ");
  const rows = [
    "pid " + life[PID] + (version ? ", version " + version : "") + (life[CLASS][GENERATION] > 1 ? ", start number " + life[CLASS][GENERATION] : ""),
    "began " + moment(began[index]) + ", last proof of life " + moment(known[index]) + ", " + ending(index) + ": " + words[life[CLASS][REASON]],
    "proven to have lived " + duration(known[index] - began[index]),
  ];
  if (labels) rows.push("labels: " + labels);
  if (words[life[CLASS][OWNER]]) rows.push("owner: " + words[life[CLASS][OWNER]]);
  if (words[life[CLASS][HOST]]) rows.push("host: " + words[life[CLASS][HOST]]);
  return rows.join("\n");
}

function tell() {
  const pane = $("pane"), open = state.chosen >= 0;
  if (pane.hidden === open) {
    pane.hidden = !open;
    size();
  }
  if (!open) return;
  const life = lives[state.chosen], told = happened[state.chosen] || NONE;
  $("who").textContent = words[life[SID]];
  $("facts").textContent = facts(state.chosen);
  $("steps").textContent = "";
  for (let i = 0; i < told.length; i += 4) {
    const item = document.createElement("li");
    item.textContent = moment(began[state.chosen] + told[i]) + "  " + words[told[i + 2]] + "  by " + words[told[i + 3]];
    $("steps").append(item);
  }
  $("more").textContent = words[more[state.chosen]] || "";
}

function tip(index, x, y) {
  const box = $("tip");
  box.hidden = index < 0;
  if (index < 0) return;
  const life = lives[index];
  box.textContent = words[life[SID]] + ", pid " + life[PID] + "\n" + moment(began[index]) + ", " + duration(known[index] - began[index]) + "\n" + ending(index) + ": " + words[life[CLASS][REASON]];
  const wide = box.offsetWidth, high = box.offsetHeight;
  box.style.left = Math.max(4, Math.min(x + 14, window.innerWidth - wide - 8)) + "px";
  box.style.top = (y + 18 + high > window.innerHeight ? y - high - 10 : y + 18) + "px";
}

function counts() {
  let sids = 0, alive = 0, crashes = 0;
  const seen = new Uint8Array(words.length);
  for (const index of inView) {
    const life = lives[index];
    if (!seen[life[SID]]) sids += seen[life[SID]] = 1;
    alive += life[CLASS][KIND] === 0;
    crashes += crashed(life) && end[index] >= state.low && end[index] <= state.high;
  }
  $("count").textContent = "In view: " + sids + " of " + workers + " workers, " + inView.length + " of " + lives.length +
    " lives, " + alive + " still living, " + crashes + " crashed or lost, at most " + ($("crowd").dataset.peak || 0) + " at once.";
}

function table() {
  tabled = inView; // as long as that is the same, so is the table
  ordered = inView.slice();
  const key = COLUMNS[tableSort][1], sign = tableDown ? -1 : 1;
  ordered.sort((a, b) => { const x = key(a), y = key(b); return x === y ? a - b : (x < y ? -sign : sign); });
  listed = 0;
  $("rows").textContent = "";
  COLUMNS.forEach((_, at) => $("heads").children[at].setAttribute("aria-sort", at !== tableSort ? "none" : tableDown ? "descending" : "ascending"));
  list();
}

function list() {
  const part = document.createDocumentFragment(), slice = ordered.slice(listed, listed + STEP);
  if (!listed && state.chosen >= 0 && ordered.includes(state.chosen) && !slice.includes(state.chosen)) slice.unshift(state.chosen);
  for (const index of slice) {
    const life = lives[index], row = document.createElement("tr");
    const cells = [
      words[life[SID]], String(life[PID]), moment(began[index]), moment(known[index]),
      life[END] < 0 ? "" : (sure(life) ? "" : "by ") + moment(end[index]), words[life[CLASS][REASON]],
      duration(known[index] - began[index]),
    ];
    for (const text of cells) row.appendChild(document.createElement("td")).textContent = text;
    row.dataset.life = index;
    row.tabIndex = 0;
    row.classList.toggle("chosen", index === state.chosen);
    part.appendChild(row);
  }
  $("rows").appendChild(part);
  listed = Math.min(ordered.length, listed + STEP);
  $("rest").hidden = listed >= ordered.length;
  $("rest").textContent = ordered.length - listed + " more";
}

function markRow() {
  for (const row of $("rows").children) row.classList.toggle("chosen", Number(row.dataset.life) === state.chosen);
}
