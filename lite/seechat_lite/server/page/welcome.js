// What is seen before the first question: sample pictures to ask about.

import * as chat from "./chat.js";
import { askSample } from "./composer.js";
import { notice } from "./dialogs.js";
import * as model from "./model.js";
import { currentLanguage, text } from "./texts.js";

// The built-in model answers each of these rightly, in both languages; a test asks it.
const SAMPLES = [
  { file: "panda.png", zh: "这是什么？", en: "What is this?" },
  { file: "hamburger.png", zh: "可以吃吗？", en: "Can it be eaten?" },
  { file: "frog.png", zh: "它是什么颜色的？", en: "What colour is it?" },
  { file: "panda-bicycle.png", zh: "描述这张图片。", en: "Describe this picture." },
  { file: "banana-rocket.png", zh: "右边是什么？", en: "What is on the right?" },
  { file: "four-things.png", zh: "有几样东西？", en: "How many things are there?" },
];

const $ = (id) => document.getElementById(id);

export function show() {
  $("sample-box").hidden = !model.sees();
  $("samples").replaceChildren(
    ...SAMPLES.map((sample) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      const image = new Image(96, 96);
      image.src = `samples/${sample.file}`;
      image.alt = "";
      const words = document.createElement("span");
      words.textContent = sample[currentLanguage()];
      button.append(image, words);
      button.onclick = () => pick(sample);
      item.append(button);
      return item;
    }),
  );
}

async function pick(sample) {
  if (chat.running()) return;
  try {
    const response = await fetch(`samples/${sample.file}`);
    await askSample(await response.blob(), sample[currentLanguage()]);
  } catch {
    notice(text("noServer"));
  }
}

export function start() {
  show();
  model.events.addEventListener("change", () => {
    if ($("sample-box").hidden === model.sees()) show();
  });
}
