"""Titles and names come with models from the Hub: terminals, logs and pages show all of their content as text."""

import unicodedata

import pytest

from hf_ilora_cli.shown_text import (
    code_in_markdown,
    in_figure,
    in_markdown,
    shareable,
    shareable_command,
    shareable_values,
    shown,
    shown_lines,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("two\nlines\r\tmore", r"two\nlines\r\tmore"),
        ("left\u202eright\u2066", r"left\u202eright\u2066"),
        ("\x9b2J \x7f \u2028 \u200b \ufeff", r"\x9b2J \x7f \u2028 \u200b \ufeff"),
        ("half \ud83d", r"half \ud83d"),
        ("\U000e0041", r"\U000e0041"),
        ("Amélie 千と千尋 \u00a0\u3000 👩\u200d🚀 क्\u200dष a\\b <i>", None),
    ],
)
def test_control_characters_are_shown_and_all_others_stay(text, expected):
    assert shown(text) == (text if expected is None else expected)


def test_every_control_character_is_shown():
    every = "".join(map(chr, range(0x110000)))
    hidden = {c for c in every if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - set("\u200c\u200d")
    assert not hidden & set(shown(every))
    assert set(every) - hidden == set(shown(every))


def test_lines_and_tabs_of_a_text_of_several_lines_stay():
    assert shown_lines("a\tb\n\x1bc\r\n") == "a\tb\n\\x1bc\\r\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a|b\\|c", r"a\|b\\\|c"),
        ("[here](javascript:x) ![](http://x)", r"\[here\](javascript:x) !\[\](http://x)"),
        ("`code` *stars* ~~gone~~ $x$", r"\`code\` \*stars\* \~\~gone\~\~ \$x\$"),
        ("__main__ _a_ b_c", r"\_\_main\_\_ \_a\_ b_c"),
        ("&lt;b&gt; &#60; Tom & Jerry", "&amp;lt;b&amp;gt; &amp;#60; Tom & Jerry"),
        ("one\ntwo\x1b", r"one\\ntwo\\x1b"),
        ("sasrec_2-a.b, 20%", "sasrec_2-a.b, 20%"),
        (7, "7"),
    ],
)
def test_markdown_shows_text_as_it_is(text, expected):
    assert in_markdown(text) == expected


def test_code_in_markdown_cannot_be_left():
    assert code_in_markdown("user/name") == "`user/name`"
    assert code_in_markdown("a`b``c") == "```a`b``c```"
    assert code_in_markdown("`") == "`` ` ``"
    assert code_in_markdown("a\nb") == r"`a\nb`"


def test_a_figure_draws_dollars():
    assert in_figure("$x$\n") == r"\$x\$\n"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/home/alice/my models/sasrec/", "sasrec"),
        ("--data_dir=/home/alice/data", "--data_dir=data"),
        ("~/data", "data"),
        (r"C:\Users\alice\data", "data"),
        ("file:///home/alice/data", "data"),
        ('{"fsdp": "/home/alice/fsdp.json", "stage": 2}', '{"fsdp": "fsdp.json", "stage": 2}'),
        ("https://alice:secret@example.org/a/b.csv?X-Amz-Signature=1f#2", "https://example.org/a/b.csv"),
        ("/", "PATH"),
        ("outputs/ml-100k/data", "outputs/ml-100k/data"),
        ("ml-100k/sasrec", "ml-100k/sasrec"),
        ("SASRec, p50 / p95, and/or", "SASRec, p50 / p95, and/or"),
        ("--seed", "--seed"),
    ],
)
def test_shared_words_contain_no_absolute_paths(word, expected):
    assert shareable(word) == expected


def test_a_shared_record_keeps_its_form_and_contains_no_absolute_paths():
    record = {"seed": 1, "data": {"/home/alice/data": [None, True, 0.5, "/home/alice/out"]}, "error": "no /home/a/b"}
    assert shareable_values(record) == {"seed": 1, "data": {"data": [None, True, 0.5, "out"]}, "error": "no b"}


def test_a_shared_command_is_one_line_of_a_shell():
    words = ["hf-ilora", "train-sasrec", "--data_dir", "/home/alice/my data", "--run_name", "a\n```\nb"]
    assert shareable_command(words) == r"hf-ilora train-sasrec --data_dir 'my data' --run_name 'a\n```\nb'"
