"use strict";
// One chart over the step: hover for values, drag to zoom, double click to come back. Data: see commands/report.py.
const data = JSON.parse(document.getElementById("data").textContent);
const box = document.querySelector(".chart"), canvas = document.querySelector("canvas"), tip = document.getElementById("tip");
const pick = document.getElementById("pick"), slide = document.getElementById("smooth"), log = document.getElementById("log");
const said = document.getElementById("reach"), back = document.getElementById("back");
const LEFT = 58, RIGHT = 14, TOP = 14, BOTTOM = 34;
const all = Object.values(data.series).flatMap(s => [s.steps[0], s.steps[s.steps.length - 1]]);
const full = all.length ? [Math.min(...all), Math.max(...all, Math.min(...all) + 1)] : [0, 1];
let view = full.slice(), hover = null, drag = null, smooth = [];

const colour = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const shown = () => data.series[pick.value];
const averages = () => data.smoothed.includes(pick.value);
const reach = () => !averages() ? 0 : Math.round(Math.pow(Math.max(2, (full[1] - full[0]) / 4), slide.value / 100) - 1);

// Over about `steps` steps, exponentially less to both sides: the same as unbroken/commands/plot.py's.
function averaged(series, steps) {
  const decayed = order => {
    let total = 0, weight = 0, before = null;
    const found = [];
    for (const i of order) {
      if (series.values[i] === null) continue;
      const kept = before === null ? 0 : Math.exp(-Math.max(1, Math.abs(series.steps[i] - before)) / (steps / 2));
      total = total * kept + series.values[i]; weight = weight * kept + 1; before = series.steps[i];
      found[i] = [total, weight];
    }
    return found;
  };
  if (steps < 1) return series.values;
  const order = series.steps.map((_, i) => i), ahead = decayed(order), behind = decayed(order.slice().reverse());
  return series.values.map((value, i) =>
    value === null ? null : (ahead[i][0] + behind[i][0] - value) / (ahead[i][1] + behind[i][1] - 1));
}

function ticks(low, high, most) {
  const raw = (high - low) / most, power = Math.pow(10, Math.floor(Math.log10(raw)));
  const step = [1, 2, 5, 10].map(m => m * power).find(s => s >= raw * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step || 0);
  return found;
}

// Of powers of ten 1, 2 and 5 where that is enough of them; else the exponents' own.
function logTicks(low, high) {
  const found = [];
  for (let k = Math.floor(low); k <= high; k++) for (const m of [1, 2, 5]) found.push(k + Math.log10(m));
  const there = found.filter(t => t >= low && t <= high);
  return there.length > 2 && there.length < 10 ? there : ticks(low, high, 6);
}

const spelled = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(5));

function range(curves) {
  let low = Infinity, high = -Infinity;
  for (const [steps, values] of curves)
    values.forEach((v, i) => {
      if (v === null || steps[i] < view[0] || steps[i] > view[1] || (log.checked && v <= 0)) return;
      low = Math.min(low, v); high = Math.max(high, v);
    });
  if (low > high) return null;
  if (log.checked) [low, high] = [Math.log10(low), Math.log10(high)];
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

function draw() {
  const width = box.clientWidth, height = box.clientHeight, ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio); pen.clearRect(0, 0, width, height);
  pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
  const main = shown(), val = pick.value === "train_loss" ? data.series.val_loss : null;
  const curves = [[main.steps, main.values]];
  if (val) curves.push([val.steps, val.values]);
  const span = range(curves);
  if (!span) { pen.fillStyle = colour("soft"); pen.fillText("nothing to draw here", LEFT, height / 2); return; }
  const x = s => LEFT + (s - view[0]) / (view[1] - view[0]) * (width - LEFT - RIGHT);
  const y = v => TOP + (span[1] - (log.checked ? Math.log10(v) : v)) / (span[1] - span[0]) * (height - TOP - BOTTOM);

  pen.lineWidth = 1; pen.textBaseline = "middle"; pen.textAlign = "right";
  for (const t of log.checked ? logTicks(span[0], span[1]) : ticks(span[0], span[1], 6)) {
    const at = TOP + (span[1] - t) / (span[1] - span[0]) * (height - TOP - BOTTOM);
    pen.strokeStyle = colour("line"); pen.beginPath(); pen.moveTo(LEFT, at); pen.lineTo(width - RIGHT, at); pen.stroke();
    pen.fillStyle = colour("soft"); pen.fillText(spelled(log.checked ? Math.pow(10, t) : t), LEFT - 7, at);
  }
  pen.textAlign = "center"; pen.textBaseline = "top";
  for (const t of ticks(view[0], view[1], Math.max(2, width / 110)))
    if (Number.isInteger(t)) pen.fillText(t.toLocaleString("en"), x(t), height - BOTTOM + 8);

  pen.save(); pen.beginPath(); pen.rect(LEFT, TOP - 4, width - LEFT - RIGHT, height - TOP - BOTTOM + 8); pen.clip();
  for (const [start, reached] of data.gaps) {
    pen.fillStyle = colour("down"); pen.globalAlpha = 0.16;
    pen.fillRect(x(start), TOP, x(reached) - x(start), height - TOP - BOTTOM);
    pen.globalAlpha = 1; pen.strokeStyle = colour("soft"); pen.setLineDash([4, 4]);
    pen.beginPath(); pen.moveTo(x(start), TOP); pen.lineTo(x(start), height - BOTTOM); pen.stroke(); pen.setLineDash([]);
  }
  pen.fillStyle = colour("saves");
  for (const s of data.saves) pen.fillRect(x(s) - 1, height - BOTTOM - 6, 2, 6);
  const trace = (steps, values, ink, alpha, wide) => {
    pen.strokeStyle = ink; pen.globalAlpha = alpha; pen.lineWidth = wide; pen.lineJoin = "round"; pen.beginPath();
    let down = false;
    values.forEach((v, i) => {
      if (v === null || (log.checked && v <= 0)) { down = false; return; }
      down ? pen.lineTo(x(steps[i]), y(v)) : pen.moveTo(x(steps[i]), y(v)); down = true;
    });
    pen.stroke(); pen.globalAlpha = 1;
  };
  const steps = reach();
  trace(main.steps, main.values, colour("train"), steps ? 0.28 : 1, steps ? 1 : 1.6);
  if (steps) trace(main.steps, smooth, colour("train"), 1, 2);
  if (val) {
    trace(val.steps, val.values, colour("val"), 1, 1.5);
    pen.fillStyle = colour("val");
    val.steps.forEach((s, i) => { if (val.values[i] !== null) { pen.beginPath(); pen.arc(x(s), y(val.values[i]), 3, 0, 7); pen.fill(); } });
  }
  if (drag && drag[1] !== null) {
    pen.fillStyle = colour("train"); pen.globalAlpha = 0.15;
    pen.fillRect(drag[0], TOP, drag[1] - drag[0], height - TOP - BOTTOM); pen.globalAlpha = 1;
  }
  if (hover !== null) point(pen, x, y, main, val, width, height);
  pen.restore();
}

