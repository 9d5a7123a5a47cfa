// The page of the camera app. All data comes from /api/events (StreamView, twice a second) and /video.
import { Video } from "./video.js";

const SILENT_MS = 4000; // eight views missed
const RETRY_MS = 2000;
const HISTORY = 120; // samples: a minute
const $ = (id) => document.getElementById(id);

const cards = new Map(); // by source: its elements and what was last seen of it
let view = null;
let lastView = 0;
let stream = null;
let single = null; // the source shown large

// --- words and numbers --------------------------------------------------------------------------

const integer = new Intl.NumberFormat("en");
const ms = (value) => (value >= 9999.5 ? `${(value / 1000).toFixed(0)} s` : value >= 999.5 ? `${(value / 1000).toFixed(1)} s` : value >= 9.95 ? `${value.toFixed(0)} ms` : `${value.toFixed(1)} ms`);
const bare = (value) => (value >= 99.5 ? integer.format(Math.round(value)) : value.toFixed(1));
const percent = (share) => (share > 0.9995 && share < 1 ? ">99.9%" : `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`);
const bytes = (value) => (value >= 2 ** 30 ? `${(value / 2 ** 30).toFixed(2)} GiB` : `${(value / 2 ** 20).toFixed(0)} MiB`);

function duration(seconds) {
  const s = Math.floor(seconds);
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function set(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function setNumber(element, text) {
  const [number, unit] = text.split(" ");
  if (element.dataset.text === text) return;
  element.dataset.text = text;
  element.replaceChildren(number);
  if (unit) {
    const small = document.createElement("small");
    small.textContent = ` ${unit}`;
    element.append(small);
  }
}

function pairs(list, entries) {
  const key = JSON.stringify(entries);
  if (list.dataset.key === key) return;
  list.dataset.key = key;
  list.replaceChildren(
    ...entries.flatMap(([name, value, tone]) => {
      const dt = document.createElement("dt");
      const dd = document.createElement("dd");
      dt.textContent = name;
      dd.textContent = value;
      if (tone) dd.className = tone;
      return [dt, dd];
    }),
  );
}

// --- one source ---------------------------------------------------------------------------------

function stateOf(source) {
  return { state: source.status.state, word: source.status.frozen ? `${source.status.state}, FROZEN` : source.status.state };
}

function showState(badge, source) {
  const { state, word } = stateOf(source);
  badge.dataset.state = source.status.frozen && state === "LIVE" ? "DEGRADED" : state;
  set(badge.querySelector("span"), word);
}

function trouble(source, now) {
  const { state, reason, last_frame_ns: last, frozen } = source.status;
  if (state === "LIVE") return frozen ? "The picture does not change." : null;
  const what = { CONNECTING: "connecting", DEGRADED: "no frames come", LOST: "lost", ENDED: "the source has ended" }[state];
  const since = state === "ENDED" ? "" : last === null ? "\nno frame yet" : `\nlast frame ${duration((now - last) / 1e9)} ago`;
  return `${reason ?? what}${since}`;
}

function showTrouble(element, source, now) {
  const text = trouble(source, now);
  element.hidden = text === null;
  element.dataset.kind = source.status.frozen && source.status.state === "LIVE" ? "frozen" : "silent";
  set(element, text ?? "");
}

function showClasses(list, latest) {
  const top = latest?.top ?? [];
  while (list.children.length > top.length) list.lastChild.remove();
  while (list.children.length < top.length) {
    const item = document.createElement("li");
    const track = document.createElement("div");
    track.className = "track";
    item.append(document.createElement("b"), document.createElement("span"), track);
    list.append(item);
  }
  top.forEach(({ label, confidence }, rank) => {
    const [name, share, track] = list.children[rank].children;
    set(name, label);
    set(share, percent(confidence));
    track.style.setProperty("--share", confidence);
  });
}

function showPresent(element, present) {
  // Kept where nothing is in view, so that the cards stay in line; left out where nothing looks for events.
  element.hidden = $("events-panel").hidden;
  if (element.dataset.key === present.join("\n")) return;
  element.dataset.key = present.join("\n");
  const labels = document.createElement("b");
  labels.textContent = present.join(", ");
  element.replaceChildren(present.length ? "in view: " : "nothing in view", labels);
}

function drops({ frames_read: read, dropped }) {
  const reasons = Object.entries(dropped).filter(([, count]) => count > 0).sort(([, a], [, b]) => b - a);
  const total = reasons.reduce((sum, [, count]) => sum + count, 0);
  if (total === 0) return "no frame dropped";
  return `dropped ${integer.format(total)} of ${integer.format(read)} (${percent(total / read)}): ${reasons.map(([reason, count]) => `${reason} ${integer.format(count)}`).join(", ")}`;
}

function line(polyline, values, floor) {
  const top = Math.max(floor, ...values.filter((value) => value !== null));
  const from = HISTORY - values.length;
  polyline.setAttribute("points", values.flatMap((value, at) => (value === null ? [] : [`${from + at},${(23 - (21 * value) / top).toFixed(1)}`])).join(" "));
}

function remember(card, source) {
  // The percentiles are of the whole run; the line shows the mean of the last half second.
  const { mean_ms: mean, count } = source.metrics.latency.age;
  const before = card.seen;
  const fresh = before && count > before.count;
  card.age.push(fresh ? (mean * count - before.mean * before.count) / (count - before.count) : null);
  card.fps.push(source.metrics.fps);
  card.seen = { mean, count };
  for (const values of [card.age, card.fps]) if (values.length > HISTORY) values.shift();
}

function makeCard(name) {
  const root = $("card").content.cloneNode(true).firstElementChild;
  const find = (selector) => root.querySelector(selector);
  root.dataset.source = name;
  set(find("h2"), name);
  find("h2").title = name;
  find(".picture").setAttribute("aria-label", `Show ${name} large`);
  find("canvas").setAttribute("aria-label", `Live picture of ${name}`);
  find(".picture").addEventListener("click", () => openSingle(name));
  return { root, find, canvas: find("canvas"), age: [], fps: [], seen: null, state: null };
}

function showCard(card, source) {
  const { latency, fps } = source.metrics;
  card.root.dataset.live = source.status.state === "LIVE";
  showState(card.find(".badge"), source);
  showTrouble(card.find(".trouble"), source, view.now_ns);
  showClasses(card.find(".classes"), source.latest);
  showPresent(card.find(".present"), source.present);
  setNumber(card.find('[data-figure="fps"]'), bare(fps));
  for (const name of ["p50", "p95", "p99"]) {
    setNumber(card.find(`[data-figure="${name}"]`), latency.age.count ? ms(latency.age[`${name}_ms`]) : "–");
  }
  line(card.find('[data-line="fps"]'), card.fps, 1);
  line(card.find('[data-line="age"]'), card.age, 1);
  set(card.find(".drops"), [drops(source.metrics), accuracy(source.metrics)].filter(Boolean).join(" · "));
}

function accuracy({ labelled, correct }) {
  return labelled ? `top-1 ${percent(correct / labelled)} of ${integer.format(labelled)} labelled` : null;
}

function announce(source) {
  const card = cards.get(source.status.source_id);
  const { word } = stateOf(source);
  if (card.state !== null && card.state !== word) {
    set($("announce"), `${source.status.source_id} is ${word}${source.status.reason ? `: ${source.status.reason}` : ""}`);
  }
  card.state = word;
}

function showSources() {
  const names = view.sources.map((source) => source.status.source_id);
  for (const [name, card] of cards) {
    if (!names.includes(name)) {
      card.root.remove();
      cards.delete(name);
    }
  }
  $("sources").dataset.count = names.length;
  for (const source of view.sources) {
    const name = source.status.source_id;
    if (!cards.has(name)) {
      cards.set(name, makeCard(name));
      $("sources").append(cards.get(name).root);
    }
    remember(cards.get(name), source);
    announce(source);
    showCard(cards.get(name), source);
  }
}

// --- the large view -----------------------------------------------------------------------------

function openSingle(name) {
  single = name;
  const canvas = $("single").querySelector("canvas");
  const small = cards.get(name).canvas;
  paint(canvas, small, small.width, small.height); // until its first picture comes
  showSingle();
  if (!$("single").open) $("single").showModal();
  watch();
}

function showSingle() {
  const source = view?.sources.find((each) => each.status.source_id === single);
  if (!source) return;
  const { status, metrics } = source;
  const find = (selector) => $("single").querySelector(selector);
  set($("single-name"), single);
  find("canvas").setAttribute("aria-label", `Live picture of ${single}`);
  showState(find(".badge"), source);
  showTrouble(find(".trouble"), source, view.now_ns);
  showClasses(find(".classes"), source.latest);
  showPresent(find(".present"), source.present);
  find("tbody").replaceChildren(
    ...Object.entries(metrics.latency).map(([stage, figures]) => {
      const row = document.createElement("tr");
      row.dataset.stage = stage;
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = stage;
      row.append(head, ...["p50_ms", "p95_ms", "p99_ms", "max_ms"].map((key) => {
        const cell = document.createElement("td");
        cell.textContent = figures.count ? bare(figures[key]) : "–";
        return cell;
      }));
      return row;
    }),
  );
  const reasons = Object.entries(metrics.dropped).map(([reason, count]) => [`dropped, ${reason}`, integer.format(count)]);
  pairs(find(".facts"), [
    ["FPS", `${bare(metrics.fps)}${status.fps ? ` of ${bare(status.fps)}` : ""}`],
    ...(status.size_wh ? [["size", status.size_wh.join(" × ")]] : []),
    ["frames read", integer.format(metrics.frames_read)],
    ["classified", integer.format(metrics.frames_inferred)],
    ...reasons,
    ...(metrics.labelled ? [["top-1", `${percent(metrics.correct / metrics.labelled)} of ${integer.format(metrics.labelled)}`]] : []),
    ["restarts", integer.format(status.restarts)],
    ["stalls", integer.format(status.stalls)],
    [`${status.state.toLowerCase()} for`, duration((view.now_ns - status.since_ns) / 1e9)],
  ]);
  $("previous").hidden = $("next").hidden = cards.size < 2;
}

function turn(step) {
  const names = [...cards.keys()];
  openSingle(names[(names.indexOf(single) + step + names.length) % names.length]);
}

$("previous").addEventListener("click", () => turn(-1));
$("next").addEventListener("click", () => turn(1));
$("close").addEventListener("click", () => $("single").close());
$("single").addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") turn(-1);
  if (event.key === "ArrowRight") turn(1);
});
$("single").addEventListener("close", () => {
  if ($("single").open) return; // opened again before the event came
  const card = cards.get(single);
  single = null;
  watch();
  card?.find(".picture").focus();
});

