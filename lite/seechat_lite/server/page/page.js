// The page of `seechat serve`: asks /v1/chat/completions as any other client would.

const TEXTS = {
  zh: {
    language: "语言",
    new: "新对话",
    conversation: "对话",
    welcome: "给我一张图片，问点什么吧",
    how: "拖放、粘贴或选择图片，也可以只聊天。",
    pictures: "下一个问题的图片",
    add: "选择图片",
    ask: "输入问题，回车发送",
    send: "发送",
    stop: "停止",
    remove: "移除图片",
    drop: "松开即可添加图片",
    picture: "图片",
    waiting: "正在等待…",
    answering: "正在回答…",
    stopped: "已停止",
    cut: "已达长度上限",
    speed: (tokens, speed) => `${tokens} 个词元 · ${speed} 词元/秒`,
    memory: "内存",
    textOnly: "纯文本",
    noPicture: "这不是浏览器能读取的图片：",
    noServer: "连不上服务器",
    loading: "模型正在加载…",
    keyTitle: "这个服务器需要密钥",
    keyWrong: "密钥不对",
    key: "API 密钥",
    ok: "确定",
    errors: {
      queue_full: "排队的人太多，请稍后再试",
      context_length_exceeded: "问题太长，模型读不下：请缩短，或开始新对话",
      body_too_large: "图片太大，请换小一些的",
      invalid_image: "模型读不了这张图片",
      out_of_memory: "服务器内存不足，请稍后再试",
      shutting_down: "服务器正在关闭",
    },
  },
  en: {
    language: "Language",
    new: "New chat",
    conversation: "Conversation",
    welcome: "Show me a picture and ask about it",
    how: "Drop, paste or choose pictures, or just talk.",
    pictures: "Pictures for the next question",
    add: "Choose pictures",
    ask: "Ask; Enter sends",
    send: "Send",
    stop: "Stop",
    remove: "Remove picture",
    drop: "Drop pictures here",
    picture: "Picture",
    waiting: "Waiting…",
    answering: "Answering…",
    stopped: "stopped",
    cut: "cut at the length limit",
    speed: (tokens, speed) => `${tokens} tokens · ${speed} tokens/s`,
    memory: "memory",
    textOnly: "text only",
    noPicture: "Not a picture this browser can read: ",
    noServer: "The server does not answer",
    loading: "The model is loading…",
    keyTitle: "This server asks for a key",
    keyWrong: "That key is wrong",
    key: "API key",
    ok: "OK",
    errors: {
      queue_full: "Too many people are waiting; try again in a moment",
      context_length_exceeded: "Too long for this model: shorten it, or start a new chat",
      body_too_large: "The pictures are too large; choose smaller ones",
      invalid_image: "The model cannot read this picture",
      out_of_memory: "The server is short of memory; try again in a moment",
      shutting_down: "The server is shutting down",
    },
  },
};
const LARGEST_SIDE = 1600; // pixels; larger pictures are scaled down before they are sent
const KEPT = { conversation: "seechat-conversation", language: "seechat-language", key: "seechat-key" };

const $ = (id) => document.getElementById(id);
const log = $("log");
const question = $("question");

let language = localStorage.getItem(KEPT.language) ?? (navigator.language.startsWith("zh") ? "zh" : "en");
let pictures = []; // data: URLs for the next question
let turns = []; // {question, pictures, answer, note} in order
let running = null; // AbortController of the answer being given

const text = (name) => TEXTS[language][name];

// --- asking

async function ask() {
  const words = question.value.trim();
  if (!words || running) return;
  const turn = { question: words, pictures, answer: "", note: "" };
  const bubble = show(turn);
  turns.push(turn);
  pictures = [];
  question.value = "";
  showPictures();
  grow();
  await answer(turn, bubble);
}

