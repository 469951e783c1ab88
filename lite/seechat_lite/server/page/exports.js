// A conversation as a file: Markdown to read, JSON for programs. Pictures are in it as data: URLs.

import { harmless, literally } from "./markdown.js";
import { dataURL } from "./pictures.js";
import { text } from "./texts.js";

export async function download(kind, record, turns) {
  const made = kind === "json" ? await json(record, turns) : await markdown(record, turns);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(made);
  link.download = `${fileName(record.title || text("untitled"))}.${kind === "json" ? "json" : "md"}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // long enough for "save as"
}

async function json(record, turns) {
  const time = (at) => new Date(at).toISOString();
  const made = {
    title: record.title,
    created: time(record.created),
    changed: time(record.changed),
    turns: await Promise.all(
      turns.map(async ({ at, question, pictures, answer }) => ({
        asked: time(at),
        question,
        pictures: (await Promise.all(pictures.map(dataURL))).filter(Boolean),
        answer,
      })),
    ),
  };
  return new Blob([JSON.stringify(made, null, 2)], { type: "application/json" });
}

async function markdown(record, turns) {
  const parts = [`# ${literally((record.title || text("untitled")).replace(/\s+/g, " "))}`];
  for (const { question, pictures, answer } of turns) {
    parts.push(`## ${text("you")}`);
    const urls = (await Promise.all(pictures.map(dataURL))).filter(Boolean);
    parts.push(...urls.map((url, i) => `![${text("picture", i + 1)}](${url})`), literally(question));
    if (answer) parts.push(`## ${text("model")}`, harmless(answer));
  }
  return new Blob([parts.join("\n\n") + "\n"], { type: "text/markdown;charset=utf-8" });
}

// Characters that a file's name may have on every system; no control or direction signs.
function fileName(title) {
  return title.replace(/[\p{C}\\/:*?"<>|.]+/gu, " ").trim().slice(0, 60).trim() || "seechat";
}
