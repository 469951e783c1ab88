// The line at the bottom: the question being written and its pictures, kept as the conversation's draft.

import * as chat from "./chat.js";
import { clearNotice, keep, notice } from "./dialogs.js";
import * as model from "./model.js";
import { forget, MOST, pictureOf, remember, thumbnail } from "./pictures.js";
import * as store from "./store.js";
import { text } from "./texts.js";

const $ = (id) => document.getElementById(id);
const question = $("question");
const touch = matchMedia("(pointer: coarse)");

let preparing = 0; // pictures that are being read

// --- asking

export function send() {
  const { draft } = chat.current();
  const words = question.value.trim();
  if (preparing || chat.running() || !(words || draft.pictures.length)) return;
  const alone = draft.pictures.length > 1 ? "describeAll" : "describe";
  clearNotice();
  chat.takeDraft();
  chat.ask(words || text(alone), draft.pictures);
  show();
}

// Asks a sample question about a sample picture.
export async function askSample(file, words) {
  const record = await pictureOf(file, chat.current().id);
  remember(record);
  keep(store.savePicture(record));
  chat.ask(words, [record.id]);
  show();
}

// --- pictures

export async function addPictures(files) {
  if (!files.length) return;
  clearNotice();
  if (!model.sees()) return notice(text("noVision"));
  const conversation = chat.current();
  const room = MOST - conversation.draft.pictures.length - preparing;
  const taken = files.slice(0, Math.max(0, room));
  const problems = [];
  if (taken.length < files.length) problems.push(text("tooMany", MOST, files.length - taken.length));
  preparing += taken.length;
  show();
  const unread = [];
  for (const file of taken) {
    try {
      const record = await pictureOf(file, conversation.id);
      remember(record);
      await keep(store.savePicture(record));
      chat.setDraft({ pictures: [...conversation.draft.pictures, record.id] }, conversation);
    } catch {
      unread.push(file.name);
    }
    preparing -= 1;
    show();
  }
  if (unread.length) problems.push(text("noPicture", unread.join(", ")));
  if (problems.length) notice(problems.join(" "));
  focus();
}

function remove(id) {
  const { id: conversation, draft } = chat.current();
  chat.setDraft({ pictures: draft.pictures.filter((other) => other !== id) });
  keep(store.removePictures(conversation, [id]));
  forget([id]);
  show();
  question.focus();
}

function showPictures() {
  const { pictures } = chat.current().draft;
  const items = pictures.map((id, i) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "remove";
    button.textContent = "×";
    button.setAttribute("aria-label", text("remove", i + 1));
    button.onclick = () => remove(id);
    item.append(thumbnail(id, i + 1), button);
    return item;
  });
  for (let i = 0; i < preparing; i += 1) {
    const item = document.createElement("li");
    item.className = "preparing";
    items.push(item);
  }
  $("pictures").replaceChildren(...items);
  $("chosen").textContent = pictures.length ? text("chosen", pictures.length, MOST) : "";
}

// --- what is seen

export function show() {
  const { draft } = chat.current();
  if (question.value !== draft.text) question.value = draft.text;
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
  showPictures();
  showState();
}

export function showState() {
  const run = chat.running();
  $("send").hidden = Boolean(run);
  $("stop").hidden = !run;
  $("send").disabled = preparing > 0 || !(question.value.trim() || chat.current().draft.pictures.length);
  for (const button of document.querySelectorAll(".adds")) button.hidden = !model.sees();
  $("camera").hidden = !model.sees() || !touch.matches;
  const progress = $("progress");
  progress.hidden = !preparing && run?.phase !== "uploading" && run?.phase !== "looking";
  if (run?.phase === "uploading") progress.value = run.percent / 100;
  else progress.removeAttribute("value");
  if (preparing) $("status").textContent = text("preparing");
  else if (run) $("status").textContent = text(run.phase, run.percent);
  else $("status").textContent = model.trouble();
  chat.follow();
}

// On a phone, the focus would bring up the keyboard over what is to be seen.
export function focus() {
  if (!touch.matches) question.focus();
}

// --- what people do

export function start() {
  $("form").onsubmit = (event) => {
    event.preventDefault();
    send();
  };
  question.oninput = () => {
    chat.setDraft({ text: question.value });
    question.style.height = "auto";
    question.style.height = `${question.scrollHeight + 2}px`;
    showState();
  };
  question.onkeydown = (event) => {
    // Enter also ends the typing of a Chinese word; Safari tells by the key code alone
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  };
  $("stop").onclick = () => {
    chat.stop();
    focus();
  };
  for (const [button, input] of [["add", "file"], ["camera", "camera-file"]]) {
    $(button).onclick = () => $(input).click();
    $(input).onchange = async (event) => {
      await addPictures([...event.target.files]);
      event.target.value = "";
    };
  }
  document.addEventListener("paste", (event) => {
    const { files: found, types } = event.clipboardData;
    // a spreadsheet copies its cells as text and as a picture: the text is meant
    if (!found.length || types.includes("text/plain")) return;
    const files = [...found];
    event.preventDefault();
    addPictures(files);
  });
  takeDrops();
  chat.events.addEventListener("open", () => {
    clearNotice();
    show();
  });
  chat.events.addEventListener("draft", show);
  chat.events.addEventListener("state", showState);
  model.events.addEventListener("change", showState);
}

function takeDrops() {
  let inside = 0; // elements that a dragged file has entered and not left
  const hasFiles = (event) => event.dataTransfer.types.includes("Files");
  // words may be dropped where words are written; a link dropped elsewhere would leave the page
  const isMeant = (event) => !hasFiles(event) && event.target.closest?.("textarea, input");
  document.addEventListener("dragenter", (event) => {
    if (!hasFiles(event)) return;
    inside += 1;
    $("drop").hidden = false;
  });
  document.addEventListener("dragleave", () => {
    inside = Math.max(0, inside - 1);
    $("drop").hidden = inside === 0;
  });
  document.addEventListener("dragover", (event) => isMeant(event) || event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (isMeant(event)) return;
    event.preventDefault();
    inside = 0;
    $("drop").hidden = true;
    addPictures([...event.dataTransfer.files]);
  });
}