async function answer(turn, bubble) {
  running = new AbortController();
  setStatus("waiting");
  bubble.text.classList.add("waiting");
  updateButtons();
  try {
    const last = await stream(running.signal, (piece) => {
      setStatus("answering");
      turn.answer += piece;
      bubble.text.textContent = turn.answer;
      toBottom();
    });
    turn.note = text("speed")(last.tokens, last.speed);
    if (last.reason === "length") turn.note += ` · ${text("cut")}`;
  } catch (error) {
    const words = wordsFor(error);
    if (turn.answer || error.name === "AbortError") {
      turn.note = words; // what was said stays
    } else {
      turns.pop(); // the question may be asked again
      bubble.text.classList.add("wrong");
      bubble.text.textContent = words;
      question.value ||= turn.question;
      if (!pictures.length) pictures = turn.pictures;
      showPictures();
      grow();
    }
  }
  // stopped before its first word: the server knows of no such turn either
  if (!turn.answer && turns.at(-1) === turn) turns.pop();
  running = null;
  bubble.text.classList.remove("waiting");
  bubble.note.textContent = turn.note;
  keep();
  updateButtons();
  toBottom();
  question.focus();
  await showServer();
}

// What people are told of an error: their language's words, where there are any, or the server's.
function wordsFor(error) {
  if (error.name === "AbortError") return text("stopped");
  if (error instanceof TypeError) return text("noServer"); // of fetch
  return text("errors")[error.cause] ?? error.message;
}

function messages() {
  return turns.flatMap((turn) => {
    const images = turn.pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    const asked = { role: "user", content: [...images, { type: "text", text: turn.question }] };
    return turn.answer ? [asked, { role: "assistant", content: turn.answer }] : [asked];
  });
}

// Calls say(piece) for every piece; returns tokens, speed and the reason for the end.
async function stream(signal, say) {
  const body = { messages: messages(), stream: true, stream_options: { include_usage: true } };
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const end = { tokens: 0, speed: 0, reason: "" };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return end;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw serverError(chunk);
      const choice = chunk.choices[0];
      if (choice?.delta.content) say(choice.delta.content);
      if (choice?.finish_reason) end.reason = choice.finish_reason;
      if (chunk.timings) end.speed = chunk.timings.tokens_per_second.toFixed(1);
      if (chunk.usage) end.tokens = chunk.usage.completion_tokens;
    }
  }
}

// fetch() with the key, asking for one where the server wants it; errors are the server's words.
async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEPT.key);
    const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    if (response.status !== 401) throw serverError(await response.json());
    sessionStorage.setItem(KEPT.key, await askKey(text(key ? "keyWrong" : "keyTitle")));
  }
}

function serverError({ error }) {
  return new Error(error.message, { cause: error.code });
}

function askKey(title) {
  const dialog = $("key-dialog");
  $("key-title").textContent = title;
  dialog.returnValue = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve, reject) => {
    const closed = () =>
      dialog.returnValue === "ok" ? resolve($("key").value) : reject(new Error(title));
    dialog.addEventListener("close", closed, { once: true });
  });
}

// --- pictures

async function addPictures(files) {
  for (const file of files) {
    try {
      pictures.push(await dataURL(file));
    } catch {
      $("status").textContent = text("noPicture") + file.name;
    }
  }
  showPictures();
  question.focus();
}

