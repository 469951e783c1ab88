// What speaks up over the page: questions to the user, errors, and words for screen readers.

import { text } from "./texts.js";

const $ = (id) => document.getElementById(id);

// Asks for a yes, or for a text where there is a value to start from; null: the user does not want to.
export function ask({ title, what = "", value = null, ok = text("ok"), dangerous = false }) {
  const dialog = $("ask-dialog");
  $("ask-title").textContent = title;
  $("ask-what").textContent = what;
  $("ask-what").hidden = !what;
  $("ask-value").hidden = value === null;
  $("ask-value").value = value ?? "";
  $("ask-ok").textContent = ok;
  $("ask-ok").classList.toggle("dangerous", dangerous);
  dialog.returnValue = "";
  dialog.showModal();
  if (value !== null) $("ask-value").select();
  return new Promise((resolve) => {
    const closed = () => resolve(dialog.returnValue === "ok" ? $("ask-value").value : null);
    dialog.addEventListener("close", closed, { once: true });
  });
}

// A key for the server; rejects if the user gives none. wrong: the last one was.
export function askKey(wrong) {
  const dialog = $("key-dialog");
  const title = text(wrong ? "keyWrong" : "keyTitle");
  $("key-title").textContent = title;
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    const closed = () => {
      if (dialog.returnValue === "ok") resolve($("key").value);
      else reject(new Error(title, { cause: "no_key" }));
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}

// A line above the question that stays until it is closed or another takes its place.
export function notice(words) {
  $("notice").hidden = false; // first: what is hidden is not read out
  $("notice-words").textContent = words;
}

export function clearNotice() {
  $("notice").hidden = true;
  $("notice-words").textContent = "";
}

// Waits for something to be stored; says so where the browser does not keep it.
export async function keep(writing) {
  try {
    await writing;
    return true;
  } catch (error) {
    notice(text(error?.name === "QuotaExceededError" ? "quota" : "notKept"));
    return false;
  }
}

// Says words to a screen reader, once.
export function announce(words) {
  $("announce").textContent = words;
}

// Copies, and says so on the button.
export async function copy(words, button) {
  let done = true;
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    done = copiedTheOldWay(words); // the page came over plain HTTP from another machine
  }
  if (!done) return notice(text("copyFailed"));
  announce(text("copied"));
  button.classList.add("done");
  setTimeout(() => button.classList.remove("done"), 1500);
}

function copiedTheOldWay(words) {
  const area = document.createElement("textarea");
  area.value = words;
  area.className = "hidden";
  const before = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus();
  return done;
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}
$("notice-close").onclick = clearNotice;
