// -- what is told in words: the pane of the chosen life, the tooltip, the table, the counts -------

const STEP = 200;
const COLUMNS = [
  ["id", (index) => words[ids[index]]],
  ["pid", (index) => pids[index]],
  ["began", (index) => began[index]],
  ["last proof of life", (index) => known[index]],
  ["ended", (index) => (goesOn(index) ? Infinity : end[index])],
  ["how", (index) => words[about(index)[REASON]]],
  ["proven lifetime", (index) => known[index] - began[index]],
];
let tableSort = 4, tableDown = true, listed = 0, ordered = [], tabled = null;

function ending(index) {
  if (goesOn(index)) return kindOf[index] === 5 ? "nobody can tell whether it lives" : "still listed";
  return sure(index) ? "ended " + moment(end[index]) : "died between " + moment(known[index]) + " and " + moment(end[index]);
}

function facts(index) {
  const version = words[about(index)[VERSION]], labels = labelsOf(index).join(" ");
  const rows = [
    pidOf(index) + (version ? ", version " + version : "") + (about(index)[GENERATION] > 1 ? ", start number " + about(index)[GENERATION] : ""),
    "began " + moment(began[index]) + ", last proof of life " + moment(known[index]) + ", " + ending(index) + ": " + words[about(index)[REASON]],
    "proven to have lived " + duration(known[index] - began[index]),
  ];
  if (labels) rows.push("labels: " + labels);
  if (words[about(index)[OWNER]]) rows.push("owner: " + words[about(index)[OWNER]]);
  if (words[about(index)[HOST]]) rows.push("host: " + words[about(index)[HOST]]);
  return rows.join("\n");
}

function tell() {
  const pane = $("pane"), open = state.chosen >= 0;
  if (pane.hidden === open) {
    pane.hidden = !open;
    size();
  }
  if (!open) return;
  const told = happened[state.chosen] || NONE;
  $("who").textContent = words[ids[state.chosen]];
  $("facts").textContent = facts(state.chosen);
  $("steps").textContent = "";
  for (let i = 0; i < told.length; i += 4) {
    const item = document.createElement("li");
    const what = words[told[i + 2]].replace("\x01", "registered pid " + pids[state.chosen]); // see page.py
    item.textContent = moment(began[state.chosen] + told[i]) + "  " + what + "  by " + words[told[i + 3]];
    $("steps").append(item);
  }
  $("more").textContent = words[more[state.chosen]] || "";
}

function tip(index, x, y) {
  const box = $("tip");
  box.hidden = index < 0;
  if (index < 0) return;
  box.textContent = words[ids[index]] + ", " + pidOf(index) + "\n" + moment(began[index]) + ", " + duration(known[index] - began[index]) + "\n" + ending(index) + ": " + words[about(index)[REASON]];
  const wide = box.offsetWidth, high = box.offsetHeight;
  box.style.left = Math.max(4, Math.min(x + 14, window.innerWidth - wide - 8)) + "px";
  box.style.top = (y + 18 + high > window.innerHeight ? y - high - 10 : y + 18) + "px";
}

function counts() {
  let alive = 0, crashes = 0;
  for (const index of inView) {
    alive += kindOf[index] === 0;
    crashes += crashed(index) && end[index] >= state.low && end[index] <= state.high;
  }
  $("count").textContent = "In view: " + idsOf(inView) + " of " + workers + " workers, " + inView.length + " of " + total +
    " lives, " + alive + " still living, " + crashes + " crashed or lost, at most " + ($("crowd").dataset.peak || 0) + " at once.";
}

function table() {
  if (!pids) return; // it is made once they are there
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
    const row = document.createElement("tr");
    const cells = [
      words[ids[index]], String(pids[index]), moment(began[index]), moment(known[index]),
      goesOn(index) ? "" : (sure(index) ? "" : "by ") + moment(end[index]), words[about(index)[REASON]],
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
