// The open conversation: asking, stopping, answering again, editing; and what runs in others meanwhile.

import * as api from "./api.js";
import { announce, keep, notice } from "./dialogs.js";
import * as pictures from "./pictures.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { text, wordsFor } from "./texts.js";
import { TurnView } from "./view.js";

const OPEN = "seechat-open"; // this tab's conversation, in sessionStorage
const SAVING = 500; // milliseconds between writes of an answer that grows
const MOST_BYTES = 24_000_000; // of pictures in a request; the server takes 32 MiB with all around them
const DIFFERENTLY = 0.7; // the least temperature at which another answer may come out
const TITLE = 60; // characters
const OURS = ["no_server", "no_key"]; // errors of which the server has said nothing

const log = document.getElementById("log");
const list = document.getElementById("turns");
const welcome = document.getElementById("welcome");
const newest = document.getElementById("newest");

// "open": another conversation; "draft": its draft came from here; "state": what runs has changed
export const events = new EventTarget();
const emit = (name) => events.dispatchEvent(new Event(name));

let conversation = blank();
let turns = [];
const views = new Map(); // by the turn's id
const live = new Map(); // by the turn's id: {turn, record, controller, phase, percent}

function blank() {
  const now = Date.now();
  return {
    id: store.newId(),
    title: "",
    named: false,
    created: now,
    changed: now,
    draft: { text: "", pictures: [] },
  };
}

export const current = () => conversation;
export const isLive = (id) => live.has(id);

// The run in the open conversation, with its phase; undefined if there is none.
export const running = () => [...live.values()].find((run) => run.record.id === conversation.id);

// --- opening

let opening = 0;

// The conversation of that id; a new one without, or where there is none.
export async function open(id = null) {
  const mine = ++opening;
  let [found, kept] = [null, []];
  if (id) {
    try {
      [found, kept] = await Promise.all([store.conversation(id), store.turns(id)]);
    } catch {
      notice(text("notKept"));
    }
  }
  if (mine !== opening) return; // another was opened meanwhile
  const here = found && [...live.values()].find((run) => run.record.id === found.id);
  conversation = here?.record ?? found ?? blank();
  turns = here?.turns ?? kept;
  pictures.forgetAllBut([
    ...conversation.draft.pictures,
    ...turns.flatMap((turn) => turn.pictures),
    ...[...live.values()].flatMap((run) => run.turns.flatMap((turn) => turn.pictures)),
  ]);
  try {
    sessionStorage.setItem(OPEN, conversation.id);
  } catch {
    // a reload opens a new conversation
  }
  following = true;
  redraw();
  emit("open");
  for (const turn of turns) if (turn.state === "running" && !live.has(turn.id)) endIfAbandoned(turn);
}

export const reopen = () => open(sessionStorage.getItem(OPEN));

// A turn of which nobody knows was being answered when its tab was closed or loaded again.
async function endIfAbandoned(turn) {
  if (await store.liveElsewhere(turn.id)) return;
  const now = await store.turn(turn.id).catch(() => turn);
  if (now?.state !== "running" || live.has(turn.id)) return refresh(); // it ended, or is asked again
  turn.state = "done";
  turn.note = { end: "interrupted" };
  keep(store.saveTurn(turn));
  views.get(turn.id)?.draw();
}

// What another tab changed in the open conversation.
export async function refresh() {
  const id = conversation.id;
  let found, kept;
  try {
    [found, kept] = await Promise.all([store.conversation(id), store.turns(id)]);
  } catch {
    return;
  }
  if (id !== conversation.id || !found) return;
  Object.assign(conversation, { title: found.title, named: found.named });
  if (running()) return;
  const same = (a, b) => a.id === b?.id && a.question === b.question;
  if (!turns.every((turn, i) => same(turn, kept[i]))) {
    turns = kept;
    redraw();
    return;
  }
  const newer = kept.slice(turns.length);
  for (const [i, turn] of turns.entries()) {
    if (JSON.stringify(turn) === JSON.stringify(kept[i])) continue;
    Object.assign(turn, kept[i]);
    views.get(turn.id).draw();
  }
  turns.push(...newer);
  for (const turn of newer) show(turn);
  if (newer.length) drawFeet();
}

// The conversation was deleted, here or elsewhere; id: undefined for all.
export async function removed(id) {
  for (const run of live.values()) {
    if (id && run.record.id !== id) continue;
    run.dropped = true;
    run.controller.abort();
  }
  if (!id || conversation.id === id) await open();
}

