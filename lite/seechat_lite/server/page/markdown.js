// Answers as Markdown: read by marked, and only what is listed here reaches the page.

import { Marked } from "./vendor/marked.esm.js";
import DOMPurify from "./vendor/purify.es.mjs";
import { text } from "./texts.js";

const LONGEST = 100_000; // characters; what is longer is shown as it is
const SAFE = /^(https?|mailto):/i;

const TAGS = [
  ..."p br hr h1 h2 h3 h4 h5 h6 strong em del code pre blockquote ul ol li a".split(" "),
  ..."table thead tbody tr th td".split(" "),
];

const marked = new Marked({
  gfm: true,
  breaks: true, // a model's line break is meant
  renderer: {
    // HTML is shown as the text it is
    html: ({ text }) => escaped(text),
    // nothing is loaded from elsewhere: a picture is its address
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const purify = DOMPurify(window);
purify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A") return;
  const href = element.getAttribute("href") ?? "";
  if (!SAFE.test(href)) {
    element.replaceWith(...element.childNodes);
    return;
  }
  element.target = "_blank";
  element.rel = "noopener noreferrer nofollow";
  element.title = element.href; // where it really leads
});

function escaped(words) {
  const signs = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
  return words.replace(/[&<>"']/g, (sign) => signs[sign]);
}

// The answer as a DocumentFragment; copy(text): what a code block's button does.
export function rendered(answer, copy) {
  const fragment = sanitized(answer);
  if (!fragment) {
    const plain = document.createElement("p");
    plain.className = "plain";
    plain.textContent = answer;
    return plain;
  }
  for (const table of fragment.querySelectorAll("table")) {
    const box = document.createElement("div"); // scrolls where the table is wider than the page
    box.className = "table";
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  for (const block of fragment.querySelectorAll("pre")) {
    block.tabIndex = 0; // scrolls, also by keyboard
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy-code";
    button.textContent = text("copyCode");
    const code = block.textContent;
    button.onclick = () => copy(code, button);
    const box = document.createElement("div");
    box.className = "code";
    block.replaceWith(box);
    box.append(block, button);
  }
  return fragment;
}

function sanitized(answer) {
  if (answer.length > LONGEST) return null;
  try {
    return purify.sanitize(marked.parse(answer).trim(), {
      ALLOWED_TAGS: TAGS,
      ALLOWED_ATTR: ["href", "start", "align"],
      ALLOW_DATA_ATTR: false,
      ALLOW_ARIA_ATTR: false,
      ALLOWED_URI_REGEXP: SAFE,
      RETURN_DOM_FRAGMENT: true,
    });
  } catch {
    return null; // nested too deeply
  }
}

// The answer for a file of Markdown that others will read: what has HTML in it, or leads anywhere
// but to a page, becomes a code block.
export function harmless(answer) {
  let blocks;
  try {
    blocks = marked.lexer(answer);
  } catch {
    return fenced(answer);
  }
  return blocks.map((block) => (isHarmless(block) ? block.raw : `${fenced(block.raw)}\n\n`)).join("").trimEnd();
}

function isHarmless(block) {
  let fine = true;
  marked.walkTokens([block], (token) => {
    if (token.type === "html" || token.type === "image") fine = false;
    if ((token.type === "link" || token.type === "def") && !SAFE.test(token.href)) fine = false;
  });
  return fine;
}

function fenced(words) {
  const longest = Math.max(2, ...[...words.matchAll(/`+/g)].map(([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}text\n${words.trimEnd()}\n${fence}`;
}

// Text that stays as it is in a file of Markdown.
export function literally(words) {
  return words.replace(/[!-/:-@[-`{-~]/g, "\\$&").replace(/\n/g, "  \n");
}
