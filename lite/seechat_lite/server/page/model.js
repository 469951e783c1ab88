// The server's model: its name, what it can do, and the details for who asks.

import * as api from "./api.js";
import { currentLanguage, text, wordsFor } from "./texts.js";

const BUILTIN = "seechat-lite-builtin";
const LOADING = 1000; // milliseconds until the server is asked again while it loads its model
const AWAY = 5000; // and while it does not answer

const $ = (id) => document.getElementById(id);

export const events = new EventTarget();

let known = null; // {model, health}
let problem = null; // the error that facts() met
let timer = 0;

// Pictures may be added until it is known that nothing can be seen.
export const sees = () => !known || known.model.vision !== null;

// How a conversation may be written for the model: {names, usual}; nothing while that is not known.
export const formats = () =>
  known ? { names: known.model.conversation_formats, usual: known.model.conversation_format } : { names: [], usual: "" };

// What stands in the way of an answer; "" if nothing.
export function trouble() {
  if (problem) return wordsFor(problem);
  return known?.health.status === "loading" ? text("loading") : "";
}

export async function look() {
  clearTimeout(timer);
  try {
    known = await api.facts();
    problem = null;
  } catch (error) {
    problem = error;
  }
  if (problem?.cause === "no_server") timer = setTimeout(look, AWAY);
  else if (!problem && known.health.status === "loading") timer = setTimeout(look, LOADING);
  show();
  events.dispatchEvent(new Event("change"));
}

export function show() {
  if (!known) return;
  const { model, health } = known;
  $("model").textContent = model.id === BUILTIN ? text("builtinName") : model.id;
  $("model").hidden = false;
  const kind = model.vision === null ? "text" : model.id === BUILTIN ? "builtin" : "vision";
  for (const element of document.querySelectorAll(".abilities")) element.textContent = text("abilities")[kind];
  const numbers = new Intl.NumberFormat(currentLanguage());
  const names = text("facts");
  const rows = [
    [names.name, model.id],
    [names.precision, text("precisions")[model.precision] ?? model.precision],
    [names.vision, model.vision ?? text("textOnly")],
    [names.context, text("context", numbers.format(model.context))],
    [names.memory, `${numbers.format(Math.round(health.memory_bytes / 1e6))} MB`],
    [names.state, text("states")[health.status] ?? health.status],
  ];
  $("facts").replaceChildren(
    ...rows.flatMap(([name, value]) => {
      const [term, description] = [document.createElement("dt"), document.createElement("dd")];
      term.textContent = name;
      description.textContent = value;
      return [term, description];
    }),
  );
}

export function start() {
  $("model").onclick = () => {
    $("about-dialog").showModal();
    look();
  };
  window.addEventListener("online", look);
  return look();
}
