// The curves of the runs in the element `data`, and their scales where they are opened.
{
  const runs = JSON.parse(document.getElementById("data").textContent);
  const place = document.getElementById("charts");
  const shown = runs.map(() => true), charts = [];
  const WIDTH = 460, HEIGHT = 220, LEFT = 56, RIGHT = 10, TOP = 8, BOTTOM = 26;
  let axis = "step", smooth = 7, logarithmic = false;

  function make(kind, parent, className, text) {
    const element = document.createElement(kind);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }
  function draw(kind, parent, values, text) {
    const part = document.createElementNS("http://www.w3.org/2000/svg", kind);
    for (const [key, value] of Object.entries(values)) part.setAttribute(key, value);
    if (text !== undefined) part.textContent = text;
    parent.append(part);
    return part;
  }

  // --- numbers in words -----------------------------------------------------------------------
  function short(value) {
    const size = Math.abs(value);
    for (const [least, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= least) return `${+(value / (sign === "k" ? 1e3 : least)).toPrecision(4)} ${sign}`;
    }
    return size !== 0 && size < 1e-3 ? value.toExponential(1) : `${+value.toPrecision(4)}`;
  }
  function time(seconds) {
    if (seconds < 120) return `${+seconds.toPrecision(3)} s`;
    return seconds < 7200 ? `${+(seconds / 60).toPrecision(3)} min` : `${+(seconds / 3600).toPrecision(3)} h`;
  }
  function position(value) {
    return axis === "seconds" ? time(value) : short(value);
  }

  // --- what is drawn --------------------------------------------------------------------------
  // A series: its run, columns of steps, seconds and values, and how it looks.
  function along(run, columns) {
    if (axis === "tokens") return columns.step.map((step) => step * run.curves.per_step);
    return columns[axis];
  }
  function points(series) {
    const x = along(runs[series.run], series.columns);
    return series.values.map((y, i) => [x[i], y]).filter(([, y]) => y !== null && y !== undefined
      && (!logarithmic || y > 0));
  }
  function averaged(found) {
    const half = Math.floor(smooth / 2);
    if (!half) return found;
    return found.map(([x], i) => {
      const near = found.slice(Math.max(0, i - half), i + half + 1);
      return [x, near.reduce((sum, [, y]) => sum + y, 0) / near.length];
    });
  }
  const LOOKS = ["", "second", "third"];
  function each(make) {
    return runs.flatMap((run, i) => make(run, i)).filter((series) =>
      series.values.some((value) => value !== null && value !== undefined));
  }
  function trained(key) {
    return each((run, i) => [{ run: i, name: run.name, columns: run.curves.train,
      values: run.curves.train[key], smooth: true }]);
  }
  function validated(key, name) {
    return each((run, i) => [{ run: i, name: `${run.name}${name}`, columns: run.curves.valid,
      values: run.curves.valid[key], dots: true }]);
  }

  const unit = runs.every((run) => run.curves.unit === "tokens") ? "tokens" : "read";
  const CHARTS = [
    ["Loss, nats (line: training, dots: validation)", [...trained("loss"), ...validated("loss", ", validation")], true],
    ["Validation, bits per byte", validated("bits_per_byte", ""), true],
    ["Validation, score", validated("score", "")],
    ["Learning rate", trained("lr").map((series) => ({ ...series, smooth: false }))],
    ["Norm of the gradients", trained("grad_norm")],
    [`Speed, ${unit === "tokens" ? "tokens" : "sequences or tokens"} per second`, trained("speed").map((series) => ({ ...series, smooth: false }))],
    ["Peak memory, bytes", trained("memory").map((series) => ({ ...series, smooth: false }))],
  ];
  runs.forEach((run, i) => {
    const scales = run.curves.scales;
    for (const [key, title] of [["weights", "Weights of the scales"], ["lags", "Learned lags, tokens"]]) {
      const series = Object.entries(scales[key]).map(([name, values], k) => ({
        run: i, name, columns: scales, values, colour: k % 8, look: LOOKS[Math.floor(k / 8) % 3] }));
      if (series.length && scales.step.length > 1) {
        CHARTS.push([`${title}${runs.length > 1 ? `: ${run.name}` : ""}`, series]);
      }
    }
  });

  // --- one chart ------------------------------------------------------------------------------
  function chart(title, all, cut) {
    const figure = make("figure", grid, "chart");
    make("figcaption", figure, "", title);
    const svg = draw("svg", figure, { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img",
      "aria-label": `${title}; arrow keys read values` });
    const told = make("p", figure, "told");
    told.setAttribute("aria-live", "polite");
    let lines = [], places = [], here = -1, toX, cursor;

    function redraw() {
      svg.replaceChildren();
      lines = all.filter((series) => shown[series.run])
        .map((series) => ({ ...series, raw: points(series) }))
        .filter((series) => series.raw.length)
        .map((series) => ({ ...series, found: series.smooth ? averaged(series.raw) : series.raw }));
      figure.hidden = !lines.length;
      if (!lines.length) return;
      const xs = lines.flatMap((series) => series.found.map(([x]) => x));
      // The first tenth of a loss is not what the eye should measure the rest by.
      const ys = lines.flatMap((series) => series.found.slice(
        cut && !series.dots ? Math.floor(series.found.length / 10) : cut && series.found.length > 1 ? 1 : 0).map(([, y]) => y));
      const change = logarithmic ? Math.log10 : (y) => y;
      let low = Math.min(...ys.map(change)), high = Math.max(...ys.map(change));
      const spare = (high - low || Math.abs(high) || 1) * 0.06;
      low -= spare; high += spare;
      const left = Math.min(0, ...xs), right = Math.max(...xs) || 1;
      toX = (x) => LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / (right - left || 1);
      const toY = (y) => TOP + (HEIGHT - TOP - BOTTOM) * Math.min(1.2, Math.max(-0.2, (high - change(y)) / (high - low)));
      const cutout = draw("clipPath", draw("defs", svg, {}), { id: `clip${charts.indexOf(self)}` });
      draw("rect", cutout, { x: LEFT, y: 0, width: WIDTH - LEFT, height: HEIGHT - BOTTOM + 4 });
      for (const y of ticks(low, high, 4)) {
        const at = TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low);
        draw("line", svg, { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at });
        draw("text", svg, { x: LEFT - 6, y: at + 4, "text-anchor": "end" }, short(logarithmic ? 10 ** y : y));
      }
      for (const x of ticks(left, right, 4)) {
        draw("line", svg, { class: "grid", x1: toX(x), x2: toX(x), y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4 });
        draw("text", svg, { x: toX(x), y: HEIGHT - 6, "text-anchor": x > left + 0.92 * (right - left) ? "end" : "middle" }, position(x));
      }
      const inner = draw("g", svg, { "clip-path": `url(#clip${charts.indexOf(self)})` });
      for (const series of lines) {
        const colour = `c${series.colour ?? series.run % 8}`;
        const path = (found) => found.map(([x, y], i) => `${i ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
        if (series.smooth && smooth > 1) draw("path", inner, { class: `${colour} pale`, d: path(series.raw) });
        draw("path", inner, { class: `${colour} ${series.look ?? ""} ${series.dots ? "pale" : ""}`, d: path(series.found) });
        if (series.dots) series.found.forEach(([x, y]) => draw("circle", inner, { class: `${colour} dot`, cx: toX(x), cy: toY(y), r: 3.5 }));
        if (!series.dots && series.colour === undefined && runs[series.run].state === "died") {
          const [x, y] = series.found.at(-1), cx = toX(x), cy = toY(y);
          draw("path", svg, { class: `${colour} end`, d: `M${cx - 5} ${cy - 5}L${cx + 5} ${cy + 5}M${cx - 5} ${cy + 5}L${cx + 5} ${cy - 5}` });
        }
      }
      cursor = draw("line", svg, { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
      places = [...new Set(xs)].sort((a, b) => a - b);
      tell(-1);
    }

    function tell(index) {
      here = index;
      told.replaceChildren();
      if (index < 0) {
        cursor.setAttribute("visibility", "hidden");
        const many = lines.length > 8 ? lines.slice(0, 8) : lines;
        many.forEach((series) => legend(series, series.found.at(-1)[1]));
        if (many.length < lines.length) make("span", told, "", `and ${lines.length - 8} more`);
        return;
      }
      const x = places[index];
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", toX(x));
      cursor.setAttribute("x2", toX(x));
      make("span", told, "", axis === "seconds" ? position(x) : `${axis === "step" ? "step" : unit} ${position(x)}`);
      told.append(" ");
      for (const series of lines) {
        if (x > series.found.at(-1)[0] || x < series.found[0][0]) continue;
        const near = series.found.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
        legend(series, near[1]);
      }
    }
    function legend(series, value) {
      const span = make("span", told, `c${series.colour ?? series.run % 8}`);
      make("i", span);
      span.append(runs.length > 1 || series.colour !== undefined || series.dots ? `${series.name} ` : "");
      make("b", span, "", short(value));
      told.append(" ");
    }

    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) / box.width * WIDTH;
      let best = 0;
      places.forEach((x, i) => { if (Math.abs(toX(x) - at) < Math.abs(toX(places[best]) - at)) best = i; });
      tell(best);
    }
    svg.addEventListener("pointermove", nearest);
    svg.addEventListener("pointerdown", nearest);
    svg.addEventListener("pointerleave", () => tell(-1));
    svg.addEventListener("blur", () => tell(-1));
    svg.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
      if (event.key === "Escape") return tell(-1);
      if (!(event.key in steps)) return;
      event.preventDefault();
      const from = here < 0 ? places.length - 1 : here;
      tell(Math.max(0, Math.min(places.length - 1, from + steps[event.key])));
    });
    const self = { redraw };
    charts.push(self);
    redraw();
  }

  function ticks(low, high, n) {
    const rough = (high - low) / n, size = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * size).find((each) => each >= rough) ?? rough;
    const found = [];
    for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step) found.push(Math.abs(x) < step * 1e-9 ? 0 : x);
    return found;
  }

  // --- what can be chosen ---------------------------------------------------------------------
  const controls = make("div", place, "controls");
  const against = make("fieldset", controls);
  make("legend", against, "", "against");
  for (const [value, words] of [["step", "steps"], ["tokens", unit === "tokens" ? "tokens" : "what was read"], ["seconds", "time"]]) {
    const label = make("label", against), input = make("input", label);
    input.type = "radio";
    input.name = "axis";
    input.value = value;
    input.checked = value === axis;
    input.addEventListener("change", () => { axis = value; charts.forEach((each) => each.redraw()); });
    label.append(` ${words}`);
  }
  const smoothing = make("label", controls, "", "smoothed over "), range = make("input", smoothing);
  range.type = "range";
  range.min = 1;
  range.max = 101;
  range.step = 2;
  range.value = smooth;
  range.setAttribute("aria-label", "lines that a curve is smoothed over");
  const lines = make("output", smoothing, "", ` ${smooth} lines`);
  range.addEventListener("input", () => {
    smooth = +range.value;
    lines.textContent = ` ${smooth} lines`;
    charts.forEach((each) => each.redraw());
  });
  const scale = make("label", controls), box = make("input", scale);
  box.type = "checkbox";
  box.name = "log";
  scale.append(" logarithmic");
  box.addEventListener("change", () => { logarithmic = box.checked; charts.forEach((each) => each.redraw()); });
  const coarse = Math.max(...runs.map((run) => run.curves.together));
  if (coarse > 1) make("p", place, "soft", `A point is the mean of up to ${coarse} lines of the metrics.`);
  const grid = make("div", place, "charts");
  for (const [title, series, cut] of CHARTS) if (series.length) chart(title, series, cut);
  if (!charts.length) make("p", place, "", "Nothing is measured yet.");

  for (const input of document.querySelectorAll("input[data-run]")) {
    input.addEventListener("change", () => {
      shown[+input.dataset.run] = input.checked;
      charts.forEach((each) => each.redraw());
    });
  }
  for (const details of document.querySelectorAll("details[data-scope]")) {
    details.addEventListener("toggle", () => {
      const inner = details.querySelector("div");
      if (details.open && !inner.hasChildNodes()) drawScope(inner, runs[+details.dataset.scope].scope);
    });
  }
}
