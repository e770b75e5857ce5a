"""Summaries: Reddit TL;DR in the forms in which it is published, and CNN/DailyMail."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megatron_gil.data.prepare.sources.example import Example, Origin, Tally, as_pair, as_response, texts_of

_MARK = "TL;DR:"
_SUBREDDIT = re.compile(r"\ASUBREDDIT:[ ]*(?:r/)?(\S+)")
_REFERENCE_FIELDS = ("reference_responses", "label", "completion", "summary")
_PAIR_FIELDS = ("postprocessed_response", "chosen", "rejected")
_BETTER_AND_WORSE = {
    "ours": ("postprocessed_response", "reference_responses"),
    "reference": ("reference_responses", "postprocessed_response"),
}


def read_tldr(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """A post with one summary, or with two and a verdict. The group is the subreddit.

    Forms: {"query", "reference_responses", "postprocessed_response", "preferred"}; {"prompt", "label" or
    "completion"}; {"prompt", "chosen", "rejected"}; {"subreddit", "title", "post", "summary"}; and OpenAI's
    comparisons {"info": {"subreddit", "title", "post"}, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}.
    """
    post = _post_of(row)
    if post is None:
        return tally.drop("no post")
    if not post.endswith(_MARK):
        tally.note(f"prompt without {_MARK} at its end got one")
        post = f"{post}\n\n{_MARK}"
    summaries = _summaries_of(row, tally)
    chosen, rejected = _pair_of(row, summaries, tally)
    references = [summaries[name] for name in _REFERENCE_FIELDS if name in summaries]
    completion = references[0] if references else chosen
    if completion is None:
        tally.drop("no summary", "demonstrations")
    subreddit = _SUBREDDIT.match(post)
    group = subreddit.group(1) if subreddit else None
    return Example(prompt=post, completion=completion, chosen=chosen, rejected=rejected, group=group)


def read_cnndm(row: Mapping[str, Any], origin: Origin, tally: Tally) -> Example | None:
    """{"article", "highlights"}: the highlights, one a line, become one paragraph."""
    texts = texts_of(row, "article", "highlights")
    if texts is None or not texts[0].strip():
        return tally.drop("no article and highlights")
    article, highlights = texts[0].strip(), texts[1].strip()
    if "\n" in highlights:
        tally.note("highlights on several lines joined to one paragraph")
    if not highlights:
        tally.drop("no summary", "demonstrations")
    completion = as_response(" ".join(highlights.split()), tally)
    return Example(prompt=f"Article: {article}\n\n{_MARK}", completion=completion)


def _post_of(row: Mapping[str, Any]) -> str | None:
    info = row["info"] if isinstance(row.get("info"), Mapping) else row
    parts = texts_of(info, "subreddit", "title", "post")
    if parts is not None:
        subreddit, title, post = (part.strip() for part in parts)
        return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\n{_MARK}" if post else None
    query = next((row[name] for name in ("query", "prompt") if isinstance(row.get(name), str)), "")
    return query.strip() or None


def _summaries_of(row: Mapping[str, Any], tally: Tally) -> dict[str, str | None]:
    """The summaries of the row by field, None for an empty one; OpenAI's two as chosen and rejected."""
    listed, choice = row.get("summaries"), row.get("choice")
    if isinstance(listed, list) and len(listed) == 2 and choice in (0, 1) and all(isinstance(s, dict) for s in listed):
        row = {"chosen": listed[int(choice)].get("text"), "rejected": listed[1 - int(choice)].get("text")}
    texts = {name: row.get(name) for name in (*_REFERENCE_FIELDS, *_PAIR_FIELDS)}
    return {name: as_response(_without_mark(text), tally) for name, text in texts.items() if isinstance(text, str)}


def _pair_of(
    row: Mapping[str, Any], summaries: Mapping[str, str | None], tally: Tally
) -> tuple[str, str] | tuple[None, None]:
    """(chosen, rejected) where the row holds a verdict."""
    better, worse = _BETTER_AND_WORSE.get(str(row.get("preferred")), ("chosen", "rejected"))
    if better in summaries and worse in summaries:
        return as_pair(summaries[better], summaries[worse], tally)
    tally.drop("no verdict on two summaries", "preferences")
    return None, None


def _without_mark(text: str) -> str:
    bare = text.lstrip()
    return bare.removeprefix(_MARK) if bare.startswith(_MARK) else text
