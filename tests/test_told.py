"""What people are shown of URIs, records and values."""

from __future__ import annotations

import logging

import pytest

from dit_mlflow import InputError
from dit_mlflow.cli import _print_traceback
from dit_mlflow.errors import cause
from dit_mlflow.told import LONGEST, logger_of, masked, no_formula, text_of, told

SECRET = "S3cr3t"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://me:S3cr3t@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg2://me:S3cr3t@host:5432/db", "postgresql+psycopg2://me:***@host:5432/db"),
        ("mysql+pymysql://me:a@S3cr3t/b?c#d@host/db", "mysql+pymysql://me:***@host/db"),
        ("ftp://:S3cr3t@host/", "ftp://:***@host/"),
        ("https://S3cr3t@host/path", "https://***@host/path"),
        ("postgresql://host/db?user=me&password=S3cr3t", "postgresql://host/db?user=me&password=***"),
        (
            "postgresql://host/db?sslpassword=S3cr3t&sslmode=require",
            "postgresql://host/db?sslpassword=***&sslmode=require",
        ),
        ("https://host/x?token=S3cr3t#part", "https://host/x?token=***#part"),
        ("https://host/x?access_token=S3cr3t", "https://host/x?access_token=***"),
        (
            "s3://b/x?X-Amz-Signature=S3cr3t&X-Amz-Credential=S3cr3t",
            "s3://b/x?X-Amz-Signature=***&X-Amz-Credential=***",
        ),
        ("https://a.blob.core.windows.net/c?sv=1&sig=S3cr3t", "https://a.blob.core.windows.net/c?sv=1&sig=***"),
        ("mssql+pyodbc:///?odbc_connect=DRIVER%3D1%3BPWD%3DS3cr3t", "mssql+pyodbc:///?odbc_connect=***"),
        ("host=h dbname=d PASSWORD=S3cr3t sslmode=on", "host=h dbname=d PASSWORD=*** sslmode=on"),
        ("cannot ask 'postgresql://me:S3cr3t@h/d': no", "cannot ask 'postgresql://me:***@h/d': no"),
        # Nothing to hide.
        ("models:/digits@champion", None),
        ("wasbs://container@account.blob.core.windows.net/x", None),
        ("http://host:5000/#/experiments/1/runs?viewStateShareKey=abc&compareRunsMode=CHART", None),
        ("sqlite:///mlflow.db and me@example.org", None),
    ],
)
def test_passwords_are_masked_everywhere(uri: str, shown: str | None, caplog: pytest.LogCaptureFixture) -> None:
    expected = uri if shown is None else shown
    assert masked(uri) == masked(expected) == expected
    assert str(InputError(uri)) == expected
    logger_of("dit_mlflow.some").warning("at %s", uri)
    assert caplog.records[-1].getMessage() == f"at {expected}"
    assert text_of(uri) == expected
    error = ValueError(uri)
    assert cause(error) is (None if shown else error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("a\nError: b\r\x00\x9b", r"a\nError: b\r\x00\x9b"),
        ("\u202egnp.\u2066x\u2069\u200f", r"\u202egnp.\u2066x\u2069\u200f"),
        ("\u2028\ud83d", r"\u2028\ud83d"),
        ("naïve 数据 👩\u200d🔬 …", "naïve 数据 👩\u200d🔬 …"),
    ],
)
def test_terminals_are_not_obeyed(text: str, shown: str) -> None:
    assert told(text) == told(shown) == shown
    assert str(InputError(text)) == shown
    assert str(InputError(InputError(text).args[0])) == shown


def test_messages_of_megabytes_keep_both_ends() -> None:
    message = str(InputError("the field " + "\x1b" * 3_000_000 + " is wrong; record again"))
    assert len(message) == LONGEST
    assert message.startswith("the field ")
    assert message.endswith(" is wrong; record again")
    assert told(message) == message
    # Nor does a password show where the text is cut.
    assert SECRET not in told("x" * 9_990 + "://me:" + SECRET * 4_000 + "@host")
    assert len(told("://a:" * 600_000)) <= LONGEST


class Mute:
    def __str__(self) -> str:
        raise RuntimeError("no")


def test_values_without_a_text_cost_their_cell() -> None:
    assert text_of(10**5000) == "(int, which cannot be shown: ValueError)"
    assert text_of(Mute()) == "(Mute, which cannot be shown: RuntimeError)"
    assert text_of("x" * 10**6, 100) == "x" * 99 + "…"
    assert text_of(("a", 1)) == "('a', 1)"


def test_texts_that_spreadsheets_would_run_are_marked() -> None:
    for text in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "＝1"):
        assert no_formula(text) == f"'{text}"
    for value in ("a=1", "", "loss", -1.5, 3, None):
        assert no_formula(value) is value


def test_loggers_are_told_once() -> None:
    assert logger_of("dit_mlflow.some") is logger_of("dit_mlflow.some") is logging.getLogger("dit_mlflow.some")
    assert len(logger_of("dit_mlflow.some").filters) == 1


def test_tracebacks_of_the_command_line_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("postgresql+psycopg2://me:S3cr3t@host/db")
    _print_traceback(RuntimeError, error, None)
    assert capsys.readouterr().err == "RuntimeError: postgresql+psycopg2://me:***@host/db\n"
