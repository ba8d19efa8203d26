// The page: one conversation as a list of turns, each with the answers of one or more models. Knows the page's server, no service.
// Texts of models reach the page as text nodes only.

const find = (id) => document.getElementById(id);
const KEY = "palate-key";
const NAME = "palate-voter";

const state = {
  models: [],
  isBlind: false,
  turns: [], // {question, answers, round, vote, again}; see ask()
  stop: null, // AbortController of the answers that are being written
};

// ── the server ──────────────────────────────────────────────────────────────────────────────────────────────────────────

function takeKey() {
  // The key is in the address once. It leaves it before anything else happens, and stays with this tab.
  if (location.hash.length > 1) {
    sessionStorage.setItem(KEY, location.hash.slice(1));
    history.replaceState(null, "", location.pathname);
  }
}

async function call(path, body, signal) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ""}` };
  const options = { headers, signal, cache: "no-store" };
  if (body !== undefined) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The page's server does not answer. Is `palate chat --web` still running?");
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Error(told.error ?? `status ${response.status}`);
  }
  return response;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) yield JSON.parse(line);
  }
}

// ── what is shown ───────────────────────────────────────────────────────────────────────────────────────────────────────

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function say(text, isError = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

function showCounts({ pairs, ties, file }) {
  find("counts").textContent = `${pairs} ${pairs === 1 ? "pair" : "pairs"}, ${ties} ${ties === 1 ? "tie" : "ties"}`;
  find("file").textContent = file;
  find("download").disabled = pairs === 0;
  find("download-ties").disabled = ties === 0;
}

function showHint() {
  find("hint").hidden = state.turns.length > 0;
  find("hint").textContent = state.isBlind
    ? "Two models answer, and you do not see which is which. Their names appear after your vote."
    : `Ask ${checked().join(" and ") || "a model"}.`;
}

function card(title) {
  const element = make("article", "answer");
  const head = make("h3");
  const name = make("b", "name", title);
  const mark = make("span", "mark");
  head.append(name, mark);
  const text = make("div", "text");
  const note = make("div", "note");
  note.hidden = true;
  element.append(head, text, note);
  return { element, name, mark, text, note };
}

function tell(answer, text, isError = false) {
  answer.card.note.textContent = text;
  answer.card.note.classList.toggle("error", isError);
  answer.card.note.hidden = !text;
}

function update() {
  const last = state.turns.at(-1);
  const isWriting = state.stop !== null;
  const canVote = needsVote(last) && isComplete(last);
  find("send").hidden = isWriting;
  find("stop").hidden = !isWriting;
  find("again").disabled = isWriting || !last || Boolean(last.vote);
  find("voting").hidden = !canVote;
  for (const id of ["mode-chat", "mode-blind", "new"]) find(id).disabled = isWriting;
  showHint();
}

const needsVote = (turn) => Boolean(turn?.isBlind && !turn.vote);
const isComplete = (turn) => turn.answers.every((one) => one.finish === "stop" || one.finish === "length");
const checked = () => [...document.querySelectorAll("#models input:checked")].map((box) => box.value);

function scroll(force = false) {
  const log = find("log");
  if (force || log.scrollHeight - log.scrollTop - log.clientHeight < 160) log.scrollTop = log.scrollHeight;
}

// ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

function settings() {
  const seed = find("seed").value.trim();
  return {
    system: find("system").value,
    temperature: Number(find("temperature").value),
    max_tokens: Number(find("max-tokens").value),
    seed: seed === "" ? null : Number(seed),
  };
}

function messages(turn, model) {
  // A blind conversation continues with the answer that won; of a tie with the left one. Else each model has its own.
  const found = [];
  for (const earlier of state.turns) {
    if (earlier === turn) break;
    const answer = state.isBlind ? earlier.answers[earlier.continues] : earlier.answers.find((one) => one.model === model);
    if (answer?.text.trim() && answer.finish !== "error") {
      found.push({ role: "user", content: earlier.question }, { role: "assistant", content: answer.text });
    }
  }
  return [...found, { role: "user", content: turn.question }];
}

async function send() {
  const question = find("message").value.trim();
  if (!question || state.stop) return;
  if (needsVote(state.turns.at(-1))) {
    const complete = isComplete(state.turns.at(-1));
    say(complete ? "Vote first: 1 left, 2 right, 3 tie, 4 both bad." : "An answer is missing: press Regenerate, or New chat.", true);
    return;
  }
  const models = checked();
  if (models.length < (state.isBlind ? 2 : 1)) {
    say(state.isBlind ? "Choose two models or more in the settings." : "Choose a model in the settings.", true);
    return;
  }
  find("message").value = "";
  const turn = { question, isBlind: state.isBlind, models, again: 0, answers: [], continues: 0, vote: "" };
  turn.element = make("div", "answers");
  state.turns.push(turn);
  find("log").append(make("div", "question", question), turn.element);
  await ask(turn);
}

async function again() {
  const turn = state.turns.at(-1);
  if (!turn || turn.vote || state.stop) return;
  turn.again += 1;
  await ask(turn);
}

async function ask(turn) {
  // With a fixed seed the same answer would come again, so the seed moves on.
  const asked = settings();
  if (asked.seed !== null) asked.seed += turn.again;
  const titles = turn.isBlind ? ["Left", "Right"] : turn.models;
  turn.answers = titles.map((title) => ({ model: turn.isBlind ? "" : title, text: "", finish: "", card: card(title) }));
  turn.element.replaceChildren(...turn.answers.map((one) => one.card.element));
  state.stop = new AbortController();
  say("");
  update();
  scroll(true);
  try {
    const signal = state.stop.signal;
    const round = async (models, name) => {
      const body = { ...asked, models, blind: turn.isBlind, messages: messages(turn, name) };
      return (await (await call("/api/round", body, signal)).json()).round;
    };
    if (turn.isBlind) {
      turn.round = await round(turn.models);
      await Promise.all(turn.answers.map((one, side) => receive(one, turn.round, side, asked, signal)));
    } else {
      await Promise.all(turn.answers.map(async (one) => receive(one, await round([one.model], one.model), 0, asked, signal)));
    }
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
    for (const one of turn.answers) one.finish ||= "error";
  }
  state.stop = null;
  update();
  scroll();
  if (needsVote(turn) && isComplete(turn)) say("Which answer is better?");
}

async function receive(answer, round, side, asked, signal) {
  answer.card.element.classList.add("writing");
  const node = document.createTextNode("");
  answer.card.text.append(node);
  try {
    for await (const event of events(await call("/api/answer", { round, side }, signal))) {
      if (event.text !== undefined) {
        answer.text += event.text;
        node.appendData(event.text);
        scroll();
      }
      if (event.error !== undefined) throw new Error(event.error);
      answer.finish = event.finish ?? answer.finish;
    }
    if (!answer.finish) throw new Error("The answer broke off.");
    if (answer.finish === "length") tell(answer, `Cut at ${asked.max_tokens} tokens.`);
    else if (!answer.text.trim()) tell(answer, "The answer is empty.");
  } catch (error) {
    const wasStopped = error.name === "AbortError";
    answer.finish = wasStopped ? "stopped" : "error";
    tell(answer, wasStopped ? "Stopped." : error.message, !wasStopped);
  } finally {
    answer.card.element.classList.remove("writing");
  }
}

// ── voting ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

async function vote(choice) {
  const turn = state.turns.at(-1);
  if (!needsVote(turn) || !isComplete(turn) || state.stop || turn.isVoting) return;
  if (!voter()) {
    askName();
    return;
  }
  turn.isVoting = true; // a key that is held down votes once
  try {
    const response = await call("/api/vote", { round: turn.round, vote: choice, voter: voter() });
    const told = await response.json();
    turn.vote = choice;
    turn.continues = { left: 0, right: 1, tie: 0, both_bad: -1 }[choice];
    turn.answers.forEach((one, side) => {
      const picked = choice === (side === 0 ? "left" : "right");
      one.model = told.models[side];
      one.card.name.textContent = one.model;
      one.card.mark.textContent = picked ? "✓ your pick" : side === 0 ? "left" : "right";
      one.card.element.classList.toggle("picked", picked);
      one.card.element.classList.toggle("passed", choice === "both_bad" || (choice !== "tie" && !picked));
    });
    showCounts(told);
    const names = `Left was ${told.models[0]}, right was ${told.models[1]}.`;
    say(told.is_pair ? `${names} Saved as a pair.` : `${names} Kept with the ties${told.why ? `: ${told.why}` : ""}; not trained on.`);
  } catch (error) {
    say(error.message, true);
  }
  turn.isVoting = false;
  update();
  find("message").focus();
}

const voter = () => find("voter").value.trim();

function askName() {
  find("name").value = voter();
  find("ask-name").showModal();
  find("name").select();
}

function setName(name) {
  find("voter").value = name;
  localStorage.setItem(NAME, name);
}

// ── the rest ────────────────────────────────────────────────────────────────────────────────────────────────────────────

function clear() {
  state.turns = [];
  find("log").replaceChildren(find("hint"));
  say("");
  update();
  find("message").focus();
}

function setMode(isBlind) {
  if (state.stop) return;
  state.isBlind = isBlind;
  find("mode-chat").setAttribute("aria-pressed", String(!isBlind));
  find("mode-blind").setAttribute("aria-pressed", String(isBlind));
  find("models-legend").textContent = isBlind ? "Models; two of them are drawn for each message" : "Models side by side";
  clear();
  if (isBlind && localStorage.getItem(NAME) === null) askName();
}

async function download(path, name) {
  try {
    const url = URL.createObjectURL(await (await call(path)).blob());
    const link = make("a");
    link.href = url;
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  } catch (error) {
    say(error.message, true);
  }
}

function onKey(event) {
  if (event.key === "Escape" && state.stop) {
    state.stop.abort();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || find("ask-name").open) return;
  const choice = ["left", "right", "tie", "both_bad"][["1", "2", "3", "4"].indexOf(event.key)];
  const field = event.target.closest("input, textarea");
  // In the empty message field a digit is a vote: nothing can be sent before it.
  if (choice && !find("voting").hidden && (!field || (field.id === "message" && !field.value))) {
    event.preventDefault();
    vote(choice);
  }
}

async function start() {
  takeKey();
  let told;
  try {
    told = await (await call("/api/state")).json();
  } catch (error) {
    say(error.message, true);
    for (const button of document.querySelectorAll("button")) button.disabled = true;
    return;
  }
  document.title = `${told.service} – Palate`;
  find("service").textContent = told.service;
  state.models = told.models;
  for (const name of told.models) {
    const box = make("input");
    Object.assign(box, { type: "checkbox", value: name, checked: told.selected.includes(name) });
    box.addEventListener("change", showHint);
    const label = make("label");
    const isTuned = name === "default" && told.models.includes("base");
    label.append(box, make("span", "", isTuned ? `${name} (tuned)` : name));
    find("models").append(label);
  }
  find("system").value = told.system;
  find("temperature").value = told.temperature;
  find("max-tokens").value = told.max_tokens;
  find("voter").value = localStorage.getItem(NAME) ?? told.voter;
  showCounts(told);

  find("mode-chat").addEventListener("click", () => setMode(false));
  find("mode-blind").addEventListener("click", () => setMode(true));
  find("new").addEventListener("click", clear);
  find("open-settings").addEventListener("click", () => {
    find("settings").hidden = !find("settings").hidden;
    find("open-settings").setAttribute("aria-expanded", String(!find("settings").hidden));
  });
  find("voter").addEventListener("change", () => setName(voter()));
  find("ask-name").addEventListener("close", () => {
    if (find("name").value.trim()) setName(find("name").value.trim());
    find("message").focus();
  });
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  find("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  find("again").addEventListener("click", again);
  find("stop").addEventListener("click", () => state.stop?.abort());
  for (const button of document.querySelectorAll("[data-vote]")) {
    button.addEventListener("click", () => vote(button.dataset.vote));
  }
  find("download").addEventListener("click", () => download("/api/votes", `${told.service}.votes.jsonl`));
  find("download-ties").addEventListener("click", () => download("/api/ties", `${told.service}.ties.jsonl`));
  document.addEventListener("keydown", onKey);
  update();
}

start();
