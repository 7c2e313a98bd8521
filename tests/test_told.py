"""What people are shown of URIs, records and values."""

from __future__ import annotations

import logging
import os
import time

import pytest
from click.testing import CliRunner

from dit_mlflow import InputError
from dit_mlflow.cli import _print_traceback, cli
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
        # As drivers take them, though a URI should not hold them so.
        ("postgresql://me:a S3cr3t@host/db", "postgresql://me:***@host/db"),
        ("no 'mysql://me:a\"S3cr3t@h/d': no", "no 'mysql://me:***@h/d': no"),
        ("postgresql://me@server:S3cr3t@host/db", "postgresql://me@server:***@host/db"),
        ("https://S3cr3t:x-oauth-basic@host/path", "https://***@host/path"),
        ("git+https://S3cr3t:@host/path", "git+https://***@host/path"),
        # Within another URI, in JSON, with names percent-encoded, behind a fragment.
        ("http://h/x?uri=sftp%3A%2F%2Fme%3AS3cr3t%40host&b=1", "http://h/x?uri=sftp%3A%2F%2Fme%3A***%40host&b=1"),
        ('{"url": "ftp:\\/\\/me:S3cr3t@host"}', '{"url": "ftp:\\/\\/me:***@host"}'),
        ("https://host/x?pass%77ord=S3cr3t", "https://host/x?pass%77ord=***"),
        ("https://host/x#access_token=S3cr3t", "https://host/x#access_token=***"),
        # Connection strings.
        ("host=h password='a S3cr3t' sslmode=on", "host=h password='***' sslmode=on"),
        ("dsn='host=h password = S3cr3t'", "dsn='host=h password = ***'"),
        ("DRIVER={ODBC}; UID=sa; PWD={a;S3cr3t}; X=1", "DRIVER={ODBC}; UID=sa; PWD=***; X=1"),
        ("AccountName=x;AccountKey=S3cr3t==;End=y", "AccountName=x;AccountKey=***;End=y"),
        ("AccountKey=S3cr3t==", "AccountKey=***"),
        ("MLFLOW_TRACKING_TOKEN=S3cr3t", "MLFLOW_TRACKING_TOKEN=***"),
        ("AWS_SECRET_ACCESS_KEY=S3cr3t", "AWS_SECRET_ACCESS_KEY=***"),
        ("built with {'db_password': 'S3cr3t', 'n': 3}", "built with {'db_password': '***', 'n': 3}"),
        ("Authorization: Bearer S3cr3t", "Authorization: Bearer ***"),
        ("X-Api-Key: S3cr3t", "X-Api-Key: ***"),
        ("HF_TOKEN=S3cr3t", "HF_TOKEN=***"),
        ("at //me:S3cr3t@host/x, and '//me:S3cr3t@h'", "at //me:***@host/x, and '//me:***@h'"),
        ('{"password": "a\\"S3cr3t"}', '{"password": "***"}'),
        ("built with {'secret': 0.125}, f(pwd=S3cr3t, n=3)", "built with {'secret': ***}, f(pwd=***, n=3)"),
        ("password=None-S3cr3t", "password=***"),
        ("host=h dbname=d PASSWORD=S3cr3t sslmode=on", "host=h dbname=d PASSWORD=*** sslmode=on"),
        ("cannot ask 'postgresql://me:S3cr3t@h/d': no", "cannot ask 'postgresql://me:***@h/d': no"),
        # Nothing to hide.
        ("models:/digits@champion", None),
        ("wasbs://container@account.blob.core.windows.net/x", None),
        ("http://host:5000/#/experiments/1/runs?viewStateShareKey=abc&compareRunsMode=CHART", None),
        ("sqlite:///mlflow.db and me@example.org", None),
        ("http://host:5000/#/exp, http://host:5000: write to 'me@example.org'", None),
        ("s3://bucket: denied to me@example.org", None),
        ("hdfs://node:8020/data@v2 and http://host:5000/a/b@c", None),
        ("f(password=None, secret=False), {'token_dim': 64, 'pwd_size': 3, 'secret': null}", None),
        ("PAD_TOKEN='<pad>', git@github.com:org/repo.git, /home/a:b@c/run, https://www.npmjs.com/@types/node", None),
        ("n_tokens=5, pad_token='x', key=3, {'token': 7}", None),
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


@pytest.mark.parametrize(
    "part",
    [
        "://a:",
        "https://",
        "?password",
        "password",
        "pwd={",
        "password='",
        "a=",
        "'a':",
        "a=%3A%2F%2F",
        "://a:b ",
        "? ",
        "pwd=)",
        ")",
        "//a:",
    ],
)
def test_the_time_to_mask_grows_with_the_length_alone(part: str) -> None:
    """Also of what is not cut before: errors of libraries, tracebacks."""
    begun = time.perf_counter()
    masked("?" + part * (200_000 // len(part)))
    assert time.perf_counter() - begun < 2


def test_passwords_are_masked_before_texts_are_cut() -> None:
    """A token of a thousand characters."""
    uri = f"https://me:{SECRET * 200}@host"
    assert text_of(uri, 50) == "https://me:***@host"
    assert text_of(f"sftp://me:{SECRET * 200}@host", 50) == "sftp://me:***@host"


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


@pytest.mark.parametrize("scheme", ["ftp", "odd+driver", "databricks", "https"])
def test_the_ui_does_not_tell_where_it_cannot_go(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://me:{SECRET}@host/x")
    monkeypatch.setattr(os, "execve", lambda *arguments: pytest.fail("handed over to MLflow"))
    said = CliRunner().invoke(cli, ["ui"])
    assert said.exit_code == 1
    assert f"{scheme}://me:***@host/x" in said.stderr


def test_tracebacks_of_the_command_line_are_masked(capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("postgresql+psycopg2://me:S3cr3t@host/db")
    _print_traceback(RuntimeError, error, None)
    assert capsys.readouterr().err == "RuntimeError: postgresql+psycopg2://me:***@host/db\n"


def test_tracebacks_of_the_command_line_are_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    _print_traceback(KeyError, KeyError("\x1b[2J\u202e"), None)
    _print_traceback(ValueError, ValueError("\x1b]0;evil\x07" + "line\n" * 10**5), None)
    shown = capsys.readouterr().err
    assert r"ValueError: \x1b]0;evil\x07line" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)
    assert len(shown) < 10_000
