"""Text from elsewhere on its way to people: passwords masked, escapes shown as text, and short enough to read.

Errors, logs, tags and the terminal show what records, stores and libraries say. All of it passes here.
"""

from __future__ import annotations

import logging
import re
import unicodedata

LONGEST = 4000
"""Most characters of a message; a longer one loses its middle."""

_KEPT_END = 900
_EXAMINED = 10_000
"""Characters at either end of a text that are looked at; what is between is never shown."""

_PASSWORDS = re.compile(r"""(://[^\s:/?#@'"<>]*:)[^\s'"<>]*@""")
_TOKENS = re.compile(r"""\b((?:https?|git)://)[^\s:/?#@'"<>]+@""", re.IGNORECASE)
_SECRET = (
    r"[\w.-]*(?:password|passwd|pwd|passphrase|token|secret|signature|credential|odbc_connect"
    r"|(?:api|access|auth|account|private|shared|secret)[_-]?key)[\w.-]*|pass|sig|key"
)
_VALUES = re.compile(rf"""([?&;](?:{_SECRET})=|\b(?:ssl)?passw(?:or)?d=)[^&;#\s'"<>]+""", re.IGNORECASE)

_ESCAPED = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories: control characters and line breaks, marks that are not seen or turn text, half pairs."""


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""How a formula begins, also in full width, which some spreadsheets take too."""

_JOINERS = {"\u200c", "\u200d"}
"""Of those categories, but emoji and several scripts are written with them."""


def masked(text: str) -> str:
    """``text`` with ``***`` for passwords and tokens in its URIs: ``user:…@``, ``?password=…``, ``&sslpassword=…``."""
    return _VALUES.sub(r"\1***", _TOKENS.sub(r"\1***@", _PASSWORDS.sub(r"\1***@", text)))


def told(text: str, longest: int = LONGEST) -> str:
    """``text`` as one line that a terminal shows and does not obey: masked, shortened in the middle, escaped.

    Told again, it stays as it is.
    """
    if len(text) > 2 * _EXAMINED:
        # A mark that itself stays, wherever the text is cut again.
        text = f"{text[:_EXAMINED]}…{text[-_EXAMINED:]}"
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
    text = masked(text if len(text) <= 2 * longest else text[: 2 * longest])
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


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
