"""The page of a demo, made with Gradio, and its server."""

import threading
import time
from collections import OrderedDict

import gradio as gr

from .rendering import CSS, answers_html, escaped, history_html
from .sessions import MATCHES, MAX_TITLE_LENGTH, Demo, Session

# Limits memory: each visitor who adds items has copies of the models.
_MAX_SESSIONS = 100
_FOCUS_SEARCH = "() => { document.querySelector('#search input, #search textarea').focus() }"
# Gradio has no settings for these roles. A live region must exist before its text changes.
_ROLES = """() => {
    const matches = document.getElementById("matches")
    matches.setAttribute("role", "group")
    matches.setAttribute("aria-label", "Matching titles")
    document.getElementById("answers").setAttribute("role", "region")
    document.getElementById("answers").setAttribute("aria-label", "Recommendations")
}"""
_LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite')"
_ADD = "Add "


class _Visitors:
    """The sessions of the open pages; if there are too many, the one that was idle for longest is dropped."""

    def __init__(self, demo: Demo):
        self._demo, self._sessions, self._lock = demo, OrderedDict(), threading.Lock()

    def session(self, request: gr.Request) -> Session:
        with self._lock:
            session = self._sessions.setdefault(request.session_hash, Session(self._demo))
            self._sessions.move_to_end(request.session_hash)
            if len(self._sessions) > _MAX_SESSIONS:
                self._sessions.popitem(last=False)
        return session

    def leave(self, request: gr.Request) -> None:
        with self._lock:
            self._sessions.pop(request.session_hash, None)


def status_html(message: str) -> str:
    """The content of the live region."""
    return f"<p>{escaped(message)}</p>"


def build_page(demo: Demo, title: str) -> gr.Blocks:
    """Build the page; every visitor has a session of the demo."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        visitors = _Visitors(demo)
        gr.HTML(f"<h1>{escaped(title)}</h1>")
        with gr.Row():
            with gr.Column():
                search = gr.Textbox(
                    label="Search titles",
                    info="Type the beginning of a word. Enter adds the first match, a button adds its title.",
                    elem_id="search",
                    max_lines=1,
                    max_length=MAX_TITLE_LENGTH,
                )
                with gr.Column(elem_id="matches"):
                    buttons = [gr.Button(visible=False, size="sm") for _ in range(MATCHES)]
                status = gr.HTML(js_on_load=_LIVE)
            with gr.Column():
                history = gr.HTML(history_html(Session(demo)))
                with gr.Row():
                    remove = gr.Button("Remove the newest title")
                    clear = gr.Button("Start again")
            with gr.Column(visible=demo.takes_new_items):
                new_title = gr.Textbox(
                    label="Title of a new item",
                    info="It gets a place in the models by what its title says. Only you see it.",
                    elem_id="new-title",
                    max_lines=1,
                    max_length=MAX_TITLE_LENGTH,
                )
                add_new = gr.Button("Add the new item")
        answers = gr.HTML(elem_id="answers", apply_default_css=False)

        def changed(visitor: Session, message: str, text: str = ""):
            """The updates after a change of the history, except for the models' answers, which may take seconds."""
            return [text, *offered(visitor, text), history_html(visitor), status_html(message)]

        def offered(visitor: Session, text: str):
            labels = visitor.complete(text)
            hidden = [gr.Button(visible=False)] * (MATCHES - len(labels))
            return [*(gr.Button(value=_ADD + label, visible=True) for label in labels), *hidden]

        def answered(request: gr.Request):
            visitor = visitors.session(request)
            return answers_html(visitor, visitor.answers())

        def completed(text: str, request: gr.Request):
            visitor = visitors.session(request)
            before = len(visitor.offered)
            updates = offered(visitor, text)
            count = len(visitor.offered)
            if not text.strip():  # the text was deleted, or its title has just been added
                return [*updates, status_html("") if before else gr.skip()]
            return [*updates, status_html(f"{count} {'title is' if count == 1 else 'titles are'} offered")]

        def entered(text: str, request: gr.Request):
            visitor = visitors.session(request)
            labels = visitor.complete(text)
            return taken(visitor, labels[0], text) if labels else changed(visitor, f"No title is like {text}", text)

        def pressed(button: str, text: str, request: gr.Request):
            return taken(visitors.session(request), button.removeprefix(_ADD), text)

        def taken(visitor: Session, label: str, text: str):
            if visitor.add(label):
                return changed(visitor, f"Added {label}. The recommendations change.")
            return changed(visitor, "Press again: other titles are offered now.", text)

        def removed(text: str, request: gr.Request):
            visitor = visitors.session(request)
            if not visitor.history:
                return changed(visitor, "The history is empty.", text)
            title = visitor.title(visitor.history.pop())
            return changed(visitor, f"Removed {title}. The recommendations change.", text)

        def cleared(text: str, request: gr.Request):
            visitor = visitors.session(request)
            visitor.history.clear()
            return changed(visitor, "The history is empty now. The recommendations change.", text)

        def added(title: str, request: gr.Request):
            try:
                nearest = visitors.session(request).add_new_item(title)
            except ValueError as error:
                return [title, status_html(f"Not added: {error}")]
            return ["", status_html(f"Added the new item {title}. The most similar titles are {', '.join(nearest)}.")]

        private = {"show_progress": "hidden", "api_visibility": "private"}
        # One event at a time, so that models are timed alone, and no model is asked while items are added to it.
        asks = private | {"concurrency_limit": 1, "concurrency_id": "models"}
        answers_of = (answered, None, answers)
        page.load(js=_ROLES)
        page.load(*answers_of, **asks)
        page.unload(visitors.leave)
        # `change`, since `input` reports pressed keys only, and not pasted, dictated or deleted text.
        search.change(completed, search, [*buttons, status], trigger_mode="always_last", **private)
        outputs = [search, *buttons, history, status]
        events = [(search.submit, entered, search)]
        events += [(button.click, pressed, [button, search]) for button in buttons]
        events += [(remove.click, removed, search), (clear.click, cleared, search)]
        for event, change, inputs in events:
            done = event(change, inputs, outputs, **private)
            if change in (entered, pressed):  # the pressed button has disappeared
                done = done.then(js=_FOCUS_SEARCH)
            done.then(*answers_of, **asks)
        for event in (new_title.submit, add_new.click):
            event(added, new_title, [new_title, status], **asks).then(*answers_of, **asks)
    return page


def serve(page: gr.Blocks, server_name: str | None = None, server_port: int | None = None) -> None:
    """Serve a page until Ctrl-C; it loads nothing from other servers.

    Args:
        page: the page from `build_page`.
        server_name: address to listen on; None means GRADIO_SERVER_NAME if it is set, as on a Space, else 127.0.0.1.
        server_port: port to listen on; None means GRADIO_SERVER_PORT if it is set, else the first free one from 7860.

    Raises:
        OSError: when the port is taken.
    """
    # System fonts, since those of Gradio's themes may come from another server; and hints in black, which read better.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*body_text_color", block_title_text_color="*body_text_color")
    _, address, _ = page.launch(
        server_name=server_name,
        server_port=server_port,
        theme=theme,
        css=CSS,
        share=False,
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"Open {address} in a browser. Ctrl-C ends the demo.", flush=True)
    try:
        while True:
            time.sleep(3600)
    finally:
        page.close(verbose=False)


__all__ = ["build_page", "serve"]