export function renamed(id, title) {
  if (conversation.id === id) Object.assign(conversation, { title, named: true });
}

// The open conversation with its turns, for a file, also where nothing can be stored.
export const whole = () => ({ record: conversation, turns });

// --- the draft

// fields: {text, pictures}, either or both.
export function setDraft(fields, record = conversation) {
  Object.assign(record.draft, fields);
  const { text, pictures } = record.draft;
  const nothing = record === conversation && !turns.length && !text && !pictures.length;
  keep(nothing ? store.removeIfEmpty(record.id) : store.saveConversation(record));
}

// The draft, which is asked now.
export function takeDraft() {
  const { draft } = conversation;
  conversation.draft = { text: "", pictures: [] };
  return draft;
}

// --- asking

export async function ask(question, chosen) {
  if (running()) return;
  if (!turns.length && !conversation.named) conversation.title = question.split("\n")[0].slice(0, TITLE);
  conversation.changed = Date.now();
  const turn = {
    id: store.newId(),
    conversation: conversation.id,
    at: Math.max(Date.now(), (turns.at(-1)?.at ?? 0) + 1),
    question,
    pictures: chosen,
    answer: "",
    note: null,
    state: "running",
  };
  turns.push(turn);
  show(turn);
  toNewest();
  keep(Promise.all([store.saveConversation(conversation), store.saveTurn(turn)]));
  await answer(turn, { fresh: true });
}

async function again(turn) {
  if (running()) return;
  const answered = turn.answer && !turn.note?.end;
  await answer(turn, { differently: Boolean(answered) });
}

// Asks anew from this turn on; the turns after it go.
async function edit(turn, question) {
  if (!turns.includes(turn)) return;
  const later = turns.splice(turns.indexOf(turn) + 1);
  for (const { id } of [turn, ...later]) {
    const run = live.get(id);
    if (!run) continue;
    run.dropped = true;
    run.controller.abort();
    live.delete(id);
  }
  if (later.length) {
    const [ids, gone] = [later.map(({ id }) => id), later.flatMap((t) => t.pictures)];
    keep(store.removeTurns(conversation.id, ids, gone));
    pictures.forget(gone);
  }
  // a turn of its own: the stopped run may still write to the old one
  const edited = { ...turn, question, answer: "", note: null };
  turns[turns.indexOf(turn)] = edited;
  if (turns[0] === edited && !conversation.named) conversation.title = question.split("\n")[0].slice(0, TITLE);
  keep(store.saveConversation(conversation));
  redraw();
  await answer(edited, {});
}

export function stop() {
  running()?.controller.abort();
}

async function answer(turn, { fresh = false, differently = false }) {
  const run = { turn, turns, record: conversation, controller: new AbortController(), phase: "waiting", percent: 0 };
  const before = { answer: turn.answer, note: turn.note };
  let said = false;
  live.set(turn.id, run);
  turn.state = "running";
  turn.note = null;
  const phase = (name, percent = 0) => {
    if (run.phase === name && run.percent === percent) return;
    Object.assign(run, { phase: name, percent });
    emit("state");
  };
  views.get(turn.id)?.draw();
  drawFeet();
  emit("state");
  announce(text("waiting"));
  try {
    const { messages, left } = await messagesFor(turns.slice(0, turns.indexOf(turn) + 1));
    const body = { messages, stream: true, stream_options: { include_usage: true }, ...settings.options() };
    if (differently) body.temperature = Math.max(body.temperature ?? 0, DIFFERENTLY);
    const end = await api.answer(body, {
      signal: run.controller.signal,
      uploaded: (part) => turn.pictures.length && phase("uploading", Math.floor(part * 100)),
      begun: () => phase(turn.pictures.length ? "looking" : "waiting"),
      say(piece) {
        if (!said) turn.answer = "";
        said = true;
        turn.answer += piece;
        phase("answering");
        views.get(turn.id)?.drawSoon(follow);
        saveSoon(run);
      },
    });
    if (!said) turn.answer = "";
    const { tokens, speed, seconds, reason } = end;
    // what was not sent, and what the model had no room for
    turn.note = { tokens, speed, seconds, cut: reason === "length", left: left + end.left };
    finish(run);
    announce(views.get(turn.id)?.spoken ?? "");
  } catch (error) {
    const stopped = error.name === "AbortError";
    const detail = stopped || OURS.includes(error.cause) ? "" : error.message;
    turn.note = { end: stopped ? "stopped" : (error.cause ?? "refused"), detail };
    if (!said && before.answer) {
      Object.assign(turn, before); // the answer there was stays
      if (!stopped) notice(wordsFor(error));
    } else if (!said && fresh && !stopped) giveBack(run);
    finish(run);
    announce(wordsFor(error));
  }
}

