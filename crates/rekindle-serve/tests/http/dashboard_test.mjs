// Drives the dashboard in headless Chromium: node dashboard_test.mjs URL DIR, with the runs that dashboard.rs writes.
import { appendFileSync, existsSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openPage } from "./chromium.mjs";

const [url, dir, screenshots] = process.argv.slice(2);
const { run, until, equal, shoot, problems, close } = await openPage(url, screenshots, "1200,1400");
const row = (name) => `document.querySelector('#runs tr[data-run="${name}"]')`;
const cell = (name, index) => `${row(name)}.children[${index}].textContent`;
const points = (key, name) =>
  `document.querySelector('figure[data-key="${key}"] path[data-run="${name}"]').getAttribute("d").split(/[ML]/).length - 1`;
const line = (step, loss) => JSON.stringify({ step, epoch: step / 4, loss, grad_norm: 1, learning_rate: 1e-4, tokens: 10,
  trained_tokens: 5, tokens_per_second: 1000 * step, seconds: step, memory: 2 ** 30, peak_memory: 2 ** 31 }) + "\n";

try {
  await until(`document.querySelectorAll("#runs tr").length === 2`);
  // Only the running run is shown at first.
  await equal(cell("live", 1), "running");
  await equal(cell("live", 2), "2 of 8");
  await equal(cell("done", 1), "finished");
  await until(`document.querySelector('figure[data-key="loss"]')`);
  await equal(points("loss", "live"), 2);
  await equal(`document.querySelector('figure[data-key="loss"] path[data-run="done"]')`, null);
  await equal(cell("live", 8), "2.00 GiB");

  // New lines of the running run.
  appendFileSync(join(dir, "live/metrics.jsonl"), line(3, 1.5) + '{"step": 4, "lo');
  await until(`${cell("live", 2)} === "3 of 8"`);
  await equal(points("loss", "live"), 3);
  await equal(cell("live", 4), "1.5");

  // The comparison with the other run: evaluations, another metric, and samples whose text stays text.
  await run(`${row("done")}.querySelector("input").click()`);
  await equal(points("loss", "done"), 4);
  await equal(points("eval_loss", "done"), 2);
  await equal(points("rewards/margins", "done"), 4);
  await equal(cell("done", 6), "0.75");
  await equal(`document.querySelectorAll("#samples article").length`, 1);
  await equal(`document.querySelector("#samples .output").textContent`, "<b>whale</b>");
  await equal(`document.querySelectorAll("#samples b").length`, 0);
  await shoot("dashboard");
  await run(`document.querySelector("#log").click()`);
  await equal(points("loss", "done"), 4);

  // Stop and save.
  await equal(`${row("done")}.querySelector("button")`, null);
  await run(`${row("live")}.querySelector("button").click()`);
  await until(`${cell("live", 1)} === "stopping"`);
  if (!existsSync(join(dir, "live/stop"))) throw new Error("the run was not asked to stop");
  rmSync(join(dir, "live/stop"));

  // A new run in the same directory replaces the curves.
  writeFileSync(join(dir, "live/metrics.jsonl"), line(1, 9));
  await until(`${cell("live", 4)} === "9"`);
  await equal(points("loss", "live"), 1);
  if (problems.length) throw new Error(problems.join("\n"));
  console.log("dashboard ok");
} finally {
  await close();
}
