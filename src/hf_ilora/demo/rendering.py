"""HTML of a demo: every title, name and note is escaped, and no information is conveyed by colour alone."""

import html
from collections.abc import Sequence

from hf_ilora_cli.shown_text import shown

from .answers import Answer, Recommendation
from .sessions import Session

# Gradio's HTML component interprets its content as a JavaScript and a Handlebars template.
_TEMPLATE_CHARACTERS = {ord(character): f"&#{ord(character)};" for character in "${}`\\"}

ABOUT_NUMBERS = (
    "Near: the titles of the history whose item vectors in the model are most like that of the recommended item, with "
    "the cosine of the two vectors; in a model that counts, the weight of the transition. They show what the model "
    "takes to be alike, while its scores depend on the whole history. Times are medians of up to five calls on the "
    "machine that serves this page."
)

CSS = """
.models { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1.5rem; margin: 1rem 0; }
.models section { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 1rem; }
.models h2 { font-size: 1.3rem; font-weight: 600; margin: 0; overflow-wrap: anywhere; }
.models p { margin: 0.25rem 0; }
.models table { border-collapse: collapse; width: 100%; margin-top: 1rem; }
.models caption { text-align: left; font-weight: 600; }
.models th, .models td { text-align: left; vertical-align: top; padding: 0.3rem 0.75rem 0.3rem 0; }
.models th { font-weight: 600; }
.models tbody tr { border-top: 1px solid var(--border-color-primary); }
.models td { overflow-wrap: anywhere; }
.models small { display: block; font-size: 0.8rem; }
.models .bar { display: block; height: 0.5rem; background: currentColor; }
button:focus-visible, input:focus-visible, textarea:focus-visible { outline: 3px solid currentColor !important; }
"""


def escaped(text: object) -> str:
    """A text in one line, escaped for HTML."""
    return html.escape(shown(text)).translate(_TEMPLATE_CHARACTERS)


def history_html(session: Session) -> str:
    """The history of a visitor as a list."""
    if not session.history:
        return "<p>The history is empty.</p>"
    items = "".join(f"<li>{escaped(session.title(item))}{_mark(session, item)}</li>" for item in session.history)
    return f"<p>Your history, the newest title last:</p><ol>{items}</ol>"


def answers_html(session: Session, answers: Sequence[Answer]) -> str:
    """The answers of all models, side by side."""
    sections = []
    for number, (model, answer) in enumerate(zip(session.demo.models, answers, strict=True)):
        parts = [f'<h2 id="model-{number}">{escaped(model.name)}</h2>', f"<p>{escaped(model.kind)}</p>"]
        if answer.milliseconds is not None:
            parts.append(f"<p><strong>{answer.milliseconds:.1f} ms</strong> per answer</p>")
        parts += [f"<p>{escaped(note)}</p>" for note in answer.notes]
        if answer.recommendations:
            parts.append(_table(session, answer))
        if answer.expert_gates:
            parts.append(_gates(answer.expert_gates))
        sections.append(f'<section aria-labelledby="model-{number}">{"".join(parts)}</section>')
    return f'<div class="models">{"".join(sections)}</div><p>{escaped(ABOUT_NUMBERS)}</p>'


def _table(session: Session, answer: Answer) -> str:
    rows = "".join(
        f"<tr><td>{each.rank:,}</td><td>{escaped(session.title(each.item_id))}{_mark(session, each.item_id)}"
        f"{_nearest(session, each, answer.similarity)}</td><td>{100 * each.probability:.2f}%</td></tr>"
        for each in answer.recommendations
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Rank", "Title", "Probability"))
    return f"<table><caption>Recommended next</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _nearest(session: Session, recommendation: Recommendation, similarity: str | None) -> str:
    """The titles of the history that are near a recommendation; empty if the model has no measure of similarity."""
    if similarity is None:
        return ""
    digits = ".2f" if similarity == "cosine" else ".3g"
    named = [f"{escaped(session.title(item))} ({similarity} {near:{digits}})" for item, near in recommendation.nearest]
    return f"<small>near {' and '.join(named)}</small>" if named else "<small>near no title of the history</small>"


def _gates(expert_gates: Sequence[float]) -> str:
    rows = "".join(
        f'<tr><th scope="row">Expert {number}</th><td>{100 * gate:.1f}%'
        f'<span class="bar" aria-hidden="true" style="width: {100 * gate:.1f}%"></span></td></tr>'
        for number, gate in enumerate(expert_gates, start=1)
    )
    head = '<th scope="col">Expert</th><th scope="col">Weight</th>'
    caption = "Weights of the experts for this history"
    return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _mark(session: Session, item_id: int) -> str:
    return " <strong>(new)</strong>" if item_id in session.new_items else ""


__all__ = ["CSS", "answers_html", "escaped", "history_html"]
