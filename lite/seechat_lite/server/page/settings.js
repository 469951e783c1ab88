// What the user has set, for all conversations: kept in this browser.

import { ask, keep, notice } from "./dialogs.js";
import * as model from "./model.js";
import * as store from "./store.js";
import { text } from "./texts.js";

const KEY = "seechat-settings";
const EMPTY = { temperature: null, length: null, system: "", format: "", theme: "auto" };

const $ = (id) => document.getElementById(id);
const settings = { ...EMPTY, ...kept() };

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) ?? {};
  } catch {
    return {};
  }
}

function save() {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    notice(text("notKept"));
  }
}

// The fields of a request; what is not set is the server's to decide.
export function options() {
  const fields = {};
  if (settings.temperature !== null) fields.temperature = settings.temperature;
  if (settings.length !== null) fields.max_tokens = settings.length;
  // what was set for another server's model may be unknown to this one
  if (model.formats().names.includes(settings.format)) fields.conversation_format = settings.format;
  return fields;
}

export const system = () => settings.system.trim();

export function show() {
  const { temperature, length, system, theme } = settings;
  $("temperature").value = temperature ?? 0;
  $("temperature-shown").textContent = temperature === null ? text("temperatureDefault") : temperature.toFixed(1);
  $("length").value = length ?? "";
  $("system").value = system;
  showFormats();
  for (const option of $("theme").options) option.textContent = text("themes")[option.value];
  $("theme").value = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function showFormats() {
  const { names, usual } = model.formats();
  const choices = [new Option(usual ? text("formatDefault", usual) : text("temperatureDefault"), ""), ...names.map((name) => new Option(name))];
  $("format").replaceChildren(...choices);
  $("format").value = names.includes(settings.format) ? settings.format : "";
}

function change(fields) {
  Object.assign(settings, fields);
  save();
  show();
}

export function start() {
  $("settings").onclick = () => $("settings-dialog").showModal();
  $("temperature").oninput = (event) => change({ temperature: Number(event.target.value) });
  $("length").onchange = (event) => {
    const whole = Math.round(Number(event.target.value));
    change({ length: whole >= 1 ? Math.min(whole, 1_000_000) : null });
  };
  $("system").oninput = (event) => {
    settings.system = event.target.value;
    save();
  };
  $("format").onchange = (event) => change({ format: event.target.value });
  model.events.addEventListener("change", showFormats);
  $("theme").onchange = (event) => change({ theme: event.target.value });
  $("reset").onclick = () => change(EMPTY);
  $("delete-all").onclick = async () => {
    const question = { title: text("deleteAllTitle"), what: text("deleteWhat"), ok: text("deleteAll") };
    if ((await ask({ ...question, dangerous: true })) !== null) await keep(store.removeAll());
  };
  show();
}
