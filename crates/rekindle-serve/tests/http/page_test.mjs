// Drives the chat page in headless Chromium: node page_test.mjs URL, with the scripted engine of this folder.
import { spawn } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [url, screenshots] = process.argv.slice(2);
const profile = mkdtempSync(join(tmpdir(), "rekindle-page-"));
const browser = spawn("chromium", ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
  `--user-data-dir=${profile}`, "--window-size=900,700", "about:blank"], { stdio: ["ignore", "ignore", "pipe"], detached: true });

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
socket.addEventListener("message", ({ data }) => {
  const message = JSON.parse(data);
  if (message.id) waiting.get(message.id)(message);
  if (message.method === "Runtime.exceptionThrown") problems.push(message.params.exceptionDetails.text);
  if (message.method === "Log.entryAdded" && message.params.entry.level === "error") problems.push(message.params.entry.text);
  if (message.method === "Network.requestWillBeSent") {
    const asked = message.params.request.url;
    if (!asked.startsWith(url) && !asked.startsWith("data:")) problems.push("the page asked for " + asked);
  }
});
let next = 0;
const call = (method, params = {}) => new Promise((resolve, reject) => {
  const id = ++next;
  waiting.set(id, ({ result, error }) => (error ? reject(new Error(error.message)) : resolve(result)));
  socket.send(JSON.stringify({ id, method, params }));
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
const key = (name, code, modifiers = 0) =>
  call("Input.dispatchKeyEvent", { type: "keyDown", key: name, windowsVirtualKeyCode: code, text: "\r", modifiers });
// Types into the field that has the focus, and sends it.
const say = async (text) => {
  await call("Input.insertText", { text });
  await key("Enter", 13);
};

try {
  for (const domain of ["Page", "Runtime", "Log", "Network"]) await call(domain + ".enable");
  await call("Page.navigate", { url });
  await until("document.querySelectorAll('#model option').length === 2");
  await equal("document.activeElement.id", "message");
  await shoot("empty");

  await say("say <b>hello</b> & grüße");
  await until("document.querySelector('article.assistant .note')");
  await equal("document.querySelector('article.user .text').textContent", "say <b>hello</b> & grüße");
  await equal("document.querySelector('article.assistant .text').textContent", "<b>hello</b> & grüße");
  await equal("document.querySelectorAll('article b').length", 0);
  await equal("document.querySelector('article.assistant .note').textContent.startsWith('base/model, ')", true);

  await say("think");
  await until("document.querySelectorAll('article.assistant .note').length === 2");
  await equal("document.querySelector('article details').textContent", "Reasoninghm");
  await equal("document.querySelectorAll('article.assistant .text')[1].textContent", "yes");

  // An adapter, a system prompt, and Shift+Enter.
  await run("document.querySelector('#model').value = 'sql'; document.querySelector('#system').value = 'Be brief.'; 0");
  await call("Input.insertText", { text: "say two" });
  await key("Enter", 13, 8);
  await say("lines");
  await until("document.querySelectorAll('article.assistant .note').length === 3");
  await equal("document.querySelectorAll('article.assistant .text')[2].textContent", "two\nlines");
  await equal("document.querySelectorAll('article.assistant .note')[2].textContent.startsWith('sql, ')", true);
  await shoot("light");

  // Stop.
  await say("hang");
  await until("!document.querySelector('#stop').hidden");
  await run("document.querySelector('#stop').click()");
  await until("document.querySelectorAll('article.assistant .note').length === 4 && !document.querySelector('#send').hidden");
  await equal("document.querySelectorAll('article.assistant .note')[3].textContent", "sql, stopped");

  // An error in the middle of the answer, and one before it.
  await say("fail half");
  await until("document.querySelector('article.error')");
  await equal("document.querySelector('article.error .text').textContent", "the device failed");
  await equal("[...document.querySelectorAll('article.assistant .text')].at(-1).textContent", "half");
  await say("reject");
  await until("document.querySelectorAll('article.error').length === 2");
  await run("document.querySelector('#theme').click()");
  await equal("document.documentElement.dataset.theme", "dark");
  await shoot("dark");

  await run("document.querySelector('#reset').click()");
  await equal("document.querySelectorAll('article').length", 0);
  await say("say fresh");
  await until("document.querySelector('article.assistant .note')");
  await equal("document.querySelector('article.assistant .text').textContent", "fresh");
  // The refused request is the only problem in the browser's log.
  const others = problems.filter((problem) => !problem.includes("429"));
  if (others.length) throw new Error(others.join("\n"));
  console.log("page ok");
} finally {
  socket.close();
  browser.removeAllListeners("exit");
  const ended = new Promise((resolve) => browser.on("exit", resolve));
  // Its whole process group: a helper process that outlives it would still write to the profile.
  process.kill(-browser.pid, "SIGKILL");
  await ended;
  rmSync(profile, { recursive: true, force: true, maxRetries: 20, retryDelay: 100 });
}
