"""Text from elsewhere on its way to people: passwords masked, escapes shown as text, and short enough to read.

Errors, logs, tags and the terminal show what records, stores and libraries say. All of it passes here.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from urllib.parse import unquote

LONGEST = 4000
"""Most characters of a message; a longer one loses its middle."""

_KEPT_END = 900
_KEPT_LINES = 200
EXAMINED = 10_000
"""Characters at either end of a text that are looked at; what is between is never shown."""

_UNQUOTED = r"""[^\s'"<>]"""
_USER = r"""[^\s:/?#'"<>]*"""
_PASSWORD_STARTS = re.compile(rf"(?:(?<![^'\"(=,])|:)\\?/\\?/{_USER}:(?!\d{{1,5}}/)")
"""Where one may start; a port, and the path behind it, is none."""
_ENCODED_STARTS = re.compile(rf"%3A%2F%2F(?:(?!%3A|%2F|%40){_UNQUOTED})*%3A", re.IGNORECASE)
_ENCODED_END = re.compile("%40", re.IGNORECASE)
_WORDS = re.compile(f"{_UNQUOTED}+")
_SPACED = re.compile(rf"""(:\\?/\\?/{_USER}:)(?!\d{{1,5}}(?:[^\w%@]|$))(?!\*\*\*@)[^\s/@][^@\n]{{0,200}}@""")
"""A password with spaces or quotes, which some drivers take as they are; a port, and what follows it, is none."""
_TOKENS = re.compile(r"""\b((?:https?|git):\\?/\\?/)[^\s:/?#@'"<>]+(?::(?:x-oauth-basic)?)?@""", re.IGNORECASE)

_KEYS = r"(?:api|access|auth|account|private|shared|secret|security|session)[_-]?key"
_IN_URI = re.compile(
    rf"password|passwd|pwd|passphrase|passcode|token|secret|signature|credential|odbc_connect|{_KEYS}"
    r"|^(?:pass|sig|key|auth|jwt|bearer|sas)$",
    re.IGNORECASE,
)
"""Names of values in the query of a URI, or in a connection string, that are secret."""
_ANYWHERE = re.compile(
    rf"(?:password|passwd|pwd|passphrase|secret|(?:access|api|auth|bearer|refresh|security|session|tracking)[_-]?token|{_KEYS})$"
    r"|(?-i:^(?!(?:PAD|[BE]OS|UNK|SEP|CLS|MASK)_)[A-Z0-9_]+_TOKEN$)",
    re.IGNORECASE,
)
"""Names, such as those of environment variables, that are secret wherever they stand."""
_NAMES = re.compile(r"""(?P<before>[?&;#]\s?|["']|(?<![\w.%-]))(?P<name>[\w.%-]+)(?P<is>=|\s=\s|["']\s?:\s?)""")
_VALUE = re.compile(
    r"""'(?:[^'\\\n]|\\.){1,999}'|"(?:[^"\\\n]|\\.){1,999}"|\{[^}\n]{1,999}\}"""
    r"""|(?!(?:None|null|True|False|true|false)(?:[,;&)\]}\s]|$))(?:(?![,)\]}]{1,9}(?:\s|$))(?:[^&;#\s'"<>]|['"](?=[\w%])))+"""
)
"""A value; not that there is none, nor what ends the list or the call that it stands in."""
_HEADERS = re.compile(r"((?:authorization\W{1,5}(?:bearer|basic|token)\s|api-key['\"]?:)\s*)[\w.~+/=-]+", re.IGNORECASE)

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control characters and line breaks, marks that are not seen or turn text, half pairs."""


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""How a formula begins, also in full width, which some spreadsheets take too."""

_JOINERS = {"\u200c", "\u200d"}
"""Of those categories, but emoji and several scripts are written with them."""


def masked(text: str) -> str:
    """``text`` with ``***`` for passwords and tokens in its URIs, connection strings, and variables called so.

    ``user:…@``, ``?password=…``, ``&sslpassword=…``, ``PWD=…;``, ``MLFLOW_TRACKING_TOKEN=…``, ``{'password': '…'}``.

    Cost: linear in the length, whatever the text.
    """
    if "@" in text or "%40" in text:
        text = _WORDS.sub(_without_password, _TOKENS.sub(r"\1***@", text))
        text = _SPACED.sub(r"\1***@", text)
    return _HEADERS.sub(r"\1***", _without_values(text))


def _without_password(found: re.Match[str]) -> str:
    """Without what stands between the first ``://user:`` and the last ``@``, once as it is, once percent-encoded."""
    word = found[0]
    end = word.rfind("@")
    if start := _PASSWORD_STARTS.search(word, 0, max(end, 0)):
        word = f"{word[: start.end()]}***{word[end:]}"
    ends = [at.start() for at in _ENCODED_END.finditer(word)]
    if ends and (start := _ENCODED_STARTS.search(word, 0, ends[-1])):
        word = f"{word[: start.end()]}***{word[ends[-1] :]}"
    return word


def _without_values(text: str) -> str:
    parts, done, at = [], 0, 0
    while found := _NAMES.search(text, at):
        at = found.end()
        in_uri = found["before"].strip() in {"?", "&", ";", "#"}
        if not (_IN_URI if in_uri else _ANYWHERE).search(unquote(found["name"])):
            continue
        if value := _VALUE.match(text, at):
            quote = value[0][0].strip("{")
            parts.append(f"{text[done:at]}{quote}***{quote}" if quote in {"'", '"'} else f"{text[done:at]}***")
            done = at = value.end()
    return "".join([*parts, text[done:]])


def told(text: str, longest: int = LONGEST) -> str:
    """``text`` as one line that a terminal shows and does not obey: masked, shortened in the middle, escaped.

    Told again, it stays as it is.
    """
    if len(text) > 2 * EXAMINED:
        # A mark that itself stays, wherever the text is cut again.
        text = f"{text[:EXAMINED]}…{text[-EXAMINED:]}"
    shown = "".join(_shown(character) for character in masked(text))
    if len(shown) <= longest:
        return shown
    end = min(_KEPT_END, longest // 4)
    return f"{shown[: longest - end - 3]} … {shown[-end:]}"


def text_of(value: object, longest: int = LONGEST) -> str:
    """``str(value)``, masked and cut, or why it has none: an integer of 5,000 digits, a ``__str__`` that raises."""
    try:
        text = str(value)
    except Exception as error:  # Any kind: it is the user's method.
        return f"({type(value).__name__}, which cannot be shown: {type(error).__name__})"
    # Masked before it is cut: half a password is not recognised.
    text = masked(text[: 2 * max(longest, EXAMINED)])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def told_lines(text: str) -> str:
    """``text`` of several lines, each :func:`told`; of very many, the middle ones are left out."""
    lines = text.split("\n")
    if len(lines) > 2 * _KEPT_LINES:
        lines = [*lines[:_KEPT_LINES], "…", *lines[-_KEPT_LINES:]]
    return "\n".join(map(told, lines))


def encodable(text: str, longest: int | None = None) -> str:
    """``text`` without halves of surrogate pairs, which UTF-8 cannot hold; if cut, with an ellipsis."""
    kept = text if longest is None or len(text) <= longest else text[: longest - 1] + "…"
    return kept.encode("utf-8", "replace").decode()


def no_formula(value: object) -> object:
    """A cell of a CSV file: text that spreadsheets take for a formula is told by an apostrophe; the rest stays."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def logger_of(module: str) -> logging.Logger:
    """The logger of a module, whose messages are :func:`told`."""
    logger = logging.getLogger(module)
    if _tell not in logger.filters:
        logger.addFilter(_tell)
    return logger


def _tell(record: logging.LogRecord) -> bool:
    try:
        message = record.getMessage()
    except Exception:  # Any kind: an argument's own. Logging reports it, and nobody's work ends for a message.
        return True
    if (shown := told(message)) != message:
        record.msg, record.args = shown, None
    return True


def _shown(character: str) -> str:
    if character in _JOINERS or unicodedata.category(character) not in _ESCAPED:
        return character
    return character.encode("unicode_escape").decode()
