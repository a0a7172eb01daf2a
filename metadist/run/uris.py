"""URIs on the command line and of folders: no secrets in them, and one name for one folder."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

LOCAL = ("file", "local")
NAMED_USERS = (
    *("sftp", "ssh", "ftp", "ftps", "hdfs", "webhdfs", "smb"),
    *("abfs", "abfss", "wasb", "wasbs", "adl", "az"),
)
"""Schemes in which what stands before @ may be a plain name: of a user or of a container."""
SECRET_WORDS = re.compile(
    r"passw|passphrase|pwd|secret|token(?!iz|s)|credential|signature|authorization|bearer"
    r"|(access|account|api|shared|private|storage)key|xamz|xgoog"
)
SECRET_NAMES = ("auth", "code", "jwt", "key", "pass", "pw", "sas", "sig")
NEXT_IN_CHAIN = re.compile(r"::(?=[a-z][\w+.-]*(?:://|::|$))", re.IGNORECASE)
URI = re.compile(r"([a-z][\w+.-]+):/+(.*)", re.IGNORECASE | re.DOTALL)


def check_no_secret(uri: str, field: str = "a URI", is_folder: bool = True) -> None:
    """Raise ValueError if a URI holds a secret, since it is stored, printed and sent as it is.

    Args:
        uri: The URI, with others before or behind it if they are chained by `::`; a path holds
            none.
        field: Its name for the error, which does not contain the secret.
        is_folder: Whether it names a folder, which has no query: any is refused.
    """
    for part in NEXT_IN_CHAIN.split(uri):
        found = URI.search(part)
        if found is None:
            continue
        scheme, rest = found[1].lower(), found[2]
        for text in (rest, unquote(rest)):
            if what := _secret_in(scheme, text, is_folder):
                raise ValueError(
                    f"{field} must not hold a password, a token, a key or a query, which would be "
                    f"stored and printed with it, got {what} in {scheme}://...: give it in the "
                    "environment or in fsspec's configuration"
                )


def check_no_secrets(texts: list[str]) -> None:
    """Raise ValueError if arguments of a command hold a URI with a secret, wherever it stands."""
    field = ""
    for text in texts:
        if text.startswith("-"):
            field = text.partition("=")[0].lstrip("-")
        # A password may contain anything, so that also the whole argument is one.
        for part in (text, *re.split(r"[\s\"',]+", text)):
            check_no_secret(part, field or "a URI", is_folder=False)


def _secret_in(scheme: str, rest: str, is_folder: bool) -> str:
    """What a URI holds that is a secret, in words; empty if nothing."""
    if scheme not in LOCAL:
        before, at, _ = rest.rpartition("@")
        user, of_host, _ = re.split(r"[/?#]", rest)[0].rpartition("@")
        if ":" in before:
            return "text with : before @ (a password)"
        if of_host and (scheme not in NAMED_USERS or _looks_random(user)):
            return "text before @ (a token)"
        if at and is_folder and scheme in ("http", "https"):
            return "an @"
        if is_folder and ("?" in rest or ("#" in rest and "=" in rest.partition("#")[2])):
            return "a query"
    for separator, name in re.findall(r"([?&;#/])([^?&;#/=]+)=", rest):
        plain = re.sub(r"[^a-z]", "", name.lower())
        if SECRET_WORDS.search(plain) or (separator != "/" and plain in SECRET_NAMES):
            return "a parameter of a name such as password, token, key or signature"
    return ""


def _looks_random(user: str) -> bool:
    return len(user) >= 20 and bool(re.search(r"\d", user) and re.search("[A-Za-z]", user))


def tidy(path: str) -> str:
    """A path or URI without the parts that name no other folder: `.`, a slash more, `file://`."""
    scheme, separator, rest = path.rpartition("://")
    if scheme.lower() in LOCAL:
        scheme, separator = "", ""
    parts = [part for part in rest.split("/") if part not in ("", ".")]
    start = "/" if rest.startswith("/") and not separator else ""
    return f"{scheme.lower()}{separator}{start}{'/'.join(parts)}" or os.curdir
