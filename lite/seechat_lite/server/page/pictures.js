// Pictures: made small enough to keep and to send, shown, and enlarged.

import * as store from "./store.js";
import { text } from "./texts.js";

export const MOST = 16; // pictures the server takes in a request
const LARGEST_SIDE = 1600; // pixels; no model sees more
const LARGEST_FILE = 512 * 1024; // bytes; smaller files of a usual kind are kept as they are
const USUAL = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const QUALITY = 0.9; // of JPEG

// A record for the store, of a file the browser can read; rejects if it cannot.
export async function pictureOf(file, conversation) {
  const url = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = url;
    await image.decode(); // upright, as its camera was held
    // a drawing may have no size of its own
    const width = image.naturalWidth || 512;
    const height = image.naturalHeight || 512;
    const scale = Math.min(1, LARGEST_SIDE / Math.max(width, height));
    const asIs = scale === 1 && file.size <= LARGEST_FILE && USUAL.includes(file.type);
    const blob = asIs ? file : await redrawn(image, Math.round(width * scale), Math.round(height * scale));
    return {
      id: store.newId(),
      conversation,
      bytes: await blob.arrayBuffer(), // not every browser keeps a Blob in a private window
      type: blob.type,
      width: Math.max(1, Math.round(width * scale)),
      height: Math.max(1, Math.round(height * scale)),
    };
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function redrawn(image, width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, width);
  canvas.height = Math.max(1, height);
  const context = canvas.getContext("2d");
  context.fillStyle = "#ffffff"; // what the model sees behind a transparent picture
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", QUALITY));
  if (!blob) throw new Error("the browser could not encode the picture");
  return blob;
}

// --- by their ids: records in memory (also where nothing can be stored) and addresses to show

const records = new Map();
const addresses = new Map();

export function remember(record) {
  records.set(record.id, record);
}

async function record(id) {
  if (!records.has(id)) {
    const found = await store.picture(id);
    if (found) records.set(id, found);
  }
  return records.get(id);
}

export function forget(ids) {
  for (const id of ids) {
    URL.revokeObjectURL(addresses.get(id));
    addresses.delete(id);
    records.delete(id);
  }
}

// Frees what other conversations' pictures hold.
export function forgetAllBut(ids) {
  const kept = new Set(ids);
  forget([...new Set([...records.keys(), ...addresses.keys()])].filter((id) => !kept.has(id)));
}

async function address(id) {
  if (!addresses.has(id)) {
    const found = await record(id);
    if (found) addresses.set(id, URL.createObjectURL(new Blob([found.bytes], { type: found.type })));
  }
  return addresses.get(id);
}

// As a data: URL, for a request or a file; null if it is gone.
export async function dataURL(id) {
  const found = await record(id);
  if (!found) return null;
  const reader = new FileReader();
  return new Promise((resolve, reject) => {
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(new Blob([found.bytes], { type: found.type }));
  });
}

// --- shown

// A button with the picture on it, which enlarges it. n: its number, from 1.
export function thumbnail(id, n) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "thumbnail";
  button.title = text("enlarge", n);
  button.setAttribute("aria-label", text("enlarge", n));
  const image = new Image();
  image.alt = text("picture", n);
  show(image, id);
  button.append(image);
  button.onclick = () => enlarge(id, n);
  return button;
}

async function show(image, id) {
  try {
    const [found, url] = [await record(id), await address(id)];
    if (!url) return;
    image.width = found.width; // room is made before it is drawn
    image.height = found.height;
    image.src = url;
  } catch {
    // the store is closed to us: its alternative text is shown
  }
}

async function enlarge(id, n) {
  const dialog = document.getElementById("picture-dialog");
  const image = document.getElementById("large-picture");
  image.alt = text("picture", n);
  dialog.setAttribute("aria-label", image.alt);
  await show(image, id);
  dialog.showModal();
}