// A picture as it is, or scaled down where a phone's camera made it larger than any model sees.
async function dataURL(file) {
  const bitmap = await createImageBitmap(file);
  const scale = LARGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  let blob = file;
  if (scale < 1) {
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  }
  bitmap.close();
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

function showPictures() {
  $("pictures").replaceChildren(
    ...pictures.map((url, i) => {
      const item = document.createElement("li");
      const remove = document.createElement("button");
      remove.type = "button";
      remove.textContent = "×";
      remove.setAttribute("aria-label", `${text("remove")} ${i + 1}`);
      remove.onclick = () => {
        pictures.splice(i, 1);
        showPictures();
        question.focus();
      };
      item.append(image(url, i), remove);
      return item;
    }),
  );
  toBottom(); // the conversation has less room now
}

function image(url, i) {
  const element = new Image();
  element.src = url;
  element.alt = `${text("picture")} ${i + 1}`;
  return element;
}

// --- what is seen

function show(turn) {
  $("welcome").hidden = true;
  const block = (name, content) => {
    const element = document.createElement("div");
    element.className = name;
    element.textContent = content;
    log.append(element);
    return element;
  };
  if (turn.pictures.length) block("shown", "").append(...turn.pictures.map(image));
  block("question", turn.question);
  const bubble = { text: block("answer", turn.answer), note: block("numbers", turn.note) };
  toBottom();
  return bubble;
}

function toBottom() {
  log.scrollTop = log.scrollHeight;
}

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`;
  updateButtons();
}

function updateButtons() {
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("send").disabled = !question.value.trim();
}

function setStatus(name) {
  $("status").textContent = text(name);
}

async function showServer() {
  try {
    const [{ data }, health] = await Promise.all(
      ["v1/models", "health"].map(async (path) => {
        const response = await (path === "health" ? fetch(path) : call(path));
        return response.json();
      }),
    );
    const [model] = data;
    $("model").textContent = `${model.id} · ${model.precision} · ${model.vision ?? text("textOnly")}`;
    $("model").title = $("model").textContent;
    if (running) return;
    if (health.status === "loading") {
      setStatus("loading");
      setTimeout(showServer, 1000);
    } else {
      $("status").textContent = `${text("memory")} ${(health.memory_bytes / 1e6).toFixed(0)} MB`;
    }
  } catch (error) {
    $("status").textContent = wordsFor(error);
  }
}

function speak(name) {
  language = name;
  document.documentElement.lang = name === "zh" ? "zh-CN" : "en";
  $("language").value = name;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", text(element.dataset.label));
    if (element instanceof HTMLButtonElement) element.title = text(element.dataset.label);
  }
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = text(element.dataset.hint);
  showPictures();
}

// --- what a reload keeps, in this tab alone

function keep() {
  try {
    sessionStorage.setItem(KEPT.conversation, JSON.stringify(turns));
  } catch {
    sessionStorage.removeItem(KEPT.conversation); // too many pictures for the browser's quota
  }
}

function startAnew() {
  running?.abort();
  turns = [];
  pictures = [];
  keep();
  log.replaceChildren($("welcome"));
  $("welcome").hidden = false;
  showPictures();
  question.focus();
}

// --- what people do

$("form").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
question.oninput = grow;
question.onkeydown = (event) => {
  // Enter also ends the typing of a Chinese word
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    ask();
  }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = startAnew;
$("add").onclick = () => $("file").click();
$("file").onchange = async (event) => {
  await addPictures([...event.target.files]);
  event.target.value = "";
};
$("language").onchange = (event) => {
  localStorage.setItem(KEPT.language, event.target.value);
  speak(event.target.value);
  showServer();
};
document.onkeydown = (event) => {
  if (event.key === "Escape") running?.abort();
};
document.onpaste = (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return;
  event.preventDefault();
  addPictures(files);
};

let inside = 0; // elements that a dragged file has entered and not left
document.ondragenter = (event) => {
  if (!event.dataTransfer.types.includes("Files")) return;
  inside += 1;
  $("drop").hidden = false;
};
document.ondragleave = () => {
  inside = Math.max(0, inside - 1);
  $("drop").hidden = inside === 0;
};
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => {
  event.preventDefault();
  inside = 0;
  $("drop").hidden = true;
  addPictures([...event.dataTransfer.files]);
};

speak(language in TEXTS ? language : "en");
try {
  turns = JSON.parse(sessionStorage.getItem(KEPT.conversation)) ?? [];
} catch {
  turns = [];
}
for (const turn of turns) show(turn);
grow();
question.focus();
showServer();