// --- engine, device, events ---------------------------------------------------------------------

function showEngine() {
  const { engine } = view;
  const verified = view.preprocessing.startsWith("verified");
  pairs($("engine"), [
    ["bundle", engine.bundle],
    ["digest", engine.bundle_digest],
    ["engine", engine.engine],
    ["precision", engine.precision],
    ["mean batch", engine.batches ? (engine.batched_frames / engine.batches).toFixed(2) : "–"],
    ["reloads", engine.reload_failures ? `${engine.reloads}, ${engine.reload_failures} refused` : `${engine.reloads}`],
    ["preprocessing", view.preprocessing, verified ? "good" : ""],
    ...(view.max_age_ms === null ? [] : [["latency budget", ms(view.max_age_ms)]]),
    ["up", duration(view.uptime_s)],
  ]);
  $("reload-error").hidden = !engine.last_reload_error;
  set($("reload-error"), engine.last_reload_error ? `Refused: ${engine.last_reload_error}` : "");
}

function showDevice() {
  const { device } = view;
  const entries = [
    ...Object.entries(device.temperatures_c).map(([sensor, value]) => [sensor, `${value.toFixed(1)} °C`]),
    ...Object.entries(device.power_mw).map(([rail, value]) => [rail, `${(value / 1000).toFixed(2)} W`]),
    ...(device.power_mode === null ? [] : [["mode", device.power_mode]]),
    ...(device.cpu_percent === null ? [] : [["CPU load", `${device.cpu_percent.toFixed(0)}%`]]),
    ...(device.memory_used_bytes === null ? [] : [["memory", bytes(device.memory_used_bytes)]]),
  ];
  $("device-panel").hidden = entries.length === 0;
  pairs($("device"), entries);
}

