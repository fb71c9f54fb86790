"""The page of a demo, made with Gradio, and its server."""

import time

import gradio as gr

from .rendering import CSS, answers_html, escaped, history_html
from .sessions import MATCHES, MAX_TITLE_LENGTH, Demo, Session

# Each visitor who adds items has copies of the models.
_MAX_SESSIONS = 100
_FOCUS_SEARCH = "() => { document.querySelector('#search input, #search textarea').focus() }"
# Gradio has no settings for these. A live region has to be there before its text changes.
_ROLES = """() => {
    const matches = document.getElementById("matches")
    matches.setAttribute("role", "group")
    matches.setAttribute("aria-label", "Matching titles")
    document.getElementById("answers").setAttribute("role", "region")
    document.getElementById("answers").setAttribute("aria-label", "Recommendations")
}"""
_LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite')"
_ADD = "Add "


def said(message: str) -> str:
    """What the live region says."""
    return f"<p>{escaped(message)}</p>"


def build_page(demo: Demo, title: str) -> gr.Blocks:
    """The page; every visitor has a session of the demo."""
    with gr.Blocks(title=title, analytics_enabled=False) as page:
        session = gr.State()
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
                history = gr.HTML()
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
            """All that a change of the history shows, but for the answers of the models, which may take seconds."""
            return [visitor, text, *offered(visitor, text), history_html(visitor), said(message)]

        def offered(visitor: Session, text: str):
            labels = visitor.complete(text)
            hidden = [gr.Button(visible=False)] * (MATCHES - len(labels))
            return [*(gr.Button(value=_ADD + label, visible=True) for label in labels), *hidden]

        def answered(visitor: Session | None):
            visitor = visitor or Session(demo)  # who types before the page is whole has one
            return [visitor, history_html(visitor), answers_html(visitor, visitor.answers())]

        def completed(visitor: Session | None, text: str):
            visitor = visitor or Session(demo)
            before = len(visitor.offered)
            updates = offered(visitor, text)
            count = len(visitor.offered)
            if not text.strip():  # nothing is offered any more, or the title that was typed has been added
                return [visitor, *updates, said("") if before else gr.skip()]
            return [visitor, *updates, said(f"{count} {'title is' if count == 1 else 'titles are'} offered")]

        def entered(visitor: Session | None, text: str):
            visitor = visitor or Session(demo)
            labels = visitor.complete(text)
            return taken(visitor, labels[0], text) if labels else changed(visitor, f"No title is like {text}", text)

        def pressed(visitor: Session | None, button: str, text: str):
            return taken(visitor or Session(demo), button.removeprefix(_ADD), text)

        def taken(visitor: Session, label: str, text: str):
            if visitor.add(label):
                return changed(visitor, f"Added {label}. The recommendations change.")
            return changed(visitor, "Press again: other titles are offered now.", text)

        def removed(visitor: Session | None, text: str):
            visitor = visitor or Session(demo)
            if not visitor.history:
                return changed(visitor, "The history is empty.", text)
            return changed(
                visitor, f"Removed {visitor.title(visitor.history.pop())}. The recommendations change.", text
            )

        def cleared(visitor: Session | None, text: str):
            visitor = visitor or Session(demo)
            visitor.history.clear()
            return changed(visitor, "The history is empty now. The recommendations change.", text)

        def added(visitor: Session | None, title: str):
            visitor = visitor or Session(demo)
            try:
                nearest = visitor.add_new_item(title)
            except ValueError as error:
                return [visitor, title, said(f"Not added: {error}")]
            message = f"Added the new item {title}. The most similar titles are {', '.join(nearest)}."
            return [visitor, "", said(message)]

        private = {"show_progress": "hidden", "api_visibility": "private"}
        # One at a time: models are timed alone, and nobody asks a model that grows.
        asks = private | {"concurrency_limit": 1, "concurrency_id": "models"}
        answers_of = (answered, session, [session, history, answers])
        page.load(*answers_of, **asks).then(js=_ROLES)
        outputs = [session, *buttons, status]
        # `input` is about pressed keys alone: not about what is pasted, spoken or deleted.
        search.change(completed, [session, search], outputs, trigger_mode="always_last", **private)
        outputs = [session, search, *buttons, history, status]
        events = [(search.submit, entered, [session, search])]
        events += [(button.click, pressed, [session, button, search]) for button in buttons]
        events += [(remove.click, removed, [session, search]), (clear.click, cleared, [session, search])]
        for event, change, inputs in events:
            focus = None if change in (removed, cleared) else _FOCUS_SEARCH  # the button that was pressed may be gone
            event(change, inputs, outputs, **private).then(js=focus).then(*answers_of, **asks)
        for event in (new_title.submit, add_new.click):
            event(added, [session, new_title], [session, new_title, status], **asks).then(*answers_of, **asks)
    return page


def serve(page: gr.Blocks, server_name: str | None = None, server_port: int | None = None) -> None:
    """Serve a page until Ctrl-C; nothing that it shows comes from elsewhere.

    Args:
        page: what `build_page` returned.
        server_name: address to listen on; None: GRADIO_SERVER_NAME if it is set, as on a Space, else 127.0.0.1.
        server_port: None: GRADIO_SERVER_PORT if it is set, else the first free one from 7860 on.

    Raises:
        OSError: when the port is taken.
    """
    # The fonts of the machine: those of Gradio's themes may come from another one. Its hints are hard to read in grey.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*body_text_color", block_label_text_color="*body_text_color")
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
        state_session_capacity=_MAX_SESSIONS,
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
