"""The text of the demo: a fixed slice of the standard library's help topics.

It differs a little between Python versions, so its hash goes with every figure.
"""

from __future__ import annotations

import hashlib

TOPICS = ("class", "function", "assignment", "exceptions", "numeric-types", "naming", "try", "import")
WINDOWS = 8
WINDOW_TOKENS = 512
PROMPT = "Explain in one sentence what a computer is."


def read_text() -> tuple[str, str]:
    """The text, and its sha256. Raises RuntimeError where Python was built without the topics."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise RuntimeError("this Python lacks pydoc_data.topics, the text that perplexity is measured on") from None
    text = "\n\n".join(topics[name] for name in TOPICS)
    return text, hashlib.sha256(text.encode()).hexdigest()
