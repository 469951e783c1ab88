// Everything the page says, in both languages.

export const TEXTS = {
  zh: {
    language: "语言",
    conversations: "对话列表",
    openList: "打开对话列表",
    closeList: "关闭对话列表",
    new: "新对话",
    search: "搜索对话",
    noneFound: "没有找到",
    noneYet: "还没有对话",
    untitled: "新对话",
    draft: "草稿",
    more: "更多操作",
    rename: "重命名",
    renameTitle: "重命名对话",
    title: "标题",
    exportMarkdown: "导出 Markdown",
    exportJSON: "导出 JSON",
    delete: "删除",
    deleteTitle: "删除这个对话？",
    deleteWhat: "对话和其中的图片会从这个浏览器中删除，无法恢复。",
    deleteAll: "删除全部对话",
    deleteAllTitle: "删除全部对话？",
    cancel: "取消",
    close: "关闭",
    ok: "确定",

    conversation: "对话",
    welcome: "给我一张图片，问点什么吧",
    how: "拖放、粘贴、拍照或选择图片，也可以只聊天。",
    samples: "试一试",
    credit: "示例图片：Twemoji（CC BY 4.0）",
    abilities: {
      builtin: "这是内置的演示模型：能说出简单图画里有什么、什么颜色、几个、在哪里，也认得一些照片里的东西。它很小，认得几百种东西，不知道的就会答错。",
      vision: "这个模型能看图，用中文和英文回答；它可能出错，重要的事请核对。",
      text: "这个模型只能读文字，不能看图片。",
    },

    pictures: "下一个问题的图片",
    add: (most) => `选择图片（最多 ${most} 张）`,
    camera: "拍照",
    ask: "输入问题，回车发送",
    send: "发送",
    stop: "停止",
    remove: (n) => `移除图片 ${n}`,
    enlarge: (n) => `放大图片 ${n}`,
    drop: "松开即可添加图片",
    picture: (n) => `图片 ${n}`,
    describe: "描述这张图片。",
    describeAll: "描述这些图片。",
    chosen: (count, most) => `${count} / ${most} 张图片`,
    tooMany: (most, left) => `一次最多 ${most} 张图片，有 ${left} 张没有添加。`,
    noPicture: (names) => `浏览器读不了这些图片：${names}`,
    noVision: "这个模型只能读文字，图片没有添加。",
    preparing: "正在处理图片…",

    you: "你",
    model: "模型",
    waiting: "正在等待…",
    uploading: (percent) => `正在上传图片… ${percent}%`,
    looking: "正在看图片…",
    answering: "正在回答…",
    answeringElsewhere: "正在另一个标签页中回答…",
    interrupted: "回答被中断",
    stopped: "已停止",
    cut: "已达长度上限",
    left: (turns) => `没有重读较早的 ${turns} 轮`,
    seconds: (seconds) => `${seconds} 秒`,
    speed: (tokens, speed) => `${tokens} 个词元 · ${speed} 词元/秒`,
    copy: "复制",
    copied: "已复制",
    copyCode: "复制代码",
    copyFailed: "浏览器不允许复制",
    again: "重新回答",
    againHow: "换一种说法再答一次",
    resend: "重新发送",
    edit: "编辑",
    editLabel: "编辑问题",
    editDrops: (turns) => `后面的 ${turns} 轮会被删除。`,
    details: "详情",
    newest: "跳到最新",

    settings: "设置",
    temperature: "温度",
    temperatureHow: "0：总是最可能的回答；越高越随意。",
    temperatureDefault: "按服务器默认",
    length: "回答长度上限",
    lengthHow: "以词元计，一个词元约一到两个汉字。留空：按服务器默认。",
    system: "系统提示",
    systemHow: "每次提问前先告诉模型的话。很小的模型会因此答得更差。",
    format: "对话格式",
    formatDefault: (name) => `按服务器默认（${name}）`,
    formatHow: "对话以什么格式写给模型。选错了，回答会变差。",
    theme: "外观",
    themes: { auto: "跟随系统", light: "浅色", dark: "深色" },
    reset: "恢复默认",
    data: "数据",
    dataHow: "对话和图片只保存在这个浏览器里。",

    about: "关于这个模型",
    builtinName: "内置演示模型",
    facts: {
      name: "名称",
      precision: "权重精度",
      vision: "看图的部分",
      context: "一次能读",
      memory: "占用内存",
      state: "状态",
    },
    precisions: {
      fp32: "32 位浮点（原始精度）",
      fp16: "16 位浮点（近乎原始精度）",
      bf16: "16 位浮点（近乎原始精度）",
      int8: "8 位整数（略有取舍，省一半内存）",
      int4: "4 位整数（更省内存，略有损失）",
    },
    context: (tokens) => `${tokens} 个词元：问题、图片、之前的对话和回答合计`,
    textOnly: "没有：只读文字",
    states: { ok: "就绪", loading: "正在加载", unloaded: "空闲，提问时加载", stopping: "正在关闭" },
    loading: "模型正在加载…",

    noServer: "连不上服务器",
    keyTitle: "这个服务器需要密钥",
    keyWrong: "密钥不对",
    key: "API 密钥",
    refused: "服务器拒绝了这个问题",
    quota: "没有保存：浏览器给这个页面的空间满了。请导出或删除旧对话。",
    notKept: "没有保存：浏览器不允许这个页面保存数据。刷新后对话会丢失，请导出。",
    errors: {
      queue_full: "排队的人太多，请稍后再试",
      context_length_exceeded: "问题太长，模型读不下：请缩短，或开始新对话",
      body_too_large: "图片太大，请换小一些的",
      invalid_image: "模型读不了这张图片",
      out_of_memory: "服务器内存不足，请稍后再试",
      shutting_down: "服务器正在关闭",
      request_timeout: "上传太慢，服务器没有等到全部内容",
      engine: "模型运行出错，原因在服务器的日志里",
      internal: "服务器内部出错，原因在它的日志里",
    },
  },

  en: {
    language: "Language",
    conversations: "Conversations",
    openList: "Open the list of conversations",
    closeList: "Close the list of conversations",
    new: "New chat",
    search: "Search conversations",
    noneFound: "Nothing found",
    noneYet: "No conversations yet",
    untitled: "New chat",
    draft: "Draft",
    more: "More actions",
    rename: "Rename",
    renameTitle: "Rename the conversation",
    title: "Title",
    exportMarkdown: "Export Markdown",
    exportJSON: "Export JSON",
    delete: "Delete",
    deleteTitle: "Delete this conversation?",
    deleteWhat: "The conversation and its pictures are deleted from this browser, for good.",
    deleteAll: "Delete all conversations",
    deleteAllTitle: "Delete all conversations?",
    cancel: "Cancel",
    close: "Close",
    ok: "OK",

    conversation: "Conversation",
    welcome: "Show me a picture and ask about it",
    how: "Drop, paste, photograph or choose pictures, or just talk.",
    samples: "Try one",
    credit: "Sample pictures: Twemoji (CC BY 4.0)",
    abilities: {
      builtin:
        "This is the built-in demonstration model: of simple drawings it says what, which colour, how " +
        "many and where, and it names some things in photographs. It is very small and knows some hundred " +
        "things; beyond them it is wrong.",
      vision: "This model sees pictures and answers in Chinese and English. It makes mistakes: check what matters.",
      text: "This model reads text only, no pictures.",
    },

    pictures: "Pictures for the next question",
    add: (most) => `Choose pictures (up to ${most})`,
    camera: "Take a photo",
    ask: "Ask; Enter sends",
    send: "Send",
    stop: "Stop",
    remove: (n) => `Remove picture ${n}`,
    enlarge: (n) => `Enlarge picture ${n}`,
    drop: "Drop pictures here",
    picture: (n) => `Picture ${n}`,
    describe: "Describe this picture.",
    describeAll: "Describe these pictures.",
    chosen: (count, most) => `${count} of ${most} pictures`,
    tooMany: (most, left) => `At most ${most} pictures at a time; ${left} were not added.`,
    noPicture: (names) => `Not a picture this browser can read: ${names}`,
    noVision: "This model reads text only; the pictures were not added.",
    preparing: "Preparing pictures…",

    you: "You",
    model: "Model",
    waiting: "Waiting…",
    uploading: (percent) => `Uploading pictures… ${percent}%`,
    looking: "Looking at the pictures…",
    answering: "Answering…",
    answeringElsewhere: "Being answered in another tab…",
    interrupted: "The answer was interrupted",
    stopped: "stopped",
    cut: "cut at the length limit",
    left: (turns) => (turns === 1 ? "the oldest turn was not read again" : `the oldest ${turns} turns were not read again`),
    seconds: (seconds) => `${seconds} s`,
    speed: (tokens, speed) => `${tokens} tokens · ${speed} tokens/s`,
    copy: "Copy",
    copied: "Copied",
    copyCode: "Copy code",
    copyFailed: "This browser does not allow copying",
    again: "Answer again",
    againHow: "Answer again in other words",
    resend: "Send again",
    edit: "Edit",
    editLabel: "Edit the question",
    editDrops: (turns) => (turns === 1 ? "The turn after it will be deleted." : `The ${turns} turns after it will be deleted.`),
    details: "Details",
    newest: "Jump to newest",

    settings: "Settings",
    temperature: "Temperature",
    temperatureHow: "0: always the likeliest answer; higher: freer.",
    temperatureDefault: "The server's default",
    length: "Longest answer",
    lengthHow: "In tokens, about ¾ of an English word each. Empty: the server's default.",
    system: "System prompt",
    systemHow: "What the model is told before every question. Very small models answer worse with one.",
    format: "Conversation format",
    formatDefault: (name) => `The server's default (${name})`,
    formatHow: "How the conversation is written for the model. In a wrong one it answers worse.",
    theme: "Appearance",
    themes: { auto: "As the system", light: "Light", dark: "Dark" },
    reset: "Reset",
    data: "Data",
    dataHow: "Conversations and pictures are kept in this browser alone.",

    about: "About this model",
    builtinName: "Built-in demo model",
    facts: {
      name: "Name",
      precision: "Weights",
      vision: "What sees",
      context: "Reads at once",
      memory: "Memory in use",
      state: "State",
    },
    precisions: {
      fp32: "32-bit floats (as trained)",
      fp16: "16-bit floats (nearly as trained)",
      bf16: "16-bit floats (nearly as trained)",
      int8: "8-bit integers (half the memory, hardly a loss)",
      int4: "4-bit integers (a quarter of the memory, a small loss)",
    },
    context: (tokens) => `${tokens} tokens: question, pictures, conversation so far and answer together`,
    textOnly: "Nothing: text only",
    states: { ok: "ready", loading: "loading", unloaded: "idle, loads when asked", stopping: "shutting down" },
    loading: "The model is loading…",

    noServer: "The server does not answer",
    keyTitle: "This server asks for a key",
    keyWrong: "That key is wrong",
    key: "API key",
    refused: "The server refused this question",
    quota: "Not saved: the browser's space for this page is full. Export or delete old conversations.",
    notKept: "Not saved: this browser lets the page keep nothing. A reload loses the conversation; export it.",
    errors: {
      queue_full: "Too many people are waiting; try again in a moment",
      context_length_exceeded: "Too long for this model: shorten it, or start a new chat",
      body_too_large: "The pictures are too large; choose smaller ones",
      invalid_image: "The model cannot read this picture",
      out_of_memory: "The server is short of memory; try again in a moment",
      shutting_down: "The server is shutting down",
      request_timeout: "The upload was too slow; the server did not get all of it",
      engine: "The model failed; the server's log says why",
      internal: "The server failed; its log says why",
    },
  },
};

