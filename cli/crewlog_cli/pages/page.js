// -- beginning: what the link says, then the first picture ----------------------------------------

function choices(select, every, name) {
  for (const [value, title] of Object.entries(every)) select.add(new Option(title, value));
  select.value = state[name];
  select.addEventListener("change", () => { state[name] = select.value; densities.clear(); refresh(); });
}

function kinds() {
  const every = KINDS.map(() => 0);
  for (let life = 0; life < total; life++) every[kindOf[life]]++;
  KINDS.forEach((kind, index) => {
    const count = every[index];
    if (!count) return;
    const label = document.createElement("label"), box = document.createElement("input"), dot = document.createElement("i");
    box.type = "checkbox";
    box.value = index;
    box.checked = !state.hidden.has(index);
    box.addEventListener("change", () => { if (box.checked) state.hidden.delete(index); else state.hidden.add(index); refresh(); });
    dot.className = kind;
    label.append(box, dot, TITLES[index] + " " + count);
    $("kinds").append(label, " ");
  });
}

// Bring the life of a link into view; a period that the link names stays.
function reveal() {
  if (state.chosen >= 0) choose(state.chosen, location.hash.includes("view=") ? "rows" : true);
}

if (location.hash.includes("life=")) await stories();
follow();
COLUMNS.forEach(([title], at) => {
  const head = document.createElement("th"), button = document.createElement("button");
  button.textContent = title;
  button.addEventListener("click", () => { tableDown = tableSort === at && !tableDown; tableSort = at; table(); });
  head.append(button);
  $("heads").append(head);
});
choices($("group"), GROUPS, "group");
choices($("sort"), SORTS, "sort");
kinds();
$("filter").value = state.filter;
$("filter").addEventListener("input", () => { state.filter = $("filter").value; refresh(); });
$("in").addEventListener("click", () => zoom(0.5));
$("out").addEventListener("click", () => zoom(2));
$("all").addEventListener("click", () => show(0, span));
$("keys").addEventListener("click", () => $("help").showModal());
$("close").addEventListener("click", () => choose(-1, false));
$("rest").addEventListener("click", list);
$("rows").addEventListener("click", (event) => {
  const row = event.target.closest("tr");
  if (row) pick(row);
});
$("rows").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.dataset.life) pick(event.target);
});
function pick(row) {
  choose(Number(row.dataset.life), true);
  $("pane").scrollIntoView({ block: small() ? "end" : "nearest" });
}
hold();
overview();
keys();
window.addEventListener("resize", () => { size(); draw(); });
window.addEventListener("hashchange", async () => { // a link was put into the address of the open page
  await stories();
  follow();
  for (const name of ["group", "sort", "filter"]) $(name).value = state[name];
  document.querySelectorAll("#kinds input").forEach((box) => { box.checked = !state.hidden.has(Number(box.value)); });
  densities.clear();
  refresh();
  reveal();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { hues = null; patterns.clear(); draw(); });
const print = (now) => () => {
  printing = now;
  patterns.clear();
  crowd();
  bars();
  const left = [Math.max(0, rows.length - PRINT_ROWS), Math.max(0, ordered.length - listed)];
  $("cut").hidden = !now || left[0] + left[1] === 0;
  $("cut").textContent = "Not on this paper: " + left[0] + " more rows of the picture, " + left[1] + " more of the table.";
};
window.addEventListener("beforeprint", print(true));
window.addEventListener("afterprint", print(false));
$("caption").textContent = data.caption + " Times are local (" + zone() + "), as of " + moment(span) + ".";
match();
size();
tell();
if (state.chosen >= 0 && !matched.includes(state.chosen)) state.chosen = -1;
tell();
reveal();
crowd();
bars();
counts();
// For the console and for tests: what is counted, and how long frames took.
window.timeline = Object.freeze({
  state, took, rows: () => rows.map((row) => row.title), view: () => inView.length,
  living: (low, high, columns) => { const found = columnsOf(living, low, high, columns); return { most: [...found.most], least: [...found.least], peak: found.peak }; },
  at: (index) => marks.find(([, , , , life]) => life === index),
  badges: () => badges,
});
setTimeout(async () => { // what is below the picture, and what is told of a life, come after it
  await stories();
  table();
  tell();
  draw();
  document.documentElement.dataset.whole = "yes";
});
document.documentElement.dataset.ready = String(Math.round(performance.now())); // ms, for tests
