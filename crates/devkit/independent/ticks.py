"""Finds the times of cron expressions, with a library that shares nothing with this project.

Each line of standard input is a JSON object

    {"cron": "…", "timezone": "…", "after": <Unix seconds>, "until": <Unix seconds>}

and each line of standard output the ticks later than "after" and no later than "until":

    {"tz_version": "2026e", "ticks": [<Unix seconds>, …]}

The packages of requirements.txt must be on PYTHONPATH, and PYTHONTZPATH empty.
"""

import json
import sys
from datetime import datetime
from zoneinfo import ZoneInfo

import tzdata
from cronsim import CronSim


def ticks(cron, timezone, after, until):
    found = []
    for tick in CronSim(cron, datetime.fromtimestamp(after, ZoneInfo(timezone))):
        second = int(tick.timestamp())
        if second > until:
            return found
        found.append(second)
    return found


for line in sys.stdin:
    print(json.dumps({"tz_version": tzdata.IANA_VERSION, "ticks": ticks(**json.loads(line))}))
