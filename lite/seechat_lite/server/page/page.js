// The page of `seechat serve`: starts its parts, each of which is a module beside this one.

import { askForKeysWith } from "./api.js";
import * as chat from "./chat.js";
import * as composer from "./composer.js";
import { askKey } from "./dialogs.js";
import * as model from "./model.js";
import { MOST } from "./pictures.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";
import { choose, currentLanguage, translate } from "./texts.js";
import * as welcome from "./welcome.js";

const $ = (id) => document.getElementById(id);

function speak() {
  $("language").value = currentLanguage();
  translate();
}

$("add").dataset.value = MOST;
speak();
$("language").onchange = (event) => {
  choose(event.target.value);
  speak();
  settings.show();
  welcome.show();
  model.show();
  chat.redraw();
  composer.show();
  sidebar.show();
};

// Escape closes what is open, or else ends the answer.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  chat.stop();
});

function showTitle() {
  const { title } = chat.current();
  document.title = title ? `${title} · SEEChat` : "SEEChat";
}
chat.events.addEventListener("open", showTitle);
store.onChange(showTitle);

let wasRunning = false;
chat.events.addEventListener("state", () => {
  const runs = Boolean(chat.running());
  if (wasRunning && !runs) {
    model.look();
    // whoever reads elsewhere is left there
    if ([document.body, $("stop"), $("send")].includes(document.activeElement)) composer.focus();
  }
  wasRunning = runs;
});

askForKeysWith(askKey);
store.answersFor(chat.isLive);
settings.start();
sidebar.start();
composer.start();
welcome.start();
await chat.reopen();
composer.focus();
await model.start();
