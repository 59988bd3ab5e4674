// The Playground: key, consent, prompt, answers, ranking; this file wires the parts together.

import * as api from "./api.js";
import { AnswerCards } from "./cards.js";
import { ConsentPanel } from "./consent.js";

const INSTRUCTION_VERSION = "1"; // of the words in index.html's #how, which tell people how to rank

const $ = (id) => document.getElementById(id);
const show = (id, visible) => ($(id).hidden = !visible);
const say = (text) => ($("status").textContent = text);

const consent = new ConsentPanel(onConsentChange, onError);
const cards = new AnswerCards($("cards"), say, onArranged);

let model = null; // the model's public name
// {completion, release, recorded, shownAt, attempt, sent} of the answers on the page. An `attempt` that failed is sent
// again as it was, under the same idempotency key, until the order changes.
let answers = null;
let running = null; // AbortController of the request on its way
let tokens = 0; // used since the page was opened

async function start() {
  api.takeKeyFromAddress();
  if (!api.key.get()) return askForKey();
  clearError();
  show("key-panel", false);
  try {
    await consent.load();
    const [served] = await api.listModels();
    model = served.id;
    if (served.max_model_len) fitTokens(served.max_model_len);
    show("ask", true);
    await showServing();
  } catch (error) {
    onError(error);
  }
  $("key-tail").textContent = `Key …${api.key.get()?.slice(-4) ?? ""}`;
  show("key-hint", api.key.get() !== null);
}

function askForKey() {
  api.key.forget();
  running?.abort();
  consent.close();
  answers = null;
  ["ask", "answers", "key-hint"].forEach((id) => show(id, false));
  show("key-panel", true);
  $("key").focus();
}

// The prompt needs room as well: offer at most half of what the model can read.
function fitTokens(length) {
  const field = $("max-tokens");
  field.max = length - 1;
  field.value = Math.min(Number(field.value), Math.floor(length / 2));
}

async function showServing() {
  $("serving").textContent = `Serving release ${await api.servingRelease()}`;
}

async function ask() {
  if (running) return;
  const count = $("count").valueAsNumber;
  const request = {
    model,
    messages: [{ role: "user", content: $("prompt").value }],
    n: count,
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
  };
  clearError();
  show("withdrawn", false);
  running = new AbortController();
  setBusy(`Writing ${count} answers …`);
  try {
    showAnswers(await api.complete(request, consent.notice, running.signal));
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else onError(error);
  } finally {
    running = null;
    setBusy(null);
  }
}

function setBusy(text) {
  show("stop", text !== null);
  $("send-prompt").disabled = text !== null;
  $("send-prompt").textContent = text ?? "Get answers";
  if (text !== null) say(text);
}

function showAnswers(arrived) {
  answers = { ...arrived, shownAt: performance.now(), attempt: null, sent: false };
  const usage = arrived.completion.usage;
  tokens += usage.total_tokens;
  $("usage").textContent = `${tokens.toLocaleString("en")} tokens in this tab`;
  $("origin").textContent =
    `Answered by release ${arrived.release} · ${usage.prompt_tokens} prompt and ${usage.completion_tokens} answer tokens`;
  show("answers", true);
  cards.show(arrived.completion.choices, rankable());
  renderRanking();
  say(`${arrived.completion.choices.length} answers arrived.`);
  $("answers").scrollIntoView({ block: "start" });
}

const rankable = () => answers.recorded && consent.granted && answers.completion.choices.length >= 2;

function renderRanking() {
  const open = rankable() && !answers.sent;
  $("answers-title").textContent = open ? "Which answer is best?" : answers.sent ? "Your ranking" : "Answers";
  show("how", open);
  show("undo", open);
  show("send-ranking-row", open);
  show("kept", answers.sent && consent.granted);
  // Which release answered is told only when it can no longer sway the judgement.
  show("origin", !open);
  if (!open) $("serving").textContent = `Serving release ${answers.release}`;
  show("why-not", !rankable() && !answers.sent);
  $("why-not").textContent = whyNot();
  onArranged();
}

function whyNot() {
  if (!consent.granted && answers.recorded) return "You have withdrawn, so these answers can no longer be ranked.";
  if (!consent.granted) {
    return "You have not opted in, so this prompt and its answers are not kept, and there is nothing that a ranking could be "
      + "added to. To rank, agree to the notice and ask again.";
  }
  if (!answers.recorded) {
    return "The server did not keep these answers: you had not opted in when you asked, or this key is for production traffic, "
      + "which is never kept. A ranking would have nothing to be added to.";
  }
  return "There is only one answer, so there is nothing to rank.";
}

function onArranged() {
  if (!answers) return;
  answers.attempt = null;
  $("undo").disabled = !cards.touched;
  $("send-ranking").textContent = cards.touched ? "Send ranking" : "The order is right as it is: send";
}

async function sendRanking() {
  const button = $("send-ranking");
  button.disabled = true;
  clearError();
  answers.attempt ??= { ranking: ranking(), idempotencyKey: newKey() };
  try {
    await api.rank(answers.attempt.ranking, answers.attempt.idempotencyKey);
    answers.sent = true;
    cards.freeze(true);
    renderRanking();
    say("Thank you: your ranking is kept.");
    $("next").focus();
  } catch (error) {
    onError(error);
  } finally {
    button.disabled = false;
  }
}

const ranking = () => ({
  completion_id: answers.completion.id,
  groups: cards.groups.map((group) => group.map((candidate) => answers.completion.choices[candidate].index)),
  instruction_version: INSTRUCTION_VERSION,
  seconds_spent: Math.round((performance.now() - answers.shownAt) / 100) / 10,
});

// Not crypto.randomUUID: it exists on https and localhost only, and this page may be open over http in an own network.
const newKey = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

function onConsentChange(text) {
  clearError();
  say(text);
  if (!answers) return;
  if (!rankable() && !answers.sent) cards.freeze(false);
  renderRanking();
}

function onError(error) {
  if (error.status === 401) askForKey();
  $("alert").textContent = error.status === 401 ? `This key was not accepted. ${error.message}` : error.message;
  show("alert", true);
  $("alert").scrollIntoView({ block: "nearest" });
}

function clearError() {
  show("alert", false);
  $("alert").textContent = "";
}

function onSubmit(form, handler) {
  $(form).addEventListener("submit", (event) => {
    event.preventDefault();
    handler();
  });
}

onSubmit("key-form", () => {
  api.key.set($("key").value.trim());
  $("key").value = "";
  start();
});
onSubmit("ask-form", ask);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask-form").requestSubmit();
});
$("stop").addEventListener("click", () => running?.abort());
$("undo").addEventListener("click", () => cards.undo());
$("send-ranking").addEventListener("click", sendRanking);
$("next").addEventListener("click", () => {
  $("prompt").select();
  scrollTo({ top: 0 });
});
$("forget-key").addEventListener("click", () => {
  clearError();
  askForKey();
});
addEventListener("hashchange", () => location.hash.startsWith("#key=") && start());

start();