const KEY = "seechat-language";
let language = kept() ?? (navigator.language.startsWith("zh") ? "zh" : "en");

function kept() {
  try {
    const name = localStorage.getItem(KEY);
    return name in TEXTS ? name : null;
  } catch {
    return null; // this browser keeps nothing
  }
}

export const currentLanguage = () => language;

// A text by its name; what has numbers in it is a function of them.
export const text = (name, ...values) => {
  const found = TEXTS[language][name];
  return typeof found === "function" ? found(...values) : found;
};

export function choose(name) {
  language = name;
  try {
    localStorage.setItem(KEY, name);
  } catch {
    // chosen for this visit alone
  }
}

// Writes every text that index.html names: data-text, data-label, data-hint.
export function translate(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-text]")) element.textContent = text(element.dataset.text);
  for (const element of root.querySelectorAll("[data-label]")) {
    const label = text(element.dataset.label, element.dataset.value);
    element.setAttribute("aria-label", label);
    if (element.matches("button")) element.title = label;
  }
  for (const element of root.querySelectorAll("[data-hint]")) element.placeholder = text(element.dataset.hint);
}

// What people are told of an error, in their language where there are words for it.
export function wordsFor(error) {
  if (error.name === "AbortError") return text("stopped");
  if (error.cause === "no_server") return text("noServer");
  if (error.cause === "no_key") return text("keyTitle");
  return text("errors")[error.cause] ?? text("refused");
}
