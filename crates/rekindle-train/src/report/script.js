"use strict";
// What lies under the pointer, in all charts at the same step.
const last = Math.max(1, document.body.dataset.last);
const charts = [...document.querySelectorAll(".plot")].map((plot) => ({
  plot,
  line: plot.querySelector("i"),
  tip: plot.querySelector("output"),
  series: JSON.parse(plot.querySelector("script").textContent),
}));

function element(name, className, text) {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

function nearest(points, step) {
  return points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
}

function show(step) {
  for (const { plot, line, tip, series } of charts) {
    const left = (100 * step) / last;
    plot.classList.add("pointed");
    line.style.left = left + "%";
    plot.querySelectorAll("b").forEach((dot) => dot.remove());
    tip.replaceChildren(element("span", "step", "step " + step.toLocaleString("en")));
    for (const { name, class: kind, points } of series) {
      const [at, top, value] = nearest(points, step);
      const dot = element("b", kind, "");
      dot.style.left = (100 * at) / last + "%";
      dot.style.top = top + "%";
      plot.append(dot);
      const elsewhere = kind === "eval" && at !== step ? " at " + at.toLocaleString("en") : "";
      tip.append(element("span", "key " + kind, name + elsewhere), element("span", "value", value));
    }
    tip.style.left = left < 50 ? `calc(${left}% + 12px)` : "auto";
    tip.style.right = left < 50 ? "auto" : `calc(${100 - left}% + 12px)`;
  }
}

function hide() {
  for (const { plot } of charts) {
    plot.classList.remove("pointed");
    plot.querySelectorAll("b").forEach((dot) => dot.remove());
  }
}

for (const { plot } of charts) {
  plot.addEventListener("pointermove", (event) => {
    const { left, width } = plot.getBoundingClientRect();
    show(Math.round(Math.min(1, Math.max(0, (event.clientX - left) / width)) * last));
  });
  plot.addEventListener("pointerleave", hide);
}
