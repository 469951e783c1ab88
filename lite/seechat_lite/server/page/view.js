// A turn as it is seen: the question with its pictures, the answer, and what can be done with both.

import { copy } from "./dialogs.js";
import { rendered } from "./markdown.js";
import { thumbnail } from "./pictures.js";
import { text, wordsFor } from "./texts.js";

const ICONS = {
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  edit: "m4 20 1-4L16 5l3 3L8 19zM14 7l3 3",
  again: "M19 12a7 7 0 1 1-2-5l2 2m0-5v5h-5",
};
const SVG = "http://www.w3.org/2000/svg";

function make(tag, name, words = "") {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = words;
  return element;
}

function button(icon, label, click) {
  const made = make("button", "act");
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  made.append(svg);
  made.onclick = () => click(made);
  return made;
}

// Puts the new content into a box, and leaves alone what is the same: somebody may be marking text in it.
function patch(box, content) {
  const fresh = content.nodeType === Node.DOCUMENT_FRAGMENT_NODE ? [...content.childNodes] : [content];
  let same = 0;
  while (same < fresh.length && box.childNodes[same]?.isEqualNode(fresh[same])) same += 1;
  while (box.childNodes.length > same) box.lastChild.remove();
  box.append(...fresh.slice(same));
}

export class TurnView {
  #turn;
  #acts;
  #question = make("div", "asked");
  #answer = make("div", "answer");
  #foot = make("div", "foot");
  #drawing = 0;
  element = make("article", "turn");

  // acts: {again(turn), edit(turn, words), later(turn), running(), last(turn)}
  constructor(turn, acts) {
    this.#turn = turn;
    this.#acts = acts;
    this.element.append(make("h3", "hidden", text("you")), this.#question);
    this.element.append(make("h3", "hidden", text("model")), this.#answer, this.#foot);
    this.#drawQuestion();
    this.draw();
  }

  // Pieces may come faster than the screen shows them.
  drawSoon(after) {
    if (this.#drawing) return;
    this.#drawing = requestAnimationFrame(() => {
      this.#drawing = 0;
      this.#drawAnswer();
      after();
    });
  }

  draw() {
    cancelAnimationFrame(this.#drawing);
    this.#drawing = 0;
    this.#drawAnswer();
    this.#drawFoot();
  }

  // The answer as it is read out.
  get spoken() {
    const words = this.#answer.cloneNode(true);
    for (const control of words.querySelectorAll("button")) control.remove();
    return words.textContent.trim();
  }

  // Other turns' ends change what can be done with this one.
  drawFoot() {
    this.#drawFoot();
  }

  #drawQuestion() {
    const { question, pictures } = this.#turn;
    const shown = make("div", "shown");
    shown.append(...pictures.map((id, i) => thumbnail(id, i + 1)));
    const bubble = make("div", "question", question);
    const acts = make("div", "acts");
    acts.append(
      button("copy", text("copy"), (clicked) => copy(question, clicked)),
      button("edit", text("edit"), () => this.#edit()),
    );
    this.#question.replaceChildren(...(pictures.length ? [shown] : []), bubble, acts);
  }

  #drawAnswer() {
    const { answer, note, state } = this.#turn;
    const running = state === "running";
    const wrong = !answer && !running && note?.end !== "stopped" && note?.end !== "interrupted" && note;
    this.#answer.classList.toggle("waiting", running);
    this.#answer.classList.toggle("wrong", Boolean(wrong));
    this.#answer.hidden = !answer && !running && !wrong;
    this.#answer.setAttribute("aria-busy", running);
    if (!wrong) {
      patch(this.#answer, rendered(answer, copy));
      return;
    }
    this.#answer.replaceChildren(make("p", "", wordsFor(new Error("", { cause: note.end }))));
    if (note.detail) {
      const details = document.createElement("details");
      details.append(make("summary", "", text("details")), make("p", "", note.detail));
      this.#answer.append(details);
    }
  }

  #drawFoot() {
    const { answer, note, state } = this.#turn;
    this.#foot.replaceChildren();
    if (state === "running") return;
    this.#foot.append(this.#numbers(answer, note));
    const acts = make("div", "acts");
    if (answer) acts.append(button("copy", text("copy"), (clicked) => copy(answer, clicked)));
    if (this.#acts.last(this.#turn) && !this.#acts.running()) {
      if (answer && !note?.end) acts.append(button("again", text("againHow"), () => this.#acts.again(this.#turn)));
      else {
        const resend = make("button", "resend", text("resend"));
        resend.type = "button";
        resend.onclick = () => this.#acts.again(this.#turn);
        acts.append(resend);
      }
    }
    this.#foot.append(acts);
  }

  // How the answer ended and how long it took; tokens and speed on demand.
  #numbers(answer, note) {
    if (!note) return make("span", "numbers");
    const words = [];
    if (note.end === "stopped") words.push(text("stopped"));
    else if (note.end === "interrupted") words.push(text("interrupted"));
    else if (note.end && answer) words.push(wordsFor(new Error("", { cause: note.end })));
    if (note.seconds) words.push(text("seconds", Math.max(0.1, note.seconds).toFixed(1)));
    if (note.cut) words.push(text("cut"));
    if (note.left) words.push(text("left", note.left));
    if (!note.tokens) return make("span", "numbers", words.join(" · "));
    const details = make("details", "numbers");
    details.append(make("summary", "", words.join(" · ")));
    details.append(make("span", "", text("speed", note.tokens, note.speed.toFixed(1))));
    return details;
  }

  #edit() {
    const form = make("form", "edit");
    const area = make("textarea", "");
    area.value = this.#turn.question;
    area.setAttribute("aria-label", text("editLabel"));
    const later = this.#acts.later(this.#turn);
    const [cancel, send] = [make("button", "", text("cancel")), make("button", "main", text("send"))];
    cancel.type = "button";
    const row = make("div", "row");
    row.append(make("span", "faint", later ? text("editDrops", later) : ""), cancel, send);
    form.append(area, row);
    const back = () => {
      this.#drawQuestion();
      this.#question.querySelector(".act:last-child").focus();
    };
    cancel.onclick = back;
    form.onsubmit = (event) => {
      event.preventDefault();
      const words = area.value.trim();
      if (!words && !this.#turn.pictures.length) return;
      this.#acts.edit(this.#turn, words);
    };
    area.onkeydown = (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        back();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
        event.preventDefault();
        form.requestSubmit();
      }
    };
    this.#question.querySelector(".question").replaceWith(form);
    this.#question.querySelector(".acts").remove();
    area.style.height = `${Math.min(area.scrollHeight + 2, 300)}px`;
    area.focus();
  }
}
