"""A desktop application around seechat-lite, in one file: Tk, Pillow and nothing else.

    python examples/desktop.py [--model BUNDLE] [PICTURE ...]

Pictures come by button, or are dropped where tkinterdnd2 is installed. The model lives in a thread
of its own, which is told what to do and tells what happened through two queues; Tk looks into its
queue some thirty times a second. Nothing here knows more of seechat-lite than its public API.
"""

import argparse
import queue
import threading
import tkinter as tk
from collections.abc import Callable
from pathlib import Path
from tkinter import filedialog, ttk
from typing import Any

from PIL import ImageTk

import seechat_lite as sl

PICTURES = "*.png *.jpg *.jpeg *.webp *.gif *.bmp *.tif *.tiff"
THUMBNAIL = (220, 160)
LOOK_EVERY = 30  # ms


class Worker(threading.Thread):
    """Owns the model. `tell(kind, *values)` is called in its thread with all that happens."""

    def __init__(self, bundle: str | None, tell: Callable[..., None]) -> None:
        super().__init__(daemon=True)
        self._bundle = bundle
        self._tell = tell
        self._work: queue.Queue[Callable[[sl.Chat], None] | None] = queue.Queue()
        self._chat: sl.Chat | None = None

    def ask(self, question: str, pictures: list[str]) -> None:
        self._work.put(lambda chat: self._answer(chat, question, pictures))

    def rewind(self) -> None:
        """Begin a new conversation, once a running answer has ended."""
        self.stop()
        self._work.put(self._forget)

    def close(self) -> None:
        """End the thread, once it has ended a running answer, and release the model."""
        self.stop()
        self._work.put(None)

    def stop(self) -> None:
        if self._chat:
            self._chat.stop()

    def run(self) -> None:
        try:
            model = sl.load(self._bundle, progress=lambda *step: self._tell("progress", *step))
        except Exception as e:  # of a SeechatError the text says what to do
            self._tell("failed", str(e))
            return
        with model:
            self._tell("ready", model.manifest.name, model.manifest.decoder.precision)
            self._chat = model.chat()
            while work := self._work.get():
                work(self._chat)

    def _forget(self, chat: sl.Chat) -> None:
        chat.clear()
        self._tell("forgotten")

    def _answer(self, chat: sl.Chat, question: str, pictures: list[str]) -> None:
        try:
            for piece in chat.stream(question, pictures):
                self._tell("piece", piece)
            self._tell("done", chat.stats)
        except Exception as e:  # whatever it is, the window has to go on
            self._tell("error", str(e))


