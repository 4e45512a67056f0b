// Drives the chat page in headless Chromium: node page_test.mjs URL, with the scripted engine of this folder.
import { openPage } from "./chromium.mjs";

const [url, screenshots] = process.argv.slice(2);
const { call, run, until, equal, shoot, problems, close } = await openPage(url, screenshots);
const key = (name, code, modifiers = 0) =>
  call("Input.dispatchKeyEvent", { type: "keyDown", key: name, windowsVirtualKeyCode: code, text: "\r", modifiers });
// Types into the field that has the focus, and sends it.
const say = async (text) => {
  await call("Input.insertText", { text });
  await key("Enter", 13);
};

try {
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
  await close();
}
