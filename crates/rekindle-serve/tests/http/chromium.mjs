// A page in headless Chromium, driven through its DevTools.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

// Opens `url`. `problems` collects errors of the page, and requests to other servers.
export async function openPage(url, screenshots, size = "900,700") {
  const profile = mkdtempSync(join(tmpdir(), "rekindle-page-"));
  const browser = spawn("chromium", ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
    `--user-data-dir=${profile}`, `--window-size=${size}`, "about:blank"], { stdio: ["ignore", "ignore", "pipe"], detached: true });
  const endpoint = await new Promise((resolve, reject) => {
    let text = "";
    browser.stderr.on("data", (data) => {
      text += data;
      const found = text.match(/DevTools listening on ws:\/\/([^/]+)\//);
      if (found) resolve(found[1]);
    });
    browser.on("exit", () => reject(new Error("Chromium ended: " + text)));
    setTimeout(() => reject(new Error("Chromium does not start: " + text)), 60000).unref();
  });

  const pages = await (await fetch(`http://${endpoint}/json/list`)).json();
  const socket = new WebSocket(pages.find((page) => page.type === "page").webSocketDebuggerUrl);
  await new Promise((resolve) => socket.addEventListener("open", resolve));
  const waiting = new Map();
  const problems = [];
  let next = 0;
  const call = (method, params = {}) => new Promise((resolve, reject) => {
    const id = ++next;
    waiting.set(id, ({ result, error }) => (error ? reject(new Error(error.message)) : resolve(result)));
    socket.send(JSON.stringify({ id, method, params }));
  });
  socket.addEventListener("message", ({ data }) => {
    const message = JSON.parse(data);
    if (message.id) waiting.get(message.id)(message);
    if (message.method === "Runtime.exceptionThrown") problems.push(message.params.exceptionDetails.text);
    if (message.method === "Log.entryAdded" && message.params.entry.level === "error") problems.push(message.params.entry.text);
    if (message.method === "Page.javascriptDialogOpening") call("Page.handleJavaScriptDialog", { accept: true });
    if (message.method === "Network.requestWillBeSent") {
      const asked = message.params.request.url;
      if (!asked.startsWith(url) && !asked.startsWith("data:")) problems.push("the page asked for " + asked);
    }
  });

  const run = async (expression) => {
    const { result, exceptionDetails } = await call("Runtime.evaluate", { expression, awaitPromise: true, returnByValue: true });
    if (exceptionDetails) throw new Error(exceptionDetails.exception?.description ?? exceptionDetails.text);
    return result.value;
  };
  const until = async (expression) => {
    for (let tries = 0; tries < 2400; tries++) {
      if (await run(expression)) return;
      await new Promise((resolve) => setTimeout(resolve, 25));
    }
    throw new Error("never true: " + expression + "\n" + (await run("document.body.innerText")));
  };
  const equal = async (expression, expected) => {
    const found = await run(expression);
    if (found !== expected) throw new Error(`${expression} is ${JSON.stringify(found)}, not ${JSON.stringify(expected)}`);
  };
  const shoot = async (name) => {
    if (!screenshots) return;
    const { data } = await call("Page.captureScreenshot", { format: "png" });
    writeFileSync(join(screenshots, name + ".png"), Buffer.from(data, "base64"));
  };
  const close = async () => {
    socket.close();
    browser.removeAllListeners("exit");
    const ended = new Promise((resolve) => browser.on("exit", resolve));
    // Its whole process group: a helper process that outlives it would still write to the profile.
    process.kill(-browser.pid, "SIGKILL");
    await ended;
    rmSync(profile, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
  };
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await call(domain + ".enable");
  await call("Page.navigate", { url });
  return { call, run, until, equal, shoot, problems, close };
}
