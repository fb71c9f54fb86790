"""The title rule of MovieLens and iLoRA: moves the year to its own column and an English article to the front."""

import pyarrow as pa
import pyarrow.compute as pc

# "Toy Story (1995)", "Fawlty Towers (1975-1979)", "Diplomatic Immunity (2009– )", "Return to Oz (1995) (V)": a span
# of years counts as its first year, and IMDb's marks for video, television and game are removed with the year.
_YEAR = (
    r"(?s)^(?P<title>.*\S)\s*\((?P<year>(?:18|19|20)\d\d)(?:\s*[-\x{2013}]\s*(?:\d{4})?\s*)?\)"
    r"(?:\s*\((?:V|TV|VG)\))?$"
)
# The name may contain closed parentheses; second names may follow in parentheses at the end.
_ARTICLE = r"(?s)^((?:[^()]|\([^()]*\))+?), (The|An|A)((?: \(.+\))?)$"
_ARTICLE_IN_PARENTHESES = r"\((a\.k\.a\. )?([^()]+), (The|An|A)\)"


def split_titles(titles: pa.Array | pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Separate the year from titles, and move an English article to the front of its name.

    "Usual Suspects, The (1995)" becomes ("The Usual Suspects", 1995); second names in parentheses follow the same
    rule: "Horseman on the Roof, The (Hussard sur le toit, Le) (1995)" becomes "The Horseman on the Roof (Hussard sur
    le toit, Le)". Articles of other languages (Le, La, Les, Il, El, Der, Das...) stay where they are.

    The reference program removes every ", The" (or else every ", A") from a title, and its last seven characters. It
    turns "American in Paris, An (1951)" into "A American in Parisn" and "unknown" into "". This function moves only an
    article at the end of a name, and removes only a year.

    Args:
        titles: text, (num_items,).

    Returns:
        titles: string, (num_items,), without white space around them. A title that is only a year stays.
        years: int32, (num_items,), null if a title does not end in a year.

    Source: iLoRA's preparation of MovieLens (title rule).
    """
    titles = pc.utf8_trim_whitespace(pa.chunked_array(titles if isinstance(titles, pa.ChunkedArray) else [titles]))
    parts = pc.extract_regex(titles, _YEAR)  # struct (title, year), null without a year
    years = pc.struct_field(parts, "year").cast(pa.int32())
    names = pc.coalesce(pc.struct_field(parts, "title"), titles)
    names = pc.replace_substring_regex(names, _ARTICLE, r"\2 \1\3")
    return pc.replace_substring_regex(names, _ARTICLE_IN_PARENTHESES, r"(\1\3 \2)"), years