function showEvents() {
  const outputs = Object.entries(view.events).filter(([name]) => name !== "page");
  $("events-panel").hidden = outputs.length === 0 && view.recent_events.length === 0;
  pairs($("event-outputs"), outputs.map(([name, counts]) => {
    const lost = counts.dropped ? `, ${integer.format(counts.dropped)} given up` : "";
    const waiting = counts.queued ? `, ${integer.format(counts.queued)} waiting` : "";
    return [name, `${integer.format(counts.delivered ?? 0)} delivered${waiting}${lost}`, counts.dropped ? "bad" : ""];
  }));
  const newest = view.recent_events[0];
  const key = newest ? `${newest.source_id} ${newest.timestamp_ns} ${newest.kind} ${newest.label}` : "";
  if ($("events").dataset.key === key) return;
  $("events").dataset.key = key;
  $("events").replaceChildren(
    ...view.recent_events.map((event) => {
      const item = document.createElement("li");
      const time = document.createElement("time");
      time.dateTime = event.time_utc;
      time.textContent = new Date(event.time_utc).toLocaleTimeString([], { hour12: false });
      const what = document.createElement("span");
      const label = document.createElement("b");
      label.textContent = event.label;
      what.append(label, event.kind === "enter" ? " entered " : " left ", event.source_id);
      const detail = document.createElement("small");
      detail.textContent = event.kind === "enter" ? percent(event.confidence) : duration(event.seconds ?? 0);
      item.append(time, what, detail);
      return item;
    }),
  );
}

