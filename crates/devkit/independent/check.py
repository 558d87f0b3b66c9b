"""Reads requests as a subscriber would, with libraries that share nothing with this project.

Each line of standard input is a JSON object

    {"secret": "whsec_…" or null, "headers": {…}, "body_base64": "…", "mode": "structured" | "binary" | "batch"}

and each line of standard output the verdict on it:

    {"signature": "valid" | "unchecked" | "<why not>", "events": [{attributes…, "data": …}], "error": null | "<why>"}

Payloads that are bytes are under "data_base64"; an event without a payload has neither (nor has one
whose payload is null: the library does not tell them apart). The signature's timestamp is compared
with the clock, so requests must be recent. The library reads signed bodies as UTF-8 only.

The packages of requirements.txt must be on PYTHONPATH.
"""

import base64
import json
import sys

from cloudevents.core.bindings import http
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from standardwebhooks.webhooks import Webhook


def signature(request, body):
    if request["secret"] is None:
        return "unchecked"
    try:
        Webhook(request["secret"]).verify(body, request["headers"], json_parse=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "valid"


def parse(mode, headers, body):
    if mode == "binary":
        return [http.from_binary(http.HTTPMessage(headers, body), JSONFormat(), CloudEvent)]
    expected = {"structured": "application/cloudevents+json", "batch": "application/cloudevents-batch+json"}[mode]
    content_type = {name.lower(): value for name, value in headers.items()}["content-type"]
    if content_type.split(";")[0].strip() != expected:
        raise ValueError(f"the content type is {content_type}")
    # The library has no batched mode: a batch is an array of events in the JSON format.
    bodies = [body] if mode == "structured" else [json.dumps(item).encode() for item in json.loads(body)]
    return [http.from_structured(http.HTTPMessage(headers, item), JSONFormat(), CloudEvent) for item in bodies]


def describe(event):
    result = dict(event.get_attributes())
    if "time" in result:
        result["time"] = result["time"].isoformat()
    data = event.get_data()
    if isinstance(data, bytes):
        result["data_base64"] = base64.b64encode(data).decode()
    elif data is not None:
        result["data"] = data
    return result


def check(request):
    body = base64.b64decode(request["body_base64"])
    verdict = {"signature": signature(request, body), "events": [], "error": None}
    try:
        verdict["events"] = [describe(event) for event in parse(request["mode"], request["headers"], body)]
    except Exception as error:
        verdict["error"] = f"{type(error).__name__}: {error}"
    return verdict


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(check(json.loads(line))), flush=True)
