// What the browser keeps of conversations, in IndexedDB.
//
//   conversations  {id, title, named, created, changed, draft: {text, pictures: [id]}}
//   turns          {id, conversation, at, question, pictures: [id], answer, note, state}
//   pictures       {id, conversation, bytes, type, width, height}
//
// A turn's state is "running" while it is answered, then "done"; at: its place in the order.
// Records are small and written one by one, so that two tabs lose nothing of each other's.
// Every function rejects where the browser does not keep what it should; callers say so.

const NAME = "seechat";
const VERSION = 1;

let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    request.onupgradeneeded = () => {
      const db = request.result;
      db.createObjectStore("conversations", { keyPath: "id" });
      db.createObjectStore("turns", { keyPath: "id" }).createIndex("conversation", "conversation");
      db.createObjectStore("pictures", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => {
      // another tab has a newer page, or the user cleared the data: open again when next needed
      request.result.onversionchange = () => request.result.close();
      request.result.onclose = () => (opening = null);
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
  });
  opening.catch(() => (opening = null));
  return opening;
}

// Runs work(stores...) in one transaction; resolves with its request's result once all is written.
async function transact(mode, names, work) {
  const db = await open();
  return new Promise((resolve, reject) => {
    const transaction = db.transaction(names, mode);
    const request = work(...names.map((name) => transaction.objectStore(name)));
    transaction.oncomplete = () => resolve(request?.result);
    transaction.onabort = () => reject(transaction.error ?? new Error("aborted"));
    // at once, so that what is written while the page goes away is written
    if (mode === "readwrite" && !request) transaction.commit?.();
  });
}

const all = (name) => transact("readonly", [name], (store) => store.getAll());

// --- reading

export const conversation = (id) => transact("readonly", ["conversations"], (store) => store.get(id));

export const picture = (id) => transact("readonly", ["pictures"], (store) => store.get(id));

export const turn = (id) => transact("readonly", ["turns"], (store) => store.get(id));

export async function turns(id) {
  const found = await transact("readonly", ["turns"], (store) => store.index("conversation").getAll(id));
  return found.sort((a, b) => a.at - b.at);
}

// The conversations, newest first; with words, those that have all of them in title, questions or answers.
export async function conversations(words = "") {
  const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
  const found = (await all("conversations")).sort((a, b) => b.changed - a.changed);
  if (!wanted.length) return found;
  const texts = new Map(found.map((c) => [c.id, [c.title, c.draft.text]]));
  for (const turn of await all("turns")) texts.get(turn.conversation)?.push(turn.question, turn.answer);
  return found.filter((c) => {
    const whole = texts.get(c.id).join("\n").toLowerCase();
    return wanted.every((word) => whole.includes(word));
  });
}

// --- writing

export const saveConversation = (record) => put("conversations", record);
export const saveTurn = (record) => put("turns", record);
export const savePicture = (record) => put("pictures", record);

async function put(name, record) {
  await transact("readwrite", [name], (store) => void store.put(record));
  tell({ conversation: record.conversation ?? record.id });
}

export async function removeTurns(conversation, ids, pictures = []) {
  await transact("readwrite", ["turns", "pictures"], (turnStore, pictureStore) => {
    for (const id of ids) turnStore.delete(id);
    for (const id of pictures) pictureStore.delete(id);
  });
  tell({ conversation });
}

export const removePictures = (conversation, ids) => removeTurns(conversation, [], ids);

// A conversation of which only a draft was kept, and that is empty now.
export async function removeIfEmpty(id) {
  await transact("readwrite", ["conversations", "turns"], (conversations, turnStore) => {
    const count = turnStore.index("conversation").count(id);
    count.onsuccess = () => count.result || conversations.delete(id);
    return count;
  });
  tell({ conversation: id });
}

// A conversation with all that belongs to it.
export async function removeConversation(id) {
  await transact("readwrite", ["conversations", "turns", "pictures"], (conversations, ...others) => {
    conversations.delete(id);
    for (const store of others) {
      store.index("conversation").getAllKeys(id).onsuccess = (event) => {
        for (const key of event.target.result) store.delete(key);
      };
    }
    return others[0].count(); // keeps the transaction open for the keys
  });
  tell({ conversation: id, removed: true });
}

export async function removeAll() {
  await transact("readwrite", ["conversations", "turns", "pictures"], (...stores) => {
    for (const store of stores) store.clear();
  });
  tell({ removed: true });
}

// --- other tabs

const channel = new BroadcastChannel(NAME);
const listeners = [];

function tell(change) {
  channel.postMessage(change);
  for (const listener of listeners) listener(change, true);
}

// listener({conversation, removed}, mine) after every change, this tab's own included.
export function onChange(listener) {
  listeners.push(listener);
}

// Which turn is being answered in a tab is known to that tab alone: `live(id)` says it of this one.
let live = () => false;
export function answersFor(isLive) {
  live = isLive;
}

channel.onmessage = ({ data }) => {
  if (data.alive) return;
  if (!data.asked) for (const listener of listeners) listener(data, false);
  else if (live(data.asked)) channel.postMessage({ alive: data.asked });
};

// Whether another tab is answering the turn; a tab that says nothing for so long is gone.
const PATIENCE = 500; // milliseconds

export function liveElsewhere(turn) {
  return new Promise((resolve) => {
    const finish = (found) => {
      channel.removeEventListener("message", heard);
      clearTimeout(timer);
      resolve(found);
    };
    const heard = ({ data }) => data.alive === turn && finish(true);
    const timer = setTimeout(finish, PATIENCE, false);
    channel.addEventListener("message", heard);
    channel.postMessage({ asked: turn });
  });
}

// --- names of records

// crypto.randomUUID is missing where the page comes over plain HTTP from another machine.
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
}
