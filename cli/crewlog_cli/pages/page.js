"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  // A life: [sid, pid, generation, began, proof, end, kind, reason, version]; times in ms, began
  // after data.from, proof and end after began; end -1: it goes on.
  const [SID, PID, GENERATION, BEGAN, PROOF, END, KIND, REASON, VERSION] = [0, 1, 2, 3, 4, 5, 6, 7, 8];
  const KINDS = ["alive", "exited", "failed", "lost", "released", "unknown"];
  const TITLES = ["alive", "ended orderly", "crashed", "lost", "released", "not known"];
  const ROW = 18, AXIS = 22, BAR = 10, TABLE_STEP = 200, PRINT_ROWS = 1500;
  const { lives, sids, reasons, versions } = data;
  const span = Math.max(1, data.to - data.from);

  const bySid = sids.map(() => []);
  lives.forEach((life, index) => bySid[life[SID]].push(index));
  const searched = sids.map((sid) => sid.toLowerCase());
  const reasonSearched = reasons.map((reason) => reason.toLowerCase());

  let rows = [];          // sids shown, by index
  let matched = [];       // lives shown, by index, in order of registration
  const wanted = KINDS.map(() => true);
  let low = 0, high = span; // the period shown, in ms after data.from
  let chosen = -1;        // a life
  let listed = 0;         // rows of the table
  let printing = false;
  let queued = false;

  const endOf = (life) => (life[END] < 0 ? data.to - data.from : life[BEGAN] + life[END]);
  const proofOf = (life) => life[BEGAN] + life[PROOF];
  const sure = (life) => life[KIND] !== 3 && life[KIND] !== 5;

  const format = new Intl.DateTimeFormat("sv-SE", {
    year: "numeric", month: "2-digit", day: "2-digit",
    hour: "2-digit", minute: "2-digit", second: "2-digit", hour12: false,
  });
  const moment = (ms) => format.format(data.from + ms);
  const zone = () => {
    const minutes = -new Date(data.to).getTimezoneOffset();
    const two = (n) => String(n).padStart(2, "0");
    const whole = Math.abs(minutes);
    return (minutes < 0 ? "-" : "+") + two(Math.floor(whole / 60)) + ":" + two(whole % 60);
  };
  const duration = (ms) => {
    const s = Math.floor(ms / 1000);
    const parts = [[Math.floor(s / 86400), "d"], [Math.floor(s / 3600) % 24, "h"], [Math.floor(s / 60) % 60, "m"], [s % 60, "s"]];
    const first = parts.findIndex(([n]) => n > 0);
    if (first < 0) return (ms / 1000).toFixed(1) + "s";
    return parts.slice(first, first + 2).filter(([n]) => n > 0).map(([n, unit]) => n + unit).join("");
  };

  // -- filter --------------------------------------------------------------------------------

  function filter() {
    const words = $("filter").value.trim().toLowerCase();
    const found = new Set();
    matched = [];
    for (let index = 0; index < lives.length; index++) {
      const life = lives[index];
      if (!wanted[life[KIND]]) continue;
      if (words && !searched[life[SID]].includes(words) && !reasonSearched[life[REASON]].includes(words)) continue;
      matched.push(index);
      found.add(life[SID]);
    }
    rows = [...found];
    if (chosen >= 0 && !found.has(lives[chosen][SID])) chosen = -1;
    $("count").textContent = rows.length + " of " + sids.length + " workers, " + matched.length + " of " + lives.length + " lives";
    $("space").style.height = Math.max(0, AXIS + rows.length * ROW - $("frame").clientHeight) + "px";
    listed = 0;
    $("rows").textContent = "";
    list();
    draw();
  }

  function list() {
    const part = document.createDocumentFragment();
    for (const index of matched.slice(listed, listed + TABLE_STEP)) {
      const life = lives[index];
      const row = document.createElement("tr");
      const cells = [
        sids[life[SID]], String(life[PID]), moment(life[BEGAN]), moment(proofOf(life)),
        life[END] < 0 ? "" : (sure(life) ? "" : "by ") + moment(endOf(life)), reasons[life[REASON]],
        duration(proofOf(life) - life[BEGAN]),
      ];
      for (const words of cells) row.appendChild(document.createElement("td")).textContent = words;
      part.appendChild(row);
    }
    $("rows").appendChild(part);
    listed = Math.min(matched.length, listed + TABLE_STEP);
    const left = matched.length - listed;
    $("more").hidden = left === 0;
    $("more").textContent = left + " more";
  }

  // -- drawing -------------------------------------------------------------------------------

  function paper(canvas, width, height) {
    const scale = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = height + "px";
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "12px system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif";
    pen.textBaseline = "middle";
    return pen;
  }

  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue("--" + name).trim();
    return { kinds: KINDS.map(of), ink: of("ink"), faint: of("faint"), line: of("line"), band: of("band"), focus: of("focus") };
  };

  function hatch(pen, colour) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = 6;
    const small = tile.getContext("2d");
    small.strokeStyle = colour;
    small.lineWidth = 1.4;
    for (const shift of [-6, 0, 6]) {
      small.beginPath();
      small.moveTo(shift, 6);
      small.lineTo(shift + 6, 0);
      small.stroke();
    }
    return pen.createPattern(tile, "repeat");
  }

  const STEPS = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 1209600, 2592000, 7776000, 31536000].map((s) => s * 1000);

  function ticks(width) {
    const step = STEPS.find((s) => (high - low) / s <= Math.max(2, width / 130)) || STEPS[STEPS.length - 1];
    const shift = new Date(data.from).getTimezoneOffset() * 60000;
    const found = [];
    let at = Math.ceil((data.from + low - shift) / step) * step + shift - data.from;
    for (; at <= high && found.length < 60; at += step) {
      const text = moment(at);
      found.push([at, step >= 86400000 ? text.slice(0, 10) : step >= 60000 ? text.slice(5, 16) : text.slice(11)]);
    }
    return found;
  }

  function labels(width) {
    return Math.min(260, Math.max(90, width * 0.2));
  }

  function crowd(hue) {
    const canvas = $("crowd");
    const width = canvas.clientWidth, height = 90, left = labels(width);
    const pen = paper(canvas, width, height);
    const columns = Math.max(1, Math.floor(width - left - 8));
    const certain = new Int32Array(columns + 2), possible = new Int32Array(columns + 2);
    const place = (ms) => Math.min(columns, Math.max(0, Math.floor(((ms - low) / (high - low)) * columns)));
    for (const index of matched) {
      const life = lives[index];
      if (endOf(life) < low || life[BEGAN] > high) continue;
      const begin = place(life[BEGAN]), last = place(endOf(life));
      possible[begin]++;
      possible[last + 1]--;
      const known = sure(life) ? last : place(proofOf(life));
      certain[begin]++;
      certain[known + 1]--;
    }
    let most = 1;
    for (let x = 1; x <= columns; x++) {
      possible[x] += possible[x - 1];
      certain[x] += certain[x - 1];
    }
    for (let x = 0; x < columns; x++) most = Math.max(most, possible[x]);
    const up = (n) => height - 4 - (n / most) * (height - 18);
    const area = (counts, fill) => {
      pen.beginPath();
      pen.moveTo(left, up(0));
      for (let x = 0; x < columns; x++) pen.lineTo(left + x, up(counts[x]));
      pen.lineTo(left + columns - 1, up(0));
      pen.fillStyle = fill;
      pen.fill();
    };
    area(possible, hatch(pen, hue.kinds[3]));
    area(certain, getComputedStyle(document.body).backgroundColor);
    pen.globalAlpha = 0.75;
    area(certain, hue.kinds[0]);
    pen.globalAlpha = 1;
    pen.fillStyle = hue.faint;
    pen.textAlign = "right";
    pen.fillText(String(most), left - 8, up(most));
    pen.fillText("0", left - 8, up(0) - 4);
    pen.textAlign = "left";
    pen.fillText("living at once", 0, height / 2);
  }

  function clip(pen, words, width) {
    if (pen.measureText(words).width <= width) return words;
    let keep = words.length;
    while (keep > 1 && pen.measureText(words.slice(0, keep) + "…").width > width) keep = Math.floor(keep * 0.9);
    return words.slice(0, keep) + "…";
  }

  function mark(pen, life, x, y, hue) {
    const middle = y + ROW / 2;
    pen.fillStyle = pen.strokeStyle = hue.kinds[life[KIND]];
    pen.lineWidth = 2;
    pen.beginPath();
    switch (life[KIND]) {
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

  function bars(hue) {
    const frame = $("frame"), canvas = $("lives");
    const width = frame.clientWidth;
    const height = printing ? AXIS + Math.min(rows.length, PRINT_ROWS) * ROW : frame.clientHeight;
    const top = printing ? 0 : frame.scrollTop;
    const left = labels(width), columns = width - left - 14;
    const pen = paper(canvas, width, height);
    const place = (ms) => left + ((ms - low) / (high - low)) * columns;
    const patterns = hue.kinds.map((colour) => hatch(pen, colour));
    const first = Math.max(0, Math.floor(top / ROW));
    const last = Math.min(rows.length, first + Math.ceil(height / ROW) + 1);
    for (let row = first; row < last; row++) {
      const y = AXIS + row * ROW - top;
      if (row % 2) {
        pen.fillStyle = hue.band;
        pen.fillRect(0, y, width, ROW);
      }
      pen.fillStyle = hue.ink;
      pen.textAlign = "left";
      pen.fillText(clip(pen, sids[rows[row]], left - 14), 6, y + ROW / 2);
      pen.save();
      pen.beginPath();
      pen.rect(left - 5, y, columns + 18, ROW);
      pen.clip();
      let earlier = false;
      for (const index of bySid[rows[row]]) {
        const life = lives[index];
        const begin = place(life[BEGAN]), end = place(endOf(life));
        if (end < left - 8 || begin > width) { earlier = true; continue; }
        const known = sure(life) ? end : Math.min(end, place(proofOf(life)));
        pen.globalAlpha = wanted[life[KIND]] ? 1 : 0.25;
        pen.fillStyle = hue.kinds[life[KIND]];
        pen.fillRect(begin, y + (ROW - BAR) / 2, Math.max(1.5, known - begin), BAR);
        if (!sure(life) && end > known) {
          pen.fillStyle = patterns[life[KIND]];
          pen.fillRect(known, y + (ROW - BAR) / 2, end - known, BAR);
        }
        if (earlier || life[GENERATION] > 1) { // a start after an end
          pen.fillStyle = hue.ink;
          pen.fillRect(begin - 0.5, y + 2, 1, ROW - 4);
        }
        mark(pen, life, end, y, hue);
        if (index === chosen) {
          pen.strokeStyle = hue.focus;
          pen.lineWidth = 2;
          pen.strokeRect(begin - 2, y + 1, Math.max(6, end - begin + 4), ROW - 2);
        }
        pen.globalAlpha = 1;
        earlier = true;
      }
      pen.restore();
    }
    pen.fillStyle = getComputedStyle(document.body).backgroundColor;
    pen.fillRect(0, 0, width, AXIS);
    pen.textAlign = "center";
    for (const [at, words] of ticks(columns)) {
      const x = place(at);
      pen.fillStyle = hue.line;
      pen.fillRect(x, AXIS - 4, 1, height);
      pen.fillStyle = hue.faint;
      pen.fillText(words, Math.min(x, width - 40), AXIS / 2);
    }
  }

  function draw() {
    if (queued) return;
    queued = true;
    requestAnimationFrame(() => {
      queued = false;
      const hue = colours();
      crowd(hue);
      bars(hue);
    });
  }

  // -- hands ---------------------------------------------------------------------------------

  function tell() {
    if (chosen < 0) return;
    const life = lives[chosen];
    const ended = life[END] < 0 ? "still listed" : sure(life)
      ? "ended " + moment(endOf(life))
      : "died between " + moment(proofOf(life)) + " and " + moment(endOf(life));
    const version = versions[life[VERSION]];
    $("detail").textContent = sids[life[SID]] + (version ? " " + version : "") + ", pid " + life[PID] +
      (life[GENERATION] > 1 ? ", start number " + life[GENERATION] : "") + "\nbegan " + moment(life[BEGAN]) +
      ", last proof of life " + moment(proofOf(life)) + ", " + ended + ": " + reasons[life[REASON]];
  }

  function choose(index, show) {
    if (index === chosen) return;
    chosen = index;
    if (show) {
      const row = rows.indexOf(lives[index][SID]), frame = $("frame");
      const y = row * ROW;
      if (y < frame.scrollTop) frame.scrollTop = y;
      if (y + AXIS + 2 * ROW > frame.scrollTop + frame.clientHeight) frame.scrollTop = y + AXIS + 2 * ROW - frame.clientHeight;
    }
    tell();
    draw();
  }

  function pointed(event) {
    const frame = $("frame"), box = frame.getBoundingClientRect();
    const row = rows[Math.floor((event.clientY - box.top - AXIS + frame.scrollTop) / ROW)];
    if (row === undefined) return;
    const left = labels(frame.clientWidth), columns = frame.clientWidth - left - 14;
    const per = (high - low) / columns;
    const at = low + (event.clientX - box.left - left) * per;
    let best = -1, nearest = Infinity;
    for (const index of bySid[row]) {
      const life = lives[index];
      const away = Math.max(life[BEGAN] - at, at - endOf(life), 0);
      if (away <= nearest) { nearest = away; best = index; }
    }
    if (best >= 0) choose(best, false);
  }

  function step(by) {
    if (!matched.length) return;
    const at = matched.indexOf(chosen);
    choose(matched[at < 0 ? 0 : Math.min(matched.length - 1, Math.max(0, at + by))], true);
  }

  function show(from, to) {
    const wide = Math.min(span, Math.max(1000, to - from));
    low = Math.min(Math.max(0, from), span - wide);
    high = low + wide;
    draw();
  }

  const zoom = (factor) => {
    const life = chosen >= 0 ? lives[chosen] : null;
    const middle = life && life[BEGAN] <= high && endOf(life) >= low
      ? (Math.max(low, life[BEGAN]) + Math.min(high, endOf(life))) / 2 : (low + high) / 2;
    const half = ((high - low) * factor) / 2;
    show(middle - half, middle + half);
  };
  const move = (share) => show(low + (high - low) * share, high + (high - low) * share);

  const KEYS = {
    ArrowDown: () => step(1), ArrowUp: () => step(-1), PageDown: () => step(20), PageUp: () => step(-20),
    Home: () => step(-matched.length), End: () => step(matched.length),
    ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2),
    "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: () => show(0, span),
  };
  $("frame").addEventListener("keydown", (event) => {
    const act = KEYS[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "/" && document.activeElement !== $("filter")) {
      event.preventDefault();
      $("filter").focus();
    }
  });
  $("frame").addEventListener("mousemove", pointed);
  $("frame").addEventListener("scroll", draw);
  $("filter").addEventListener("input", filter);
  $("in").addEventListener("click", () => zoom(0.5));
  $("out").addEventListener("click", () => zoom(2));
  $("all").addEventListener("click", () => show(0, span));
  $("more").addEventListener("click", list);
  window.addEventListener("resize", filter);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  const print = (now) => () => {
    printing = now;
    const hue = colours();
    crowd(hue);
    bars(hue);
  };
  window.addEventListener("beforeprint", print(true));
  window.addEventListener("afterprint", print(false));

  KINDS.forEach((kind, index) => {
    const count = lives.reduce((n, life) => n + (life[KIND] === index), 0);
    if (!count) return;
    const label = document.createElement("label");
    const box = document.createElement("input");
    const dot = document.createElement("i");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => { wanted[index] = box.checked; filter(); });
    dot.style.background = "var(--" + kind + ")";
    label.append(box, dot, TITLES[index] + " " + count);
    $("kinds").append(label, " ");
  });
  $("told").textContent = data.told + " Times are local (" + zone() + "), as of " + moment(span) + ".";
  filter();
  document.documentElement.dataset.ready = String(Math.round(performance.now())); // ms, for tests
})();