const nearest = (steps, s) => {
  let low = 0, high = steps.length - 1;
  while (low < high) { const mid = (low + high) >> 1; if (steps[mid] < s) low = mid + 1; else high = mid; }
  return low > 0 && s - steps[low - 1] < steps[low] - s ? low - 1 : low;
};

function point(pen, x, y, main, val, width, height) {
  const i = nearest(main.steps, hover), step = main.steps[i];
  pen.strokeStyle = colour("soft"); pen.lineWidth = 1; pen.beginPath();
  pen.moveTo(x(step), TOP); pen.lineTo(x(step), height - BOTTOM); pen.stroke();
  const lines = ["step " + step.toLocaleString("en"), pick.selectedOptions[0].text + "  " + (main.values[i] ?? "not a number")];
  if (reach() && smooth[i] !== null) lines.push("smoothed  " + spelled(smooth[i]));
  if (val) { const k = nearest(val.steps, step); lines.push("validation " + (val.values[k] ?? "not a number") + " (step " + val.steps[k] + ")"); }
  tip.textContent = lines.join("\n"); tip.style.display = "block";
  const place = x(step) + 14;
  tip.style.left = Math.max(4, place + tip.offsetWidth > width ? x(step) - tip.offsetWidth - 14 : place) + "px";
  tip.style.top = TOP + 6 + "px";
}

// At first over a fiftieth of the run, as in a picture.
slide.value = Math.round(100 * Math.log((full[1] - full[0]) / 50 + 1) / Math.log(Math.max(2, (full[1] - full[0]) / 4)));

function renew() {
  slide.parentElement.hidden = !averages();
  smooth = averaged(shown(), reach());
  said.textContent = reach() ? "over " + reach().toLocaleString("en") + (reach() > 1 ? " steps" : " step") : "off";
  document.getElementById("key").hidden = pick.value !== "train_loss" || !data.series.val_loss;
  back.hidden = view[0] === full[0] && view[1] === full[1];
  draw();
}

const stepAt = px => view[0] + (px - LEFT) / (box.clientWidth - LEFT - RIGHT) * (view[1] - view[0]);
const inside = e => Math.min(box.clientWidth - RIGHT, Math.max(LEFT, e.clientX - canvas.getBoundingClientRect().left));
canvas.addEventListener("pointerdown", e => { drag = [inside(e), null]; try { canvas.setPointerCapture(e.pointerId); } catch (_) {} });
canvas.addEventListener("pointermove", e => { hover = stepAt(inside(e)); if (drag) drag[1] = inside(e); draw(); });
canvas.addEventListener("pointerup", () => {
  if (drag && drag[1] !== null && Math.abs(drag[1] - drag[0]) > 8) {
    const ends = [stepAt(drag[0]), stepAt(drag[1])].sort((a, b) => a - b);
    if (ends[1] - ends[0] > 1) view = ends;
  }
  drag = null; renew();
});
canvas.addEventListener("pointercancel", () => { drag = null; draw(); });
canvas.addEventListener("pointerleave", () => { hover = null; tip.style.display = "none"; draw(); });
const whole = () => { view = full.slice(); renew(); };
canvas.addEventListener("dblclick", whole); back.addEventListener("click", whole);
for (const control of [pick, slide, log]) control.addEventListener("input", renew);
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
renew();
