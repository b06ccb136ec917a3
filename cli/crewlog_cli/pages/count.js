// -- how many lived at once: exact steps, whatever the width -------------------------------------

// Steps of a count: `at` are times, `count` what holds from there to the next. An end comes before a
// beginning of the same ms: who follows another does not live beside it. A life of no length is
// one for its instant: `peak` has it, the step after it no more.
function steps(indexes, ends) {
  const size = indexes.length, begins = new Float64Array(size);
  const stops = new Float64Array(size); // time * 2, and 1 more for a life of no length: it ends after it began
  let sorted = true;
  for (let i = 0; i < size; i++) {
    const index = indexes[i];
    begins[i] = began[index];
    sorted &&= i === 0 || begins[i] >= begins[i - 1];
    stops[i] = ends[index] > began[index] ? ends[index] * 2 : began[index] * 2 + 1;
  }
  if (!sorted) begins.sort();
  stops.sort();
  const times = new Float64Array(2 * size), counts = new Int32Array(2 * size), peaks = new Int32Array(2 * size);
  let count = 0, begin = 0, stop = 0, length = 0;
  while (stop < size) {
    const when = Math.min(begin < size ? begins[begin] : Infinity, Math.floor(stops[stop] / 2));
    for (; stop < size && stops[stop] === when * 2; stop++) count--;
    let peak = count;
    for (; begin < size && begins[begin] === when; begin++) peak = ++count;
    for (; stop < size && stops[stop] === when * 2 + 1; stop++) count--;
    times[length] = when;
    counts[length] = count;
    peaks[length++] = peak;
  }
  return { times: times.subarray(0, length), counts, peaks };
}

// The first place whose time is not before `when`.
function place(times, when) {
  let low = 0, high = times.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (times[middle] < when) low = middle + 1; else high = middle;
  }
  return low;
}

// Return for each column the most and the fewest that lived in it, and the most of all.
function columnsOf(found, low, high, columns) {
  const most = new Int32Array(columns), least = new Int32Array(columns);
  let at = place(found.times, low), peak = 0;
  let now = at > 0 ? found.counts[at - 1] : 0;
  for (let x = 0; x < columns; x++) {
    const from = low + ((high - low) * x) / columns, last = x === columns - 1;
    const until = last ? high : low + ((high - low) * (x + 1)) / columns;
    let up = now, down = now;
    if (found.times[at] === from) { // who ended at this very moment lived before it
      up = found.peaks[at];
      down = now = found.counts[at++];
    }
    while (at < found.times.length && (found.times[at] < until || (last && found.times[at] === until))) {
      up = Math.max(up, found.peaks[at]);
      now = found.counts[at];
      if (found.times[at] < until) down = Math.min(down, now); // an end of the period is no idle moment
      at++;
    }
    most[x] = up;
    least[x] = down;
    peak = Math.max(peak, up);
  }
  return { most, least, peak };
}