async function command(button, path, done) {
  button.disabled = true;
  set($("command-result"), "…");
  try {
    const response = await fetch(path, { method: "POST", headers: { "X-Edgefold": "1" } });
    const text = await response.text();
    const body = text.startsWith("{") ? JSON.parse(text) : { message: text.trim() };
    set($("command-result"), response.ok ? done(body) : body.message);
  } catch (error) {
    set($("command-result"), "No answer from the app.");
  }
  button.disabled = false;
}

$("check").addEventListener("click", () => command($("check"), "/check", (body) => `Preprocessing: ${body.preprocessing}`));
$("reload").addEventListener("click", () => command($("reload"), "/reload", () => "The bundle was loaded anew."));

// --- the connection -----------------------------------------------------------------------------

function show(message) {
  view = JSON.parse(message.data);
  lastView = performance.now();
  showEvents();
  showSources();
  showEngine();
  showDevice();
  if (single !== null) {
    if (cards.has(single)) showSingle();
    else $("single").close();
  }
  const live = view.sources.filter((source) => source.status.state === "LIVE").length;
  const fps = view.sources.reduce((sum, source) => sum + source.metrics.fps, 0);
  set($("summary"), `${live} of ${view.sources.length} live · ${bare(fps)} FPS · ${view.engine.bundle} ${view.engine.precision}`);
  document.title = `${live}/${view.sources.length} live · Edgefold`;
  showConnection();
}

function showConnection() {
  const silent = performance.now() - lastView;
  const lost = lastView > 0 && silent > SILENT_MS;
  const state = lost ? "LOST" : lastView > 0 ? "LIVE" : "CONNECTING";
  $("connection").dataset.state = state;
  set($("connection").querySelector("span"), lost ? "no connection" : lastView > 0 ? "connected" : "connecting");
  document.body.classList.toggle("disconnected", lost);
  if (lost) {
    if ($("lost").hidden) {
      const since = new Date(Date.now() - silent).toLocaleTimeString([], { hour12: false });
      set($("lost"), `No connection to the app since ${since}. What you see is old.`);
      document.title = "no connection · Edgefold";
    }
    $("lost").hidden = false;
    const note = $("single").querySelector(".trouble"); // the banner stands behind the large view
    note.hidden = false;
    set(note, $("lost").textContent);
  } else {
    $("lost").hidden = true;
  }
}

function connect() {
  stream?.close();
  stream = new EventSource("/api/events");
  stream.addEventListener("message", show);
}

function paint(canvas, picture, width, height) {
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  canvas.getContext("2d").drawImage(picture, 0, 0);
  canvas.dataset.pictures = Number(canvas.dataset.pictures ?? 0) + 1;
}

const video = new Video(
  (source, bitmap) => {
    const canvas = source === single ? $("single").querySelector("canvas") : cards.get(source)?.canvas;
    if (canvas) paint(canvas, bitmap, bitmap.width, bitmap.height);
  },
  (text) => {
    $("video-note").hidden = text === null;
    set($("video-note"), text ?? "");
  },
);

// One connection for the figures and one for the pictures, and neither while nobody looks.
function watch() {
  if (document.hidden) {
    video.stop();
    stream?.close();
    stream = null;
    return;
  }
  if (stream === null) {
    if (lastView > 0) lastView = performance.now(); // nobody listened, so the silence says nothing
    connect();
  }
  video.start(single);
}

setInterval(() => {
  if (document.hidden) return;
  showConnection();
  // EventSource gives up for good on an answer that is no stream, and does not notice a silent peer.
  if (stream?.readyState === EventSource.CLOSED || performance.now() - lastView > SILENT_MS) connect();
}, RETRY_MS);
document.addEventListener("visibilitychange", watch);

const address = new URL(location.href);
if (address.searchParams.has("token")) {
  address.searchParams.delete("token"); // it is in a cookie now, and need not be read over a shoulder
  history.replaceState(null, "", address);
}
watch();