class Window:
    """The window; all its methods run in Tk's thread."""

    def __init__(self, root: tk.Tk, bundle: str | None) -> None:
        self._root = root
        self._events: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue()
        self.worker = Worker(bundle, lambda kind, *values: self._events.put((kind, values)))
        self._pictures: list[str] = []
        self._shown: list[ImageTk.PhotoImage] = []  # Tk does not keep them alive
        self.busy = True
        root.title("SEEChat")
        root.minsize(420, 420)
        self._build()
        self._accept_drops()
        self.worker.start()
        self._look()

    def _build(self) -> None:
        root = self._root
        if root.tk.call("tk", "windowingsystem") == "x11":
            ttk.Style().theme_use("clam")  # the default there is of another century
            root.configure(background=ttk.Style().lookup("TFrame", "background"))
        root.columnconfigure(0, weight=1)
        root.rowconfigure(0, weight=1)
        self.talk = tk.Text(
            root,
            wrap="word",
            state="disabled",
            font="TkDefaultFont",
            padx=14,
            pady=10,
            spacing3=4,
            relief="flat",
        )
        self.talk.tag_configure("question", foreground="#1d4ed8", spacing1=12)
        self.talk.tag_configure("wrong", foreground="#b42318")
        self.talk.tag_configure("note", foreground="#5b6472")
        self.talk.grid(row=0, column=0, columnspan=2, sticky="nsew")
        bar = ttk.Scrollbar(root, command=self.talk.yview)
        bar.grid(row=0, column=2, sticky="ns")
        self.talk.configure(yscrollcommand=bar.set)

        self._next = ttk.Label(root, padding=(8, 4))
        self._next.grid(row=1, column=0, columnspan=3, sticky="w")
        self._question = ttk.Entry(root)
        self._question.grid(row=2, column=0, sticky="ew", padx=(10, 4), pady=2, ipady=4)
        self._question.bind("<Return>", lambda _: self._ask())
        self._question.focus()
        self._send = ttk.Button(root, text="发送 Send", command=self._ask)
        self._send.grid(row=2, column=1, columnspan=2, padx=(4, 10))

        buttons = ttk.Frame(root)
        buttons.grid(row=3, column=0, columnspan=3, sticky="ew", padx=8, pady=(2, 8))
        for text, command in (
            ("图片… Picture…", self._choose),
            ("停止 Stop", self.worker.stop),
            ("新对话 New", self.worker.rewind),
        ):
            ttk.Button(buttons, text=text, command=command).pack(side="left", padx=2)
        self._status = ttk.Label(buttons, text="…", anchor="e")
        self._status.pack(side="right", fill="x", expand=True, padx=4)
        root.bind("<Escape>", lambda _: self.worker.stop())

    def _accept_drops(self) -> None:
        """Where tkinterdnd2 is installed and its library can be loaded."""
        try:
            from tkinterdnd2 import DND_FILES, TkinterDnD

            TkinterDnD._require(self._root)
        except (ImportError, RuntimeError, tk.TclError):
            return
        target: Any = self.talk  # it has these methods from tkinterdnd2
        target.drop_target_register(DND_FILES)
        target.dnd_bind(
            "<<Drop>>", lambda event: self.add_pictures(self._root.tk.splitlist(event.data))
        )

    # --- what people do

    def add_pictures(self, paths: Any) -> None:
        self._pictures += map(str, paths)
        names = " · ".join(Path(p).name for p in self._pictures)
        self._next.configure(text=f"图片 Pictures: {names}" if names else "")
        self._question.focus()

    def ask(self, question: str) -> None:
        """Put a question and send it."""
        self._question.delete(0, "end")
        self._question.insert(0, question)
        self._ask()

    def _choose(self) -> None:
        kinds = [("图片 Pictures", PICTURES), ("*", "*")]
        self.add_pictures(filedialog.askopenfilenames(filetypes=kinds))

    def _ask(self) -> None:
        question = self._question.get().strip()
        if not question or self.busy:
            return
        self.busy = True
        self._send.configure(state="disabled")
        self._say(f"{question}\n", "question")
        for path in self._pictures:
            self._show(path)
        self.worker.ask(question, self._pictures)
        self._pictures = []
        self._next.configure(text="")
        self._question.delete(0, "end")

    # --- what the worker tells

    def _look(self) -> None:
        while not self._events.empty():
            kind, values = self._events.get()
            getattr(self, f"_on_{kind}")(*values)
        self._root.after(LOOK_EVERY, self._look)

    def _on_forgotten(self) -> None:
        self._pictures = []
        self._shown.clear()
        self._next.configure(text="")
        self.talk.configure(state="normal")
        self.talk.delete("1.0", "end")
        self.talk.configure(state="disabled")

    def _on_progress(self, stage: str, done: int, total: int) -> None:
        self._status.configure(text=f"{stage} {done / total:.0%}")

    def _on_ready(self, name: str, precision: str) -> None:
        self._status.configure(text=f"{name} · {precision}")
        self._free()

    def _on_piece(self, piece: str) -> None:
        self._say(piece)

    def _on_done(self, stats: sl.Stats) -> None:
        stopped = " · 已停止 stopped" if stats.finish_reason == "cancelled" else ""
        self._say(
            f"\n{stats.new_tokens} tokens · {stats.tokens_per_second:.1f}/s{stopped}\n", "note"
        )
        self._free()

    def _on_error(self, message: str) -> None:
        self._say(f"{message}\n", "wrong")
        self._free()

    def _on_failed(self, message: str) -> None:
        self._say(f"{message}\n", "wrong")  # without a model nothing can be asked
        self._status.configure(text="")

    def _free(self) -> None:
        self.busy = False
        self._send.configure(state="normal")

    # --- the conversation

    def _say(self, text: str, *tags: str) -> None:
        self.talk.configure(state="normal")
        self.talk.insert("end", text, tags)
        self.talk.configure(state="disabled")
        self.talk.see("end")

    def _show(self, path: str) -> None:
        try:
            photo = ImageTk.PhotoImage(sl.thumbnail(path, THUMBNAIL))
        except sl.ImageError:
            return  # the worker tells what is wrong with it
        self._shown.append(photo)
        self.talk.configure(state="normal")
        self.talk.image_create("end", image=photo, padx=2, pady=4)
        self.talk.insert("end", "\n")
        self.talk.configure(state="disabled")


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask about pictures")
    parser.add_argument("--model", help="a bundle; default: built in")
    parser.add_argument("pictures", nargs="*")
    args = parser.parse_args()
    root = tk.Tk()
    root.geometry("640x640")
    window = Window(root, args.model)
    window.add_pictures(args.pictures)
    root.mainloop()
    window.worker.close()


if __name__ == "__main__":
    main()
