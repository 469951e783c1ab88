// The list of conversations: opened, searched, renamed, exported, deleted.

import * as chat from "./chat.js";
import { ask, keep, notice } from "./dialogs.js";
import { download } from "./exports.js";
import * as store from "./store.js";
import { text } from "./texts.js";

const SOON = 150; // milliseconds that changes are gathered

const $ = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 760px)");

let unfolded = null; // the conversation whose actions are shown
let showing = 0;

export async function show() {
  const mine = ++showing;
  const words = $("search").value.trim();
  let found = [];
  try {
    found = await store.conversations(words);
  } catch {
    // said when something is to be kept
  }
  if (mine !== showing) return;
  const focused = document.activeElement?.closest("#conversations li")?.dataset;
  const role = document.activeElement?.dataset.role;
  $("conversations").replaceChildren(...found.map(item));
  $("none").textContent = found.length ? "" : text(words ? "noneFound" : "noneYet");
  // the list may be drawn anew under somebody's fingers
  if (focused) $("conversations").querySelector(`[data-id="${focused.id}"] [data-role="${role}"]`)?.focus();
}

let timer = null;

function showSoon() {
  timer ??= setTimeout(() => {
    timer = null;
    show();
  }, SOON);
}

function titleOf(record) {
  if (record.title) return record.title;
  const { text: words } = record.draft;
  return words ? `${text("draft")}: ${words.slice(0, 60)}` : text("untitled");
}

function item(record) {
  const element = document.createElement("li");
  element.dataset.id = record.id;
  const title = button("open", titleOf(record), () => {
    chat.open(record.id);
    if (narrow.matches) fold();
  });
  title.className = "title";
  title.title = titleOf(record);
  title.dir = "auto";
  if (record.id === chat.current().id) title.setAttribute("aria-current", "page");
  const more = button("more", "⋯", () => {
    unfolded = unfolded === record.id ? null : record.id;
    show();
  });
  more.className = "more";
  more.setAttribute("aria-label", `${text("more")}: ${titleOf(record)}`);
  more.setAttribute("aria-expanded", unfolded === record.id);
  element.append(title, more);
  if (unfolded === record.id) element.append(actions(record));
  return element;
}

function actions(record) {
  const box = document.createElement("div");
  box.className = "actions";
  box.append(
    button("rename", text("rename"), () => rename(record)),
    button("md", text("exportMarkdown"), () => save("md", record)),
    button("json", text("exportJSON"), () => save("json", record)),
    button("delete", text("delete"), () => remove(record)),
  );
  return box;
}

function button(role, words, click) {
  const made = document.createElement("button");
  made.type = "button";
  made.dataset.role = role;
  made.textContent = words;
  made.onclick = click;
  return made;
}

async function rename(record) {
  const title = (await ask({ title: text("renameTitle"), value: record.title }))?.trim();
  if (!title) return;
  chat.renamed(record.id, title);
  await keep(renameStored(record, title));
}

async function renameStored(record, title) {
  const now = (await store.conversation(record.id)) ?? record; // its draft may have grown since
  await store.saveConversation({ ...now, title, named: true });
}

async function remove(record) {
  const question = { title: text("deleteTitle"), what: `${titleOf(record)}\n${text("deleteWhat")}` };
  if ((await ask({ ...question, ok: text("delete"), dangerous: true })) === null) return;
  await keep(store.removeConversation(record.id));
  $("new").focus(); // the button that had the focus is gone
}

async function save(kind, record) {
  try {
    const open = chat.whole();
    if (open.record.id === record.id) await download(kind, open.record, open.turns);
    else await download(kind, record, await store.turns(record.id));
  } catch (error) {
    notice(error.message);
  }
}

// --- on a narrow screen the list lies over the conversation

function unfold() {
  document.body.classList.add("listed");
  place();
  $("new").focus();
}

function fold() {
  document.body.classList.remove("listed");
  place();
  if (narrow.matches) $("open-list").focus();
}

function place() {
  const over = narrow.matches && document.body.classList.contains("listed");
  $("list").inert = narrow.matches && !over;
  $("shade").hidden = !over;
  for (const id of ["top", "main", "form"]) $(id).inert = over;
  $("open-list").setAttribute("aria-expanded", over);
}

export function start() {
  $("new").onclick = async () => {
    await chat.open();
    if (narrow.matches) fold();
    $("question").focus();
  };
  $("search").oninput = showSoon;
  $("open-list").onclick = unfold;
  $("close-list").onclick = fold;
  $("shade").onclick = fold;
  $("list").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !narrow.matches) return;
    event.stopPropagation();
    fold();
  });
  narrow.addEventListener("change", place);
  place();
  chat.events.addEventListener("open", show);
  store.onChange((change, mine) => {
    if (change.removed) chat.removed(change.conversation);
    else if (!mine && change.conversation === chat.current().id) chat.refresh();
    showSoon();
  });
}
