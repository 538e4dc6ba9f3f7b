// drawScope(root, picture): the scales of a text in an element; `picture` as scope.py gives it.
"use strict";

function drawScope(root, picture) {
  const T = picture.tokens.length;
  const cursors = [], withChanges = picture.blocks.some((block) => block.scales[0].change !== null);
  let here = 0;

  function make(kind, parent, className, text) {
    const element = document.createElement(kind);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  root.replaceChildren();
  const scope = make("section", root, "scope");
  const many = picture.n_before ? ` after ${picture.n_before.toLocaleString("en")} others` : "";
  const cost = picture.bits_per_byte === null ? "" : `, ${picture.bits_per_byte.toFixed(3)} bits/byte`;
  const whose = picture.run ? `${picture.run}: ` : "";
  make("p", scope, "", `${whose}${T.toLocaleString("en")} tokens${many}${cost}`);

  // --- the text -------------------------------------------------------------------------------
  make("p", scope, "caption",
    "Tokens, the darker the more bits; point at one, or use the arrow keys. Underlined: what the memory finds there.");
  const text = make("div", scope, "scope-tokens");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "tokens of the text; arrow keys go from one to the next");
  const most = Math.max(1, ...picture.bits.map((bits) => bits ?? 0));
  const spans = picture.tokens.map((token, i) => {
    const span = make("span", text, "", shown(token));
    span.style.backgroundColor = `rgba(226, 106, 32, ${0.75 * (picture.bits[i] ?? 0) / most})`;
    span.addEventListener("pointerenter", () => show(i));
    span.addEventListener("click", () => show(i));
    return span;
  });
  const detail = make("p", scope, "scope-detail");
  detail.setAttribute("aria-live", "polite");

  function shown(token) {
    return token.replace(/\n/g, "⏎\n").replace(/\t/g, "⇥").replace(/\r/g, "␍");
  }
  function quoted(i) {
    return JSON.stringify(picture.tokens[i]).replace(/^"/, "‘").replace(/"$/, "’");
  }

  // --- panels over the tokens -----------------------------------------------------------------
  const STOPS = {
    energy: [[48, 18, 80], [58, 82, 139], [32, 144, 140], [94, 201, 97], [253, 231, 36]],
    open: [[0, 34, 78], [66, 77, 108], [125, 124, 120], [189, 173, 104], [254, 232, 56]],
    found: [[120, 120, 130, 24], [240, 147, 95], [214, 69, 65], [158, 30, 130]],
  };
  function colour(stops, value) {
    const place = Math.min(1, Math.max(0, value)) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(place));
    const a = [...stops[low], 255], b = [...stops[low + 1], 255];
    return [0, 1, 2, 3].map((k) => Math.round(a[k] + (place - low) * (b[k] - a[k])));
  }

  // rows of T values from 0 to 1, or null for what is not drawn
  function strip(parent, rows, stops, label, height) {
    const place = make("div", parent, "scope-strip");
    if (height) place.style.height = height;
    const canvas = make("canvas", place);
    canvas.width = T;
    canvas.height = rows.length;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", label);
    const pen = canvas.getContext("2d"), image = pen.createImageData(T, rows.length);
    rows.forEach((row, y) => row.forEach((value, x) => {
      if (value !== null) image.data.set(colour(stops, value), 4 * (y * T + x));
    }));
    pen.putImageData(image, 0, 0);
    cursors.push(make("div", place, "cursor"));
    const point = (event) => {
      const box = place.getBoundingClientRect();
      show(Math.floor((event.clientX - box.left) / box.width * T));
    };
    place.addEventListener("pointermove", point);
    place.addEventListener("pointerdown", point);
  }

  function panel(caption, labels, rows, stops, side, height) {
    make("p", scope, "caption", caption);
    const grid = make("div", scope, `scope-panel${withChanges ? "" : " wide"}`);
    const names = make("div", grid, labels.length === rows.length ? "labels" : "labels ends");
    labels.forEach(([name, more]) => {
      const line = make("div", names, "", name);
      if (more) make("span", line, "more", more);
    });
    strip(grid, rows, stops, caption, height);
    if (!withChanges) return;
    const beside = make("div", grid, "side");
    (side ?? []).forEach((fill) => fill(make("div", beside)));
  }

  function lagsOf(scale) {
    const lags = scale.lags.map((lag) => lag.toFixed(1)).join("+");
    return `${lags ? `lag ${lags}, ` : ""}reach ${scale.reach}`;
  }

  function zeros(n) {
    return Array.from({ length: n }, () => new Array(T).fill(0));
  }

  for (const block of picture.blocks) {
    make("h3", scope, "", block.name);
    const changes = block.scales.map((scale) => scale.change);
    const largest = Math.max(1e-9, ...changes.map((change) => Math.abs(change ?? 0)));
    const side = !withChanges ? [] : changes.map((change) => (line) => {
      const bar = make("span", line, change < 0 ? "bar less" : "bar");
      bar.style.width = `${3.2 * Math.abs(change) / largest}rem`;
      line.append(`${change < 0 ? "−" : "+"}${Math.abs(change).toFixed(3)}`);
    });
    panel("Log energy of each scale's mixed band, each row from its least to its greatest"
      + (side.length ? "; on the right: bits per byte more with the scale silenced" : ""),
      block.scales.map((scale) => [scale.name, lagsOf(scale)]),
      block.scales.map((scale) => scale.shade), STOPS.energy, side);
    if (block.scales[0].openness !== null) {
      const all = block.scales.flatMap((scale) => scale.openness);
      const low = Math.min(...all), high = Math.max(...all);
      panel(`How far the gates are open, from ${(100 * low).toFixed(0)} % to ${(100 * high).toFixed(0)} %`,
        block.scales.map((scale) => [scale.name]),
        block.scales.map((scale) => scale.openness.map((v) => (v - low) / (high - low || 1))),
        STOPS.open);
    }
    if (block.recall) {
      const rows = zeros(T), strongest = Math.max(...block.recall.reads.flat().map(([, share]) => share));
      block.recall.reads.forEach((reads, t) => reads.forEach(([s, share]) => {
        rows[s][t] = Math.sqrt(share / strongest);
      }));
      panel("Which earlier tokens (downwards) the memory finds at each token (across)",
        [["first token"], ["last token"]], rows, STOPS.found, [], "11rem");
    }
    for (const slots of block.slots) {
      const n = Math.min(48, slots.n_rows), rows = zeros(n);
      slots.reads.forEach((reads, t) => reads.forEach(([row, share]) => {
        rows[Math.floor(row * n / slots.n_rows)][t] += share;
      }));
      panel(`Which of its ${slots.n_rows.toLocaleString("en")} rows the ${slots.name} reads`,
        [["first row"], ["last row"]], rows, STOPS.found, [], "8rem");
    }
    make("p", scope, "caption", "Lags of the delays by level, as large as they count");
    delays(block);
  }
  const bars = zeros(24);
  picture.bits.forEach((bits, t) => {
    for (let y = 0; y < 24; y++) bars[23 - y][t] = (bits ?? 0) / most > y / 24 ? 0.5 : null;
  });
  make("h3", scope, "", "The prediction");
  panel("Bits per token", [[`${most.toFixed(1)} bits`], ["0"]], bars, STOPS.found, [], "4rem");

  function delays(block) {
    const top = Math.max(...block.delays.map((delay) => delay.level));
    const far = Math.max(2, ...block.delays.flatMap((delay) => delay.lags));
    const x = (lag) => 60 + 240 * Math.log2(lag) / Math.log2(far), y = (level) => 12 + 18 * (top - level);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const put = (kind, values, words) => {
      const part = document.createElementNS(svg.namespaceURI, kind);
      for (const [key, value] of Object.entries(values)) part.setAttribute(key, value);
      part.textContent = words ?? "";
      svg.append(part);
      return part;
    };
    const height = 18 * (top + 1) + 20;
    svg.setAttribute("viewBox", `0 0 330 ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `lags of the delays of ${block.name}`);
    for (let level = 0; level <= top; level++) {
      put("text", { x: 4, y: y(level) + 4 }, `level ${level}`);
      put("line", { x1: 52, x2: 320, y1: y(level), y2: y(level) });
    }
    for (let lag = 1; lag <= far; lag *= 2) {
      put("text", { x: x(lag), y: height - 3, "text-anchor": "middle" }, `${lag}`);
    }
    for (const delay of block.delays) {
      delay.lags.forEach((lag, i) => {
        const look = { fill: delay.basis ? "#2c8a5b" : "#4a6fd0", "fill-opacity": 0.75 };
        const dot = put("circle", { cx: x(lag), cy: y(delay.level), r: 7 * Math.sqrt(delay.weights[i]), ...look });
        const title = document.createElementNS(svg.namespaceURI, "title");
        title.textContent = `lag ${lag}: ${(100 * delay.weights[i]).toFixed(1)} %`;
        dot.append(title);
      });
    }
    scope.append(svg);
  }

  // --- one token ------------------------------------------------------------------------------
  function show(i) {
    here = Math.min(T - 1, Math.max(0, i));
    for (const cursor of cursors) cursor.style.left = `${100 * (here + 0.5) / T}%`;
    const found = new Map();
    const lines = picture.blocks.map((block) => {
      const strong = block.scales.reduce((a, b) => (b.energy[here] > a.energy[here] ? b : a));
      let line = `${block.name}: most energy in ${strong.name}`;
      if (block.recall) {
        const reads = block.recall.reads[here];
        reads.forEach(([s, share]) => found.set(s, Math.max(share, found.get(s) ?? 0)));
        const words = reads.map(([s, share]) =>
          `${quoted(s)} ${here === s ? "itself" : `${here - s} back`} ${(100 * share).toFixed(0)} %`);
        line += words.length ? `; the memory finds ${words.join(", ")}` : "";
      }
      return line;
    });
    spans.forEach((span, k) => {
      span.classList.toggle("here", k === here);
      span.classList.toggle("found", found.has(k) && k !== here);
    });
    const bits = picture.bits[here];
    detail.replaceChildren();
    make("b", detail, "", quoted(here));
    detail.append(` is token ${here + 1} of ${T}${bits === null ? "" : `, ${bits.toFixed(2)} bits`}\n${lines.join("\n")}`);
  }
  text.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10, Home: -T, End: T };
    if (!(event.key in steps)) return;
    event.preventDefault();
    show(here + steps[event.key]);
    spans[here].scrollIntoView({ block: "nearest" });
  });
  show(T - 1);
}
