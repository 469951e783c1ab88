// The server, asked as any other client would: /v1/chat/completions, /v1/models and /health.

const KEY = "seechat-key";

let askKey = async () => {
  throw new Error("no key");
};

// ask(wrong): a promise of a key from the user; wrong: the last one was.
export function askForKeysWith(ask) {
  askKey = ask;
}

// What the server says of its model and of itself.
export async function facts() {
  const health = await fetchJSON("health");
  const models = await withKey(() => fetchJSON("v1/models"));
  return { model: models.data[0], health };
}

async function fetchJSON(path) {
  let response, body;
  try {
    response = await fetch(path, { headers: authorization() });
    body = await response.json();
  } catch {
    throw noServer();
  }
  if (body.error) throw serverError(body, response.status);
  return body; // of /health also while the server loads, which is no error here
}

// Asks, and calls uploaded(0…1), begun() when all is sent, and say(piece) for every piece.
// Resolves with {tokens, speed, seconds, reason, left}; rejects with an error whose cause is its code.
export async function answer(body, { signal, uploaded, begun, say }) {
  return withKey(() => post("v1/chat/completions", JSON.stringify(body), { signal, uploaded, begun, say }));
}

// XMLHttpRequest, because fetch() cannot tell how much of the pictures is sent.
function post(path, body, { signal, uploaded, begun, say }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const events = new Events(say);
    const abort = () => request.abort();
    const fail = (error) => {
      reject(error);
      request.abort();
    };
    request.open("POST", path);
    request.setRequestHeader("Content-Type", "application/json");
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => event.lengthComputable && uploaded(event.loaded / event.total);
    request.upload.onload = begun;
    request.onprogress = () => {
      if (request.status !== 200) return;
      try {
        events.read(request.responseText);
      } catch (error) {
        fail(error);
      }
    };
    request.onload = () => {
      try {
        if (request.status !== 200) throw serverError(parsed(request.responseText), request.status);
        events.read(request.responseText);
        if (!events.done) throw noServer(); // it broke off
        resolve(events.end);
      } catch (error) {
        reject(error);
      }
    };
    request.onerror = () => reject(noServer());
    request.onabort = () => reject(new DOMException("stopped", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", abort);
    if (signal.aborted) return request.onabort();
    signal.addEventListener("abort", abort);
    request.send(body);
  });
}

// Server-sent events as they arrive.
class Events {
  #seen = 0;
  #say;
  done = false;
  end = { tokens: 0, speed: 0, seconds: 0, reason: "", left: 0 };

  constructor(say) {
    this.#say = say;
  }

  // text: all that has come so far.
  read(text) {
    for (;;) {
      const next = text.indexOf("\n\n", this.#seen);
      if (next < 0) return;
      const event = text.slice(this.#seen, next);
      this.#seen = next + 2;
      for (const line of event.split("\n")) if (line.startsWith("data:")) this.#take(line.slice(5).trim());
    }
  }

  #take(data) {
    if (data === "[DONE]") {
      this.done = true;
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw serverError(chunk, 200);
    const choice = chunk.choices[0];
    if (choice?.delta.content) this.#say(choice.delta.content);
    if (choice?.finish_reason) this.end.reason = choice.finish_reason;
    if (chunk.timings) {
      this.end.speed = chunk.timings.tokens_per_second;
      this.end.seconds = chunk.timings.seconds;
    }
    if (chunk.usage) {
      this.end.tokens = chunk.usage.completion_tokens;
      this.end.left = chunk.usage.dropped_turns ?? 0; // for which the context had no room
    }
  }
}

// --- keys and errors

function authorization() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function withKey(attempt) {
  for (;;) {
    const used = sessionStorage.getItem(KEY);
    try {
      return await attempt();
    } catch (error) {
      if (error.status !== 401) throw error;
      if (sessionStorage.getItem(KEY) !== used) continue; // asked for by another request meanwhile
      sessionStorage.setItem(KEY, await askKey(Boolean(used)));
    }
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return {}; // a proxy's own page
  }
}

function serverError({ error }, status) {
  const made = new Error(error?.message ?? `HTTP ${status}`, { cause: error?.code });
  made.status = status;
  return made;
}

const noServer = () => new Error("no answer", { cause: "no_server" });