function finish(run) {
  const { turn } = run;
  turn.state = "done";
  clearTimeout(run.saving);
  if (live.get(turn.id) === run) live.delete(turn.id);
  if (!run.dropped) keep(store.saveTurn(turn));
  views.get(turn.id)?.draw();
  drawFeet();
  follow();
  emit("state");
}

// A question that could not be asked goes back to where it was written, unless something new is there.
function giveBack(run) {
  const { turn, record } = run;
  if (record.draft.text || record.draft.pictures.length) return;
  run.dropped = true;
  const place = run.turns.indexOf(turn);
  if (place >= 0) run.turns.splice(place, 1);
  views.get(turn.id)?.element.classList.add("gone");
  keep(store.removeTurns(record.id, [turn.id]));
  setDraft({ text: turn.question, pictures: turn.pictures }, record);
  if (record === conversation) emit("draft");
}

function saveSoon(run) {
  run.saving ??= setTimeout(() => {
    run.saving = undefined;
    if (!run.dropped) keep(store.saveTurn(run.turn));
  }, SAVING);
}

// As much as is said so far, while the page goes away.
window.addEventListener("pagehide", () => {
  for (const run of live.values()) if (!run.dropped) store.saveTurn(run.turn).catch(() => {});
});

// The newest turns whose pictures the server takes in one request; left: how many are not sent.
async function messagesFor(asked) {
  const messages = [];
  let [count, bytes, sent] = [0, 0, 0];
  for (const turn of asked.toReversed()) {
    const last = turn === asked.at(-1);
    if (!last && !turn.answer) {
      sent += 1; // the model knows of no such turn
      continue;
    }
    const urls = (await Promise.all(turn.pictures.map(pictures.dataURL))).filter(Boolean);
    count += urls.length;
    bytes += urls.reduce((sum, url) => sum + url.length, 0);
    if (!last && (count > pictures.MOST || bytes > MOST_BYTES)) break;
    const images = urls.map((url) => ({ type: "image_url", image_url: { url } }));
    const words = turn.question || text("describe");
    const pair = [{ role: "user", content: [...images, { type: "text", text: words }] }];
    if (!last) pair.push({ role: "assistant", content: turn.answer });
    messages.unshift(...pair);
    sent += 1;
  }
  if (settings.system()) messages.unshift({ role: "system", content: settings.system() });
  return { messages, left: asked.length - sent };
}

// --- what is seen

const acts = {
  again,
  edit,
  later: (turn) => turns.length - 1 - turns.indexOf(turn),
  running: () => Boolean(running()),
  last: (turn) => turn === turns.at(-1),
};

function show(turn) {
  const view = new TurnView(turn, acts);
  views.set(turn.id, view);
  list.append(view.element);
  welcome.hidden = true;
}

export function redraw() {
  const top = log.scrollTop;
  views.clear();
  list.replaceChildren();
  welcome.hidden = turns.length > 0;
  for (const turn of turns) show(turn);
  if (!welcome.hidden) log.scrollTop = 0;
  follow();
  // whoever read something above reads on there; pictures have their room by the next frame
  if (!following) requestAnimationFrame(() => (log.scrollTop = top));
}

function drawFeet() {
  for (const turn of turns) if (turn.state !== "running") views.get(turn.id)?.drawFoot();
}

// Whoever reads at the end stays at the end; whoever scrolled up stays where they are.
const NEAR = 48; // pixels from the end
let following = true;
let lastTop = 0;

const fromEnd = () => log.scrollHeight - log.clientHeight - log.scrollTop;

export function follow() {
  // a welcome is read from its beginning
  if (following && welcome.hidden) log.scrollTop = log.scrollHeight;
  newest.hidden = !welcome.hidden || fromEnd() < NEAR;
}

export function toNewest() {
  following = true;
  follow();
}

log.addEventListener("scroll", () => {
  if (!welcome.hidden) return;
  if (fromEnd() < NEAR) following = true;
  else if (log.scrollTop < lastTop) following = false;
  lastTop = log.scrollTop;
  follow();
});
// the window, the line below, and what is said, pictures that take their room
const sizes = new ResizeObserver(follow);
for (const element of [log, list]) sizes.observe(element);
newest.onclick = () => {
  toNewest();
  log.focus();
};
