"""URLs that are not read, that carry secrets, or that lead elsewhere."""

from __future__ import annotations

from typing import Any

from tests.refusals.place import Malformed

SECRET = "sEcReT-0123456789"


def base(url: str, where: str = "") -> Malformed:
    return Malformed(lambda place: place.merge(base=url), where=where)


def output(url: str) -> Malformed:
    return Malformed(lambda place: place.merge(output=url), where="")


def key(where: str, **changes: Any) -> Malformed:
    return Malformed(lambda place: place.merge(**changes), where=where)


def hook(**settings: Any) -> Malformed:
    return Malformed(lambda place: place.attach(publish={"hook": settings}), where="")


CASES: dict[str, Malformed] = {
    "an unknown scheme": base("ftp://host/model"),
    "http for a model": base("https://host/model"),
    "data in the URL": base("data://x"),
    "no bucket": base("s3://"),
    "an empty bucket": base("s3:///model"),
    "two dots": base("s3://bucket/../other"),
    "an empty part": base("s3://bucket//model"),
    "a user and a password": base(f"s3://me:{SECRET}@bucket/model"),
    "options": base(f"s3://bucket/model?token={SECRET}"),
    "a fragment": base("s3://bucket/model#part"),
    "a port": base("s3://bucket:9000/model"),
    "a file of another machine": base("file://host/model"),
    "a relative file": base("file://model"),
    "a file that is not there": base("file:///nowhere/model", where="/nowhere/model"),
    "spaces": base("s3://buck et/model"),
    "a newline": base("s3://bucket/mo\ndel"),
    "a format before an unknown scheme": base("zero:ftp://host/model"),
    "an output of an unknown scheme": output("ftp://host/run"),
    "an output with a password": output(f"s3://me:{SECRET}@bucket/run"),
    "an output with options": output(f"gs://bucket/run?key={SECRET}"),
    "an output on the hub": output("hf://nobody"),
    "a tracker with a password": key(
        "tracking", tracking={"mlflow": f"http://me:{SECRET}@host:5000"}
    ),
    "a tracker with a token": key(
        "tracking", tracking={"mlflow": f"https://host:5000/?access_token={SECRET}"}
    ),
    "a tracker with a token for a user": key(
        "tracking", tracking={"mlflow": f"https://{SECRET}@host:5000"}
    ),
    "a repository that is none": key("repo", push_to_hub={"repo": "../x"}),
    "a repository of another site": key("repo", push_to_hub={"repo": "https://host/x"}),
    "a hook of an unknown scheme": hook(url="ftp://host/hook"),
    "a hook that is a file": hook(url="file:///etc/passwd"),
    "a hook without a host": hook(url="http:///hook"),
    "a hook with a password": hook(url=f"http://me:{SECRET}@host/hook"),
    "a hook with a token": hook(url=f"https://host/hook?token={SECRET}"),
    "a hook with a signature": hook(url=f"https://host/hook?a=1&X-Amz-Signature={SECRET}"),
    "a hook to a cloud's metadata": hook(url="http://169.254.169.254/latest/meta-data/"),
    "a hook to a cloud's metadata, as a number": hook(url="http://2852039166/latest/"),
    "a hook to a cloud's metadata, in octal": hook(url="http://0251.0376.0251.0376/"),
    "a hook to a cloud's metadata, within IPv6": hook(url="http://[::ffff:169.254.169.254]/"),
    "a hook to a link-local address": hook(url="http://[fe80::1]/hook"),
    "a hook to a cloud's metadata, by its name": hook(url="http://metadata.google.internal/x"),
    "a hook to a port beyond all": hook(url="http://host:99999/hook"),
    "a hook to a broken address": hook(url="http://[::1/hook"),
    "a hook with a newline": hook(url="http://host/hook\r\nX: y"),
    "a report at a URL": Malformed(lambda _place: ["report", "s3://bucket/run"], where="s3://"),
    "a report at a URL with a password": Malformed(
        lambda _place: ["report", f"s3://me:{SECRET}@bucket/run"], where="s3://"
    ),
    "an inspection of an unknown scheme": Malformed(
        lambda _place: ["inspect", "ftp://host/model"], where=""
    ),
    "a configuration at a URL": Malformed(
        lambda _place: ["merge", "s3://bucket/merge.yaml"], where=""
    ),
    "a configuration on another machine": Malformed(
        lambda _place: ["merge", "file://host/merge.yaml"], where=""
    ),
}
